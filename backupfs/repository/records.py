"""What the index holds of a layer: the rows of its table as records, and of the layer itself a line."""

import struct
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from backupfs.repository import codec
from backupfs.repository.format import CODEC_SHIFT, RECORD, REGION_CHUNKS, LayerId, Rows, Words, mix64

_LAYER = struct.Struct(">16sIQQ")


def record_seeds(chain_no: int, regions: Words) -> Words:
    """Return the address part of the checks of the records in each of these regions of a chain."""
    return mix64(regions.astype(np.uint64) | np.uint64(chain_no << 32))


def gathered(parts: Iterable[Rows], least: int) -> Iterator[Rows]:
    """Join parts until there are `least` rows: numpy's calls cost the same for few as for many."""
    held: list[Rows] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part)
        if count >= least:
            yield np.concatenate(held)
            held, count = [], 0
    if held:
        yield np.concatenate(held)


def cut(rows: Rows, first: int, end: int) -> Rows:
    """Return rows that cover chunks in [first, end) with their zero runs cut at these borders."""
    rows = rows.copy()
    zero = rows["codec"] == codec.ZERO
    begin = rows["chunk_no"][zero]
    stop = np.minimum(begin + rows["length"][zero], np.uint64(end))
    rows["chunk_no"][zero] = np.maximum(begin, np.uint64(first))
    rows["length"][zero] = stop - rows["chunk_no"][zero]
    return rows


def records_of(rows: Rows, seq: int) -> tuple[Words, Rows]:
    """Turn rows of a footer into records, sorted: the region of each, and the records.

    A zero run is cut at the regions' borders.
    """
    zero = rows["codec"] == codec.ZERO
    firsts = rows["chunk_no"].astype(np.int64)
    ends = firsts + np.where(zero, rows["length"], 1).astype(np.int64)
    pieces = (ends - 1) // REGION_CHUNKS - firsts // REGION_CHUNKS + 1
    source = np.repeat(np.arange(len(rows)), pieces)
    ordinal = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    regions = firsts[source] // REGION_CHUNKS + ordinal
    begin = np.maximum(firsts[source], regions * REGION_CHUNKS)
    stop = np.minimum(ends[source], (regions + 1) * REGION_CHUNKS)
    records = np.zeros(len(source), RECORD)
    records["chunk"], records["seq"], records["run"] = begin % REGION_CHUNKS, seq, stop - begin
    for field in ("offset", "xxh3", "id0", "id1"):
        records[field] = rows[field][source]
    records["packed"] = np.where(zero, 0, rows["length"] | (rows["codec"] << CODEC_SHIFT))[source]
    return regions.astype(np.uint64), records


def encode_layer(key: bytes, layer_id: LayerId, parent_seq: int, edition: int) -> bytes:
    """Return what is held under a layer's key."""
    check = xxhash.xxh3_64_intdigest(key + layer_id + struct.pack(">IQ", parent_seq, edition))
    return _LAYER.pack(layer_id, parent_seq, edition, check)


def decode_layer(key: bytes, value: bytes) -> tuple[LayerId, int, int]:
    """Return a layer's id, its parent's seq and its edition. Raises ValueError, struct.error: it is damaged."""
    layer_id, parent_seq, edition, _ = _LAYER.unpack(value)
    if value != encode_layer(key, layer_id, parent_seq, edition):
        raise ValueError("a layer's check does not match")
    return LayerId(layer_id), parent_seq, edition
