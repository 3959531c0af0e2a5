"""Chunks of a point that can be read without looking anything up: each knows where its bytes are.

`read` fills `into`, a list of one memoryview (what preadv takes), with the disk's bytes from `offset` on, if it can
without waiting for a disk. It is the way of most reads: each call less is a percent. What is stored as it is comes out
of the kernel's memory and counts only if it was checked, as asked afterwards (payloads.py). From one thread at a time.
"""

import os
import weakref
from typing import Protocol

from backupfs.repository.cache import LruCache
from backupfs.repository.format import MAX_CHUNK
from backupfs.repository.payloads import Payloads

_preadv, _NOWAIT = os.preadv, os.RWF_NOWAIT
ZEROES = memoryview(bytes(MAX_CHUNK))

ChunkCache = LruCache[tuple[int, int, int, int], bytes]  # (the chain's number, seq, offset, xxh3) -> a decoded chunk


class AtHand(Protocol):
    """A chunk at hand."""

    def read(self, offset: int, into: list[memoryview]) -> bool | None:
        """See above; a range that ends behind the chunk is not read. Returns whether it did; None: it never will again.

        If it did not the memory may hold anything.
        """


class Stored:
    """A chunk that is stored as it is. Its layer may be closed at any time, and then it is of no more use.

    Args:
        at: its offset among the layer's payloads.
        first, end: where it begins and ends on the disk.
    """

    __slots__ = ("_end", "_mark", "_payloads", "_place", "_shift")

    def __init__(self, payloads: Payloads, at: int, xxh3: int, first: int, end: int) -> None:
        self._payloads = weakref.ref(payloads)
        self._place, self._mark = payloads.mark(at, xxh3)
        self._shift = at - first
        self._end = end

    def read(self, offset: int, into: list[memoryview]) -> bool | None:
        payloads = self._payloads()
        if payloads is None:
            return None
        length = len(into[0])
        if offset + length > self._end:
            return False
        marks = payloads.marks
        forgotten = marks[-1]
        try:
            got = _preadv(payloads.fd, into, offset + self._shift, _NOWAIT)
        except OSError:  # EAGAIN; EOPNOTSUPP of file systems that can't tell
            return False
        # If any chunk was read anew meanwhile, it may have been this one: bad when we got it, and found right since.
        return got == length and marks[self._place] == self._mark and marks[-1] == forgotten


class Decoded:
    """A compressed chunk, as long as it is in the cache."""

    __slots__ = ("_cache", "_first", "_key")

    def __init__(self, cache: ChunkCache, key: tuple[int, int, int, int], first: int) -> None:
        self._cache = cache
        self._key = key
        self._first = first

    def read(self, offset: int, into: list[memoryview]) -> bool:
        chunk = self._cache.get(self._key)
        target, within = into[0], offset - self._first
        if chunk is None or within + len(target) > len(chunk):
            return False
        target[:] = memoryview(chunk)[within : within + len(target)]
        return True


class Zero:
    """A chunk that reads as zeroes."""

    __slots__ = ("_end",)

    def __init__(self, end: int) -> None:
        self._end = end

    def read(self, offset: int, into: list[memoryview]) -> bool:
        if offset + len(into[0]) > self._end:
            return False
        into[0][:] = ZEROES[: len(into[0])]
        return True
