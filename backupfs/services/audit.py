"""The audit of a dirty bitmap: a random sample of the chunks that it calls clean is read and compared."""

import math
import random
from collections.abc import Iterable

from backupfs.image import Image


class Sample:
    """A uniform random sample of `size` of all chunk numbers that were added, each as likely as any other.

    Takes ranges, at a cost that grows with the logarithm of their length. Source: Li, "Reservoir-sampling algorithms
    of time complexity O(n(1 + log(N/n)))", algorithm L.
    """

    def __init__(self, size: int, rng: random.Random) -> None:
        self.chunks: list[int] = []
        self._size = size
        self._rng = rng
        self._seen = 0
        self._next = 0  # the ordinal of the next chunk to be taken
        self._weight = 1.0

    def add(self, first: int, count: int) -> None:
        """Offer the chunks `first` to `first + count - 1`."""
        if not self._size:
            return
        while self._next < self._seen + count:
            chunk = first + self._next - self._seen
            if len(self.chunks) < self._size:
                self.chunks.append(chunk)
            else:
                self.chunks[self._rng.randrange(self._size)] = chunk
            self._advance()
        self._seen += count

    def _advance(self) -> None:
        if len(self.chunks) < self._size:
            self._next += 1
            return
        self._weight *= math.exp(math.log(1.0 - self._rng.random()) / self._size)
        skip = math.log(1.0 - self._rng.random()) / math.log1p(-self._weight) if self._weight < 1.0 else 0.0
        self._next += int(min(skip, 1e18)) + 1


def first_difference(now: Image, before: Image, chunks: Iterable[int], chunk_size: int) -> int | None:
    """Return the offset of the first of `chunks` that is not alike in both images, or None.

    What one image has beyond the other's end counts as zeroes.
    """
    for chunk_no in sorted(chunks):
        offset = chunk_no * chunk_size
        sides = []
        for image in (now, before):
            data = bytearray(chunk_size)
            length = min(chunk_size, max(image.size - offset, 0))
            if length:
                image.readinto(offset, memoryview(data)[:length])
            sides.append(data)
        if sides[0] != sides[1]:
            return offset
    return None
