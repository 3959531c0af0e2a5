"""Whether an XFS' inode has extended attributes: room for some is not yet one."""

from types import SimpleNamespace
from typing import Any

import pytest

from backupfs.guest.xfs_attributes import may_have
from backupfs.guest.xfs_disk import BTREE, EXTENTS, LOCAL


@pytest.mark.parametrize(
    ("form", "fork", "extents", "expected"),
    [
        (EXTENTS, b"", 0, False),
        (EXTENTS, bytes(40), 0, False),
        (EXTENTS, bytes(40), 1, True),
        (BTREE, bytes(40), 9, True),
        (LOCAL, b"\0\4\0\0", 0, False),
        (LOCAL, b"\0\x0c\1\0", 0, True),
        (LOCAL, b"", 0, False),
    ],
)
def test_whether_there_may_be_some(form: int, fork: bytes, extents: int, expected: bool) -> None:
    inode: Any = SimpleNamespace(attribute_form=form, attributes=fork, attribute_extents=extents)
    assert may_have(inode) is expected
