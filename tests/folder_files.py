"""A folder of this host behind the interface of a guest's file system."""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backupfs.errors import NotFound
from backupfs.extents import Extent
from backupfs.filesystem import Entry, Run, Stat
from backupfs.image import Image


class FolderFiles:
    """A folder's files. Inodes are those of the host."""

    kind = "ext4"

    def __init__(self, root: Path, *notes: str) -> None:
        self.notes = notes
        self.root = root.stat().st_ino
        self.closed = False
        self.asked: list[str] = []
        self._paths = {self.root: bytes(root)}
        self._lock = threading.Lock()

    def _path(self, inode: int) -> bytes:
        try:
            return self._paths[inode]
        except KeyError:
            raise NotFound(f"no inode {inode}") from None

    def stat(self, inode: int) -> Stat:
        s = os.lstat(self._path(inode))
        times = s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns
        return Stat(
            inode, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, s.st_blocks * 512, *times, rdev=s.st_rdev
        )

    def list(self, inode: int) -> list[Entry]:
        self.asked.append("list")
        found = []
        for name in os.listdir(self._path(inode)):
            path = os.path.join(self._path(inode), name)
            with self._lock:
                self._paths[os.lstat(path).st_ino] = path
            found.append(Entry(name, self.stat(os.lstat(path).st_ino)))
        return found

    def read(self, inode: int, offset: int, length: int) -> bytes:
        with open(self._path(inode), "rb") as file:
            return os.pread(file.fileno(), length, offset)

    def contents(self, inodes: Sequence[int], largest: int) -> Sequence[bytes | None]:
        self.asked.append("contents")
        return [self.read(inode, 0, largest) if self.stat(inode).size <= largest else None for inode in inodes]

    def runs(self, inode: int) -> Sequence[Run] | None:
        self._path(inode)
        return None

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        with open(self._path(inode), "rb") as file:
            end, hole = offset + length, False
            while offset < end:
                try:
                    until = min(end, os.lseek(file.fileno(), offset, os.SEEK_DATA if hole else os.SEEK_HOLE))
                except OSError as e:
                    if e.errno != errno.ENXIO:
                        raise
                    until = end
                if until > offset:
                    yield Extent(offset, until - offset, hole)
                offset, hole = until, not hole

    def readlink(self, inode: int) -> bytes:
        return os.readlink(self._path(inode))

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        path = self._path(inode)
        if stat.S_ISLNK(os.lstat(path).st_mode):
            return {}
        return {name.encode(): os.getxattr(path, name) for name in os.listxattr(path)}

    def xattrs_of(self, inodes: Sequence[int]) -> Sequence[dict[bytes, bytes] | None]:
        self.asked.append("xattrs_of")
        return [self.xattrs(inode) for inode in inodes]

    def left_out(self, inode: int) -> Sequence[bytes]:
        return ()

    def close(self) -> None:
        self.closed = True


@dataclass
class FolderVolume:
    """A volume with such files, or with a problem."""

    fs: FolderFiles | None
    problem: str | None = None
    kind: str | None = "ext4"
    opened: int = field(default=0)

    def open(self) -> FolderFiles:
        assert self.fs is not None
        self.opened += 1
        return self.fs

    def file(self, runs: Sequence[Run]) -> Image:
        raise AssertionError(f"there are no runs, {runs} neither")
