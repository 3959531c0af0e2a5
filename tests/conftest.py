"""Fixtures that several files share."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import namespaces
import pytest

if TYPE_CHECKING:
    from domains import Web
    from libvirtd import Libvirt


_keepers = []


def pytest_configure(config: pytest.Config) -> None:
    """Once, before there are workers."""
    if not hasattr(config, "workerinput") and (keeper := namespaces.keep()):
        _keepers.append(keeper)


def pytest_unconfigure() -> None:
    while _keepers:
        keeper = _keepers.pop()
        keeper.kill()
        keeper.wait()


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


@pytest.fixture
def no_image_stays(tmp_path: Path) -> Iterator[None]:
    """Remove the images: pytest would keep them all, and they are hundreds of megabytes each."""
    yield
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
