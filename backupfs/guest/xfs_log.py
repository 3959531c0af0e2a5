"""What the log of an XFS says that is not in the file system yet: it is not replayed, but what it changes is known.

While it runs, XFS writes what changes to its log first. An inode that the log changes may be another file's by now, and
its old blocks too: what is read through it would be somebody else's bytes. An inode that the log does not change is
right, blocks and all, since blocks change hands only with the inodes of both.

Source: fs/xfs/xfs_log_recover.c, fs/xfs/libxfs/xfs_log_format.h. Items are little-endian, as x86 and ARM write them.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from backupfs.errors import GuestError
from backupfs.guest.xfs_disk import Disk

_SECTOR = 512
_MAGIC = b"\xfe\xed\xba\xbe"
_LONGEST_RECORD = 1024  # sectors, and more
_PER_HEADER = 32 << 10  # bytes of a record that one sector of header is for
_START, _COMMIT, _CONTINUE, _CONTINUED, _END, _UNMOUNT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_TRANSACTION = b"NART"  # the magic of a transaction's header, little-endian
_INODE_ITEM, _BUFFER_ITEM = 0x123B, 0x123C
# Free space, quotas, who else uses a block, new inodes: nothing that is read here.
_OTHER_ITEMS = frozenset((*range(0x1236, 0x1239), *range(0x123D, 0x1244), 0x1245, 0x1247))
_OF_INODES = 0x1  # of a buffer: only the list of unlinked inodes is changed
_MOST_SECTORS = 4_000_000


@dataclass(slots=True)
class Pending:
    """What the log changes: inodes, and sectors of metadata; `all`: it can't be known."""

    inodes: set[int] = field(default_factory=set)
    sectors: set[int] = field(default_factory=set)
    all: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing."""
        return not (self.inodes or self.sectors or self.all)


class _UnreadableError(Exception):
    """The log can't be taken apart."""


@dataclass(frozen=True, slots=True)
class _Record:
    at: int  # sector of the log
    sectors: int
    tail: int
    operations: int
    data: bytes


def pending(disk: Disk) -> Pending:
    """Return what the log changes. Raises GuestError: the volume can't be read."""
    if disk.log_at is None:
        return Pending(all=True)  # on another disk
    log = _Log(disk, disk.log_at)
    try:
        last = log.last()
        if last is None or (last.operations == 1 and last.data[9] & _UNMOUNT):
            return Pending(all=last is None)
        return _changes(log.records(last.tail, log.head))
    except (_UnreadableError, struct.error, IndexError):
        return Pending(all=True)


class _Log:
    """The log, which is written round and round; each sector says in which round it was."""

    def __init__(self, disk: Disk, begin: int) -> None:
        self._disk = disk
        self._begin = begin
        self._sectors = disk.log_blocks * disk.block // _SECTOR
        first, low, self.head = self._round(0), 0, self._sectors
        while self.head - low > 1:
            middle = (low + self.head) // 2
            low, self.head = (middle, self.head) if self._round(middle) == first else (low, middle)

    def _read(self, number: int, count: int) -> bytes:
        """Return sectors, around the end."""
        number %= self._sectors
        before = min(count, self._sectors - number)
        data = self._disk.read(self._begin + number * _SECTOR, before * _SECTOR)
        return data + (self._disk.read(self._begin, (count - before) * _SECTOR) if before < count else b"")

    def _round(self, number: int) -> int:
        data = self._read(number, 1)
        return int(struct.unpack_from(">I", data, 4 if data[:4] == _MAGIC else 0)[0])

    def last(self) -> _Record | None:
        """Return the record before the head."""
        for back in range(1, min(_LONGEST_RECORD, self._sectors)):
            if self._read(self.head - back + self._sectors, 1)[:4] == _MAGIC:
                return self._record(self.head - back + self._sectors)
        return None

    def _record(self, number: int) -> _Record:
        head = self._read(number, 1)
        if head[:4] != _MAGIC:
            raise _UnreadableError
        version, length = struct.unpack_from(">II", head, 8)
        tail, operations, most = (struct.unpack_from(">I", head, at)[0] for at in (28, 40, 320))
        headers = max(1, -(-most // _PER_HEADER)) if version & 2 else 1
        count = -(-length // _SECTOR)
        if headers > 64 or count > 64 * headers or tail >= self._sectors:
            raise _UnreadableError
        heads, data = self._read(number, headers), bytearray(self._read(number + headers, count))
        for i in range(count):  # the round stands in place of the first four bytes of each sector
            at = 44 + 4 * i if i < 64 else i // 64 * _SECTOR + 4 + 4 * (i % 64)
            data[i * _SECTOR : i * _SECTOR + 4] = heads[at : at + 4]
        return _Record(number % self._sectors, headers + count, tail, operations, bytes(data[:length]))

    def records(self, tail: int, head: int) -> Iterator[_Record]:
        """Yield the records from the tail to the head; what was torn at the head counts for nothing."""
        left = (head - tail) % self._sectors or self._sectors
        while left > 0:
            try:
                record = self._record(tail)
            except _UnreadableError:
                if left > 8 * _LONGEST_RECORD:  # more than is ever being written at a time
                    raise
                return
            yield record
            tail, left = tail + record.sectors, left - record.sectors


def _changes(records: Iterator[_Record]) -> Pending:
    found = Pending()
    items: dict[int, int] = {}  # of a transaction: how many regions of its item are still to come
    parts: dict[int, bytes] = {}  # of a region that goes on in the next record
    for record in records:
        position = 0
        for _ in range(record.operations):
            transaction, length, _, flags = struct.unpack_from(">IIBB", record.data, position)
            region = record.data[position + 12 : position + 12 + length]
            position += 12 + length
            if len(region) != length:
                raise _UnreadableError
            if flags & _START:
                items[transaction] = 0
            if flags & _COMMIT:
                items.pop(transaction, None)
            if transaction not in items or flags & (_START | _COMMIT | _UNMOUNT):
                continue  # of one that began before the tail nothing is left to be done
            region = parts.pop(transaction, b"") + region
            if flags & _CONTINUE:
                parts[transaction] = region
            elif items[transaction]:
                items[transaction] -= 1
            elif region and not region.startswith(_TRANSACTION):
                items[transaction] = _note(region, found)
        if len(found.sectors) > _MOST_SECTORS:
            return Pending(all=True)
    return found


def _note(item: bytes, found: Pending) -> int:
    """Note what an item changes; return how many regions follow it."""
    kind, regions, flags, length = struct.unpack_from("<HHHH", item)
    if kind == _INODE_ITEM:
        found.inodes.add(struct.unpack_from("<Q", item, 16)[0])
    elif kind == _BUFFER_ITEM:
        (first,) = struct.unpack_from("<q", item, 8)
        if not flags & _OF_INODES:
            found.sectors.update(range(first, first + length))
    elif kind not in _OTHER_ITEMS:
        raise _UnreadableError
    return int(regions) - 1


def refuse(what: str) -> GuestError:
    """Return the error for what the log changes."""
    return GuestError(
        f"{what} was changed last in the log of the XFS, which is not replayed; the kernel does that when DISK.rw is "
        "mounted (backupfs mount --scratch)"
    )
