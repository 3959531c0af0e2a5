"""Fixtures that several files share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from domains import Web
    from libvirtd import Libvirt


@pytest.fixture(scope="module")
def daemon() -> "Iterator[Libvirt]":
    """A libvirtd."""
    from libvirtd import libvirtd

    with libvirtd() as daemon:
        yield daemon


@pytest.fixture
def web(daemon: "Libvirt") -> "Iterator[Web]":
    """A domain with two disks."""
    from domains import two_disks

    with two_disks(daemon) as web:
        yield web
