"""Chunks of a point that can be read without looking anything up: each knows where its bytes are.

`read` fills `into`, a list of one memoryview, with the disk's bytes from `offset` on, if it can without waiting for a
disk. It is the way of most reads: each call less is a percent. From one thread at a time.
"""

from typing import Protocol

from backupfs.repository.cache import LruCache
from backupfs.repository.format import MAX_CHUNK
from backupfs.repository.payloads import Payloads
from backupfs.units import KiB

ZEROES = memoryview(bytes(MAX_CHUNK))
_LARGEST = 128 * KiB  # that is read and checked while others wait: 25 us

# (the chain's number, seq, offset, xxh3) -> a decoded and checked chunk
ChunkCache = LruCache[tuple[int, int, int, int], bytes | bytearray]
OpenLayers = LruCache[tuple[int, int], Payloads]  # (the chain's number, seq) -> what is in the layer


class AtHand(Protocol):
    """A chunk at hand."""

    def read(self, offset: int, into: list[memoryview]) -> bool:
        """See above; a range that ends behind the chunk is not read. Returns whether it did."""


class Cached:
    """A chunk that is in the cache; or, if it is stored as it is, comes there out of the kernel's memory.

    Args:
        key: in the cache.
        first, end: where it begins and ends on the disk.
        opened: where its layer may be, if it is stored as it is.
    """

    __slots__ = ("_cache", "_end", "_first", "_key", "_opened")

    def __init__(
        self, cache: ChunkCache, key: tuple[int, int, int, int], first: int, end: int, opened: OpenLayers | None
    ) -> None:
        self._cache = cache
        self._key = key
        self._first, self._end = first, end
        self._opened = opened

    def read(self, offset: int, into: list[memoryview]) -> bool:
        chunk, target = self._cache.get(self._key) or self._bring(), into[0]
        end = offset + len(target)
        if chunk is None or end > self._end:
            return False
        target[:] = memoryview(chunk)[offset - self._first : end - self._first]
        return True

    def _bring(self) -> bytearray | None:
        if self._opened is None:
            return None
        chain_no, seq, at, xxh3 = self._key
        payloads = self._opened.get((chain_no, seq))
        if payloads is None or payloads.chunk_size > _LARGEST:
            return None
        chunk = payloads.chunk_in_memory(at, xxh3)
        if chunk is not None:
            self._cache.put(self._key, chunk, len(chunk))
        return chunk


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
