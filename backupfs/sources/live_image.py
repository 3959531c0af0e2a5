"""One connection to a live export, as an Image. A child process has it (live_link.py), so no libnbd here.

An export shows one moment for as long as a connection to it lasts. When the connection is lost, or the export is silent
for too long, the image is dead for good, and every read of it fails: behind another connection there may be another
moment, and bytes of both must not come out of one file.

Whoever reads on where a read ended is read ahead for: the next MiBs are asked for before they are wanted. What was read
ahead, and what is known to be zero, is believed for 2 s only. That costs next to nothing, and should somebody show an
export that is written to, what comes out of it is at least not old.
"""

import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress

from backupfs.errors import ProtocolError, SourceError
from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, check_range
from backupfs.sources.live_child import PAIR, READ, STATUS
from backupfs.sources.live_link import LARGEST, Export, Link, Loans, Slot
from backupfs.units import KiB, MiB

DEADLINE_S = 10.0
"""For a read, and for making a connection."""

_SLOTS = 24  # for reads at once, and for what they lend; more wait
_BLOCK = LARGEST  # what is read ahead at a time
_BLOCKS = 12  # slots for what is read ahead, of all readers of the disk
_AHEAD = 4  # blocks
_POSITIONS = 64  # ends of reads that are remembered
_REGION = 64 * MiB  # what a question after holes is about
_REGIONS = 64  # whose answers are remembered
_WORTH = 64 * KiB  # a smaller read is not worth that question
_FRESH_S = 2.0
_LOOK_S = 0.01  # how often whoever waits for a slot looks whether one that was lent came back
_ZEROES = memoryview(bytes(LARGEST))


class _Holes:
    """What is known to be zero, by regions. Old news are no news."""

    def __init__(self) -> None:
        self._regions: OrderedDict[int, tuple[float, list[Extent]]] = OrderedDict()

    def region(self, index: int) -> list[Extent] | None:
        """Return what a region is made of, without gaps; None: not known."""
        asked_at, extents = self._regions.get(index, (0.0, None))
        return extents if time.monotonic() <= asked_at + _FRESH_S else None

    def learn(self, index: int, asked_at: float, extents: list[Extent]) -> None:
        """Remember a region."""
        self._regions[index] = asked_at, extents
        self._regions.move_to_end(index)
        if len(self._regions) > _REGIONS:
            self._regions.popitem(last=False)

    def cover(self, first: int, length: int) -> bool:
        """Whether a range inside of one region is known to be zero."""
        extents = self.region(first // _REGION)
        if not extents:
            return False
        found = extents[bisect_right(extents, first, key=lambda e: e.offset) - 1]
        return found.flag and found.end >= first + length


class LiveImage:
    """An export that is connected to, until it is lost or closed.

    Args:
        export: which.
        name: what messages call it.
        deadline_s: for each read, and for `connect`.

    Attributes:
        size: bytes.
        allocated: bytes that are not known to be holes.
        since_ns: when it was connected, on time.time_ns's clock.

    Raises:
        ConnectError: the child can't be started.
    """

    def __init__(self, export: Export, name: str, deadline_s: float = DEADLINE_S) -> None:
        self.size = self.allocated = self.since_ns = 0
        self._deadline_s = deadline_s
        self._link = Link(export, name, deadline_s, _SLOTS + _BLOCKS)
        self._state = threading.Condition()
        self._free = self._link.slots[:_SLOTS]  # for what was not read ahead
        self._spare = self._link.slots[_SLOTS:]  # for blocks
        self._blocks: OrderedDict[int, Slot] = OrderedDict()  # by number; the one asked for last is the last
        self._used_up: set[int] = set()  # blocks that were read to their ends
        self._loans = Loans()
        self._ends: OrderedDict[int, None] = OrderedDict()  # where reads ended
        self._holes = _Holes()
        self._tells_holes = False

    def connect(self) -> None:
        """Wait for the connection. Once, before anything else; `close` from another thread ends it.

        Raises:
            SourceError: there is none. The image is dead.
        """
        greeting = self._link.connect()
        self.size, self.allocated = greeting["size"], greeting["allocated"]
        self._tells_holes = bool(greeting["holes"])
        self.since_ns = time.time_ns()

    @property
    def failure(self) -> SourceError | None:
        """Why it is dead, if it is."""
        return self._link.failure

    def alive(self) -> bool:
        """Look whether the connection is there, as far as that is known. Does not wait."""
        return self._link.alive()

    def close(self) -> None:
        """End the connection and the child. Reads that are waiting fail. Twice does no harm."""
        self._link.close()

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `Image.readinto`. Fails when there is no answer by the deadline."""
        target = memoryview(buffer).cast("B")
        check_range(self, offset, len(target))
        deadline = time.monotonic() + self._deadline_s
        for first, length in _cut(offset, len(target), _BLOCK):
            target[first - offset :][:length] = self._read(first, length, deadline)

    def lend(self, offset: int, length: int) -> memoryview:
        """Return the bytes of a range. Their memory is the caller's until he lets go of it: soon, there is little.

        Raises:
            ValueError: the range is not inside the disk.
            SourceError: the bytes can't be had, or not by the deadline.
        """
        check_range(self, offset, length)
        if length and offset // _BLOCK == (offset + length - 1) // _BLOCK:
            return self._read(offset, length, time.monotonic() + self._deadline_s)
        content = bytearray(length)
        self.readinto(offset, content)
        return memoryview(content)

    def lend_at_once(self, offset: int, length: int) -> memoryview | None:
        """Return what `lend` would, if it was read ahead and is here. Does not wait."""
        check_range(self, offset, length)
        index = offset // _BLOCK
        with self._state:
            if self.failure is not None or offset not in self._ends:
                return None
            if self._holes.cover(offset, length):
                self._goes_on(offset, length)
                return _ZEROES[:length]
            slot = self._blocks.get(index)
            if slot is None or not _usable(slot) or not _here(slot) or slot.answer is None or slot.answer[0]:
                return None
            if offset + length > min((index + 1) * _BLOCK, self.size):
                return None
            self._goes_on(offset, length)
            slot.users += 1
            self._read_ahead(index + 1)
            return self._lent(slot, slot.answer[1], offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Image.extents`. What the export does not answer about counts as data."""
        check_range(self, offset, length)
        return coalesce(self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        for first, count in _cut(offset, length, _REGION):
            yield from clip(self._region(first // _REGION, time.monotonic() + self._deadline_s), first, count)

    def _read(self, first: int, length: int, deadline: float) -> memoryview:
        """Return a range inside of one block."""
        with self._link.used():
            with self._state:
                goes_on = self._goes_on(first, length)
            if (goes_on or length >= _WORTH) and self._is_zero(first, length, deadline):
                return _ZEROES[:length]
            index = first // _BLOCK
            with self._state:
                if goes_on:
                    self._read_ahead(index)
                slot = self._blocks.get(index)
                if slot is not None and not _usable(slot):
                    slot = None
                if slot is not None:
                    slot.users += 1
            if slot is not None:
                # One sector that can't be read spoils a block; it may not be one that is wanted.
                with suppress(ProtocolError):
                    return self._lent(slot, self._answered(slot, deadline), first, length)
            slot = self._own_slot(deadline)
            return self._lent(slot, self._asked(slot, READ, first, length, deadline), first, length)

    # Slots.

    def _answered(self, slot: Slot, deadline: float) -> int:
        """Wait for the answer; return its number. When it raises, the slot is given back."""
        try:
            return self._link.answered(slot, deadline)
        except BaseException:
            with self._state:
                self._give_back(slot)
            raise

    def _asked(self, slot: Slot, operation: int, offset: int, length: int, deadline: float) -> int:
        """Ask, and then as `_answered`."""
        with suppress(OSError):  # the child is gone, as the answer will say
            slot.ask(operation, offset, length)
        return self._answered(slot, deadline)

    def _lent(self, slot: Slot, begin: int, first: int, length: int) -> memoryview:
        """Return the bytes of a range out of a slot, which is given back when they are let go."""
        if slot.block is None:
            return self._loans.lend(slot, begin, length)
        block = slot.block * _BLOCK
        if first + length == min(block + _BLOCK, self.size):
            self._used_up.add(slot.block)
        return self._loans.lend(slot, begin + first - block, length)

    def _own_slot(self, deadline: float) -> Slot:
        with self._state:
            while True:
                self._take_back()
                if self._free:
                    slot = self._free.pop()
                    slot.users = 1
                    return slot
                if self.failure is not None or time.monotonic() > deadline:
                    raise self._link.lose(self._link.silent())
                self._state.wait(_LOOK_S)

    def _take_back(self) -> None:
        """Take back what was let go. With the state locked."""
        for slot in self._loans.returned():
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        """Note that somebody has no use for a slot any more. With the state locked."""
        slot.users -= 1
        if slot.users:
            return
        if slot.block is None:
            self._free.append(slot)
            self._state.notify()
        elif slot.answer is not None and slot.answer[0]:
            self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        assert slot.block is not None
        del self._blocks[slot.block]
        self._used_up.discard(slot.block)
        slot.block = None
        self._spare.append(slot)

    # Reading ahead. With the state locked.

    def _goes_on(self, first: int, length: int) -> bool:
        """Whether a read begins where another ended; remember where it ends."""
        goes_on = first in self._ends
        self._ends.pop(first, None)
        self._ends[first + length] = None
        if len(self._ends) > _POSITIONS:
            self._ends.popitem(last=False)
        return goes_on

    def _read_ahead(self, index: int) -> None:
        """Ask for a block and those after it, as far as there are slots."""
        self._take_back()
        for number in range(index, min(index + _AHEAD, -(-self.size // _BLOCK))):
            offset = number * _BLOCK
            length = min(_BLOCK, self.size - offset)
            if number in self._blocks or self._holes.cover(offset, length):
                continue
            if not self._spare and not self._free_a_block():
                return
            slot = self._spare.pop()
            slot.block, self._blocks[number] = number, slot
            with suppress(OSError):  # the child is gone, as the answer will say
                slot.ask(READ, offset, length)

    def _free_a_block(self) -> bool:
        """Give up a block that was read to its end, or that is old: the newest, as processors' caches may hold it."""
        for number, slot in reversed(self._blocks.items()):
            if not slot.users and (number in self._used_up or not _usable(slot)) and _here(slot):
                self._forget(slot)
                return True
        return False

    # Holes.

    def _is_zero(self, first: int, length: int, deadline: float) -> bool:
        self._region(first // _REGION, deadline)
        with self._state:
            return self._holes.cover(first, length)

    def _region(self, index: int, deadline: float) -> list[Extent]:
        """Return what a region is made of, without gaps. Asks if it isn't known."""
        with self._state:
            known = self._holes.region(index)
        if known is not None:
            return known
        asked_at, first = time.monotonic(), index * _REGION
        length = min(_REGION, self.size - first)
        told = self._told(first, length, deadline) if self._tells_holes else []
        end = told[-1].end if told else first
        extents = list(coalesce([*told, Extent(end, first + length - end, False)]))
        with self._state:
            self._holes.learn(index, asked_at, extents)
        return extents

    def _told(self, first: int, length: int, deadline: float) -> list[Extent]:
        """Ask after holes. Return what comes, from `first` on; nothing if the server refuses."""
        with self._link.used(), suppress(ProtocolError):
            slot = self._own_slot(deadline)
            count = self._asked(slot, STATUS, first, length, deadline)
            pairs = bytes(self._loans.lend(slot, 0, count * PAIR.size))
            extents, position = [], first
            for size, zero in PAIR.iter_unpack(pairs):
                extents.append(Extent(position, size, bool(zero)))
                position += size
            return list(clip(extents, first, length))
        return []


def _usable(slot: Slot) -> bool:
    """Whether a block is fresh, or still to come."""
    return time.monotonic() <= slot.asked_at + _FRESH_S or not _here(slot)


def _here(slot: Slot) -> bool:
    """Whether the answer is here; it never will be when the child is gone."""
    try:
        return slot.take(0)
    except (OSError, EOFError):
        return False


def _cut(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of `unit`."""
    end = offset + length
    while offset < end:
        border = min((offset // unit + 1) * unit, end)
        yield offset, border - offset
        offset = border
