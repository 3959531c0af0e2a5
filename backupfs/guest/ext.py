"""ext2, ext3 and ext4, read by our own code: every checksum that there is, is checked, as Linux does.

One thread, in a process of its own (child.py).
"""

import itertools
import stat as st
from collections.abc import Iterator, MutableSequence, Sequence

from backupfs.errors import GuestError, NotFound
from backupfs.extents import Extent, coalesce
from backupfs.filesystem import Entry, Run, Stat, listed
from backupfs.guest import ext_attributes
from backupfs.guest.ext_folder import block_names, inline_names
from backupfs.guest.ext_inode import ENCRYPT_FLAG, INDEX_FLAG, INLINE_FLAG, ROOT, Inode, Inodes
from backupfs.guest.ext_journal import Replayed
from backupfs.guest.ext_map import Map
from backupfs.image import Image
from backupfs.units import MiB

_MOST_ENTRIES = 1_000_000  # in a folder
_LARGEST_FOLDER, _PIECE = 512 * MiB, MiB
_LONGEST_LINK = 4095
_MOST_RUNS = 100_000
_BATCH = 25_000  # names of a folder whose inodes are read together
_TYPES = frozenset((st.S_IFREG, st.S_IFDIR, st.S_IFLNK, st.S_IFCHR, st.S_IFBLK, st.S_IFIFO, st.S_IFSOCK))


class ExtFileSystem:
    """A FileSystem (filesystem.py).

    Args:
        volume: with its journal replayed (ext_journal.py).
        kind: `ext2`, `ext3` or `ext4`.
        notes: what somebody has to know.

    Raises:
        GuestError: it can't be opened.
    """

    root = ROOT

    def __init__(self, volume: Image, kind: str, notes: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.notes = notes
        self._volume = volume
        self._inodes = Inodes(volume)
        self._map = Map(self._inodes)
        try:
            is_folder = st.S_ISDIR(self._get(self.root).mode)
        except NotFound:
            is_folder = False
        if not is_folder:
            raise GuestError(f"the {kind} can't be opened: it has no first folder")

    def stat(self, inode: int) -> Stat:
        found = self._get(inode)
        # As the kernel counts what is in the inode itself. Source: fs/ext4/inode.c, ext4_file_getattr.
        inside = -(-found.size // 512) * 512 if found.flags & INLINE_FLAG and not st.S_ISDIR(found.mode) else 0
        return Stat(
            inode=inode,
            mode=found.mode,
            nlink=found.nlink,
            uid=found.uid,
            gid=found.gid,
            size=found.size,
            allocated=found.allocated + inside,
            atime_ns=found.atime_ns,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
            rdev=found.rdev,
            has_xattrs=ext_attributes.may_have(found),
        )

    def list(self, inode: int) -> list[Entry]:
        return [*self.entries(inode)]

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns."""
        found: dict[bytes, int] = {}
        try:
            for name, number in self._names(self._get(inode)):
                if name in found:
                    raise GuestError(f"the name {name!r} is there twice")
                found[name] = number
                if len(found) > _MOST_ENTRIES:
                    raise GuestError(f"it has more than {_MOST_ENTRIES:,} entries")
        except GuestError as e:
            raise GuestError(f"folder {inode} can't be read: {e}") from e
        names = iter(found.items())
        while batch := list(itertools.islice(names, _BATCH)):
            # In the order of their inodes: names lie in that of their hashes, and each would be read from elsewhere.
            stats = {number: listed(self, number) for number in sorted({number for _, number in batch})}
            yield from (Entry(name, stats[number]) for name, number in batch)

    def read(self, inode: int, offset: int, length: int) -> bytes:
        found = self._file(inode)
        length = max(0, min(length, found.size - offset))
        if found.flags & INLINE_FLAG:
            return ext_attributes.inline(found)[offset : offset + length].ljust(length, b"\0")
        return self._map.read(found, offset, length)

    def runs(self, inode: int) -> Sequence[Run] | None:
        found, block, runs, position = self._file(inode), self._inodes.block, list[Run](), 0
        if found.flags & INLINE_FLAG:
            return None
        for part in self._map.segments(found, 0, -(-found.size // block)):
            begin, length = part.first * block, min(part.blocks * block, found.size - part.first * block)
            if part.written:
                if isinstance(self._volume, Replayed) and self._volume.differs(part.at * block, length):
                    return None
                _add(runs, begin - position, None)
                _add(runs, length, part.at * block)
                position = begin + length
            if len(runs) > _MOST_RUNS:
                return None
        _add(runs, found.size - position, None)
        return runs

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        found, block, end = self._file(inode), self._inodes.block, offset + length
        if found.flags & INLINE_FLAG:
            return iter([Extent(offset, length, False)] if length else [])
        stop = max(offset, min(end, found.size))
        pieces, position = list[Extent](), offset
        for part in self._map.segments(found, offset // block, -(-stop // block)):
            first = max(part.first * block, offset)
            last = min((part.first + part.blocks) * block, stop)
            if part.written and first < last:
                pieces += [Extent(position, first - position, True), Extent(first, last - first, False)]
                position = last
        pieces.append(Extent(position, end - position, True))
        return coalesce(piece for piece in pieces if piece.length)

    def readlink(self, inode: int) -> bytes:
        found = self._get(inode)
        if not st.S_ISLNK(found.mode):
            raise GuestError(f"inode {inode} is no symbolic link")
        if found.flags & ENCRYPT_FLAG:
            raise GuestError(f"inode {inode} is encrypted")
        if not 0 < found.size <= _LONGEST_LINK:
            raise GuestError(f"symbolic link {inode} is damaged: its target is {found.size} bytes long")
        if found.flags & INLINE_FLAG:
            return ext_attributes.inline(found)[: found.size]
        if found.size < len(found.block):
            return found.block[: found.size]
        return self._map.read(found, 0, found.size)

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        return ext_attributes.attributes(self._inodes, self._map, self._get(inode))

    def left_out(self, inode: int) -> Sequence[bytes]:
        return ()

    def close(self) -> None:
        """Nothing is held."""

    def _get(self, inode: int) -> Inode:
        found = self._inodes.get(inode)
        if self._inodes.is_special(inode):
            raise GuestError(f"inode {inode} is the file system's own")
        if not found.nlink:
            raise NotFound(f"there is no inode {inode}")
        if st.S_IFMT(found.mode) not in _TYPES:
            raise GuestError(f"inode {inode} is damaged: its mode is {found.mode:#o}")
        return found

    def _file(self, inode: int) -> Inode:
        found = self._get(inode)
        if not st.S_ISREG(found.mode):
            raise GuestError(f"inode {inode} is no file")
        if found.flags & ENCRYPT_FLAG:
            raise GuestError(f"inode {inode} is encrypted")
        return found

    def _names(self, folder: Inode) -> Iterator[tuple[bytes, int]]:
        if not st.S_ISDIR(folder.mode):
            raise GuestError("it is none")
        if folder.flags & ENCRYPT_FLAG:
            raise GuestError("it is encrypted")
        if folder.flags & INLINE_FLAG:
            yield from inline_names(ext_attributes.inline(folder)[4:], self._inodes.count)  # behind the parent's number
            return
        if folder.size % self._inodes.block or folder.size > _LARGEST_FOLDER:
            raise GuestError(f"it has {folder.size:,} bytes")
        seed, indexed = self._inodes.seed(folder), bool(folder.flags & INDEX_FLAG)
        for offset in range(0, folder.size, _PIECE):
            content = self._map.read(folder, offset, min(_PIECE, folder.size - offset))
            for begin in range(0, len(content), self._inodes.block):
                part = content[begin : begin + self._inodes.block]
                yield from block_names(part, offset + begin, self._inodes.count, seed, indexed)


def _add(runs: MutableSequence[Run], length: int, offset: int | None) -> None:
    if length > 0:
        runs.append(Run(length, offset))
