"""The journal of an ext file system, jbd2: which blocks its committed transactions write, and where they lie in it.

    superblock | descriptor block block … revoke commit | descriptor block … commit | …      (wraps around)

A transaction counts when its commit block is there. As the kernel does it: fs/jbd2/recovery.c, do_one_pass; layouts:
include/linux/jbd2.h. Numbers are big-endian.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backupfs.guest.crc32c import crc32c

_MAGIC = 0xC03B3998
_HEADER = struct.Struct(">3I")  # magic, type, sequence
DESCRIPTOR, COMMIT, _SUPER_1, _SUPER_2, REVOKE = 1, 2, 3, 4, 5
_CHECKSUM_1 = 0x1  # compat
_WIDE, _ASYNC, _CHECKSUM_2, _CHECKSUM_3, _FAST = 0x2, 0x4, 0x8, 0x10, 0x20  # incompat; 0x1: revokes
_KNOWN = 0x3F
_SUPER_SIZE, _CRC32C_TYPE, _CRC32_TYPE = 1024, 4, 1
_COMMIT_SIZE = 64  # struct commit_header
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8  # a tag's flags
_FAST_BLOCKS, _LEAST_BLOCKS = 256, 1024
_FAST_HEAD = 9  # fs/ext4/fast_commit.h, EXT4_FC_TAG_HEAD
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class DamagedJournalError(Exception):
    """The kernel would not replay it either."""


@dataclass(frozen=True, slots=True)
class Logged:
    """A block that the journal writes: where its content is in the journal, in blocks."""

    at: int
    sequence: int
    escaped: bool
    checksum: int


@dataclass(slots=True)
class _Record:
    """A block of the log that describes others."""

    kind: int
    sequence: int
    content: bytes
    tags: list[tuple[int, Logged]] = field(default_factory=list)
    intact: bool = True


class Journal:
    """A journal.

    Args:
        read: returns a block of it. Raises DamagedJournalError where there is none.
        block: bytes of a block.
        blocks: how many it has.

    Raises:
        DamagedJournalError: it has no superblock that makes sense, or features that are not known.
    """

    def __init__(self, read: Callable[[int], bytes], block: int, blocks: int) -> None:
        self._read = read
        self._block = block
        head = read(0)[:_SUPER_SIZE]
        magic, kind, _, size, self._length, self._first, self._sequence, self._start = struct.unpack_from(">8I", head)
        if magic != _MAGIC or kind not in {_SUPER_1, _SUPER_2}:
            raise DamagedJournalError("it has no superblock")
        compat, incompat = struct.unpack_from(">2I", head, 36) if kind == _SUPER_2 else (0, 0)
        if incompat & ~_KNOWN:
            raise DamagedJournalError(f"it has features that backupfs does not know ({incompat & ~_KNOWN:#x})")
        self._checked = bool(incompat & (_CHECKSUM_2 | _CHECKSUM_3))
        if self._checked:
            if (incompat & _CHECKSUM_2 and incompat & _CHECKSUM_3) or head[80] != _CRC32C_TYPE:
                raise DamagedJournalError("its checksums are of an unknown kind")
            if crc32c(head[:252] + bytes(4) + head[256:]) != struct.unpack_from(">I", head, 252)[0]:
                raise DamagedJournalError("its superblock does not match its checksum")
        self._seed = crc32c(head[48:64])
        self._incompat = incompat
        self._sums_blocks = bool(compat & _CHECKSUM_1) and not self._checked
        self._last = self._length
        if incompat & _FAST:
            fast = struct.unpack_from(">I", head, 84)[0] or _FAST_BLOCKS
            if self._length - fast >= _LEAST_BLOCKS:
                self._last = self._length - fast
        if size != block or self._length > blocks or not 1 <= self._first < self._last:
            raise DamagedJournalError("its superblock makes no sense")
        if self._start and not self._first <= self._start < self._last:
            raise DamagedJournalError("its superblock makes no sense")
        self.fast_commits = False  # found by `committed`: there are some, which it does not return

    def committed(self) -> dict[int, Logged]:
        """Return what is to be written: the block of the file system, and its content.

        Raises:
            DamagedJournalError: what was committed is damaged; the kernel would not mount it.
        """
        if not self._start:
            return {}
        end, revoked, written = self._scan()
        found: dict[int, Logged] = {}
        for block, logged in written:
            if block not in revoked or _before(revoked[block], logged.sequence):
                found[block] = logged
        if self._checked:
            self._verify(list(found.values()))
        self.fast_commits = bool(self._incompat & _FAST) and self._fast_commits(end)
        return found

    # The log.

    def _scan(self) -> tuple[int, dict[int, int], list[tuple[int, Logged]]]:
        """Return the first transaction that does not count, what was revoked last in which, and all that is written."""
        revoked: dict[int, int] = {}
        written: list[tuple[int, Logged]] = []
        open_revoked: list[int] = []
        open_written: list[tuple[int, Logged]] = []
        suspect, newest, crc = False, 0, 0xFFFFFFFF
        sequence = self._sequence
        for record in self._verified(self._walk()):
            if record.kind == DESCRIPTOR:
                suspect |= not record.intact
                open_written += record.tags
                if self._sums_blocks:
                    crc = _crc32_be(record.content, crc)
                    for _, logged in record.tags:
                        crc = _crc32_be(self._read(logged.at), crc)
            elif record.kind == REVOKE:
                suspect |= not record.intact
                open_revoked += self._revokes(record) if record.intact else []
            else:
                seconds = struct.unpack_from(">Q", record.content, 48)[0]
                if suspect and seconds >= newest:
                    raise DamagedJournalError(f"transaction {record.sequence} does not match its checksum")
                intact = record.intact and (not self._sums_blocks or _sums_match(record.content, crc))
                if not (suspect or intact or self._incompat & _ASYNC) and seconds >= newest:
                    raise DamagedJournalError(f"the end of transaction {record.sequence} does not match its checksum")
                if suspect or not intact:
                    break  # left from before; with `async` the last one may be torn
                newest, crc = seconds, 0xFFFFFFFF
                written += open_written
                revoked |= dict.fromkeys(open_revoked, record.sequence)
                open_revoked, open_written = [], []
                sequence = record.sequence + 1 & 0xFFFFFFFF
        return sequence, revoked, written

    def _walk(self) -> Iterator[_Record]:
        """Yield what describes blocks, in order, up to where the log ends. Nothing is verified."""
        position, sequence, left = self._start, self._sequence, self._last - self._first
        while left > 0:
            content = self._read(position)
            magic, kind, number = _HEADER.unpack_from(content)
            if magic != _MAGIC or number != sequence or kind not in {DESCRIPTOR, COMMIT, REVOKE}:
                return
            record = _Record(kind, sequence, content)
            position, left = self._after(position), left - 1
            if kind == DESCRIPTOR:
                for block, escaped, checksum in self._tags(content):
                    record.tags.append((block, Logged(position, sequence, escaped, checksum)))
                    position, left = self._after(position), left - 1
            elif kind == COMMIT:
                sequence = sequence + 1 & 0xFFFFFFFF
            yield record

    def _after(self, position: int) -> int:
        return position + 1 if position + 1 < self._last else self._first

    def _tags(self, content: bytes) -> Iterator[tuple[int, bool, int]]:
        """Yield block, whether escaped, checksum, of what a descriptor lists."""
        wide, third = self._incompat & _WIDE, self._incompat & _CHECKSUM_3
        size = 16 if third else 8 + (2 if self._incompat & _CHECKSUM_2 else 0) + (4 if wide else 0)
        position, end = _HEADER.size, len(content) - (4 if self._checked else 0)
        while position + size <= end:
            block, checksum, flags = struct.unpack_from(">IHH", content, position)
            if third:
                checksum = struct.unpack_from(">I", content, position + 12)[0]
            if wide:
                block |= struct.unpack_from(">I", content, position + 8)[0] << 32
            yield block, bool(flags & _ESCAPED), checksum
            if flags & _LAST:
                return
            position += size + (0 if flags & _SAME_UUID else 16)

    def _revokes(self, record: _Record) -> list[int]:
        used = struct.unpack_from(">I", record.content, 12)[0]
        if used > self._block - (4 if self._checked else 0):
            raise DamagedJournalError(f"transaction {record.sequence} revokes more than there is room for")
        count, code = (used - 16) // (8 if self._incompat & _WIDE else 4), "Q" if self._incompat & _WIDE else "I"
        return list(struct.unpack_from(f">{max(0, count)}{code}", record.content, 16))

    # Checksums.

    def _verified(self, records: Iterator[_Record]) -> Iterator[_Record]:
        """Set `intact` of each."""
        for record in records:
            if self._checked:
                at = 16 if record.kind == COMMIT else self._block - 4
                blank = record.content[:at] + bytes(4) + record.content[at + 4 :]
                expected = struct.unpack_from(">I", record.content, at)[0]
                record.intact = crc32c(blank, self._seed) == expected or (
                    record.kind == COMMIT
                    and crc32c(blank[:_COMMIT_SIZE] + bytes(self._block - _COMMIT_SIZE), self._seed) == expected
                )
            yield record

    def _verify(self, blocks: list[Logged]) -> None:
        """Raise DamagedJournalError unless what is to be written matches its checksums."""
        mask = 0xFFFFFFFF if self._incompat & _CHECKSUM_3 else 0xFFFF
        for logged in blocks:
            state = crc32c(struct.pack(">I", logged.sequence), self._seed)
            if crc32c(self._read(logged.at), state) & mask != logged.checksum:
                raise DamagedJournalError(f"block {logged.at} of it does not match its checksum")

    def _fast_commits(self, sequence: int) -> bool:
        """Say whether there is something that a fast commit added to the last transaction."""
        if self._last + 1 >= self._length:
            return False
        tag, length, _, number = struct.unpack_from("<HHII", self._read(self._last + 1))
        return bool(tag == _FAST_HEAD and length == 8 and number == sequence)


def _before(left: int, right: int) -> bool:
    """Compare transactions, whose numbers wrap."""
    return (left - right) & 0xFFFFFFFF >= 0x80000000


def _crc32_be(data: bytes, state: int) -> int:
    """Return the state of a CRC-32 that begins at the highest bit, as `crc32_be` in Linux."""
    mirrored = zlib.crc32(data.translate(_REVERSED), _mirror(state) ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return _mirror(mirrored)


def _mirror(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little").translate(_REVERSED), "big")


def _sums_match(commit: bytes, crc: int) -> bool:
    """Compare the checksum over a transaction, of journals before checksums 2 and 3, if there is one."""
    kind, size, found = commit[12], commit[13], struct.unpack_from(">I", commit, 16)[0]
    return (kind, size, found) == (_CRC32_TYPE, 4, crc) or (kind, size, found) == (0, 0, 0)
