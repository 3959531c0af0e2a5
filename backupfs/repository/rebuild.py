"""Putting a layer's header, table or trailer right, in place. Under the writer lock; mounts go on meanwhile.

A point's manifest has the BLAKE3 of its layer's header, table and trailer together. So what is put together here, from
whatever can be had, is to the bit what was published, or it is not written. It comes from

- the header: the manifest, and the index or the parent's manifest for what it stands on;
- a row of the table: itself with one bit flipped, when its check is right then; or, in a delta, the index; in a plain
  layer, its raw image;
- what is behind the table: the rows.

What was there before is kept in the repository's folder `damaged`. A crash in the middle leaves a damaged layer, as
before.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import blake3
import numpy as np
import numpy.typing as npt
import xxhash

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import codec
from backupfs.repository.files import open_regular
from backupfs.repository.format import (
    ALIGNMENT,
    CODEC_SHIFT,
    FENCE_ROWS,
    HEADER_SIZE,
    LENGTH_MASK,
    MAX_DISK,
    REGION_CHUNKS,
    ROW,
    TRAILER_SIZE,
    LayerHeader,
    LayerTrailer,
    Rows,
    Words,
    checks,
    decode_header,
    decode_trailer,
)
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.mend import keep, writable

_BLOCK = 4096  # what a disk loses at a time
_ROWS = 1 << 16  # of the table at a time
_MOST = 1 << 20  # damaged rows that are looked for
_MOST_CHOICES = 100  # of what several rows may have been
_MOST_FLIPPED = 1000  # of _ROWS in which a bit is looked for: each takes a hundred microseconds

# (first region, region after the last) -> the region of each record of the layer, and the records. Raises Corrupt.
Records = Callable[[int, int], tuple[Words, Rows]]
# The place of the first row, and it with those that follow.
_Patch = tuple[int, Rows]


@dataclass(frozen=True, slots=True)
class _Table:
    offset: int
    rows: int


def rebuild(root: str, path: str, header: LayerHeader | None, entry: DiskEntry, records: Records | None) -> bool:
    """Put header, table and trailer of a layer right.

    Args:
        root: the repository's folder.
        header: what the layer's should be, where that is known; a good one in the file counts before it.
        entry: what its point's manifest says of it.
        records: of this layer, from the index or the raw image; None where there are none.

    Returns:
        Whether they are right now; if not nothing was written.

    Raises:
        RepositoryError: it can't be read or written.
    """
    try:
        fd = open_regular(path)
        try:
            pieces = _pieces(fd, path, header, entry, records)
        finally:
            os.close(fd)
        if pieces is None:
            return False
        for offset, old, _ in pieces:
            keep(root, entry.layer_id, offset, old)
        with writable(path) as fd:
            for offset, _, new in pieces:
                done = os.pwrite(fd, new, offset)
                if done < len(new):
                    raise RepositoryError(f"{path}: can't be repaired: written in part only; try again")
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as e:
        raise RepositoryError(f"{path}: can't be repaired: {e.strerror}") from e
    return True


def _pieces(
    fd: int, path: str, header: LayerHeader | None, entry: DiskEntry, records: Records | None
) -> list[tuple[int, bytes, bytes]] | None:
    """Return what has to be written: offset, what is there, what should be. None when nothing can be proven."""
    with contextlib.suppress(RepositoryError):
        header = decode_header(_read(fd, 0, HEADER_SIZE), path)
    if header is None or header.layer_id.hex() != entry.layer_id or os.fstat(fd).st_size != entry.layer_bytes:
        return None
    return _Work(fd, path, header, entry).pieces(records)


def _read(fd: int, offset: int, length: int) -> bytes:
    """Return bytes of a file; zeroes for what can't be read or is not there."""
    try:
        return os.pread(fd, length, offset).ljust(length, b"\0")
    except OSError:
        cut = (offset // _BLOCK + 1) * _BLOCK - offset  # the rest of the block
        if length <= cut:
            return bytes(length)
    parts = [
        (offset, cut),
        *((at, min(_BLOCK, offset + length - at)) for at in range(offset + cut, offset + length, _BLOCK)),
    ]
    return b"".join(_read(fd, at, size) for at, size in parts)


class _Work:
    """One layer that is damaged."""

    def __init__(self, fd: int, path: str, header: LayerHeader, entry: DiskEntry) -> None:
        self._fd = fd
        self._path = path
        self._entry = entry
        self._header = header
        self._seed = header.seed
        self._chunks = -(-max(header.virtual_size, 1) // header.chunk_size)
        self._data_rows = entry.data_bytes // header.chunk_size
        self._length = entry.layer_bytes

    def _read(self, offset: int, length: int) -> bytes:
        return _read(self._fd, offset, length)

    def pieces(self, records: Records | None) -> list[tuple[int, bytes, bytes]] | None:
        """As `_pieces`."""
        table = self._find()
        choices = self._choices(table, records) if table else None
        if table is None or choices is None or math.prod(map(len, choices)) > _MOST_CHOICES:
            return None
        for patches in itertools.product(*choices):
            parts = self._parts(table, patches)
            if parts is not None:
                compared = [(offset, self._read(offset, len(new)), new) for offset, new in sorted(parts)]
                return [(offset, old, new) for offset, old, new in compared if old != new]
        return None

    def _parts(self, table: _Table, patches: Sequence[_Patch]) -> list[tuple[int, bytes]] | None:
        """Return what has to be at which offsets, if the table is the one that was published with these patches."""
        header = self._header.encode()
        digest, fences, data_chunks = blake3.blake3(header), list[Words](), 0
        for first, rows in self._rows(table):
            for at, new in patches:
                begin, end = max(at, first), min(at + len(new), first + len(rows))
                if begin < end:
                    rows[begin - first : end - first] = new[begin - at : end - at]
            digest.update(rows.tobytes())
            fences.append(rows["chunk_no"][::FENCE_ROWS])
            data_chunks += int(np.count_nonzero(rows["codec"] != codec.ZERO))
        fence_bytes = np.concatenate(fences).astype("<u8").tobytes() if fences else b""
        xxh3 = xxhash.xxh3_64_intdigest(fence_bytes)
        trailer = LayerTrailer(table.offset, table.rows, data_chunks, xxh3, self._header.layer_id)
        tail = fence_bytes + trailer.encode()
        digest.update(tail)
        if digest.hexdigest() != self._entry.layer_blake3:
            return None
        parts = [(table.offset + at * ROW.itemsize, new.tobytes()) for at, new in patches]
        return [(0, header), (trailer.fences_offset, tail), *parts]

    def _find(self) -> _Table | None:
        """Return where the table is: by the trailer, or where a row with a right check makes the lengths fit."""
        place = self._length - TRAILER_SIZE
        try:
            trailer = decode_trailer(self._read(place, TRAILER_SIZE), self._length, self._path)
            return _Table(trailer.table_offset, trailer.rows)
        except Corrupt:
            pass
        for offset in range(place // ALIGNMENT * ALIGNMENT, HEADER_SIZE - 1, -ALIGNMENT):
            rest = place - offset
            groups = -(-rest // (ROW.itemsize * FENCE_ROWS + 8))
            count, odd = divmod(rest - 8 * groups, ROW.itemsize)
            if count > self._chunks:
                return None
            if odd or count < max(self._data_rows, 1) or -(-count // FENCE_ROWS) != groups:
                continue
            ends = self._read(offset, ROW.itemsize) + self._read(offset + (count - 1) * ROW.itemsize, ROW.itemsize)
            rows = np.frombuffer(ends, ROW)
            if np.any(checks(rows, self._seed) == rows["check"]):
                return _Table(offset, count)
        return None

    def _rows(self, table: _Table) -> Iterator[tuple[int, Rows]]:
        """Yield the table as it is, each part with the place of its first row."""
        for first in range(0, table.rows, _ROWS):
            count = min(_ROWS, table.rows - first)
            data = self._read(table.offset + first * ROW.itemsize, count * ROW.itemsize)
            yield first, np.frombuffer(bytearray(data), ROW)

    def _choices(self, table: _Table, records: Records | None) -> list[list[_Patch]] | None:
        """Return what damaged rows may have been, for each place; None when that can't be told."""
        found: list[list[_Patch]] = []
        places: list[int] = []
        for first, rows in self._rows(table):
            wrong = np.flatnonzero(checks(rows, self._seed) != rows["check"]).tolist()
            for i in wrong:
                right = _one_bit_flipped(rows[i : i + 1], self._seed) if len(wrong) <= _MOST_FLIPPED else []
                if right:
                    found.append([(first + i, row) for row in right])
                else:
                    places.append(first + i)
            if len(places) > _MOST:
                return None
        bad = np.array(places, np.int64)
        for run in np.split(bad, np.flatnonzero(np.diff(bad) != 1) + 1) if len(bad) else []:
            begin, end = int(run[0]), int(run[-1]) + 1
            new = self._from_index(self._chunk_after(table, begin - 1), self._chunk_at(table, end), records)
            if new is None or len(new) != len(run):
                return None
            found.append([(begin, new)])
        return found

    def _row(self, table: _Table, place: int) -> Rows:
        return np.frombuffer(self._read(table.offset + place * ROW.itemsize, ROW.itemsize), ROW)

    def _chunk_after(self, table: _Table, place: int) -> int:
        if place < 0:
            return 0
        (row,) = self._row(table, place)
        return int(row["chunk_no"]) + (int(row["length"]) if row["codec"] == codec.ZERO else 1)

    def _chunk_at(self, table: _Table, place: int) -> int:
        return int(self._row(table, place)["chunk_no"][0]) if place < table.rows else 1 << 60

    def _from_index(self, first: int, end: int, records: Records | None) -> Rows | None:
        """Return the rows for the chunks in [first, end) by the index."""
        if records is None:
            return None
        last_region = min(-(-end // REGION_CHUNKS), -(-(self._chunks + 1) // REGION_CHUNKS))
        try:
            regions, held = records(first // REGION_CHUNKS, last_region)
        except Corrupt:
            return None
        numbers = regions.astype(np.int64) * REGION_CHUNKS + held["chunk"]
        inside = (numbers >= first) & (numbers < end)
        return rows_of(numbers[inside], held[inside], self._seed)


def rows_of(numbers: npt.NDArray[np.int64], records: Rows, seed: int) -> Rows:
    """Return the rows of a table that records of one layer were made of. A writer's zero runs end with a region.

    Args:
        numbers: of each record's first chunk.
    """
    rows = np.zeros(len(records), ROW)
    rows["chunk_no"] = numbers
    for field in ("offset", "xxh3", "id0", "id1"):
        rows[field] = records[field]
    rows["length"] = np.where(records["packed"] == 0, records["run"], records["packed"] & LENGTH_MASK)
    rows["codec"] = records["packed"] >> CODEC_SHIFT
    rows["check"] = checks(rows, seed)
    return rows


def _one_bit_flipped(row: Rows, seed: int) -> list[Rows]:
    """Return the row with each one bit flipped that makes its check right: several for the highest bits of words."""
    bits = 8 * ROW.itemsize
    flips = np.packbits(np.eye(bits, dtype=np.uint8), axis=1, bitorder="little")
    tried = (np.repeat(row, bits).view(np.uint8).reshape(bits, -1) ^ flips).reshape(-1).view(ROW)
    right = checks(tried, seed) == tried["check"]
    likely = (tried["chunk_no"] < MAX_DISK) & (tried["offset"] < MAX_DISK) & (tried["codec"] <= codec.ZSTD)
    return [tried[i : i + 1] for i in np.flatnonzero(right & likely)]
