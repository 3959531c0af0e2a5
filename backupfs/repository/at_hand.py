"""Chunks of a point that can be read without looking anything up: each knows where its bytes are.

`read` fills `into`, a list of one memoryview, with the disk's bytes from `offset` on, if it can without waiting for a
disk. It is the way of most reads: each call less is a percent. From any thread.
"""

import threading
from typing import Protocol

from backupfs.repository.cache import LruCache
from backupfs.repository.chunk_cache import NOTHING, ChunkCache, Key
from backupfs.repository.format import MAX_CHUNK
from backupfs.repository.payloads import Payloads
from backupfs.units import KiB

ZEROES = memoryview(bytes(MAX_CHUNK))
LARGEST = 128 * KiB
"""Of chunks that are read and checked while others wait: 20 us."""
_OFTEN = 3

OpenLayers = LruCache[tuple[int, int], Payloads]  # (the chain's number, seq) -> what is in the layer


class OneChunk(threading.local):
    """Memory for a chunk, another for each thread."""

    def __init__(self, size: int) -> None:
        self.into = [memoryview(bytearray(size))]


class AtHand(Protocol):
    """A chunk at hand."""

    def read(self, offset: int, into: list[memoryview]) -> bool:
        """See above; a range that ends behind the chunk is not read. Returns whether it did.

        If it did not the memory may hold anything.
        """


class Decoded:
    """A compressed chunk, as long as it is in the cache."""

    __slots__ = ("_cache", "_cell", "_end", "_first", "_key")

    def __init__(self, cache: ChunkCache, key: Key, first: int, end: int) -> None:
        self._cache = cache
        self._cell = NOTHING
        self._key = key
        self._first, self._end = first, end

    def read(self, offset: int, into: list[memoryview]) -> bool:
        cell, target = self._cell, into[0]
        chunk = cell.chunk
        if chunk is None:
            chunk = self._look() or self._fetch()
        else:
            cell.used = True
        end = offset + len(target)
        if chunk is None or end > self._end:
            return False
        target[:] = chunk[offset - self._first : end - self._first]
        return True

    def _look(self) -> memoryview | None:
        self._cell = self._cache.get(self._key)
        return self._cell.chunk

    def _fetch(self) -> memoryview | None:
        return None


class Stored(Decoded):
    """A chunk that is stored as it is: all of it is read from its layer, if that is open, and checked.

    Mostly it is kept by the kernel alone. One that is asked for again and again is put into the cache; not at once,
    as new memory costs as much as reading it several times.

    Args:
        opened: where its layer may be.
        memory: to read it into, one for all.
    """

    __slots__ = ("_memory", "_opened", "_times")

    def __init__(
        self,
        cache: ChunkCache,
        key: Key,
        first: int,
        end: int,
        *,
        opened: OpenLayers,
        memory: OneChunk,
    ) -> None:
        super().__init__(cache, key, first, end)
        self._opened, self._memory = opened, memory
        self._times = 0

    def _fetch(self) -> memoryview | None:
        chain_no, seq, at, xxh3 = self._key
        payloads, into = self._opened.get((chain_no, seq)), self._memory.into
        if payloads is None or not payloads.read_in_memory(at, xxh3, into):
            return None
        self._times += 1
        if self._times == _OFTEN:
            self._times = 0
            self._cell = self._cache.put(self._key, bytes(into[0]))
        return into[0]


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
