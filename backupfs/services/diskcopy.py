"""Copying a disk of a point into a target: everything, or what differs. Other threads read, decode and compare; the
calling thread writes, in order of offset.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import blake3
import numpy as np

from backupfs.errors import Corrupt, Missing
from backupfs.extents import Extent, coalesce, intersect, widen
from backupfs.repository.bulk import read_chunks
from backupfs.repository.chunkmap import IDENTITY
from backupfs.repository.format import REGION_CHUNKS
from backupfs.repository.point import PointImage
from backupfs.sources.target import Target
from backupfs.units import GiB, MiB

_WINDOW = GiB  # of the disk, whose extents are looked at at a time
_PART = 2 * MiB  # read, decoded and written at a time; a multiple of every chunk size
_WORKERS = min(4, max(2, os.cpu_count() or 1))
_QUEUE = 2 * _WORKERS  # parts that are being read, or wait for being written

# (disk, bytes of the disk dealt with, size of the disk, bytes read): called from the calling thread, often.
Progress = Callable[[str, int, int, int], None]
# Bytes to be written at an offset, or, None, a number of zeroes.
Piece = tuple[int, int, memoryview | None]


@dataclass(slots=True, kw_only=True)
class Restored:
    """What a restore did; bytes. `rest` is what the target has beyond the disk's end, and was left as it is."""

    vm: str
    point: str
    disk: str
    target: str
    format: str
    size: int
    resumed: bool = False
    read: int = 0
    written: int = 0
    zeroed: int = 0
    rest: int = 0
    seconds: float = 0.0


class DiskCopy:
    """One pass over the disk.

    Args:
        compare: read what the target has, and write only what differs.
        blank: the target is known to read as zeroes.
    """

    def __init__(
        self,
        image: PointImage,
        target: Target,
        done: Restored,
        progress: Progress,
        *,
        compare: bool = False,
        blank: bool = False,
    ) -> None:
        self._image = image
        self._target = target
        self._done = done
        self._progress = progress
        self._compares = compare
        self._blank = blank
        self._chunk_size = image.chunk_size

    def run(self) -> None:
        """Make the target's first bytes the disk's, and put them on the disk."""
        size = self._image.size
        pending: deque[tuple[int, Future[list[Piece]]]] = deque()
        with ThreadPoolExecutor(_WORKERS, "restore") as workers:
            try:
                for part, get in self._compared() if self._compares else self._copied():
                    pending.append((part.end, workers.submit(get, part)))
                    if len(pending) >= _QUEUE:
                        self._write(*pending.popleft())
                while pending:
                    self._write(*pending.popleft())
            except BaseException:
                workers.shutdown(wait=True, cancel_futures=True)
                raise
        self._target.flush()
        self._progress(self._done.disk, size, size, self._done.read)

    def _write(self, end: int, part: Future[list[Piece]]) -> None:
        done = self._done
        for offset, length, data in part.result():
            # Counted before: who is interrupted in it must not say that nothing was written.
            if data is None:
                done.zeroed += length
                self._target.zero(offset, length)
            else:
                done.read += length
                done.written += length
                self._target.write(offset, data)
        self._progress(done.disk, end, self._image.size, done.read)

    def _copied(self) -> Iterator[tuple[Extent, Callable[[Extent], list[Piece]]]]:
        """Yield all of the disk in parts, each with the function that gets its bytes."""
        size = self._image.size
        for extent in coalesce(e for at in range(0, size, _WINDOW) for e in self._image.extents(at, _length(at, size))):
            if not extent.flag:
                yield from ((part, self._read) for part in _parts(extent))
            elif not self._blank:
                yield extent, _zeroes

    def _read(self, part: Extent) -> list[Piece]:
        buffer = np.empty(part.length, np.uint8).data  # not cleared first
        try:
            read_chunks(self._image, part.offset, buffer)
        except Missing:  # which is no range, and nothing that --from could bring back
            raise
        except Corrupt as e:
            raise self._located(e, part) from e
        return [(part.offset, part.length, buffer)]

    def _located(self, error: Corrupt, part: Extent) -> Corrupt:
        """Return the error with the range of the disk that it hurts, and the ways out."""
        buffer = memoryview(bytearray(self._chunk_size))
        for offset in range(part.offset, part.end, self._chunk_size):
            length = min(self._chunk_size, part.end - offset)
            try:
                self._image.readinto(offset, buffer[:length])
            except Corrupt as e:
                done = self._done
                return Corrupt(
                    e.file,
                    e.offset,
                    f"{e.what}. That is offset {offset} length {length} of {done.vm}/{done.point}/{done.disk}. "
                    f"`backupfs verify {done.vm} --repair --from {done.disk}=SOURCE` takes the right bytes from an "
                    "image that has them; all the rest can be copied from the mount, with `dd conv=noerror,sync`: see "
                    "Troubleshooting in the README",
                )
        return error

    def _compared(self) -> Iterator[tuple[Extent, Callable[[Extent], list[Piece]]]]:
        """Yield what may differ in parts of whole chunks, each with the function that finds out."""
        size = self._image.size
        for at in range(0, size, _WINDOW):
            length = _length(at, size)
            pairs = intersect(self._image.extents(at, length), self._target.extents(at, length))
            # Where both are zero there is nothing to do.
            unequal = coalesce(Extent(p.offset, p.length, not (p.flag and t.flag)) for p, t in pairs)
            for extent in widen(unequal, self._chunk_size, at + length):
                if extent.flag:
                    yield from ((part, self._differing) for part in _parts(extent))

    def _differing(self, part: Extent) -> list[Piece]:
        """Return what has to be written so that the target has the point's bytes: chunks whose BLAKE3 is another."""
        unit = self._chunk_size
        theirs = np.empty(part.length, np.uint8).data
        self._target.readinto(part.offset, theirs)
        zero = bytes(unit)
        found = []
        for i, (identity, packed) in enumerate(self._identities(part)):
            chunk: bytes | memoryview = theirs[i * unit : (i + 1) * unit]
            offset, length = part.offset + i * unit, len(chunk)
            if length < unit:
                chunk = bytes(chunk).ljust(unit, b"\0")
            if packed:
                if blake3.blake3(chunk).digest(length=16) != identity:
                    found.append(Extent(offset, length, False))
            elif bytes(chunk) != zero:
                found.append(Extent(offset, length, True))
        pieces: list[Piece] = []
        for extent in coalesce(found):
            pieces += _zeroes(extent) if extent.flag else self._read(extent)
        return pieces

    def _identities(self, part: Extent) -> Iterator[tuple[bytes, int]]:
        """Yield of each chunk its BLAKE3, and 0 when it is zero."""
        for chunk_no in range(part.offset // self._chunk_size, -(-part.end // self._chunk_size)):
            region, i = divmod(chunk_no, REGION_CHUNKS)
            identity, packed = IDENTITY.unpack_from(self._image.map.region(region), i * IDENTITY.size)
            yield identity, packed


def _length(at: int, size: int) -> int:
    return min(_WINDOW, size - at)


def _parts(extent: Extent) -> Iterator[Extent]:
    """Cut an extent at multiples of _PART."""
    offset = extent.offset
    while offset < extent.end:
        end = min(offset // _PART * _PART + _PART, extent.end)
        yield Extent(offset, end - offset, extent.flag)
        offset = end


def _zeroes(extent: Extent) -> list[Piece]:
    return [(extent.offset, extent.length, None)]
