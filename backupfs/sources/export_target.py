"""NBD exports that a disk is restored to: a server's, or that of a qemu-nbd child, for image files."""

import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import quote

import numpy as np

from backupfs.errors import SourceError, TargetError
from backupfs.sources.child import Child
from backupfs.sources.export import NbdSource
from backupfs.sources.nbd import Request
from backupfs.sources.qemu_nbd import listening
from backupfs.sources.source import align, split
from backupfs.units import MiB

_WINDOW = 16 * MiB  # sent and not yet answered
# Written at most between two flushes: what a killed qemu-nbd did not flush has no tables that lead to it, so the next
# try would write it again; and a flush has to be done within the time limit.
_UNFLUSHED = 256 * MiB
_TIMEOUT_S = 300.0  # a server that has to put gigabytes on a disk is silent for long
_ZEROED = 32 * MiB  # in one request: a server that has to write them answers in time


class NbdTarget(NbdSource):
    """An NBD export that is written to. A Target.

    Args:
        uri: as in the NBD URI specification.
        timeout_s: how long the server may be silent.
        description: what messages call it, if not by the URI.

    Raises:
        TargetError: the export is read-only.
        SourceError: no connection.
    """

    def __init__(self, uri: str, timeout_s: float = _TIMEOUT_S, *, description: str | None = None) -> None:
        super().__init__(uri, None, timeout_s, description=description)
        self.undo = ExitStack()  # what close gives back
        self._answered: deque[Request] = deque()
        self._pending = 0  # requests
        self._sent = 0  # bytes
        self._unflushed = 0  # bytes
        self._flushed: deque[Request] = deque()
        self._flushing = False
        if not self._wire.can("write"):
            self.close()
            raise TargetError(f"{self.description}: the export is read-only")

    def write(self, offset: int, data: memoryview) -> None:
        """See `Target.write`."""
        first, length = align(offset, len(data), self._wire.unit, self._export_size)
        if (first, length) != (offset, len(data)):
            self._settle(0)  # a block that is read must have what was written to it before
            whole = bytearray(length)
            self.readinto(first, whole)
            whole[offset - first : offset - first + len(data)] = data
            data = memoryview(whole)
        for position, count in split(first, length, self.request_size):
            part = data[position - first :][:count]
            self._unflushed += count
            if self._unflushed > _UNFLUSHED:
                self._end_flush()
                self._begin_flush()
            self._wire.ask_write(self._request(position, count, part))

    def zero(self, offset: int, length: int) -> None:
        """See `Target.zero`."""
        unit, end = self._wire.unit, offset + length
        first, last = -(-offset // unit) * unit, end // unit * unit
        if not self._wire.can("zero") or first >= last:
            first = last = end
        for edge, edge_end in ((offset, first), (last, end)):
            for position, count in split(edge, edge_end - edge, self.request_size):
                self.write(position, np.zeros(count, np.uint8).data)
        for position, count in split(first, last - first, max(_ZEROED // unit, 1) * unit):
            self._wire.ask_zero(self._request(position, count, None))

    def _request(self, offset: int, length: int, data: memoryview | None) -> Request:
        """Return a request that may be sent now; it is counted as sent."""
        self._settle(max(_WINDOW - length, 0))
        self._pending += 1
        self._sent += length
        return Request(offset, length, self._answered, data=data)

    def _settle(self, limit: int) -> None:
        """Wait until at most `limit` bytes are on their way. Raises what failed."""
        while self._answered or (self._pending and self._sent > limit):
            self._wire.wait(self._answered)
            request = self._answered.popleft()
            self._pending -= 1
            self._sent -= request.length
            self._raise_error("writing", request)

    def flush(self) -> None:
        """See `Target.flush`. A server that has no flush promises that what is done is on the disk."""
        self._settle(0)
        self._end_flush()
        self._begin_flush()
        self._end_flush()

    def _begin_flush(self) -> None:
        """Have put on the disk what is done by now, while more is written."""
        self._unflushed = 0
        if self._wire.can("flush"):
            self._wire.ask_flush(Request(0, 0, self._flushed))
            self._flushing = True

    def _end_flush(self) -> None:
        """Wait for what `_begin_flush` began. Raises as `write`."""
        if self._flushing:
            self._wire.wait(self._flushed)
            self._flushing = False
            self._raise_error("flushing after", self._flushed.popleft())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """When the block is broken off, have put on the disk what is done by then, as far as that can be.

        qemu-nbd keeps the tables that lead to it in memory, and is killed when this is closed.
        """
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # whatever was broken off where, that it was is what counts
                self._flushed, self._flushing = deque(), False
                self._begin_flush()
                self._end_flush()
            raise

    def close(self) -> None:
        """See `Image.close`."""
        super().close()
        self.undo.close()


def make_qcow2(path: str, size: int, timeout_s: float = 30.0) -> None:
    """Make an empty qcow2 file. Raises TargetError."""
    _qemu_img(timeout_s, "create", "-q", "-f", "qcow2", "--", os.path.abspath(path), str(size))


def is_sound_qcow2(path: str, timeout_s: float = 600.0) -> bool:
    """Say whether a qcow2 file's own tables are in order; clusters that nothing leads to do no harm."""
    try:
        _qemu_img(timeout_s, "check", "-q", "-f", "qcow2", "--", os.path.abspath(path), good=(0, 3))
    except TargetError:
        return False
    return True


def _qemu_img(timeout_s: float, *words: str, good: tuple[int, ...] = (0,)) -> None:
    try:
        done = subprocess.run(["qemu-img", *words], capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError as e:
        raise TargetError("qemu-img is not installed: install the package qemu-utils") from e
    except subprocess.TimeoutExpired as e:
        raise TargetError(f"{words[-1]}: qemu-img {words[0]} did not end within {timeout_s:g} s") from e
    if done.returncode not in good:
        said = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise TargetError(f"{words[0]}: {said}")


def open_qcow2(path: str, timeout_s: float = _TIMEOUT_S) -> NbdTarget:
    """Open a qcow2 file for writing, through a qemu-nbd child that ends with the target, or with this process.

    Raises:
        TargetError, SourceError: it can't be opened, or a virtual machine uses it.
    """
    full = os.path.abspath(path)
    command = ["qemu-nbd", "--format=qcow2", "--shared=8", "--cache=writeback", "--discard=unmap", "--", full]
    with ExitStack() as undo, listening() as (listener, address):
        child = Child(command, listener)
        undo.callback(child.stop)
        try:
            target = NbdTarget(f"nbd+unix:///?socket={quote(address)}", timeout_s, description=path)
        except SourceError as e:
            words = child.stop().removeprefix("qemu-nbd: ")
            raise TargetError(f"{path}: qemu-nbd does not serve it: {words or e}") from e
        target.undo = undo.pop_all()
        return target
