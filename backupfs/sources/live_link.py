"""The line to the process that reads one live export (live_child.py): shared memory in slots of a MiB, each with a
socket pair of its own. So a thread asks on its slot's line and waits there, with a deadline, and nobody has to hand out
answers. No libnbd here.
"""

import errno
import json
import mmap
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import numpy as np

from backupfs import errors
from backupfs.errors import ConnectError, ProtocolError, SourceError
from backupfs.sources.child import Child
from backupfs.sources.live_child import ANSWER, ASK, LARGEST_UNIT
from backupfs.units import MiB

LARGEST = MiB
"""Bytes that can be asked for at once."""

_SLOT = LARGEST + 2 * LARGEST_UNIT  # the child aligns what it reads
_MESSAGE = 1 << 16


class Slot:
    """A piece of the shared memory, and its line.

    Attributes:
        answer: errno or 0, and a number: see live_child.py. None until it was taken from the line.
        asked_at: on time.monotonic's clock.
        users: how many have a use for what is in it, and
        block: the number of the block that it holds, if any: for whoever deals in slots.
    """

    def __init__(self, line: socket.socket, memory: mmap.mmap, begin: int) -> None:
        self.line = line
        self.answer: tuple[int, int] | None = None
        self.asked_at = 0.0
        self.users = 0
        self.block: int | None = None
        self._memory = memory
        self._begin = begin
        self._taking = threading.Lock()  # who has it takes the answer from the line

    def ask(self, operation: int, offset: int, length: int) -> None:
        """Ask. The answer to what was asked before has to be here. Raises OSError when the child is gone."""
        self.answer, self.asked_at = None, time.monotonic()
        self.line.send(ASK.pack(operation, length, offset))

    def take(self, timeout_s: float) -> bool:
        """Wait for the answer; False: the time is over. Raises OSError, EOFError when the child is gone."""
        deadline = time.monotonic() + timeout_s
        if not self._taking.acquire(timeout=max(0.0, timeout_s)):
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
            self._taking.release()

    def view(self, begin: int, length: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """Return a part of the memory."""
        return np.frombuffer(self._memory, np.uint8, length, self._begin + begin)


class Export(NamedTuple):
    """An NBD export.

    Attributes:
        uri: where it is.
        witness: the URI of what answers for as long as the export shows its moment, see Witness; None: it always
            does.
    """

    uri: str
    witness: str | None = None


class Link:
    """A child, and the slots that it answers in, until it is lost or closed.

    Args:
        export: which.
        name: what messages call it.
        deadline_s: how long `connect` waits.
        slots: how many.

    Attributes:
        slots: all of them.

    Raises:
        ConnectError: the child can't be started.
    """

    def __init__(self, export: Export, name: str, deadline_s: float, slots: int) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self._state = threading.Lock()
        self._inside = 0  # threads between the lines
        self._failure: SourceError | None = None
        self._lines = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._lines.close)
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(theirs.close)
            self._lines.callback(self._control.close)
            order = {**export._asdict(), "name": name, "timeout_s": deadline_s, "slot": _SLOT}
            self.slots = self._make_slots(slots, json.dumps(order).encode())
            self._child = Child([sys.executable, "-m", "backupfs.sources.live_child"], theirs)
            undo.pop_all()

    def _make_slots(self, count: int, order: bytes) -> list[Slot]:
        """Make the memory and the lines; send the child its ends, with its order."""
        with ExitStack() as sent:
            memory_fd = os.memfd_create("backupfs-live")
            sent.callback(os.close, memory_fd)
            os.truncate(memory_fd, count * _SLOT)
            memory = mmap.mmap(memory_fd, 0)  # unmapped when the last slot, and the last of what was lent, is gone
            slots, fds = [], [memory_fd]
            for number in range(count):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._lines.callback(ours.close)
                sent.callback(theirs.close)
                fds.append(theirs.fileno())
                slots.append(Slot(ours, memory, number * _SLOT))
            socket.send_fds(self._control, [order], fds)
        return slots

    def connect(self) -> dict[str, int]:
        """Wait for the connection, and return the child's GREETING. Once, first; `close` in another thread ends it.

        Raises:
            SourceError: there is none; the link is lost.
        """
        with self.used():
            self._control.settimeout(self._deadline_s)
            try:
                message = self._control.recv(_MESSAGE)
            except TimeoutError:
                raise self.lose(self.silent()) from None
            except OSError:
                message = b""
            greeting: dict[str, int] = json.loads(message) if message else {}
            if "size" not in greeting:
                raise self.lose(self._farewell(message))
            return greeting

    @property
    def failure(self) -> SourceError | None:
        """Why it is lost, if it is."""
        return self._failure

    def alive(self) -> bool:
        """Look whether the child has said farewell. Does not wait."""
        try:
            with self.used():
                self._control.settimeout(0)
                message = self._control.recv(_MESSAGE)
        except BlockingIOError:
            return True
        except SourceError:
            return False
        except OSError:
            message = b""
        self.lose(self._farewell(message))
        return False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep the lines open meanwhile. Raises SourceError when the link is lost."""
        with self._state:
            if self._failure is not None:
                raise self._again()
            self._inside += 1
        try:
            yield
        finally:
            with self._state:
                self._inside -= 1
                if self._failure is not None and not self._inside:
                    self._lines.close()

    def answered(self, slot: Slot, deadline: float) -> int:
        """Wait for a slot's answer; return its number.

        Raises:
            ProtocolError: the server refuses.
            SourceError: the link is lost, maybe because there was no answer by the deadline.
        """
        try:
            in_time = slot.take(deadline - time.monotonic())
        except (OSError, EOFError) as e:
            raise self.lose_child() from e
        if not in_time:
            raise self.lose(self.silent())
        assert slot.answer is not None
        error, number = slot.answer
        if error:
            words = f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"
            raise ProtocolError(f"{self._name}: the server answered: {words}")
        return number

    def lose(self, failure: SourceError) -> SourceError:
        """End it all because of `failure`. Returns what to raise: the first reason, if there was one."""
        with self._state:
            if self._failure is None:
                self._failure = failure
        self._child.stop()  # whoever waits on a line finds it closed
        with self._state:
            if not self._inside:
                self._lines.close()
            return self._again()

    def lose_child(self) -> SourceError:
        """The child is gone: find out why. Returns what to raise."""
        message = b""
        with suppress(OSError, SourceError), self.used():
            self._control.settimeout(0)
            message = self._control.recv(_MESSAGE)
        return self.lose(self._farewell(message))

    def silent(self) -> ConnectError:
        """Return what to raise when a deadline is over."""
        return ConnectError(f"no answer from {self._name} for {self._deadline_s:g} s")

    def close(self) -> None:
        """End the child. Who waits gets an error. Twice does no harm."""
        self.lose(ConnectError(f"{self._name}: closed"))

    def _again(self) -> SourceError:
        assert self._failure is not None
        return type(self._failure)(str(self._failure))  # a new one: threads must not share a traceback

    def _farewell(self, message: bytes) -> SourceError:
        said = json.loads(message) if message else {}
        if "error" not in said:
            return ConnectError(f"{self._name}: the process that reads it died")
        kind: type[SourceError] = getattr(errors, said["error"])
        return kind(said["message"])


class Loans:
    """Parts of slots that were given away: whoever has one keeps the slot from being used anew until he lets go."""

    def __init__(self) -> None:
        self._returned: deque[Slot] = deque()

    def lend(self, slot: Slot, begin: int, length: int) -> memoryview:
        """Give a part away. The slot comes out of `returned` once the part is no longer referred to."""
        part = slot.view(begin, length)
        # A finalizer runs wherever the last reference goes, so it takes no lock.
        weakref.finalize(part, self._returned.append, slot).atexit = False
        return part.data

    def returned(self) -> Iterator[Slot]:
        """Yield the slots of the parts that came back since the last call, one for each part."""
        while self._returned:
            yield self._returned.popleft()
