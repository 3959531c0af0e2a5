"""One connection to a live export, as an Image: the side of the process that must not die. No libnbd here.

A child process (live_child.py) has the connection. Between the two lies shared memory in slots of a MiB, and for each
slot a line, a socket pair of its own: so a thread that reads asks on its slot's line, waits there with a deadline, and
nobody has to hand out answers.

An export shows one moment for as long as a connection to it lasts. When the connection is lost, or the export is silent
for too long, the image is dead for good, and every read of it fails: behind another connection there may be another
moment, and bytes of both must not come out of one file.

Whoever reads on where a read ended is read ahead for: the next MiBs are asked for before they are wanted. What was read
ahead, and what is known to be zero, is believed for 2 s only. That costs next to nothing, and should somebody show an
export that is written to, what comes out of it is at least not old.
"""

import errno
import json
import mmap
import os
import socket
import sys
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from backupfs import errors
from backupfs.errors import ConnectError, ProtocolError, SourceError
from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, check_range
from backupfs.sources.child import Child
from backupfs.sources.live_child import ANSWER, ASK, LARGEST_UNIT, PAIR, READ, STATUS
from backupfs.units import KiB, MiB

DEADLINE_S = 10.0
"""For a read, and for making a connection."""

READERS = 16
"""Reads at once that each have a slot; more wait for one."""

_BLOCK = MiB  # what is read ahead at a time; the kernel asks for no more at once
_BLOCKS = 12  # slots for what is read ahead, of all readers of the disk
_AHEAD = 4  # blocks
_SLOT = _BLOCK + 2 * LARGEST_UNIT  # the child aligns what it reads
_POSITIONS = 64  # remembered ends of reads
_REGION = 64 * MiB  # what a question after holes is about
_REGIONS = 64  # of which it is remembered
_WORTH = 64 * KiB  # a smaller read is not worth a question
_FRESH_S = 2.0


class _Slot:
    """A piece of the shared memory, and its line."""

    def __init__(self, line: socket.socket, memory: memoryview) -> None:
        self.line = line
        self.memory = memory
        self.waiting = threading.Lock()  # who has it takes the answer from the line
        self.answer: tuple[int, int] | None = None
        self.asked_at = 0.0
        self.users = 0
        self.used_up = False  # read to its end

    def ask(self, operation: int, offset: int, length: int) -> None:
        """Ask. The answer to what was asked before has to be here."""
        self.answer, self.asked_at, self.used_up = None, time.monotonic(), False
        self.line.send(ASK.pack(operation, length, offset))

    def take(self, timeout_s: float) -> bool:
        """Wait for the answer; False: the time is over. Raises OSError, EOFError when the child is gone."""
        deadline = time.monotonic() + timeout_s
        if not self.waiting.acquire(timeout=max(0.0, timeout_s)):
            return False
        try:
            if self.answer is None:
                self.line.settimeout(max(0.0, deadline - time.monotonic()))
                message = self.line.recv(ANSWER.size)
                if not message:
                    raise EOFError
                self.answer = ANSWER.unpack(message)
            return True
        except (TimeoutError, BlockingIOError):
            return False
        finally:
            self.waiting.release()

    def recyclable(self) -> bool:
        """Whether nobody needs what is in it any more."""
        if self.users or not (self.used_up or time.monotonic() > self.asked_at + _FRESH_S):
            return False
        try:
            return self.take(0)
        except (OSError, EOFError):
            return False


class LiveImage:
    """An export that is connected to, until it is lost or closed.

    Args:
        uri: of the export.
        name: what messages call it.
        deadline_s: for each read, and for `connect`.

    Attributes:
        size: bytes.
        allocated: bytes that are not known to be holes.
        since_ns: when it was connected, on time.time_ns's clock.

    Raises:
        ConnectError: the child can't be started.
    """

    def __init__(self, uri: str, name: str, deadline_s: float = DEADLINE_S) -> None:
        self.size = self.allocated = self.since_ns = 0
        self._name = name
        self._deadline_s = deadline_s
        self._state = threading.Condition()
        self._inside = 0  # threads that use the slots
        self._failure: SourceError | None = None
        self._holes = False
        self._regions: OrderedDict[int, tuple[float, list[Extent]]] = OrderedDict()
        self._positions: OrderedDict[int, None] = OrderedDict()
        self._blocks: OrderedDict[int, _Slot] = OrderedDict()
        self._parts = ExitStack()  # the lines and the memory
        with ExitStack() as undo:
            undo.callback(self._parts.close)
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(theirs.close)
            self._parts.callback(self._control.close)
            slots = self._make_slots(json.dumps({"uri": uri, "name": name, "timeout_s": deadline_s, "slot": _SLOT}))
            self._free, self._spare = slots[:READERS], slots[READERS:]
            self._child = Child([sys.executable, "-m", "backupfs.sources.live_child"], theirs)
            undo.pop_all()

    def _make_slots(self, order: str) -> list[_Slot]:
        """Make the memory and the lines; send the child its ends, with its order."""
        count = READERS + _BLOCKS
        memory_fd = os.memfd_create("backupfs-live")
        with ExitStack() as sent:
            sent.callback(os.close, memory_fd)
            os.truncate(memory_fd, count * _SLOT)
            memory = mmap.mmap(memory_fd, 0)
            self._parts.callback(memory.close)
            whole = self._parts.enter_context(memoryview(memory))
            slots, fds = [], [memory_fd]
            for number in range(count):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._parts.callback(ours.close)
                sent.callback(theirs.close)
                fds.append(theirs.fileno())
                slots.append(_Slot(ours, self._parts.enter_context(whole[number * _SLOT :][:_SLOT])))
            socket.send_fds(self._control, [order.encode()], fds)
        return slots

    def connect(self) -> None:
        """Wait for the connection. Once, before anything else; `close` from another thread ends it.

        Raises:
            SourceError: there is none. The image is closed.
        """
        with self._used():
            self._control.settimeout(self._deadline_s)
            try:
                message = self._control.recv(1 << 16)
            except TimeoutError:
                raise self._lose(self._silent()) from None
            except OSError as e:
                raise self._lose(ConnectError(f"{self._name}: {e.strerror}")) from e
            greeting = json.loads(message) if message else {}
            if "size" not in greeting:
                raise self._lose(self._farewell(message))
            self.size, self.allocated, self._holes = greeting["size"], greeting["allocated"], greeting["holes"]
            self.since_ns = time.time_ns()

    def alive(self) -> bool:
        """Look whether the connection is there, as far as that is known. Does not wait."""
        with self._state:
            if self._failure is not None:
                return False
            self._inside += 1
        try:
            self._control.settimeout(0)
            message = self._control.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            message = b""
        finally:
            self._leave()
        self._lose(self._farewell(message))
        return False

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `Image.readinto`. Fails when there is no answer by the deadline."""
        check_range(self, offset, len(buffer))
        deadline = time.monotonic() + self._deadline_s
        with self._used(), memoryview(buffer).cast("B") as target:
            for first, length in _cut(offset, len(target), _BLOCK):
                self._read(first, target[first - offset :][:length], deadline)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Image.extents`. What the export does not answer about counts as data."""
        check_range(self, offset, length)
        return coalesce(self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        for first, count in _cut(offset, length, _REGION):
            with self._used():
                region = self._region(first // _REGION, time.monotonic() + self._deadline_s)
            yield from clip(region, first, count)

    def close(self) -> None:
        """End the connection and the child. Reads that are waiting fail. Twice does no harm."""
        self._lose(ConnectError(f"{self._name}: closed"))

    # Reading.

    def _read(self, first: int, target: memoryview, deadline: float) -> None:
        """Read a range that does not pass the end of a block."""
        length = len(target)
        follows = self._follows(first, length)
        if (follows or length >= _WORTH) and self._is_zero(first, length, deadline):
            target[:] = bytes(length)
            return
        index = first // _BLOCK
        slot = self._block(index, ahead=follows)
        if slot is not None:
            try:
                self._wait(slot, deadline)
                error, begins = slot.answer or (errno.EIO, 0)
                if not error:
                    begins += first - index * _BLOCK
                    target[:] = slot.memory[begins : begins + length]
                    return
            finally:
                with self._state:
                    slot.users -= 1
                    slot.used_up = slot.used_up or first + length == min((index + 1) * _BLOCK, self.size)
                    if slot.answer and slot.answer[0]:
                        self._forget(index, slot)
        # Not read ahead, or something in the block can't be read: perhaps not what is wanted.
        with self._own_slot(deadline) as slot:
            begins = self._answered(slot, READ, first, length, deadline)
            target[:] = slot.memory[begins : begins + length]

    def _follows(self, first: int, length: int) -> bool:
        """Whether a read goes on where another ended; remember where it ends."""
        with self._state:
            follows = first in self._positions
            self._positions.pop(first, None)
            self._positions[first + length] = None
            if len(self._positions) > _POSITIONS:
                self._positions.popitem(last=False)
            return follows

    def _block(self, index: int, *, ahead: bool) -> _Slot | None:
        """Return the slot that has a block, or will; it is used then. Ask for those after it, when told to."""
        with self._state:
            if ahead:
                for number in range(index, min(index + 1 + _AHEAD, -(-self.size // _BLOCK))):
                    self._ask_ahead(number)
            slot = self._blocks.get(index)
            if slot is None or (slot.answer is not None and time.monotonic() > slot.asked_at + _FRESH_S):
                return None
            slot.users += 1
            return slot

    def _ask_ahead(self, index: int) -> None:
        offset = index * _BLOCK
        length = min(_BLOCK, self.size - offset)
        if index in self._blocks or self._known_zero(offset, length):
            return
        if not self._spare:
            # The newest first: what the processor's caches still hold.
            for old, slot in reversed(self._blocks.items()):
                if slot.recyclable():
                    self._forget(old, slot)
                    break
            else:
                return
        slot = self._spare.pop()
        with suppress(OSError):  # whoever wants it finds out that the child is gone
            slot.ask(READ, offset, length)
        self._blocks[index] = slot

    def _forget(self, index: int, slot: _Slot) -> None:
        if self._blocks.get(index) is slot and not slot.users:
            del self._blocks[index]
            self._spare.append(slot)

    @contextmanager
    def _own_slot(self, deadline: float) -> Iterator[_Slot]:
        with self._state:
            while not self._free:
                if not self._state.wait(max(0.0, deadline - time.monotonic())) or self._failure:
                    raise self._failure_again() if self._failure else self._lose(self._silent())
            slot = self._free.pop()
        try:
            yield slot
        finally:
            with self._state:
                self._free.append(slot)
                self._state.notify()

    def _answered(self, slot: _Slot, operation: int, offset: int, length: int, deadline: float) -> int:
        """Ask and wait. Returns the answer's number."""
        try:
            slot.ask(operation, offset, length)
        except OSError as e:
            raise self._lose_child() from e
        self._wait(slot, deadline)
        error, number = slot.answer or (errno.EIO, 0)
        if error:
            words = f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"
            raise ProtocolError(f"{self._name}: reading {length} bytes at offset {offset} failed: {words}")
        return number

    def _wait(self, slot: _Slot, deadline: float) -> None:
        try:
            if not slot.take(deadline - time.monotonic()):
                raise self._lose(self._silent())
        except (OSError, EOFError) as e:
            raise self._lose_child() from e

    # Holes.

    def _is_zero(self, first: int, length: int, deadline: float) -> bool:
        with self._state:
            if self._known_zero(first, length):
                return True
        self._region(first // _REGION, deadline)
        with self._state:
            return self._known_zero(first, length)

    def _known_zero(self, first: int, length: int) -> bool:
        known = self._known_region(first // _REGION)
        if known is None:
            return False
        found = known[bisect_right(known, first, key=lambda e: e.offset) - 1]
        return found.flag and found.end >= first + length

    def _known_region(self, index: int) -> list[Extent] | None:
        asked_at, extents = self._regions.get(index, (0.0, []))
        return extents if extents and time.monotonic() <= asked_at + _FRESH_S else None

    def _region(self, index: int, deadline: float) -> list[Extent]:
        """Return what a region is made of, without gaps. Asks if it isn't known."""
        with self._state:
            known = self._known_region(index)
        if known is not None:
            return known
        asked_at, first = time.monotonic(), index * _REGION
        length = min(_REGION, self.size - first)
        extents = [] if not self._holes else self._ask_region(first, length, deadline)
        covered = extents[-1].end if extents else first
        extents = list(coalesce([*extents, Extent(covered, first + length - covered, False)]))
        with self._state:
            self._regions.pop(index, None)
            self._regions[index] = asked_at, extents
            if len(self._regions) > _REGIONS:
                self._regions.popitem(last=False)
        return extents

    def _ask_region(self, first: int, length: int, deadline: float) -> list[Extent]:
        extents = []
        with self._own_slot(deadline) as slot:
            try:
                count = self._answered(slot, STATUS, first, length, deadline)
            except ProtocolError:
                return []  # it only means that nothing is known
            position = first
            for size, flag in PAIR.iter_unpack(slot.memory[: count * PAIR.size]):
                extents.append(Extent(position, size, bool(flag)))
                position += size
        return list(clip(extents, first, length))

    # The end.

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Keep the lines and the memory while they are used. Raises when the image is dead."""
        with self._state:
            if self._failure is not None:
                raise self._failure_again()
            self._inside += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._state:
            self._inside -= 1
            if self._failure is not None and not self._inside:
                self._parts.close()

    def _lose(self, failure: SourceError) -> SourceError:
        """End it all because of `failure`. Returns what to raise: the first reason, if there was one."""
        with self._state:
            first = self._failure is None
            if first:
                self._failure = failure
            self._state.notify_all()
        words = self._child.stop()  # whoever waits on a line finds it closed
        if first and words:
            failure.add_note(words)
        with self._state:
            if not self._inside:
                self._parts.close()
            return self._failure_again()

    def _failure_again(self) -> SourceError:
        assert self._failure is not None
        return type(self._failure)(str(self._failure))  # a new one: threads must not share a traceback

    def _lose_child(self) -> SourceError:
        """The child is gone: find out why."""
        message = b""
        with suppress(OSError):
            self._control.settimeout(0)
            message = self._control.recv(1 << 16)
        return self._lose(self._farewell(message))

    def _farewell(self, message: bytes) -> SourceError:
        said = json.loads(message) if message else {}
        if "error" not in said:
            return ConnectError(f"{self._name}: the process that reads it died")
        kind = getattr(errors, said["error"])
        reason: SourceError = kind(said["message"])
        return reason

    def _silent(self) -> ConnectError:
        return ConnectError(f"no answer from {self._name} for {self._deadline_s:g} s")


def _cut(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of `unit`."""
    end = offset + length
    while offset < end:
        border = min((offset // unit + 1) * unit, end)
        yield offset, border - offset
        offset = border
