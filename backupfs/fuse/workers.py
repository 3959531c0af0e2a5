"""The threads that answer what the lane's reader thread can't at once: they read disks, decompress, walk extents, and
write.

Started as they are needed, up to WORKERS, and at most WORKERS_OF_AN_IMAGE of them are in one image: readers of one that
hangs wait, and nobody else.
"""

import errno
import os
import queue
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from backupfs.errors import BackupfsError
from backupfs.extents import coalesce
from backupfs.fuse.catalogue import Writable
from backupfs.image import Buffer, BytesImage, Gatherer, Image, seek
from backupfs.units import GiB, MiB

WORKERS = 32
WORKERS_OF_AN_IMAGE = 8
_FIRST_LOOK, _LARGEST_LOOK = 16 * MiB, 16 * GiB  # of a disk, whose extents are asked for at a time
_FEW = 256  # extents


class Held(Protocol):
    """An image that is open, for all who have it open, and whether it can be trusted (images.py)."""

    image: Image | None
    condemned: Exception | None
    backing: int | None  # of the raw file that the kernel reads instead


@dataclass(frozen=True, slots=True)
class _Window:
    """The extents in [begin, end): where each begins, and whether it is zero."""

    begin: int
    end: int
    starts: list[int]
    zero: list[bool]

    def find(self, offset: int, whence: int) -> int | None:
        """Return where data or a hole begins, None: not inside. `offset` is."""
        for i in range(bisect_right(self.starts, offset) - 1, len(self.starts)):
            if self.zero[i] == (whence == os.SEEK_HOLE):
                return max(self.starts[i], offset)
        return None


class File:
    """A file handle that the lane answers for."""

    def __init__(self, inode: int, held: Held) -> None:
        assert held.image is not None, "open"
        self.inode = inode
        self.held = held
        self.image: Image = held.image
        self.size = self.image.size
        self.jobs = 0  # that a worker has or is to take
        self.closed = False
        self.at_once: Callable[[int, list[memoryview]], bool] = lambda _offset, _into: False
        self.gather: Callable[[int, int], Sequence[Buffer | bytes]] = self._read
        self.content: bytes | None = None
        self.writable: Writable | None = None
        if isinstance(self.image, BytesImage):
            self.content = self.image.content
        else:  # these are slow: what else is small is opened often
            if isinstance(self.image, Gatherer):
                self.at_once, self.gather = self.image.at_once, self.image.gather
            self.writable = self.image if isinstance(self.image, Writable) else None
        self._data = 0, 0  # offset and end of data that is known: programs ask for its end from everywhere in it
        self._known = _Window(0, 0, [], [])

    def _read(self, offset: int, length: int) -> list[Buffer | bytes]:
        buffer = bytearray(length)
        self.image.readinto(offset, buffer)
        return [buffer]

    def seek(self, offset: int, whence: int) -> int:
        """Return where data or a hole begins. Raises as `image.seek`."""
        if self.writable is not None:
            return seek(self.image, offset, whence)  # nothing is remembered of what changes
        found = self.seek_at_once(offset, whence)
        if found is None:
            found = self._seek(offset, whence)
            if whence == os.SEEK_HOLE:
                self._data = offset, found
        return found

    def seek_at_once(self, offset: int, whence: int) -> int | None:
        """Return the same if it is known, else None. Does not block: programs walk over thousands of pieces."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            return None
        first, end = self._data
        if first <= offset < end:
            return end if whence == os.SEEK_HOLE else offset
        known = self._known
        return known.find(offset, whence) if known.begin <= offset < known.end else None

    def _seek(self, offset: int, whence: int) -> int:
        if not 0 <= offset < self.size or whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            return seek(self.image, offset, whence)  # says what is wrong
        while offset < self.size:
            known = self._known
            if not known.begin <= offset < known.end:
                known = self._known = self._look_at(offset, known)
            found = known.find(offset, whence)
            if found is not None:
                return found
            offset = known.end
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENXIO, "no more data")
        return self.size

    def _look_at(self, offset: int, before: "_Window") -> "_Window":
        """Ask for the extents of a part of the disk; of a larger one each time, while somebody walks over it."""
        length, near = _FIRST_LOOK, before.end - before.begin
        if before.end <= offset < before.end + near:
            length = min(2 * near, _LARGEST_LOOK) if len(before.starts) < _FEW else near
        end = min(offset + length, self.size)
        found = list(coalesce(self.image.extents(offset, end - offset)))
        return _Window(offset, end, [e.offset for e in found], [e.flag for e in found])

    def check(self) -> None:
        """Raise BackupfsError if the image can't be trusted, or must not be read any more."""
        if self.closed:
            raise BackupfsError("the file is closed")
        if self.held.condemned is not None:
            raise BackupfsError(f"the image can't be trusted: {self.held.condemned}")


@dataclass(frozen=True, slots=True)
class Job:
    """A READ; a WRITE of `data`; a FALLOCATE that makes zeroes; an LSEEK, `size` is `whence` then."""

    unique: int
    opcode: int
    offset: int
    size: int
    data: bytes = b""


class Subject(Protocol):
    """What jobs are about."""

    inode: int
    jobs: int  # that a worker has or is to take


S = TypeVar("S", bound=Subject)
J = TypeVar("J")


class _Waiting(Generic[S, J]):
    """The jobs of one subject that nobody does yet. Each of its tickets in the queue lets a worker do one of them."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[S, J]] = deque()
        self.queued = 0  # tickets
        self.working = 0  # tickets that a worker has


class Workers(Generic[S, J]):
    """Does jobs.

    Args:
        answer: answers a request, whatever happens; called in a thread.
        name: of the threads.
    """

    def __init__(self, answer: Callable[[S, J], None], name: str = "lane-worker") -> None:
        self._answer = answer
        self._name = name
        self._lock = threading.Lock()
        self._tickets = 0  # in the queue, or with a worker
        self._threads = 0
        self._queue: queue.SimpleQueue[tuple[int, _Waiting[S, J]] | None] = queue.SimpleQueue()
        self._waiting: dict[int, _Waiting[S, J]] = {}  # by inode

    @property
    def busy(self) -> bool:
        """Whether there are jobs."""
        return self._tickets > 0

    def submit(self, file: S, job: J) -> None:
        """Have a job done. Raises RuntimeError: no thread can be started; the job is not taken."""
        with self._lock:
            if self._tickets >= self._threads and self._threads < WORKERS:
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
                self._threads += 1
            waiting = self._waiting.setdefault(file.inode, _Waiting())
            waiting.jobs.append((file, job))
            file.jobs += 1
            if waiting.queued + waiting.working < WORKERS_OF_AN_IMAGE:
                waiting.queued += 1
                self._tickets += 1
                self._queue.put((file.inode, waiting))

    def end(self) -> None:
        """Let the threads end that have nothing to do."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (ticket := self._queue.get()) is not None:
            inode, waiting = ticket
            with self._lock:
                file, job = waiting.jobs.popleft()
                waiting.queued -= 1
                waiting.working += 1
            self._answer(file, job)
            with self._lock:
                file.jobs -= 1
                waiting.working -= 1
                if len(waiting.jobs) > waiting.queued:
                    waiting.queued += 1
                    self._queue.put(ticket)
                    continue
                self._tickets -= 1
                if not waiting.queued + waiting.working:
                    del self._waiting[inode]
