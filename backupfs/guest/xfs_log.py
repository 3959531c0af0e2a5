"""The transactions in the log of an XFS that may not be in the file system yet.

    … | record: header, operations | record … | record |            (goes round and round)
      tail                                              head

A record's operations are the regions of the items of transactions; one that is too long goes on in the next record. A
transaction counts when its commit is there.

Source: fs/xfs/xfs_log_recover.c (xlog_recovery_process_trans and what it calls), fs/xfs/libxfs/xfs_log_format.h.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from backupfs.guest.xfs_disk import Disk
from backupfs.guest.xfs_log_ends import find_ends, records
from backupfs.guest.xfs_records import Record, Records, UnreadableLogError
from backupfs.units import MiB

_START, _COMMIT, _CONTINUED, _UNMOUNT = 0x1, 0x2, 0x8, 0x20
_CLIENTS = (0x69, 0xAA)
_OPERATION = struct.Struct(">IIBBxx")  # transaction, length, client, flags
_TRANSACTION = struct.pack("<I", 0x5452414E)  # the magic of a transaction's header
_TRANSACTION_HEADER = 16
_MOST_REGIONS = 257
_NO_LSN = 2**64 - 1
_MOST_OPEN = 192 * MiB  # bytes of transactions whose commit was not found yet
Region = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction that was committed.

    Attributes:
        lsn: the number of the record that it began in; what has it, or a higher one, is no older.
        items: of each its regions: what it is, and what it holds.
    """

    lsn: int
    items: Sequence[Sequence[Region]]


@dataclass(slots=True)
class _Open:
    """A transaction as far as it was read."""

    lsn: int
    size: int = 0
    header: bytes = b""
    items: list[list[Region]] = field(default_factory=list)

    def add(self, region: bytes) -> None:
        """Source: xlog_recover_add_to_trans."""
        self.size += len(region)
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
        if not self.items:
            self.add(region)
            return
        self.size += len(region)
        last = self.items[-1]
        if not isinstance(last[-1], bytearray):
            last[-1] = bytearray(last[-1])
        last[-1] += region

    @property
    def is_complete(self) -> bool:
        """Whether no item lacks a region."""
        return all(len(item) == _regions(item[0]) for item in self.items[-1:])


def _operations(record: Record) -> Iterator[tuple[int, int, bytes]]:
    """Yield what a record is made of: the number of a transaction, flags, a region."""
    position = 0
    for _ in range(record.operations):
        if position + _OPERATION.size > len(record.data):
            raise UnreadableLogError
        number, length, client, flags = _OPERATION.unpack_from(record.data, position)
        position += _OPERATION.size
        if position + length > len(record.data) or client not in _CLIENTS:
            raise UnreadableLogError
        yield number, flags, record.data[position : position + length]
        position += length


def _regions(item: Region) -> int:
    if len(item) < 4:
        raise UnreadableLogError
    return int(struct.unpack_from("<H", item, 2)[0])


class Log:
    """The log of a file system.

    Raises:
        UnreadableLogError: it is on another disk, or damaged.
        GuestError: the volume can't be read.
    """

    def __init__(self, disk: Disk) -> None:
        self._records = Records(disk)
        self.ends = find_ends(self._records)
        self._sums = disk.version == 5
        if self._sums and self.ends.lsn < disk.lsn != _NO_LSN:
            raise UnreadableLogError  # the file system is newer

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing in it."""
        return self.ends.tail == self.ends.head

    def records(self) -> Iterator[Record]:
        """Yield its records. Raises UnreadableLogError, GuestError."""
        for record in records(self._records, self.ends.tail, self.ends.head) if not self.is_clean else ():
            if self._sums and not record.is_sound:
                raise UnreadableLogError
            yield record

    def transactions(self) -> Iterator[Transaction]:
        """Yield what was committed, in that order. Raises UnreadableLogError, GuestError."""
        opened: dict[int, _Open] = {}
        for record in self.records():
            for number, flags, region in _operations(record):
                transaction = opened.get(number)
                if transaction is None:
                    if flags & _START:
                        opened[number] = _Open(record.lsn)
                    continue  # it began before the tail: nothing of it is left to be done
                if flags & _START:
                    raise UnreadableLogError
                if flags & _COMMIT:
                    if not transaction.is_complete:
                        raise UnreadableLogError
                    yield Transaction(transaction.lsn, opened.pop(number).items)
                elif flags & _UNMOUNT:
                    del opened[number]
                elif flags & _CONTINUED:
                    transaction.go_on(region)
                elif region:
                    transaction.add(region)
            if sum(transaction.size for transaction in opened.values()) > _MOST_OPEN:
                raise UnreadableLogError
