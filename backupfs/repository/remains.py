"""What is left of a layer whose header, table or trailer is damaged, and what it may have been. Reads only.

It is put together from

- a row of the table: itself with one bit flipped, or with the hashes of its payload, when its check is right then; or
  records of the same layer: in a delta the index's, in a plain layer what its raw image gives;
- what is behind the table: the rows.

Whether it is what was published is for others to prove: rebuild.py, orphans.py.
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
from backupfs.repository.datafile import DataFile
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
    addresses,
    checks,
    decode_trailer,
)
from backupfs.repository.layer import raw_path

_BLOCK = 4096  # what a disk loses at a time
_ROWS = 1 << 16  # of the table at a time
_MOST = 1 << 20  # damaged rows that are looked for
_REGIONS = 1 << 32  # more than any disk has
_MOST_CHOICES = 100  # of what several rows may have been
_MOST_FLIPPED = 1000  # of _ROWS in which a bit is looked for: each takes a hundred microseconds

# (first region, region after the last) -> the region of each record of the layer, and the records.
# Raises RepositoryError.
Records = Callable[[int, int], tuple[Words, Rows]]
# Offset in the file, what is there, what should be.
Piece = tuple[int, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Patch:
    """Rows that belong into a table.

    Attributes:
        place: of the first of them.
        given: by records; else their checks are those that are in the file.
    """

    place: int
    rows: Rows
    given: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """What a layer may have been.

    Attributes:
        blake3: of header, table and what is behind it.
    """

    header: bytes
    table_offset: int
    patches: Sequence[Patch]
    tail_offset: int
    tail: bytes
    blake3: str

    def pieces(self, fd: int) -> list[Piece]:
        """Return what of the file has to be written."""
        parts = [(0, self.header), (self.tail_offset, self.tail)]
        parts += [(self.table_offset + p.place * ROW.itemsize, p.rows.tobytes()) for p in self.patches]
        compared = [(offset, read(fd, offset, len(new)), new) for offset, new in sorted(parts)]
        return [(offset, old, new) for offset, old, new in compared if old != new]


@dataclass(frozen=True, slots=True)
class _Table:
    offset: int
    rows: int


def read(fd: int, offset: int, length: int) -> bytes:
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
    return b"".join(read(fd, at, size) for at, size in parts)


class Remains:
    """What is left of one layer.

    Args:
        fd: of its file, which is as long as it was.
        header: what is, or should be, its header.
        data_rows: how many rows are not ZERO; None where that is not known.
    """

    def __init__(self, fd: int, path: str, header: LayerHeader, data_rows: int | None) -> None:
        self._fd = fd
        self._path = path
        self._header = header
        self._seed = header.seed
        self._chunks = -(-max(header.virtual_size, 1) // header.chunk_size)
        self._data_rows = data_rows
        self._length = os.fstat(fd).st_size

    def _read(self, offset: int, length: int) -> bytes:
        return read(self._fd, offset, length)

    def versions(self, sources: Sequence[Records]) -> Iterator[Version]:
        """Yield what the layer may have been: mostly one version, none when nothing is known of some row."""
        table, trailer = find_table(self._fd, self._path, self._seed, self._chunks, self._data_rows)
        choices = self._choices(table, sources) if table else None
        if table is None or choices is None or math.prod(map(len, choices)) > _MOST_CHOICES:
            return
        for patches in itertools.product(*choices):
            version, new = self._version(table, patches)
            if trailer is None or new == trailer:
                yield version

    def _version(self, table: _Table, patches: Sequence[Patch]) -> tuple[Version, LayerTrailer]:
        header = self._header.encode()
        digest, fences, data_chunks = blake3.blake3(header), list[Words](), 0
        for first, rows in self._rows(table):
            for patch in patches:
                begin, end = max(patch.place, first), min(patch.place + len(patch.rows), first + len(rows))
                if begin < end:
                    rows[begin - first : end - first] = patch.rows[begin - patch.place : end - patch.place]
            digest.update(rows.tobytes())
            fences.append(rows["chunk_no"][::FENCE_ROWS])
            data_chunks += int(np.count_nonzero(rows["codec"] != codec.ZERO))
        fence_bytes = np.concatenate(fences).astype("<u8").tobytes() if fences else b""
        xxh3 = xxhash.xxh3_64_intdigest(fence_bytes)
        trailer = LayerTrailer(table.offset, table.rows, data_chunks, xxh3, self._header.layer_id)
        tail = fence_bytes + trailer.encode()
        digest.update(tail)
        return Version(header, table.offset, patches, trailer.fences_offset, tail, digest.hexdigest()), trailer

    def _rows(self, table: _Table) -> Iterator[tuple[int, Rows]]:
        """Yield the table as it is, each part with the place of its first row."""
        for first in range(0, table.rows, _ROWS):
            count = min(_ROWS, table.rows - first)
            data = self._read(table.offset + first * ROW.itemsize, count * ROW.itemsize)
            yield first, np.frombuffer(bytearray(data), ROW)

    def _choices(self, table: _Table, sources: Sequence[Records]) -> list[list[Patch]] | None:
        """Return what damaged rows may have been, for each place; None when that can't be told."""
        found: list[list[Patch]] = []
        places: list[int] = []
        for first, rows in self._rows(table):
            wrong = np.flatnonzero(checks(rows, self._seed) != rows["check"]).tolist()
            for i in wrong:
                right = self._by_its_check(rows[i : i + 1]) if len(wrong) <= _MOST_FLIPPED else []
                if right:
                    found.append([Patch(first + i, row) for row in right])
                else:
                    places.append(first + i)
            if len(places) > _MOST:
                return None
        bad = np.array(places, np.int64)
        for run in np.split(bad, np.flatnonzero(np.diff(bad) != 1) + 1) if len(bad) else []:
            begin, end = int(run[0]), int(run[-1]) + 1
            span = self._chunk_after(table, begin - 1), self._chunk_at(table, end)
            given = (self._given(*span, source, len(run)) for source in sources)
            different = {rows.tobytes(): Patch(begin, rows, given=True) for rows in given if rows is not None}
            if not different:
                return None
            found.append(list(different.values()))
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

    def _given(self, first: int, end: int, source: Records, count: int) -> Rows | None:
        """Return the rows for the chunks in [first, end) by records, if there are as many as are missing."""
        try:
            regions, held = source(first // REGION_CHUNKS, min(-(-end // REGION_CHUNKS), _REGIONS))
        except RepositoryError:
            return None
        numbers = regions.astype(np.int64) * REGION_CHUNKS + held["chunk"]
        inside = (numbers >= first) & (numbers < end)
        rows = rows_of(numbers[inside], held[inside], self._seed)
        if self._header.plain and len(rows) < count == min(end, self._chunks) - first:
            rows = self._filled_up(first, count, rows)
        return rows if len(rows) == count else None

    def _filled_up(self, first: int, count: int, rows: Rows) -> Rows:
        """Add rows, without hashes, for chunks that gc took out of a raw image: each chunk here had one."""
        filled = np.zeros(count, ROW)
        filled["chunk_no"] = np.arange(first, first + count)
        filled["offset"] = filled["chunk_no"] * np.uint64(self._header.chunk_size)
        filled["length"], filled["codec"] = self._header.chunk_size, codec.NONE
        filled[rows["chunk_no"].astype(np.int64) - first] = rows
        filled["check"] = checks(filled, self._seed)
        return filled

    def _by_its_check(self, row: Rows) -> list[Rows]:
        """Return what a row may have been whose check was right."""
        right = _one_bit_flipped(row, self._seed)
        if len(right) == 1:
            return right
        # Several for the highest bits of words. Its payload, if that is whole, says which.
        by_payload = {new.tobytes(): new for old in right or [row] for new in self._hashed(old)}
        return list(by_payload.values()) or right

    def _hashed(self, row: Rows) -> list[Rows]:
        """Return the row with its payload's hashes, if its check is right then."""
        chunk = self._chunk(row)
        if chunk is None:
            return []
        new = row.copy()
        new["xxh3"] = xxhash.xxh3_64_intdigest(chunk)
        new["id0"], new["id1"] = np.frombuffer(blake3.blake3(chunk).digest(length=16), "<u8")
        return [new] if checks(new, self._seed) == new["check"] else []

    def _chunk(self, row: Rows) -> bytes | None:
        """Return the chunk in a row's payload; None when there is none."""
        size, length, kind = self._header.chunk_size, int(row["length"][0]), int(row["codec"][0])
        if length > size or kind not in (codec.NONE, codec.ZSTD):
            return None
        plain = self._header.plain
        with contextlib.suppress(RepositoryError, ValueError):
            file = DataFile(raw_path(self._path) if plain else self._path, "the payloads", filled_up=plain)
            payload = file.pread(int(row["offset"][0]), length)
            if kind == codec.ZSTD:
                return codec.decompress(payload, size)
            return payload if length == size else None
        return None


def find_table(
    fd: int, path: str, seed: int | None, chunks: int, data_rows: int | None
) -> tuple[_Table | None, LayerTrailer | None]:
    """Return where a layer's table is, and its trailer if that is whole.

    Args:
        seed: the layer's address; None: not known.
        chunks: the most that it can have.
        data_rows: the least that it can have.
    """
    length = os.fstat(fd).st_size
    place = length - TRAILER_SIZE
    with contextlib.suppress(Corrupt):
        trailer = decode_trailer(read(fd, place, TRAILER_SIZE), length, path)
        return _Table(trailer.table_offset, trailer.rows), trailer
    if place == HEADER_SIZE and not data_rows:  # nothing had changed
        return _Table(HEADER_SIZE, 0), None
    # Where a row with a right check, or two of the same address, make the lengths fit.
    for offset in range(place // ALIGNMENT * ALIGNMENT, HEADER_SIZE - 1, -ALIGNMENT):
        rest = place - offset
        groups = -(-rest // (ROW.itemsize * FENCE_ROWS + 8))
        count, odd = divmod(rest - 8 * groups, ROW.itemsize)
        if count > chunks:
            break
        if odd or count < max(data_rows or 0, 1) or -(-count // FENCE_ROWS) != groups:
            continue
        ends = [read(fd, offset + i * ROW.itemsize, ROW.itemsize) for i in sorted({0, count // 2, count - 1})]
        found = _addresses(np.frombuffer(b"".join(ends), ROW)).tolist()
        if seed in found if seed is not None else len(set(found)) < len(found):
            return _Table(offset, count), None
    return None, None


def _addresses(rows: Rows) -> Words:
    """Return the addresses that rows were made for, but for those in which there is nothing."""
    return addresses(rows[rows["check"] != 0])


def address_by_rows(fd: int, path: str, chunks: int) -> int | None:
    """Return the address that most of the first rows of a table were made for; None when no two agree.

    Args:
        chunks: the most that the table can have.
    """
    table, _ = find_table(fd, path, None, chunks, None)
    if table is None:
        return None
    rows = np.frombuffer(read(fd, table.offset, min(table.rows, _ROWS) * ROW.itemsize), ROW)
    values, counts = np.unique(_addresses(rows), return_counts=True)
    return int(values[np.argmax(counts)]) if len(counts) and counts.max() > 1 else None


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
