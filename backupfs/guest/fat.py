"""FAT12, FAT16 and FAT32 with long names, read by our own code: The Sleuth Kit cuts names off behind 195 characters.

What has no inodes gets one: the place of its entry on the volume, in 32 bytes; 1 is the first folder.

Source: Microsoft, FAT: General Overview of On-Disk Format; Linux, fs/fat/inode.c (fat_fill_super), dir.c, misc.c.
"""

import codecs
import functools
import stat as st
import struct
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from backupfs.errors import GuestError, NotFound
from backupfs.extents import Extent
from backupfs.filesystem import Entry, Run, Stat, listed
from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import KiB, MiB

_ENTRY = struct.Struct("<11sBBBHHHHHHHI")  # name, attributes, case, tenths; 2 created, read, high, 2 written, low, size
_SIZE = 32
_READ_ONLY, _LABEL, _FOLDER, _LONG = 0x01, 0x08, 0x10, 0x0F
_END, _REMOVED = 0x00, 0xE5
_LOWER_NAME, _LOWER_EXTENSION = 0x08, 0x10
_LAST = 0x40  # of a long name: this one comes first
_ONE_TABLE = 0x80  # in FAT32's flags
_ROOT = 1
_LARGEST_FOLDER = 2 * MiB  # as in Linux
_PAGE = 64 * KiB
_MOST_12, _MOST_16 = 0xFF4, 0xFFF4  # clusters
_MOST_RUNS = 100_000
# Now: the process can open no file any more when they are first used.
codecs.lookup("cp437")
codecs.lookup("utf-16-le")


class FatFileSystem:
    """A FileSystem (filesystem.py). Times are taken for UTC; owners are 0, as in Linux without options.

    Raises:
        GuestError: it can't be opened.
    """

    kind = "vfat"
    root = _ROOT
    notes: tuple[str, ...] = ()

    def __init__(self, volume: Image) -> None:
        self._volume = volume
        head = self._read(0, 64)
        sector, per_cluster, reserved, copies, entries, total = struct.unpack_from("<HBHBHH", head, 11)
        (table,) = struct.unpack_from("<H", head, 22)
        wide_total, wide_table, flags = struct.unpack_from("<2IH", head, 32)
        if sector not in {512, 1024, 2048, 4096} or not per_cluster or per_cluster & (per_cluster - 1):
            raise GuestError("the FAT's first sector makes no sense")
        is_32 = not table
        table_bytes = (table or wide_table) * sector
        # All tables are alike, unless one alone is said to be kept up to date.
        alone = flags & 0xF if is_32 and flags & _ONE_TABLE else 0
        self._table = reserved * sector + alone * table_bytes
        self._first_folder = reserved * sector + copies * table_bytes, entries * _SIZE
        self._cluster = per_cluster * sector
        self._data = self._first_folder[0] + -(-entries * _SIZE // sector) * sector
        clusters = max(0, (total or wide_total) * sector - self._data) // self._cluster
        self._bits = 32 if is_32 else 16 if clusters > _MOST_12 else 12
        self._count = min(clusters, table_bytes * 8 // self._bits - 2)
        self._first_cluster = struct.unpack_from("<I", head, 44)[0] if is_32 else 0
        if not reserved or alone >= copies or self._count < 1 or (self._bits == 16 and clusters > _MOST_16):
            raise GuestError("the FAT's first sector makes no sense")
        if is_32 and not self._first_cluster:
            raise GuestError("the FAT's first sector makes no sense: it has no first folder")
        self._page = functools.lru_cache(64)(self._read_page)
        self._chain = functools.lru_cache(16)(self._follow)
        self.stat(self.root)

    def stat(self, inode: int) -> Stat:
        if inode == self.root:
            size = self._first_folder[1] if self._bits != 32 else self._length(self._first_cluster)
            return Stat(inode, st.S_IFDIR | 0o755, 1, 0, 0, size, size, 0, 0, 0, has_xattrs=False)
        _, attributes, _, _, _, _, read_on, _, time, date, _, size = _ENTRY.unpack(raw := self._entry(inode))
        written = _time(date, time)
        if attributes & _FOLDER:
            mode, size = st.S_IFDIR | 0o755, self._length(self._first(raw))
        else:
            mode = st.S_IFREG | (0o555 if attributes & _READ_ONLY else 0o755)
        return Stat(
            inode=inode,
            mode=mode,
            nlink=1,
            uid=0,
            gid=0,
            size=size,
            allocated=-(-size // self._cluster) * self._cluster,
            atime_ns=_time(read_on, 0),
            mtime_ns=written,
            ctime_ns=written,
            has_xattrs=False,
        )

    def list(self, inode: int) -> list[Entry]:
        return [*self.entries(inode)]

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns."""
        found = set[bytes]()
        for name, number in self._names(inode):
            if name in found:
                raise GuestError(f"folder {inode} is damaged: it has the name {name!r} twice")
            found.add(name)
            yield Entry(name, listed(self, number))

    def read(self, inode: int, offset: int, length: int) -> bytes:
        parts = []
        for run in self._parts(inode, offset, length):
            assert run.offset is not None, "FAT has no holes"
            parts.append(self._read(run.offset, run.length))
        return b"".join(parts)

    def runs(self, inode: int) -> Sequence[Run] | None:
        found = list(self._parts(inode, 0, 1 << 32))
        return found if len(found) <= _MOST_RUNS else None

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        self._file(inode)
        return iter([Extent(offset, length, False)] if length else [])

    def readlink(self, inode: int) -> bytes:
        raise GuestError(f"inode {inode} is no symbolic link")

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        self.stat(inode)
        return {}

    def left_out(self, inode: int) -> Sequence[bytes]:
        return ()

    def close(self) -> None:
        """Nothing is held."""

    # Entries.

    def _entry(self, inode: int) -> bytes:
        raw = read(self._volume, inode * _SIZE, _SIZE)
        if raw is None or inode * _SIZE < self._first_folder[0] or raw[0] in {_END, _REMOVED} or raw[11] & _LABEL:
            raise NotFound(f"there is no inode {inode}")
        return raw

    def _names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Yield names and inodes, but for what is removed, a label, `.` and `..`."""
        parts: list[tuple[int, int, bytes]] = []  # of a long name: number, checksum, what it holds
        for at, content in self._folder(inode):
            for position in range(0, len(content), _SIZE):
                raw = content[position : position + _SIZE]
                if raw[0] == _END:
                    return
                if raw[0] == _REMOVED:
                    parts = []
                elif raw[11] & 0x3F == _LONG:
                    parts = ([] if raw[0] & _LAST else parts) + [(raw[0] & 0x3F, raw[13], _long_part(raw))]
                else:
                    if not raw[11] & _LABEL and raw[:11].rstrip() not in {b".", b".."}:
                        yield _name(raw, parts), (at + position) // _SIZE
                    parts = []

    def _folder(self, inode: int) -> Iterator[tuple[int, bytes]]:
        """Yield where parts of a folder lie, and what is there."""
        first = self._first_cluster
        if inode != self.root:
            raw = self._entry(inode)
            if not raw[11] & _FOLDER:
                raise GuestError(f"inode {inode} is no folder")
            first = self._first(raw)
        elif self._bits != 32:
            at, length = self._first_folder
            yield at, self._read(at, length)
            return
        done = 0
        for run in self._chain(first):
            assert run.offset is not None, "FAT has no holes"
            done += run.length
            if done > _LARGEST_FOLDER:
                raise GuestError(f"folder {inode} is damaged: it is larger than 2 MiB")
            yield run.offset, self._read(run.offset, run.length)

    # Clusters.

    def _file(self, inode: int) -> tuple[int, int]:
        """Return a file's first cluster and its size."""
        if inode == self.root:
            raise GuestError(f"inode {inode} is no file")
        raw = self._entry(inode)
        if raw[11] & _FOLDER:
            raise GuestError(f"inode {inode} is no file")
        return self._first(raw), struct.unpack_from("<I", raw, 28)[0]

    def _first(self, raw: bytes) -> int:
        """Return the first cluster of an entry. The upper half is FAT32's: OS/2 and DR-DOS keep other things there."""
        high, low = struct.unpack_from("<H", raw, 20)[0], struct.unpack_from("<H", raw, 26)[0]
        return int(low | high << 16) & 0x0FFFFFFF if self._bits == 32 else int(low)

    def _parts(self, inode: int, offset: int, length: int) -> Iterator[Run]:
        """Yield where a range of a file lies, up to the file's end."""
        first, size = self._file(inode)
        end, position = min(offset + length, size), 0
        for run in self._chain(first) if size else ():
            begin, stop = max(offset, position), min(end, position + run.length)
            if begin < stop:
                assert run.offset is not None, "FAT has no holes"
                yield Run(stop - begin, run.offset + begin - position)
            position += run.length
        if position < min(size, end):
            raise GuestError(f"inode {inode} is damaged: it ends at {position}, not at {size}")

    def _length(self, first: int) -> int:
        return sum(run.length for run in self._chain(first))

    def _follow(self, cluster: int) -> Sequence[Run]:
        """Return where the clusters of a chain lie."""
        runs: list[Run] = []
        begin, count, left = cluster, 0, self._count
        if not cluster:
            return runs
        end = (1 << min(self._bits, 28)) - 8
        while True:
            if not 2 <= cluster < self._count + 2 or not left:
                raise GuestError(f"a chain of clusters is damaged at {cluster}")
            count, left = count + 1, left - 1
            following = self._following(cluster)
            if following != cluster + 1:
                runs.append(Run(count * self._cluster, self._data + (begin - 2) * self._cluster))
                begin, count = following, 0
            if following >= end:
                return runs
            cluster = following

    def _following(self, cluster: int) -> int:
        if self._bits == 12:
            at = cluster + cluster // 2
            pair: int = struct.unpack_from("<H", self._page(0) + self._page(1), at)[0]  # 6 KiB are the most
            return pair >> 4 if cluster & 1 else pair & 0xFFF
        each = self._bits // 8
        page, at = divmod(cluster * each, _PAGE)
        found: int = struct.unpack_from("<I" if each == 4 else "<H", self._page(page), at)[0]
        return found & 0x0FFFFFFF

    def _read_page(self, number: int) -> bytes:
        at = min(self._table + number * _PAGE, self._volume.size)
        return self._read(at, min(_PAGE, self._volume.size - at))

    def _read(self, offset: int, length: int) -> bytes:
        data = read(self._volume, offset, length)
        if data is None:
            raise GuestError(f"the FAT is damaged: it wants {length} bytes at {offset}, behind its end")
        return data


def _time(date: int, time: int) -> int:
    """Return a time in ns. Of what is none, what Linux makes of it. Source: fs/fat/misc.c, fat_time_fat2unix()."""
    day, month, year = max(date & 0x1F, 1), max(date >> 5 & 0xF, 1), 1980 + (date >> 9)
    second, minute, hour = (time & 0x1F) * 2, time >> 5 & 0x3F, time >> 11
    begin = datetime(year, month if month <= 12 else 1, 1, tzinfo=UTC)
    whole = begin + timedelta(days=day - 1, hours=hour, minutes=minute, seconds=second)
    return int(whole.timestamp()) * 10**9


def _long_part(raw: bytes) -> bytes:
    return raw[1:11] + raw[14:26] + raw[28:32]


def _name(raw: bytes, parts: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Return the name of an entry: the long one before it, if that is its own and whole, else the short one.

    Raises:
        GuestError: it is none that can be shown.
    """
    whole = [number for number, _, _ in parts] == list(range(len(parts), 0, -1))
    if parts and whole and {checksum for _, checksum, _ in parts} == {_checksum(raw[:11])}:
        units = b"".join(part for _, _, part in reversed(parts)).decode("utf-16-le", "surrogatepass")
        name = units.split("\0", 1)[0].encode("utf-8", "surrogatepass")
        if _can_be(name):
            return name
    base, extension = raw[:8], raw[8:11].rstrip()
    base = (b"\xe5" + base[1:] if base[0] == 0x05 else base).rstrip()
    texts = [part.decode("cp437") for part in (base, extension)]
    if raw[12] & _LOWER_NAME:
        texts[0] = texts[0].lower()
    if raw[12] & _LOWER_EXTENSION:
        texts[1] = texts[1].lower()
    name = ".".join(text for text in texts if text).encode()
    if not _can_be(name):
        raise GuestError(f"a folder is damaged: it has the name {name!r}")
    return name


def _can_be(name: bytes) -> bool:
    return name not in {b"", b".", b".."} and b"/" not in name and b"\0" not in name


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total & 1) << 7 | total >> 1) + byte & 0xFF
    return total
