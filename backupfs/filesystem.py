"""What is read of a guest's file system: one interface, whatever reads it.

Everything that comes out of a file system was written by a guest: a name is bytes without NUL and `/`, never `.` or
`..`; a number is what the disk says, bounded only where this file says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from backupfs.errors import BackupfsError
from backupfs.extents import Extent

LARGEST_XATTR, LONGEST_XATTR = 64 << 10, 255
"""Bytes of an extended attribute and of its name, as in Linux."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What an inode says of itself.

    Args:
        inode: its number, as the file system counts; below 2**64.
        mode: type and permissions, as in st_mode; 0 in a listing: `stat` says why it can't be read.
        nlink: names it has.
        uid, gid: owner.
        size: bytes; of a symbolic link those of its target.
        allocated: bytes that are stored for it, for st_blocks.
        atime_ns, mtime_ns, ctime_ns: times in ns since 1970; negative before it.
        rdev: of a device, its number; else 0.
        has_xattrs: False: it is known to have no extended attributes. Saves who lists a folder a question a name.
    """

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    allocated: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    has_xattrs: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder, and what it stands for."""

    name: bytes
    stat: Stat


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a file's content.

    Args:
        length: bytes.
        offset: where they lie on the volume, as they are; None: nowhere, they are zeroes.
    """

    length: int
    offset: int | None


class FileSystem(Protocol):
    """A guest's file system, read-only. Calls may block and come from several threads.

    All raise GuestError (backupfs/errors.py) where the file system is damaged, or what reads it died or took too long;
    NotFound where there is no such inode.

    Attributes:
        kind: `ext4`, `ntfs`, `xfs`, …, for people.
        root: the inode of its first folder.
        notes: what somebody has to know who reads it, a sentence each: a journal that was not replayed.
    """

    kind: str
    root: int
    notes: tuple[str, ...]

    def stat(self, inode: int) -> Stat:
        """Return what an inode says of itself."""

    def list(self, inode: int) -> list[Entry]:
        """Return what is in a folder, without `.` and `..`, each name once, with the `Stat` of each.

        The `mode` of what can't be read itself is 0: the others can be had.
        """

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Return a range of a file, short only at its end."""

    def runs(self, inode: int) -> Sequence[Run] | None:
        """Return where a file's content lies on the volume, one run behind the other; None: not there as it is."""

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        """Yield what is data (flag False) and what are holes (flag True), covering the range."""

    def readlink(self, inode: int) -> bytes:
        """Return the target of a symbolic link, as it is."""

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """Return extended attributes, full names; POSIX ACLs as system.posix_acl_access and _default, as Linux does."""

    def left_out(self, inode: int) -> Sequence[bytes]:
        """Return the names of alternate streams that `xattrs` does not have: too large for one, or too long a name."""

    def close(self) -> None:
        """Let it go."""


def listed(system: FileSystem, inode: int) -> Stat:
    """Return what is listed of an inode: its `stat`, or if it can't be read nothing but its number."""
    try:
        return system.stat(inode)
    except BackupfsError:
        return unreadable(inode)


def unreadable(inode: int) -> Stat:
    """Return what is listed of an inode that can't be read."""
    return Stat(inode, 0, 1, 0, 0, 0, 0, 0, 0, 0)


def printable(name: bytes) -> str:
    """Return a guest's name for a terminal: what is not printable is written as an escape."""
    return shown(name.decode(errors="backslashreplace"))


def shown(text: str) -> str:
    """Return words that may come from a guest for a terminal, as `printable`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
