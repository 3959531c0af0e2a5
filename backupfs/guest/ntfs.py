"""NTFS, read by The Sleuth Kit; names by our own code (ntfs_index.py).

C on what a guest wrote: only in a process of its own (child.py). One thread.
"""

import contextlib
import functools
import stat as st
import struct
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from typing import Any

import pytsk3

from backupfs.errors import BackupfsError, GuestError, NotFound
from backupfs.extents import Extent, coalesce
from backupfs.filesystem import LARGEST_XATTR, LONGEST_XATTR, Entry, Run, Stat, unreadable
from backupfs.guest import ntfs_index, ntfs_log, ntfs_reparse
from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import KiB, MiB

_MOST_ENTRIES = 1_000_000  # in a folder
_TYPES = {
    pytsk3.TSK_FS_META_TYPE_REG: st.S_IFREG,
    pytsk3.TSK_FS_META_TYPE_DIR: st.S_IFDIR,
    pytsk3.TSK_FS_META_TYPE_LNK: st.S_IFLNK,
}
_FIRST_USER_SEGMENT = 24  # of NTFS' master file table: before it is the file system's own
_OWN_SEGMENTS = frozenset(range(5)) | frozenset(range(6, _FIRST_USER_SEGMENT))  # 5 is the root
_TABLE, _LOG = 0, 2  # their numbers in the master file table
_NUMBER = (1 << 48) - 1  # in a reference; above it how often the record was used anew
_GONE = 1 << 62  # added to the number of a record that is another file's now
_INDEX = (
    int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_IDXROOT),
    int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_IDXALLOC),
    int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_BITMAP),
)
_STUDIED = 1  # source: The Sleuth Kit, tsk_fs.h, TSK_FS_META_ATTR_STUDIED
_TAIL = 64 * KiB
_STANDARD = struct.Struct("<4q")  # created, written, changed, read; in 100 ns since 1601
_1601_TO_1970 = 116_444_736_000_000_000  # in 100 ns
_MOST_RUNS = 100_000
_PREFIX = b"user."  # before a stream's name, as in ntfs-3g
_LONGEST_LIST = 256 * KiB  # of attributes, as in Windows
_NOT_RESIDENT = int(pytsk3.TSK_FS_ATTR_NONRES)
_STORED_OTHERWISE = int(pytsk3.TSK_FS_ATTR_COMP) | int(pytsk3.TSK_FS_ATTR_ENC)
_FILLER = int(pytsk3.TSK_FS_ATTR_RUN_FLAG_FILLER)
# A hole may be either.
_HOLE = _FILLER | int(pytsk3.TSK_FS_ATTR_RUN_FLAG_SPARSE)


class _Volume(pytsk3.Img_Info):  # type: ignore[misc]  # pytsk3 has no types
    """A volume, as The Sleuth Kit reads it.

    Attributes:
        failure: the last read that failed: The Sleuth Kit goes on without what it could not read, and says nothing.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.failure: BackupfsError | None = None
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def close(self) -> None:
        """Called by The Sleuth Kit."""

    def read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self._image.size - offset))
        buffer = bytearray(size)
        try:
            if size:
                self._image.readinto(offset, buffer)
        except BackupfsError as e:
            self.failure = e
            raise
        return bytes(buffer)

    def get_size(self) -> int:
        return self._image.size


class NtfsFileSystem:
    """A FileSystem (filesystem.py).

    Raises:
        GuestError: it can't be opened.
    """

    kind = "ntfs"

    def __init__(self, volume: Image) -> None:
        self._image = volume
        self._begin_anew()
        self.root = int(self._fs.info.root_inum)
        self._record_size = self._read_record_size()
        self.notes = self._look_at_log()

    def _read_record_size(self) -> int:
        head = read(self._image, 0, 512) or bytes(512)
        per_record = int.from_bytes(head[64:65], signed=True)
        return 1 << min(-per_record, 16) if per_record < 0 else per_record * int(self._fs.info.block_size)

    def _begin_anew(self) -> None:
        self._fs: Any = None
        self._volume = _Volume(self._image)
        try:
            opened = pytsk3.FS_Info(self._volume)
        except (OSError, RuntimeError) as e:
            raise GuestError(f"the {self.kind} can't be opened: {self._volume.failure or _words(e)}") from e
        if self._volume.failure is not None:
            raise GuestError(f"the {self.kind} can't be opened: {self._volume.failure}")
        self._fs = opened
        self._open = functools.lru_cache(256)(self._open_anew)
        self._refuse_unreadable = functools.lru_cache(256)(self._look_whether_readable)

    def _look_at_log(self) -> tuple[str, ...]:
        try:
            with self._reading("its log"):
                log = bytes(self._fs.open_meta(_LOG).read_random(0, ntfs_log.LENGTH))
        except GuestError as e:
            return (f"whether the NTFS was in use is not known: {e}",)
        if not ntfs_log.was_in_use(log):
            return ()
        return (
            "the NTFS was in use, and its log ($LogFile) is not replayed: what changed in the seconds before may be"
            " missing, or wrong where files were removed or moved; Windows and Linux' ntfs3 replay it",
        )

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Raise GuestError for whatever in the block could not be read, also where The Sleuth Kit went on without it.

        What was remembered until then may lack something, and goes.
        """
        if self._fs is None:
            self._begin_anew()
        problem: Exception | None = None
        try:
            yield
        except (OSError, RuntimeError, NotFound) as e:  # RuntimeError: what `_Volume.read` raised
            if self._volume.failure is None and isinstance(e, NotFound):
                raise
            problem = e
        if self._volume.failure is not None or problem is not None:
            words = str(self._volume.failure or _words(problem))
            if self._volume.failure is not None:
                self._fs = None
            raise GuestError(f"{what} can't be read: {words}") from problem

    def stat(self, inode: int) -> Stat:
        with self._reading(f"inode {inode}"):
            return self._stat(inode, self._open(inode))

    def list(self, inode: int) -> list[Entry]:
        return [*self.entries(inode)]

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns. Whether all of it could be read is known at the end."""
        found = set[bytes]()
        with self._reading(f"folder {inode}"):
            for name, reference in self._names(inode, self._open(inode)):
                if name == b"." or (inode == self.root and reference & _NUMBER < _FIRST_USER_SEGMENT):
                    continue
                if name in found or name == b".." or b"/" in name or b"\0" in name:
                    raise GuestError(f"folder {inode} is damaged: it has the name {name!r}")
                found.add(name)
                if len(found) > _MOST_ENTRIES:
                    raise GuestError(f"the folder has more than {_MOST_ENTRIES:,} entries")
                yield Entry(name, self._listed(reference))

    def read(self, inode: int, offset: int, length: int) -> bytes:
        parts, done = [], 0
        with self._reading(f"inode {inode} at {offset}"):
            file = self._open(inode)
            self._refuse_unreadable(inode)
            data = self._data(file)
            wanted = min(length, (int(data.info.size) if data is not None else 0) - offset)
            while done < wanted:
                part = file.read_random(offset + done, wanted - done, data.info.type, data.info.id)
                if not part:
                    raise GuestError(f"inode {inode} can't be read at {offset + done}: it ends there")
                parts.append(part)
                done += len(part)
        return b"".join(parts)

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        with self._reading(f"inode {inode}"):
            self._refuse_unreadable(inode)
            found = list(coalesce(self._extents(self._open(inode), offset, offset + length)))
        return iter(found)

    def runs(self, inode: int) -> Sequence[Run] | None:
        with self._reading(f"inode {inode}"):
            self._refuse_unreadable(inode)
            return self._runs(self._open(inode))

    def readlink(self, inode: int) -> bytes:
        with self._reading(f"inode {inode}"):
            target = ntfs_reparse.link(self._reparse(self._open(inode))) or b""
        if not target:
            raise GuestError(f"inode {inode} is no symbolic link")
        return target

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        with self._reading(f"inode {inode}"):
            file, found = self._open(inode), dict[bytes, bytes]()
            for name, attribute in self._streams(file):
                if _fits(name, attribute):
                    size = int(attribute.info.size)
                    content = found[_PREFIX + name] = _content(file, attribute, size)
                    if len(content) != size:
                        raise GuestError(f"inode {inode}: a stream can't be read")
            return found

    def left_out(self, inode: int) -> Sequence[bytes]:
        with self._reading(f"inode {inode}"):
            return [name for name, attribute in self._streams(self._open(inode)) if not _fits(name, attribute)]

    def close(self) -> None:
        self._open.cache_clear()

    # Files.

    def _open_anew(self, inode: int) -> Any:
        if inode in _OWN_SEGMENTS:
            raise NotFound(f"there is no inode {inode}")
        if inode & _GONE:
            raise GuestError(f"inode {inode & _NUMBER} was removed, and is another file's now")
        try:
            file = self._fs.open_meta(inode)
        except OSError as e:
            if "metadata structure" in str(e):
                raise GuestError(f"inode {inode} can't be read: {_words(e)}") from e
            raise NotFound(f"inode {inode} can't be found: {_words(e)}") from e
        return self._checked(file, inode)

    @staticmethod
    def _checked(file: Any, inode: int) -> Any:
        meta = file.info.meta
        if meta is None or not int(meta.flags) & int(pytsk3.TSK_FS_META_FLAG_ALLOC):
            raise NotFound(f"there is no inode {inode}")
        if int(meta.attr_state) != _STUDIED:
            # Without them a file would seem to be empty.
            raise GuestError(f"inode {inode}: The Sleuth Kit can't read its attributes")
        return file

    def _names(self, inode: int, file: Any) -> Iterator[tuple[bytes, int]]:
        """Yield the names in a folder and their references: those in its record, then those in blocks of the index."""
        parts = {int(a.info.type): a for a in file if a.info.name == b"$I30"}
        root, blocks, used = (parts.get(kind) for kind in _INDEX)
        if root is None:
            raise GuestError(f"inode {inode} is no folder")
        first = _content(file, root, ntfs_index.LARGEST_BLOCK)
        size = ntfs_index.block_size(first)
        yield from ntfs_index.root_names(first)
        if blocks is None:
            return
        if used is None:
            raise GuestError(f"folder {inode} is damaged: which blocks of its index are in use is not known")
        bits, end = _content(file, used, MiB), int(blocks.info.size)
        for offset in range(0, end, size):
            block = offset // size
            if block >= len(bits) * 8:
                return
            if bits[block // 8] >> block % 8 & 1:
                content = bytes(file.read_random(offset, size, blocks.info.type, blocks.info.id))
                if len(content) != size:
                    raise GuestError(f"folder {inode} is damaged: a block of its index is cut off")
                yield from ntfs_index.block_names(content)

    def _listed(self, reference: int) -> Stat:
        """Return what is listed of what a name leads to. Where that is gone ntfs-3g shows the name too."""
        number = reference & _NUMBER
        try:
            file = self._open_anew(number)
            if reference >> 48 not in {0, int(file.info.meta.seq)}:
                return unreadable(number | _GONE)
            return self._stat(number, file)
        except (NotFound, GuestError):
            return unreadable(number)

    def _stat(self, inode: int, file: Any) -> Stat:
        """Return what ntfs-3g shows without options: there are no owners, and these modes."""
        meta = file.info.meta
        mode = _TYPES.get(meta.type, 0) or st.S_IFREG
        data = self._data(file) if mode == st.S_IFREG else None
        size, nlink = int(meta.size if data is None else data.info.size), 1
        target = ntfs_reparse.link(self._reparse(file))
        if target is not None:
            mode, size = st.S_IFLNK, len(target)
        if not st.S_ISDIR(mode):
            nlink = max(1, self._count_names(file))
        allocated = sum(e.length for e in self._extents(file, 0, size) if not e.flag) if st.S_ISREG(mode) else 0
        mtime_ns, ctime_ns, atime_ns = _times(file)
        return Stat(
            inode=inode,
            mode=mode | 0o777,
            nlink=nlink,
            uid=0,
            gid=0,
            size=size,
            allocated=-(-allocated // 512) * 512,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
            ctime_ns=ctime_ns,
            has_xattrs=_may_have_streams(file),
        )

    def _look_whether_readable(self, inode: int) -> None:
        """Raise GuestError for what would come out wrong."""
        file = self._open(inode)
        data = self._data(file)
        has_holes = data is not None and any(int(run.flags) & _HOLE for run in data)
        reason = ntfs_reparse.reason(self._reparse(file), has_holes=has_holes)
        if reason:
            raise GuestError(f"inode {inode} {reason}")
        if data is not None and _flags(data) & int(pytsk3.TSK_FS_ATTR_ENC):
            raise GuestError(f"inode {inode} is encrypted")
        if data is not None and any(int(run.flags) & _FILLER for run in data):
            raise GuestError(f"inode {inode} is damaged: the places of a part of it are missing")

    def _extents(self, file: Any, offset: int, end: int) -> Iterator[Extent]:
        """Yield what is data and what is a hole, by the runs of the file's content."""
        data, block = self._data(file), int(self._fs.info.block_size)
        if data is None or not _flags(data) & _NOT_RESIDENT or _flags(data) & int(pytsk3.TSK_FS_ATTR_COMP):
            yield Extent(offset, max(0, end - offset), False)
            return
        position = offset
        for run in data:
            first, size = int(run.offset) * block, int(run.len) * block
            begin, stop = max(position, first), min(end, first + size)
            if begin < stop:
                yield Extent(position, begin - position, True)
                yield Extent(begin, stop - begin, bool(int(run.flags) & _HOLE))
                position = stop
        yield Extent(position, max(0, end - position), True)

    def _runs(self, file: Any) -> Sequence[Run] | None:
        data, block = self._data(file), int(self._fs.info.block_size)
        if data is None or _flags(data) & _STORED_OTHERWISE or not _flags(data) & _NOT_RESIDENT:
            return None
        end = int(data.info.size)
        written = self._written(file, data)
        if end and not written:
            return None
        found: MutableSequence[Run] = []
        position = 0
        for run in data:
            first, size = int(run.offset) * block, min(int(run.len) * block, end - position)
            if first != position or len(found) > _MOST_RUNS:
                return None
            stored = max(0, min(size, written - position)) if not int(run.flags) & _HOLE else 0
            at = int(run.addr) * block
            _add(found, stored, at)
            _add(found, size - stored, None)
            position += size
        _add(found, end - position, None)
        return found

    @staticmethod
    def _written(file: Any, data: Any) -> int:
        """Return behind which of the bytes of a file's content there are only zeroes, 0: it can't be seen at once.

        NTFS keeps how much of a file was ever written; what lies behind that on the disk is not the file's. The Sleuth
        Kit knows, and pytsk3 does not tell: but what was read as other than zero was written, and all before it.
        """
        size = int(data.info.size)
        tail = bytes(file.read_random(max(0, size - _TAIL), min(size, _TAIL), data.info.type, data.info.id))
        return size - len(tail) + len(tail.rstrip(b"\0")) if tail.rstrip(b"\0") else 0

    # NTFS.

    @staticmethod
    def _count_names(file: Any) -> int:
        """Count a file's names, without those that are for DOS only."""
        count = 0
        for attribute in file:
            if int(attribute.info.type) == int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_FNAME):
                content = _content(file, attribute, 68)
                count += len(content) > 65 and content[65] != 2
        return count

    @staticmethod
    def _reparse(file: Any) -> bytes:
        for attribute in file:
            if int(attribute.info.type) == int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_REPARSE):
                return _content(file, attribute, ntfs_reparse.LONGEST)
        return b""

    def _streams(self, file: Any) -> Iterator[tuple[bytes, Any]]:
        """Yield the names of alternate data streams and their attributes."""
        names = self._stream_names(file)
        for attribute in _of_data(file):
            name = names[int(attribute.info.id)]
            if name:
                yield name, attribute

    def _stream_names(self, file: Any) -> Mapping[int, bytes]:
        """Return the names of streams of data by their numbers, b"" for the content."""
        inode = int(file.info.meta.addr)
        found = {int(a.info.id): bytes(a.info.name or b"") for a in _of_data(file)}
        record = self._fs.open_meta(_TABLE).read_random(inode * self._record_size, self._record_size)
        names = ntfs_index.stream_names(bytes(record))
        if names is None:
            # They are in several records, and The Sleuth Kit numbers them anew.
            parts = (a for a in file if int(a.info.type) == int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_ATTRLIST))
            listed = set[bytes]().union(*(ntfs_index.listed_streams(_content(file, a, _LONGEST_LIST)) for a in parts))
            if listed != set(found.values()) or len(listed) < len(found):
                raise GuestError(f"inode {inode}: the names of its streams can't be read")
            return found
        if names.keys() != found.keys():
            raise GuestError(f"inode {inode}: not all of its streams can be read")
        return names

    def _data(self, file: Any) -> Any:
        """Return the attribute with a file's content, or None."""
        found = [attribute for attribute in _of_data(file) if not attribute.info.name]
        if len(found) > 1:
            names = self._stream_names(file)
            found = [attribute for attribute in found if not names[int(attribute.info.id)]]
        return found[0] if found else None


def _times(file: Any) -> tuple[int, int, int]:
    """Return when it was written, changed and read, in ns since 1970."""
    meta = file.info.meta
    written, changed, read_at = int(meta.mtime), int(meta.ctime), int(meta.atime)
    if not (written and changed and read_at):
        # The Sleuth Kit has 0 for what is before 1970 or after 2106.
        for attribute in file:
            if attribute.info.type == pytsk3.TSK_FS_ATTR_TYPE_NTFS_SI:
                raw = _content(file, attribute, _STANDARD.size)
                if len(raw) == _STANDARD.size:
                    _, written, changed, read_at = (100 * (time - _1601_TO_1970) for time in _STANDARD.unpack(raw))
                    return written, changed, read_at
    return (
        written * 10**9 + int(meta.mtime_nano),
        changed * 10**9 + int(meta.ctime_nano),
        read_at * 10**9 + int(meta.atime_nano),
    )


def _flags(attribute: Any) -> int:
    return int(attribute.info.flags)


def _add(runs: MutableSequence[Run], length: int, offset: int | None) -> None:
    """Add a run, as a part of the last one if it goes on there."""
    if length <= 0:
        return
    last = runs[-1] if runs else None
    if last and last.offset is None and offset is None:
        runs[-1] = Run(last.length + length, None)
    elif last and last.offset is not None and last.offset + last.length == offset:
        runs[-1] = Run(last.length + length, last.offset)
    else:
        runs.append(Run(length, offset))


def _of_data(file: Any) -> Iterator[Any]:
    """Yield the attributes with a file's content and with its streams."""
    kinds = {int(pytsk3.TSK_FS_ATTR_TYPE_DEFAULT), int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_DATA)}
    return (attribute for attribute in file if int(attribute.info.type) in kinds)


def _may_have_streams(file: Any) -> bool:
    # The name of a stream is missing where The Sleuth Kit can't write it.
    named = [bool(attribute.info.name) for attribute in _of_data(file)]
    return any(named) or len(named) > (file.info.meta.type != pytsk3.TSK_FS_META_TYPE_DIR)


def _fits(name: bytes, attribute: Any) -> bool:
    """Whether a stream can be an extended attribute."""
    return int(attribute.info.size) <= LARGEST_XATTR and len(_PREFIX + name) <= LONGEST_XATTR


def _content(file: Any, attribute: Any, length: int) -> bytes:
    size = min(length, int(attribute.info.size))
    return bytes(file.read_random(0, size, attribute.info.type, attribute.info.id)) if size else b""


def _words(error: Exception | None) -> str:
    return " ".join(str(error).split())[:500]
