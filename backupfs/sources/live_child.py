"""The process that reads one live export for a mount: `python -m backupfs.sources.live_child`, see live_image.py.

A process of its own because libnbd 1.14 can abort when a connection is cut. It makes one connection to the export;
when that is lost it says why, and ends. It has no deadlines: its parent has them, and kills it.

Descriptor 3 is the control line, a SOCK_SEQPACKET socket. The parent begins with ORDER, with which come descriptors:
shared memory, and for each slot of that memory a line (SOCK_SEQPACKET too). Answered with GREETING, or with FAREWELL,
which may come later as well. On a slot's line go ASK and ANSWER, one at a time; what was asked for is in the slot.

    ORDER     JSON {"uri", "witness", "name", "timeout_s", "slot"}; slot: bytes of memory that each has
    GREETING  JSON {"size", "allocated", "holes"}; holes: whether STATUS can be asked for
    FAREWELL  JSON {"error", "message"}; error: the name of the exception's class
    ASK       operation, length, offset
    ANSWER    errno or 0, number. READ: where in the slot the bytes asked for begin. STATUS: how many PAIRs are in the
              slot: length, 1 if it reads as zeroes. They may end before the range does
"""

import errno
import json
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from contextlib import suppress

from backupfs.errors import ProtocolError, SourceError
from backupfs.extents import Extent, coalesce
from backupfs.sources.nbd import Request, Wire
from backupfs.sources.source import ZERO, align, parse_descriptors, split
from backupfs.sources.witness import Witness
from backupfs.units import GiB, KiB

READ, STATUS = 1, 2
ASK, ANSWER, PAIR = struct.Struct("=BIQ"), struct.Struct("=II"), struct.Struct("=II")
LARGEST_UNIT = 64 * KiB

_CONTROL = 3
_ALLOCATION = "base:allocation"
_PART = 256 * KiB  # of a read, asked for at a time: so that what comes in stays in the processor's caches
_LOOK_S = 0.5  # how long it may take to find out how much of the disk is no hole


class _Slot:
    """A piece of the shared memory, and what is asked for in it."""

    def __init__(self, line: socket.socket, memory: memoryview) -> None:
        self.line = line
        self.memory = memory
        self.begins = 0  # where in the memory the bytes asked for are
        self.left = 0  # requests that are not answered
        self.error = 0


class _Proof:
    """Holds answers back until a witness has said that they are of the moment. It is asked for many at once."""

    def __init__(self, witness: Witness) -> None:
        self.wire = witness.wire
        self._witness = witness
        self._next: list[tuple[_Slot, bytes]] = []
        self._asked: list[tuple[_Slot, bytes]] = []  # about these the witness is asked now
        self._done: deque[Request] = deque()

    def add(self, slot: _Slot, answer: bytes) -> None:
        """Take an answer that is complete."""
        self._next.append((slot, answer))

    def turn(self) -> None:
        """Send what is proved, and ask about what came since. Raises SourceError: the moment is lost."""
        if self._done:
            self._witness.judge(self._done.popleft())
            for slot, answer in self._asked:
                slot.line.send(answer)
            self._asked = []
        if self._next and not self._asked:
            self._asked, self._next = self._next, []
            self._witness.ask(self._done)


class _Reader:
    """Answers what is asked on the slots' lines out of an export."""

    def __init__(self, wire: Wire, slots: list[_Slot], proof: _Proof | None) -> None:
        self._wire = wire
        self._proof = proof
        self._wires = [wire, proof.wire] if proof else [wire]
        self._slots = {slot.line.fileno(): slot for slot in slots}
        self._done: deque[Request] = deque()
        self._asked: dict[Request, _Slot] = {}
        part = min(_PART, wire.maximum) // wire.unit * wire.unit
        if wire.unit > LARGEST_UNIT or not part:
            raise ProtocolError(f"the server wants requests of {wire.unit} to {wire.maximum} bytes")
        self._part = part

    def run(self) -> None:
        """Answer until the parent is gone. Raises SourceError when the export is."""
        with select.epoll() as lines:  # of its own: those of the export change, and there are few
            for fd in (_CONTROL, *self._slots):
                lines.register(fd, select.EPOLLIN)
            while True:
                poller = select.poll()
                poller.register(lines.fileno(), select.POLLIN)
                wires = {}
                for wire in self._wires:
                    for fd, events in wire.events().items():
                        poller.register(fd, events)
                        wires[fd] = wire
                ready = {fd for fd, _ in poller.poll()}
                if lines.fileno() in ready:
                    ready.remove(lines.fileno())
                    for fd, _ in lines.poll(0):
                        ask = b"" if fd == _CONTROL else self._slots[fd].line.recv(ASK.size)
                        if not ask:  # the parent is gone; it says nothing more on the control line
                            return
                        self._ask(self._slots[fd], *ASK.unpack(ask))
                for wire in {wires[fd] for fd in ready}:
                    wire.turn()
                while self._done:
                    self._settle(self._done.popleft())
                if self._proof:
                    self._proof.turn()

    def _ask(self, slot: _Slot, operation: int, length: int, offset: int) -> None:
        first, count = align(offset, length, self._wire.unit, self._wire.size)
        slot.error = 0
        if operation == STATUS:
            slot.left = 1
            request = Request(first, count, self._done)
            self._asked[request] = slot
            self._wire.ask_status(request)
            return
        slot.begins = offset - first
        parts = list(split(first, count, self._part))
        slot.left = len(parts)
        for position, size in parts:
            request = Request(position, size, self._done, data=slot.memory[position - first :][:size])
            self._asked[request] = slot
            self._wire.ask_read(request)

    def _settle(self, request: Request) -> None:
        """Take an answer of the server's; answer the slot when it was the last one."""
        slot = self._asked.pop(request)
        slot.left -= 1
        slot.error = slot.error or request.error or 0
        if slot.left:
            return
        number = slot.begins
        if request.data is None and not slot.error:
            try:
                number = self._fill(slot, _zeroes(request))
            except ProtocolError:
                slot.error = errno.EPROTO
        answer = ANSWER.pack(slot.error, number)
        if self._proof:
            self._proof.add(slot, answer)
        else:
            slot.line.send(answer)

    @staticmethod
    def _fill(slot: _Slot, extents: list[Extent]) -> int:
        extents = extents[: len(slot.memory) // PAIR.size]
        for number, extent in enumerate(extents):
            PAIR.pack_into(slot.memory, number * PAIR.size, extent.length, extent.flag)
        return len(extents)


def _zeroes(request: Request) -> list[Extent]:
    """Return what the server said of a range. Raises ProtocolError if that is nonsense."""
    entries = request.answers.get(_ALLOCATION, ())
    return list(coalesce(parse_descriptors(entries, ZERO, request.offset, request.length)))


def _allocated(wire: Wire) -> int:
    """Return how many bytes are not known to be zero; all of them if it takes long to find out."""
    deadline = time.monotonic() + _LOOK_S
    done: deque[Request] = deque()
    position = allocated = 0
    while position < wire.size:
        request = Request(*align(position, min(GiB, wire.size - position), wire.unit, wire.size), done)
        wire.ask_status(request)
        wire.wait(done)
        done.clear()
        try:
            extents = [] if request.error else _zeroes(request)
        except ProtocolError:
            extents = []
        if not extents or extents[-1].end <= position or time.monotonic() > deadline:
            return wire.size
        allocated += sum(e.end - max(e.offset, position) for e in extents if not e.flag and e.end > position)
        position = extents[-1].end
    return allocated


def main() -> None:
    """Take the order, and read until the parent or the export is gone."""
    control = socket.socket(fileno=_CONTROL)
    message, fds, _, _ = socket.recv_fds(control, 1 << 16, 64)
    if not message:
        return  # the parent went at once
    order = json.loads(message)
    memory = memoryview(mmap.mmap(fds[0], 0))
    os.close(fds[0])
    size = order["slot"]
    slots = [_Slot(socket.socket(fileno=fd), memory[i * size :][:size]) for i, fd in enumerate(fds[1:])]
    try:
        wire = Wire(order["uri"], [_ALLOCATION], order["name"], order["timeout_s"])
        witness = Witness(order["witness"], order["name"], order["timeout_s"]) if order["witness"] else None
        holes = wire.offers(_ALLOCATION)
        greeting = {"size": wire.size, "allocated": _allocated(wire) if holes else wire.size, "holes": holes}
        if witness:
            witness.check()
        reader = _Reader(wire, slots, _Proof(witness) if witness else None)
        control.send(json.dumps(greeting).encode())
        reader.run()
    except SourceError as e:
        with suppress(OSError):  # the parent may be gone
            control.send(json.dumps({"error": type(e).__name__, "message": str(e)}).encode())
    except BrokenPipeError:
        pass  # the parent is gone


if __name__ == "__main__":
    main()
