"""btrfs, read by ourselves: the library there is checks no checksums, and takes what lies nowhere for zeroes.

In the process that may do next to nothing (child.py), as the parsers in C are. The top level is shown, with subvolumes
and snapshots as folders where they lie. An inode is shown under a number made of its subvolume's and its own.
"""

import functools
import os
import stat as st
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from backupfs.errors import GuestError, NotFound
from backupfs.extents import Extent, coalesce
from backupfs.filesystem import Entry, Run, Stat, listed
from backupfs.guest.btrfs_data import NONE, decompress
from backupfs.guest.btrfs_disk import CHECKSUM_TREE, FS_TREE, ROOT_ITEM, ROOT_TREE, Disk
from backupfs.image import Image

_INODE_ITEM, _XATTR_ITEM, _DIR_INDEX, _EXTENT_DATA, _EXTENT_CSUM, _ROOT_REF = 1, 24, 96, 108, 128, 156
_FIRST_INODE, _CSUMS = 256, 2**64 - 10
_NO_CHECKSUMS = 0x1
_INLINE, _REGULAR, _PREALLOCATED = range(3)
_TREE_SHIFT = 40
_EMPTY = 2  # what stands for a subvolume that a snapshot has not got. Source: BTRFS_EMPTY_SUBVOL_DIR_OBJECTID
_MOST_ENTRIES, _MOST_EXTENTS = 1_000_000, 1_000_000
_LONGEST_LINK = 4096
_NOTE = "its log was not replayed: what was written last and flushed (fsync) within the last half minute may be missing"
_INODE = struct.Struct("<16xQQ8xIIIIQQ")  # size, nbytes, nlink, uid, gid, mode, rdev, flags


class _Piece(NamedTuple):
    """A part of a file that is no hole."""

    offset: int
    length: int
    content: bytes | None  # of an inline one
    compression: int
    at: int  # of the extent, logical
    stored: int  # bytes of it
    skipped: int  # of what it holds, before this part
    size: int  # of what it holds


class BtrfsFileSystem:
    """A FileSystem (filesystem.py) on a volume.

    Raises:
        GuestError: it can't be opened.
    """

    kind = "btrfs"

    def __init__(self, volume: Image) -> None:
        self._disk = Disk(volume)
        self.root = _FIRST_INODE
        self.notes: tuple[str, ...] = (_NOTE,) if self._disk.log else ()
        self._inode = functools.lru_cache(4096)(self._read_inode)
        self._pieces = functools.lru_cache(8)(self._read_pieces)
        self._decoded = functools.lru_cache(16)(self._decode)
        self.stat(self.root)

    def stat(self, inode: int) -> Stat:
        tree, number = _split(inode)
        if number == _EMPTY:
            first = self.stat(_joined(tree, _FIRST_INODE))
            return replace(first, inode=inode, mode=st.S_IFDIR | 0o755, nlink=1, uid=0, gid=0, size=0, has_xattrs=False)
        item = self._inode(tree, number)
        size, stored, nlink, uid, gid, mode, rdev, _ = _INODE.unpack_from(item)
        atime, ctime, mtime = (_time(item, at) for at in (112, 124, 136))
        is_device = st.S_ISCHR(mode) or st.S_ISBLK(mode)
        has_xattrs = next(self._disk.items(tree, number, _XATTR_ITEM), None) is not None
        return Stat(
            inode=inode,
            mode=mode,
            nlink=nlink,
            uid=uid,
            gid=gid,
            size=size,
            allocated=-(-stored // self._disk.sector) * self._disk.sector,
            atime_ns=atime,
            mtime_ns=mtime,
            ctime_ns=ctime,
            rdev=os.makedev(rdev >> 20, rdev & 0xFFFFF) if is_device else 0,
            has_xattrs=has_xattrs,
        )

    def list(self, inode: int) -> list[Entry]:
        return [*self.entries(inode)]

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns."""
        tree, number = _split(inode)
        if number == _EMPTY:
            return
        if not st.S_ISDIR(self.stat(inode).mode):
            raise GuestError(f"inode {inode} is no folder")
        found = set[bytes]()
        for _, item in self._disk.items(tree, number, _DIR_INDEX):
            for (child, kind, _), name, _ in _named(item):
                if name in found or not name or b"/" in name or b"\0" in name:
                    raise GuestError(f"folder {inode} is damaged: it has the name {name!r}")
                inside = _joined(tree, child)
                if kind == ROOT_ITEM:
                    inside = self._subvolume(tree, child, number, name)
                elif kind != _INODE_ITEM:
                    raise GuestError(f"folder {inode} is damaged")
                found.add(name)
                if len(found) > _MOST_ENTRIES:
                    raise GuestError(f"the folder has more than {_MOST_ENTRIES:,} entries")
                yield Entry(name, listed(self, inside))

    def _subvolume(self, tree: int, child: int, folder: int, name: bytes) -> int:
        """Return the first folder of a subvolume. A snapshot of what it lies in has its name, but an empty folder."""
        for offset, item in self._disk.items(ROOT_TREE, tree, _ROOT_REF, child):
            if offset == child and struct.unpack_from("<Q", item)[0] == folder and item[18:] == name:
                return _joined(child, _FIRST_INODE)
            break
        return _joined(tree, _EMPTY)

    def read(self, inode: int, offset: int, length: int) -> bytes:
        item = self._file(inode)
        size = _INODE.unpack_from(item)[0]
        parts, end = [], min(offset + length, size)
        for begin, count, piece in self._cover(inode, offset, end):
            parts.append(bytes(count) if piece is None else self._content(item, piece, begin - piece.offset, count))
        return b"".join(parts)

    def runs(self, inode: int) -> Sequence[Run] | None:
        item = self._file(inode)
        size, *_, flags = _INODE.unpack_from(item)
        if not flags & _NO_CHECKSUMS:
            return None  # they would not be checked
        found = []
        for begin, count, piece in self._cover(inode, 0, size):
            if piece is None:
                found.append(Run(count, None))
            elif piece.content is None and not piece.compression:
                place = self._disk.places(piece.at + piece.skipped + begin - piece.offset, count)[0]
                found.append(Run(count, place))
            else:
                return None
        return found

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        size = _INODE.unpack_from(self._file(inode))[0]
        end, behind = offset + length, max(offset, min(offset + length, size))
        found = [Extent(begin, count, piece is None) for begin, count, piece in self._cover(inode, offset, behind)]
        return coalesce([*found, *([Extent(behind, end - behind, True)] if behind < end else [])])

    def readlink(self, inode: int) -> bytes:
        found = self.stat(inode)
        if not st.S_ISLNK(found.mode):
            raise GuestError(f"inode {inode} is no symbolic link")
        pieces = self._pieces(inode)
        target = pieces[0].content if len(pieces) == 1 else None
        if target is None or not 0 < found.size <= _LONGEST_LINK or len(target) < found.size:
            raise GuestError(f"inode {inode} is damaged")
        return target[: found.size]

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        tree, number = _split(inode)
        items = self._disk.items(tree, number, _XATTR_ITEM) if number != _EMPTY else ()
        return {name: value for _, item in items for _, name, value in _named(item)}

    def left_out(self, inode: int) -> Sequence[bytes]:
        return ()

    def close(self) -> None:
        for kept in (self._inode, self._pieces, self._decoded):
            kept.cache_clear()

    # Files.

    def _read_inode(self, tree: int, number: int) -> bytes:
        for offset, item in self._disk.items(tree, number, _INODE_ITEM):
            if offset == 0 and len(item) >= 160:
                return item
        raise NotFound(f"there is no inode {number} in subvolume {tree}")

    def _file(self, inode: int) -> bytes:
        tree, number = _split(inode)
        item = self._inode(tree, number) if number != _EMPTY else bytes(160)
        if not st.S_ISREG(_INODE.unpack_from(item)[5]):
            raise GuestError(f"inode {inode} is no file")
        return item

    def _read_pieces(self, inode: int) -> Sequence[_Piece]:
        found: list[_Piece] = []
        for offset, item in self._disk.items(*_split(inode), _EXTENT_DATA):
            _, size, compression, encryption, encoding, kind = struct.unpack_from("<QQBBHB", item)
            if encryption or encoding:
                raise GuestError(f"inode {inode} is encrypted or encoded")
            if found and offset < found[-1].offset + found[-1].length:
                raise GuestError(f"inode {inode} is damaged: its extents lie over each other")
            if kind == _INLINE:
                content = item[21:]
                if compression != NONE:
                    content = decompress(content, compression, size, self._disk.sector)
                found.append(_Piece(offset, len(content), content, NONE, 0, 0, 0, 0))
            elif kind in (_REGULAR, _PREALLOCATED):
                at, stored, skipped, length = struct.unpack_from("<QQQQ", item, 21)
                if at and compression == NONE:
                    # `size` says nothing then: Linux before 6.11 left too small ones. Source: fs/btrfs/file-item.c
                    size = stored
                if not length or (at and skipped + length > size):
                    raise GuestError(f"inode {inode} is damaged: an extent makes no sense")
                if kind == _REGULAR and at:
                    found.append(_Piece(offset, length, None, compression, at, stored, skipped, size))
            else:
                raise GuestError(f"inode {inode} is damaged: an extent of type {kind}")
            if len(found) > _MOST_EXTENTS:
                raise GuestError(f"inode {inode} lies in too many pieces")
        return found

    def _cover(self, inode: int, offset: int, end: int) -> Iterator[tuple[int, int, _Piece | None]]:
        """Cover a range: where each part begins, its length, and the piece that it is in; None: a hole."""
        pieces = self._pieces(inode)
        first = max(bisect_right(pieces, offset, key=lambda piece: piece.offset) - 1, 0)
        for piece in pieces[first:] if offset < end else ():
            if piece.offset >= end:
                break
            if piece.offset > offset:
                yield offset, piece.offset - offset, None
                offset = piece.offset
            until = min(piece.offset + piece.length, end)
            if until > offset:
                yield offset, until - offset, piece
                offset = until
        if offset < end:
            yield offset, end - offset, None

    def _content(self, item: bytes, piece: _Piece, begin: int, count: int) -> bytes:
        if piece.content is not None:
            return piece.content[begin : begin + count]
        checked = not _INODE.unpack_from(item)[7] & _NO_CHECKSUMS
        begin += piece.skipped
        if piece.compression:
            return self._decoded(piece.at, piece.stored, piece.compression, piece.size, checked)[begin : begin + count]
        first = begin // self._disk.sector * self._disk.sector
        last = min(-(-(begin + count) // self._disk.sector) * self._disk.sector, piece.stored)
        return self._stored(piece.at + first, last - first, checked)[begin - first : begin - first + count]

    def _decode(self, at: int, stored: int, compression: int, size: int, checked: bool) -> bytes:
        if stored > 1 << 20:
            raise GuestError(f"a compressed extent of {stored} bytes")
        return decompress(self._stored(at, stored, checked), compression, size, self._disk.sector)

    def _stored(self, logical: int, length: int, checked: bool) -> bytes:
        """Return what is stored in whole sectors, as the checksums say."""
        sums = self._sums(logical, length) if checked else b""
        size, sector = self._disk.checksum_size, self._disk.sector

        def is_right(data: bytes) -> bool:
            found = (self._disk.checksum(data[at : at + sector]) for at in range(0, length, sector))
            return not checked or b"".join(found) == sums

        assert not checked or len(sums) == length // sector * size
        return self._disk.read_logical(logical, length, is_right, f"the data at {logical:#x}")

    def _sums(self, logical: int, length: int) -> bytes:
        """Return the checksums of sectors."""
        size, sector = self._disk.checksum_size, self._disk.sector
        root = self._disk.root(CHECKSUM_TREE)
        before = self._disk.before(root, (_CSUMS, _EXTENT_CSUM, logical))
        first = before[2] if before and before[:2] == (_CSUMS, _EXTENT_CSUM) else logical
        parts, position, end = [], logical, logical + length
        for begin, sums in self._disk.items(CHECKSUM_TREE, _CSUMS, _EXTENT_CSUM, first):
            covered = begin + len(sums) // size * sector
            if begin > position or position >= end:
                break
            if covered > position:
                until = min(covered, end)
                parts.append(sums[(position - begin) // sector * size : (until - begin) // sector * size])
                position = until
        if position < end:
            raise GuestError(f"the data at {position:#x} has no checksum")
        return b"".join(parts)


def _joined(tree: int, number: int) -> int:
    if tree >> 22 or number >> _TREE_SHIFT:
        raise GuestError(f"inode {number} of subvolume {tree} has too large a number")
    return number if tree == FS_TREE else tree << _TREE_SHIFT | number


def _split(inode: int) -> tuple[int, int]:
    if not 0 <= inode < 1 << 62:
        raise NotFound(f"there is no inode {inode}")
    return inode >> _TREE_SHIFT or FS_TREE, inode & ((1 << _TREE_SHIFT) - 1)


def _named(item: bytes) -> Iterator[tuple[tuple[int, int, int], bytes, bytes]]:
    """Yield what stands in an item of a folder or of extended attributes: a key, a name, a value."""
    position = 0
    while position < len(item):
        number, kind, offset, _, size, length, _ = struct.unpack_from("<QBQQHHB", item, position)
        begin = position + 30
        position = begin + length + size
        if position > len(item):
            raise GuestError("a name is damaged")
        yield (number, kind, offset), item[begin : begin + length], item[begin + length : position]


def _time(item: bytes, at: int) -> int:
    seconds, ns = struct.unpack_from("<qI", item, at)
    return int(seconds) * 10**9 + min(int(ns), 10**9 - 1)
