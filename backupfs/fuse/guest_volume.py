"""A guest's file system, open: what it says is checked, and what it said last is remembered. From any thread.

Nothing that a FileSystem says is believed because it says so: names and numbers that can't be shown are refused here.
"""

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from backupfs.errors import BackupfsError, NotFound
from backupfs.extents import Extent
from backupfs.filesystem import FileSystem, Run, Stat
from backupfs.fuse.catalogue import ManyFiles
from backupfs.fuse.guest_xattrs import GuestXattrs, Xattrs
from backupfs.fuse.read_ahead import ReadAhead, is_small
from backupfs.image import Buffer, Image, seek

T = TypeVar("T")

_REMEMBERED = 50_000  # names in folders, and the inodes; about 500 bytes each
_LONGEST_NAME = 1024  # FUSE_NAME_MAX
_LONGEST_TARGET = 4095  # PATH_MAX
_TYPES = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
_NO_USER, _NOBODY = 2**32 - 1, 65534
_LAST_NS = 2**62  # of a time; the years 1823 to 2116


class Unsound(BackupfsError):
    """A file system says of something what can't be."""


@dataclass(slots=True)
class Volume:
    """A file system and what is remembered of it.

    Args:
        fs: closed by who opened it.
        image: returns what lies at a place of the volume; to be closed.
        has_labels: whether its files may have SELinux labels.
    """

    fs: ManyFiles
    image: Callable[[Sequence[Run]], Image]
    has_labels: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _folders: dict[int, Mapping[bytes, Stat]] = field(default_factory=dict)
    _names: int = 0  # in _folders
    _stats: OrderedDict[int, Stat] = field(default_factory=OrderedDict)
    _parents: OrderedDict[int, int] = field(default_factory=OrderedDict)  # of folders
    ahead: ReadAhead = field(init=False)
    _xattrs: GuestXattrs = field(init=False)

    def __post_init__(self) -> None:
        self.ahead = ReadAhead(self.fs.contents)
        no_label = errno.ENODATA if self.has_labels else errno.EOPNOTSUPP
        self._xattrs = GuestXattrs(self.fs.xattrs, self.fs.xattrs_of, no_label)

    def stat(self, inode: int) -> Stat:
        """Return what an inode says of itself. Raises BackupfsError."""
        known = self._stats.get(inode)
        if known is None:
            known = sound(self.fs.stat(inode))
            with self._lock:
                _remember(self._stats, inode, known, _REMEMBERED)
        return known

    def folder(self, inode: int) -> Mapping[bytes, Stat]:
        """Return what is in a folder. Not every `Stat` need be sound. Raises BackupfsError."""
        known = self._folders.get(inode)
        if known is not None:
            return known
        found: dict[bytes, Stat] = {}
        for entry in self.fs.list(inode):
            name = entry.name
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > _LONGEST_NAME:
                raise Unsound(f"folder {inode} holds a name that is none: {name[:100]!r}")
            found[name] = entry.stat
        with self._lock:
            self._remember_folder(inode, found)
        self.ahead.note(found)
        self._xattrs.note(found)
        return found

    def _remember_folder(self, inode: int, found: Mapping[bytes, Stat]) -> None:
        if inode not in self._folders:
            self._folders[inode] = found
            self._names += len(found)
        while self._names > _REMEMBERED and len(self._folders) > 1:
            oldest = next(iter(self._folders))
            self._names -= len(self._folders.pop(oldest))
        most = max(_REMEMBERED, len(found))  # what a folder holds takes no more room here: the folder is remembered
        for inside in found.values():
            if stat.S_ISDIR(inside.mode):
                _remember(self._parents, inside.inode, inode, most)
            if is_sound(inside):
                _remember(self._stats, inside.inode, _clamped(inside), most)

    def parent(self, folder: int) -> int:
        """Return the folder that a folder is in. Raises NotFound if that is forgotten."""
        try:
            return self._parents[folder]
        except KeyError:
            raise NotFound(f"nobody remembers where folder {folder} is") from None

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Return a range of a file, short only at its end. Raises BackupfsError."""
        content = self.fs.read(inode, offset, length)
        if len(content) != length:
            # The kernel fills a short answer up with zeroes.
            expected = max(0, min(length, self.stat(inode).size - offset))
            if len(content) != expected:
                raise Unsound(f"inode {inode}: {len(content)} bytes instead of {expected} at {offset}")
        return content

    def small(self, inode: int) -> bytes | None:
        """Return a small file's content, None: it is not small. Raises BackupfsError."""
        found = self.stat(inode)
        if not is_small(found):
            return None
        content = self.ahead.take(inode)
        if content is None:
            content = self.ahead.read(inode)
        return self.read(inode, 0, found.size) if content is None else content

    def runs(self, inode: int) -> Sequence[Run] | None:
        """Return where a file's content lies on the volume; None: not there as it is. Raises BackupfsError."""
        runs = self.fs.runs(inode)
        size = self.stat(inode).size
        if runs is not None and sum(run.length for run in runs) != size:
            raise Unsound(f"inode {inode}: {size} bytes, and as many as lie on the disk are others")
        return runs

    def seek(self, inode: int, offset: int, whence: int) -> int:
        """Return where data or a hole begins; see `image.seek`."""
        return seek(_Content(self.fs, inode, self.stat(inode).size), offset, whence)

    def target(self, inode: int) -> bytes:
        """Return what a symbolic link points to. Raises BackupfsError."""
        target = self.fs.readlink(inode)
        if not 0 < len(target) <= _LONGEST_TARGET or b"\0" in target:
            raise Unsound(f"inode {inode}: a symbolic link to nothing that can be: {target[:100]!r}")
        return target

    def xattrs(self, inode: int) -> Xattrs:
        """Return extended attributes. Raises BackupfsError."""
        return self.xattrs_at_hand(inode) or self._xattrs.read(inode)

    def xattrs_at_hand(self, inode: int) -> Xattrs | None:
        """Return extended attributes if they are known. Does not block."""
        known = self._stats.get(inode)
        if known is not None and not known.has_xattrs:
            return self._xattrs.none
        return self._xattrs.at_hand(inode)


@dataclass(slots=True)
class _Content:
    """A file as an Image, for `seek`, which asks for nothing but its extents."""

    fs: FileSystem
    inode: int
    size: int

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self.fs.extents(self.inode, offset, length)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def close(self) -> None:
        pass


def is_sound(found: Stat) -> bool:
    """Whether an inode can be shown."""
    return (
        stat.S_IFMT(found.mode) in _TYPES
        and 0 <= found.inode < 2**64
        and 0 <= found.mode < 2**16
        and 0 <= found.size < 2**63
        and 0 <= found.allocated < 2**63
        and all(0 <= number < 2**32 for number in (found.nlink, found.uid, found.gid, found.rdev))
    )


def sound(found: Stat) -> Stat:
    """Return what an inode says as it can be shown. Raises Unsound."""
    if not is_sound(found):
        raise Unsound(f"inode {found.inode} says what can't be: {found}")
    return _clamped(found)


def _clamped(found: Stat) -> Stat:
    if _NO_USER in (found.uid, found.gid):
        # Nobody may be that, so nobody, root neither, could pass by the modes of what is his. Linux' overflowuid.
        uid, gid = (_NOBODY if number == _NO_USER else number for number in (found.uid, found.gid))
        found = replace(found, uid=uid, gid=gid)
    times = found.atime_ns, found.mtime_ns, found.ctime_ns
    if all(-_LAST_NS <= time <= _LAST_NS for time in times):
        return found
    atime, mtime, ctime = (max(-(10**9) * 2**33, min(time, 10**9 * 2**35)) for time in times)
    return replace(found, atime_ns=atime, mtime_ns=mtime, ctime_ns=ctime)


def _remember(kept: OrderedDict[int, T], key: int, value: T, most: int) -> None:
    """Remember something; the oldest goes. To find that in a dict takes long: it passes by all that went before."""
    if len(kept) >= most:
        kept.popitem(last=False)
    kept[key] = value
