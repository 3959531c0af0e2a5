"""XFS, read by ourselves: what libraries there are lose nanoseconds, names that are not UTF-8, and fragmented files.

In the process that may do next to nothing (child.py), as the parsers in C are.
"""

import functools
import stat as st
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NoReturn

from backupfs.errors import GuestError
from backupfs.extents import Extent, coalesce
from backupfs.filesystem import Entry, Run, Stat, listed
from backupfs.guest import xfs_attributes, xfs_folder, xfs_replay
from backupfs.guest.xfs_disk import DEVICE, LOCAL, REMOTE, Inode, Mapped
from backupfs.image import Image

_MOST_ENTRIES = 1_000_000  # in a folder
_LONGEST_LINK = 1024
_MOST_RUNS = 100_000
_KERNEL = "The kernel replays it when DISK.rw is mounted (backupfs mount --scratch)"
_NOTE = "its log was not replayed: what was written last is missing, and what the log changes can't be read. " + _KERNEL
_BEGUN = "what its log began to change and did not end was not replayed, and can't be read: inodes {}. " + _KERNEL
_NAMED = 20  # inodes


class XfsFileSystem:
    """A FileSystem (filesystem.py) on a volume.

    Raises:
        GuestError: it can't be opened.
    """

    kind = "xfs"

    def __init__(self, volume: Image) -> None:
        self._disk, self._replayed, self._pending = xfs_replay.replayed(volume)
        self.root = self._disk.root
        self._mapped = functools.lru_cache(8)(self._disk.mapped)
        self._disk.stale = self._pending.sectors
        self.stat(self.root)
        self.notes: tuple[str, ...] = ()
        if self._replayed and self._pending.inodes:
            self.notes = (_BEGUN.format(", ".join(map(str, sorted(self._pending.inodes)[:_NAMED]))),)
        elif not self._pending.is_empty:
            self.notes = (_NOTE,)

    def stat(self, inode: int) -> Stat:
        if self._replayed:
            self._refuse_pending(inode)  # also of what is half of something
        found = self._disk.inode(inode)
        is_device = st.S_ISCHR(found.mode) or st.S_ISBLK(found.mode)
        if is_device and (found.form != DEVICE or len(found.data) < 4):
            self._damaged(inode)
        return Stat(
            inode=inode,
            mode=found.mode,
            nlink=found.nlink,
            uid=found.uid,
            gid=found.gid,
            size=found.size,
            allocated=found.blocks * self._disk.block,
            atime_ns=found.atime_ns,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
            rdev=found.rdev if is_device else 0,
            has_xattrs=xfs_attributes.may_have(found),
        )

    def list(self, inode: int) -> list[Entry]:
        return [*self.entries(inode)]

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns."""
        self._refuse_pending(inode)
        folder = self._disk.inode(inode)
        if not st.S_ISDIR(folder.mode):
            raise GuestError(f"inode {inode} is no folder")
        found = set[bytes]()
        for name, number in xfs_folder.entries(self._disk, folder):
            if name in found or not name or b"/" in name or b"\0" in name:
                raise GuestError(f"folder {inode} is damaged: it has the name {name!r}")
            found.add(name)
            if len(found) > _MOST_ENTRIES:
                raise GuestError(f"the folder has more than {_MOST_ENTRIES:,} entries")
            yield Entry(name, listed(self, number))

    def read(self, inode: int, offset: int, length: int) -> bytes:
        found = self._file(inode)
        end = min(offset + length, found.size)
        parts = []
        for extent, at in self._pieces(found, offset, end):
            parts.append(self._disk.read(at, extent.length) if at is not None else bytes(extent.length))
        return b"".join(parts)

    def runs(self, inode: int) -> Sequence[Run] | None:
        found = self._file(inode)
        pieces = [Run(extent.length, at) for extent, at in self._pieces(found, 0, found.size)]
        if self._replayed and any(p.offset is not None and self._replayed.differs(p.offset, p.length) for p in pieces):
            return None
        return pieces if len(pieces) <= _MOST_RUNS else None

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        found, end = self._file(inode), offset + length
        pieces = [extent for extent, _ in self._pieces(found, offset, min(end, found.size))]
        behind = max(offset, min(end, found.size))
        return coalesce([*pieces, *([Extent(behind, end - behind, True)] if behind < end else [])])

    def readlink(self, inode: int) -> bytes:
        self._refuse_pending(inode)
        found = self._disk.inode(inode)
        if not st.S_ISLNK(found.mode):
            raise GuestError(f"inode {inode} is no symbolic link")
        if not 0 < found.size <= _LONGEST_LINK:
            self._damaged(inode)
        target = found.data[: found.size] if found.form == LOCAL else self._remote_link(found)
        if len(target) != found.size:
            self._damaged(inode)
        return target

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        self._refuse_pending(inode)
        return xfs_attributes.attributes(self._disk, self._disk.inode(inode))

    def left_out(self, inode: int) -> Sequence[bytes]:
        return ()

    def close(self) -> None:
        self._disk.inode.cache_clear()
        self._mapped.cache_clear()

    def _damaged(self, inode: int) -> NoReturn:
        raise GuestError(f"inode {inode} is damaged")

    def _refuse_pending(self, inode: int) -> None:
        if self._pending.all or inode in self._pending.inodes:
            raise xfs_replay.refuse(f"inode {inode}")

    def _file(self, inode: int) -> Inode:
        self._refuse_pending(inode)
        found = self._disk.inode(inode)
        if not st.S_ISREG(found.mode):
            raise GuestError(f"inode {inode} is no file")
        return found

    def _pieces(self, file: Inode, offset: int, end: int) -> Iterator[tuple[Extent, int | None]]:
        """Cover a range with what is data, each with its place on the volume, and with holes."""
        pieces = self._mapped(file)
        first = bisect_right(pieces, offset, key=attrgetter("offset")) - 1
        for piece in pieces[max(first, 0) :] if offset < end else ():
            if piece.offset + piece.length <= offset:
                continue
            if piece.offset >= end:
                break
            if piece.offset > offset:
                yield Extent(offset, piece.offset - offset, True), None
                offset = piece.offset
            until = min(piece.offset + piece.length, end)
            at = None if piece.unwritten else piece.at + offset - piece.offset
            yield Extent(offset, until - offset, piece.unwritten), at
            offset = until
        if offset < end:
            yield Extent(offset, end - offset, True), None

    def _remote_link(self, link: Inode) -> bytes:
        """Return a target that has blocks of its own; of version 5 each piece of them has a header."""
        target, header = b"", 56 if self._disk.version == 5 else 0
        pieces: Sequence[Mapped] = self._mapped(link)
        for piece in pieces:
            if len(target) >= link.size or piece.unwritten or piece.length > 1 << 20:
                self._damaged(link.number)
            block = self._disk.read(piece.at, piece.length)
            wanted = min(link.size - len(target), piece.length - header)
            if header:
                self._disk.check(block, piece.at, link.number, REMOTE, b"XSLM")
                if struct.unpack_from(">II", block, 4) != (len(target), wanted):
                    self._damaged(link.number)
            target += block[header : header + wanted]
        return target
