"""Which stored version of each chunk a point shows: one look-up a region, none along the chain.

A region is REGION_CHUNKS chunks of a disk. Its positions, a packed table in memory, are worked out once from all
records of the region and kept in a bounded cache; a read then costs one `unpack_from`. From any thread.
"""

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from backupfs.repository import codec
from backupfs.repository.cache import LruCache
from backupfs.repository.format import (
    CODEC_SHIFT,
    REGION_CHUNKS,
    Rows,
    map_digest,
)
from backupfs.repository.index import Index
from backupfs.repository.layer import Layer

# One chunk of a resolved region. All zeroes: the chunk reads as zeroes.
POSITION = np.dtype(
    [("offset", "<u8"), ("xxh3", "<u8"), ("id0", "<u8"), ("id1", "<u8"), ("seq", "<u4"), ("packed", "<u4")]
)
PLACE = struct.Struct("<QQ16xII")  # of a position: offset, xxh3, seq, packed
IDENTITY = struct.Struct("<16x16s4xI")  # of a position: its BLAKE3, packed
assert PLACE.size == IDENTITY.size == POSITION.itemsize

_MOST_REGIONS = 256  # resolved at a time: 65,536 chunks, or fewer where they have
_MOST_RECORDS = 1 << 16

# (the chain's number, seq, region) -> a region's positions; shared by all maps of a repository.
RegionCache = LruCache[tuple[int, int, int], bytes]


def resolve(chunks: npt.NDArray[np.intp], records: Rows, seq: int, positions: Rows) -> None:
    """Put into `positions` (POSITION, one a chunk, filled from the base) what the deltas up to `seq` say.

    Args:
        chunks: where in `positions` each record begins.
        records: sorted by chunk and seq.
        seq: of the point.
        positions: changed in place.
    """
    seen = records["seq"] <= seq
    chunks, visible = chunks[seen], records[seen]
    if not len(visible):
        return
    newest = np.full(len(positions), -1, np.int64)
    single = visible["run"] == 1
    if np.any(single):
        where, versions = chunks[single], visible[single]
        last = np.append(where[1:] != where[:-1], True)
        where, versions = where[last], versions[last]
        newest[where] = versions["seq"]
        found = np.zeros(len(versions), POSITION)
        for field in POSITION.names or ():
            found[field] = versions[field]
        found[versions["packed"] == 0] = 0  # a ZERO record
        positions[where] = found
    runs, run_chunks = visible[~single], chunks[~single]
    # Newest first: mostly the first few cover what the others would.
    for i in np.argsort(runs["seq"])[::-1]:
        run_seq, first = int(runs["seq"][i]), int(run_chunks[i])
        span = slice(first, first + int(runs["run"][i]))
        older = newest[span] < run_seq
        newest[span][older] = run_seq
        positions[span][older] = np.zeros((), POSITION)


class ChunkMap:
    """The chunk map of one disk at one point."""

    def __init__(self, index: Index, chain_no: int, seq: int, base: Layer, cache: RegionCache) -> None:
        self._index = index
        self._chain_no = chain_no
        self._seq = seq
        self._base = base
        self._base_seq = base.header.seq
        self._lineage = index.lineage(chain_no, seq)
        self._cache = cache
        self._records = 0  # that the last look-up met: how many regions are taken at a time

    def region(self, region: int) -> bytes:
        """Return the region's positions, REGION_CHUNKS times POSITION, from the cache if they are there.

        Raises:
            Corrupt: the index or the base's table is damaged there.
        """
        key = (self._chain_no, self._seq, region)
        held = self._cache.get(key)
        if held is None:
            held = self.positions(region).tobytes()
            self._cache.put(key, held, len(held))
        return held

    def positions(self, region: int, count: int = 1) -> Rows:
        """Work the positions of `count` regions out, REGION_CHUNKS each. Raises as `region`."""
        positions = np.zeros(count * REGION_CHUNKS, POSITION)
        first = region * REGION_CHUNKS
        for rows in self._base.rows(first, first + len(positions)):
            data = rows[rows["codec"] != codec.ZERO]
            found = np.zeros(len(data), POSITION)
            for field in ("offset", "xxh3", "id0", "id1"):
                found[field] = data[field]
            found["seq"] = self._base_seq
            found["packed"] = data["length"] | (data["codec"] << CODEC_SHIFT)
            positions[(data["chunk_no"] - np.uint64(first)).astype(np.intp)] = found
        if self._seq != self._base_seq:
            regions, records = self._index.records(self._chain_no, region, region + count)
            self._records = len(records)
            # Layers between, of points that were deleted, are no ancestors.
            seen = self._lineage[np.minimum(records["seq"], self._seq + 1)]
            places = (regions[seen] - np.uint64(region)).astype(np.intp) * REGION_CHUNKS + records["chunk"][seen]
            resolve(places, records[seen], self._seq, positions)
        return positions

    def occupied(self, first: int, end: int) -> Iterator[int]:
        """Yield the regions in [first, end) that may hold data, in order; all others are zero."""
        delta: int | None = -1
        base: int | None = -1
        region = first
        while region < end:
            if delta is not None and delta < region:
                delta = self._index.next_region(self._chain_no, region) if self._seq != self._base_seq else None
            if base is not None and base < region:
                chunk = self._base.next_chunk(region * REGION_CHUNKS)
                base = None if chunk is None else chunk // REGION_CHUNKS
            candidates = [r for r in (delta, base) if r is not None]
            if not candidates or min(candidates) >= end:
                return
            region = min(candidates)
            yield region
            region += 1

    def resolved(self, first: int, end: int) -> Iterator[tuple[int, Rows]]:
        """Yield the positions of all regions in [first, end) that may hold data, in order, several regions at a time.

        Yields:
            The first region, and the positions of it and of those behind it.
        """
        region, count = next(self.occupied(first, end), end), 1
        while region < end:
            count = min(count, end - region)
            yield region, self.positions(region, count)
            region = next(self.occupied(region + count, end), end)
            count = min(2 * count, _MOST_REGIONS) if self._records < _MOST_RECORDS else count // 2 or 1

    def digest(self, regions: int) -> tuple[int, int, int]:
        """Work the whole map's digest out: (lane 0, lane 1, chunks that hold data). Not for the read path.

        Args:
            regions: how many regions the disk has.
        """
        lane0 = lane1 = chunks = 0
        for region, positions in self.resolved(0, regions):
            data = np.flatnonzero(positions["packed"])
            numbers = (data + region * REGION_CHUNKS).astype(np.uint64)
            a, b = map_digest(numbers, positions["id0"][data], positions["id1"][data])
            lane0, lane1, chunks = lane0 + a, lane1 + b, chunks + len(data)
        return lane0, lane1, chunks
