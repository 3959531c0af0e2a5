"""The log of an XFS: which transactions are in it that may not be in the file system yet.

    … | record: header, operations | record … | record |            (goes round and round)
      tail                                              head

A record's operations are the regions of the items of transactions; one that is too long goes on in the next record. A
transaction counts when its commit is there. Records are written side by side: what comes behind one that is torn or
missing counts for nothing, as in the kernel.

Source: fs/xfs/xfs_log_recover.c, fs/xfs/libxfs/xfs_log_format.h. Records are big-endian, what they hold is as the
guest's processor has it: read is what x86 and ARM write.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from crc32c import crc32c

from backupfs.guest.xfs_disk import Disk
from backupfs.units import MiB

SECTOR = 512
_MAGIC = b"\xfe\xed\xba\xbe"
_LITTLE_ENDIAN = 1
_HEADER, _CRC_AT = 328, 32  # bytes that a checksum counts of the first sector of a header; of others:
_MORE_HEADER = 260
_PER_HEADER = 32 << 10  # bytes of a record that one sector of header is for
_MOST_HEADERS = 64
_IN_FLIGHT = 8 * 256 * 2 + _MOST_HEADERS  # sectors that may be being written at a time, XLOG_TOTAL_REC_SHIFT, and more
_START, _COMMIT, _CONTINUE, _CONTINUED, _END, _UNMOUNT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_OPERATION = struct.Struct(">IIBBxx")  # transaction, length, client, flags
_TRANSACTION = struct.pack("<I", 0x5452414E)  # the magic of a transaction's header
_TRANSACTION_HEADER = 16
_MOST_REGIONS = 256
_MOST_OPEN = 192 * MiB  # bytes of transactions whose commit was not found yet


class UnreadableLogError(Exception):
    """The log can't be taken apart."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction that was committed.

    Attributes:
        lsn: the number of the record that it began in; what has it, or a higher one, is no older.
        items: of each its regions: what it is, and what it holds.
    """

    lsn: int
    items: list[list[bytes]]


@dataclass(frozen=True, slots=True)
class _Record:
    at: int  # sector of the log
    sectors: int
    lsn: int
    tail: int
    operations: int
    data: bytes


@dataclass(slots=True)
class _Open:
    """A transaction as far as it was read."""

    lsn: int
    header: bytes = b""
    items: list[list[bytes]] = field(default_factory=list)

    def add(self, region: bytes) -> None:
        """Source: xlog_recover_add_to_trans."""
        if len(self.header) < _TRANSACTION_HEADER:
            self.header += region
            if not self.header.startswith(_TRANSACTION) or len(self.header) > _TRANSACTION_HEADER:
                raise UnreadableLogError
        elif self.items and len(self.items[-1]) < _regions(self.items[-1][0]):
            self.items[-1].append(region)
        elif 0 < _regions(region) <= _MOST_REGIONS:
            self.items.append([region])
        else:
            raise UnreadableLogError

    def go_on(self, region: bytes) -> None:
        """Add to the last region. Source: xlog_recover_add_to_cont_trans."""
        if self.items:
            self.items[-1][-1] += region
        else:
            self.add(region)

    @property
    def is_complete(self) -> bool:
        """Whether no item lacks a region."""
        return all(len(item) == _regions(item[0]) for item in self.items[-1:])


def _operations(record: _Record) -> Iterator[tuple[int, int, bytes]]:
    """Yield what a record is made of: the number of a transaction, flags, a region."""
    position = 0
    for _ in range(record.operations):
        if position + _OPERATION.size > len(record.data):
            raise UnreadableLogError
        number, length, _client, flags = _OPERATION.unpack_from(record.data, position)
        position += _OPERATION.size
        if position + length > len(record.data):
            raise UnreadableLogError
        yield number, flags, record.data[position : position + length]
        position += length


def _regions(item: bytes) -> int:
    return int(struct.unpack_from("<H", item, 2)[0])


class Log:
    """The log of a file system.

    Raises:
        UnreadableLogError: it is on another disk, or makes no sense.
        GuestError: the volume can't be read.
    """

    def __init__(self, disk: Disk) -> None:
        if disk.log_at is None:
            raise UnreadableLogError
        self._disk = disk
        self._begin = disk.log_at
        self._sectors = disk.log_blocks * disk.block // SECTOR
        if self._sectors < 2:
            raise UnreadableLogError
        last = self._last()
        self._tail, self._head = last.tail, (last.at + last.sectors) % self._sectors
        is_unmounted = last.operations == 1 and len(last.data) > 9 and last.data[9] & _UNMOUNT
        self.is_clean = bool(is_unmounted) or self._tail == self._head

    def transactions(self) -> Iterator[Transaction]:
        """Yield what was committed, in that order. Raises UnreadableLogError, GuestError."""
        opened: dict[int, _Open] = {}
        size = 0
        for record in self._records():
            for number, flags, region in _operations(record):
                transaction = opened.get(number)
                if flags & _START:
                    opened[number] = _Open(record.lsn)
                elif transaction is None:
                    continue  # it began before the tail: nothing of it is left to be done
                elif flags & (_COMMIT | _UNMOUNT):
                    if not transaction.is_complete:
                        raise UnreadableLogError
                    yield Transaction(transaction.lsn, opened.pop(number).items)
                elif flags & _CONTINUED:
                    transaction.go_on(region)
                elif region:
                    transaction.add(region)
            size = size + len(record.data) if opened else 0
            if size > _MOST_OPEN:
                raise UnreadableLogError

    def _records(self) -> Iterator[_Record]:
        """Yield the records from the tail to the head."""
        at, left, lsn = self._tail, (self._head - self._tail) % self._sectors, 0
        while left > 0:
            record = self._record(at)
            if record.sectors > left or record.lsn <= lsn:
                raise UnreadableLogError
            yield record
            at, left, lsn = (at + record.sectors) % self._sectors, left - record.sectors, record.lsn

    # Where it ends.

    def _last(self) -> _Record:
        """Return the last record that counts.

        Each sector says in which round it was written. Where that changes, more or less, is the head: records are
        written side by side. So this goes from one that was complete before those to the first that is not.
        """
        first, low, head = self._round(0), 0, self._sectors
        while head - low > 1:
            middle = (low + head) // 2
            low, head = (middle, head) if self._round(middle) == first else (low, middle)
        back = min(2 * _IN_FLIGHT, self._sectors - 1)
        content = self._read(head - back, back)
        for i in range(back):
            if content[i * SECTOR : i * SECTOR + 4] == _MAGIC:
                found = self._follow((head - back + i) % self._sectors)
                if found is not None:
                    return found
        raise UnreadableLogError

    def _follow(self, at: int) -> _Record | None:
        """Return the last of the records that follow each other from one on; None: it is none."""
        found: _Record | None = None
        for _ in range(self._sectors):
            try:
                record = self._record(at)
            except (UnreadableLogError, struct.error):
                return found
            # In the same round, or in the next one after the end.
            if found is not None and record.lsn >> 32 != (found.lsn >> 32) + (
                found.at + found.sectors >= self._sectors
            ):
                return found
            found, at = record, (at + record.sectors) % self._sectors
        return found

    # What is in it.

    def _read(self, number: int, count: int) -> bytes:
        """Return sectors, around the end."""
        number %= self._sectors
        if count > self._sectors:
            raise UnreadableLogError
        before = min(count, self._sectors - number)
        data = self._disk.read(self._begin + number * SECTOR, before * SECTOR)
        return data + (self._disk.read(self._begin, (count - before) * SECTOR) if before < count else b"")

    def _round(self, number: int) -> int:
        data = self._read(number, 1)
        return int(struct.unpack_from(">I", data, 4 if data[:4] == _MAGIC else 0)[0])

    def _record(self, number: int) -> _Record:
        """Return the record whose header is a sector. Raises UnreadableLogError: none that is complete is there."""
        head = self._read(number, 1)
        if head[:4] != _MAGIC:
            raise UnreadableLogError
        version, length, lsn = struct.unpack_from(">IIQ", head, 8)
        tail, checksum, operations = (struct.unpack_from(order, head, at)[0] for order, at in _FIELDS)
        form, most = struct.unpack_from(">I16xI", head, 300)
        headers = max(1, -(-most // _PER_HEADER)) if version & 2 else 1
        count = -(-length // SECTOR)
        if headers > _MOST_HEADERS or count > 64 * headers or tail >= self._sectors or form != _LITTLE_ENDIAN:
            raise UnreadableLogError
        if lsn & 0xFFFFFFFF != number:
            raise UnreadableLogError
        heads, data = self._read(number, headers), bytearray(self._read(number + headers, count))
        if checksum and checksum != _checksum(heads, bytes(data[:length])):  # mkfs writes none
            raise UnreadableLogError
        for i in range(count):  # the round stands in place of the first four bytes of each sector
            at = 44 + 4 * i if i < 64 else i // 64 * SECTOR + 4 + 4 * (i % 64)
            data[i * SECTOR : i * SECTOR + 4] = heads[at : at + 4]
        return _Record(number, headers + count, lsn, tail, operations, bytes(data[:length]))


_FIELDS = ((">I", 28), ("<I", _CRC_AT), (">I", 40))


def _checksum(heads: bytes, data: bytes) -> int:
    """Source: fs/xfs/xfs_log.c, xlog_cksum."""
    state = crc32c(heads[:_CRC_AT] + bytes(4) + heads[_CRC_AT + 4 : _HEADER])
    for at in range(SECTOR, len(heads), SECTOR):
        state = crc32c(heads[at : at + _MORE_HEADER], state)
    return crc32c(data, state)
