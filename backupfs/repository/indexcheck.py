"""Is what the index says of a chain what the chain's layers say? From any thread.

The records that a layer's table stands for are made again, and their checks summed up; so are those of the records that
the index holds for this layer. Each record's check covers all of it and its place, so equal sums mean equal records.
Every table and every record is read once, however many points there are.
"""

from collections.abc import Iterator

import numpy as np

from backupfs.errors import Corrupt
from backupfs.repository.format import RECORD, Rows, Words, checks
from backupfs.repository.index import Index
from backupfs.repository.layer import Layer
from backupfs.repository.records import cut, record_seeds, records_of

_SLAB = 1 << 22  # chunks of the disk at a time: zero runs are cut there, for a long one stands for many records
_RECORDS = 1 << 16  # of the index at a time, if there are not more in one region
_REGIONS = 1024


def index_fault(index: Index, chain_no: int, layers: list[Layer]) -> tuple[int, str] | None:
    """Compare.

    Args:
        layers: of one lineage, newest first, down to the base; their tables are whole.

    Returns:
        None; or the lowest seq of a layer that the index is wrong about, so of the first point that it may fail, and
        what is wrong.

    Raises:
        Corrupt: the index can't be read.
    """
    known = index.layers(chain_no)
    for layer in reversed(layers):
        header = layer.header
        parent = header.seq if header.is_base else header.parent_seq
        if known.get(header.seq) != parent or index.layer_id(chain_no, header.seq) != header.layer_id:
            return header.seq, f"layer {header.seq} is not in the index, or as another one"
    deltas = [layer for layer in layers if not layer.header.is_base]
    if not deltas:
        return None
    wanted, held = _Sums(deltas[0].header.seq), _Sums(deltas[0].header.seq)
    for layer in deltas:
        for rows in _rows(layer, -(-max(d.header.virtual_size for d in layers) // layer.header.chunk_size)):
            wanted.add(chain_no, *records_of(rows, layer.header.seq))
    lowest = deltas[-1].header.seq
    try:
        for regions, records in _held(index, chain_no):
            held.add(chain_no, regions, records)
    except Corrupt as e:  # of a region that every delta's point reads
        return lowest, e.what
    seqs = np.array(sorted(layer.header.seq for layer in deltas))
    wrong = seqs[(wanted.counts[seqs] != held.counts[seqs]) | (wanted.checks[seqs] != held.checks[seqs])]
    if len(wrong):
        return int(wrong[0]), f"the records of layer {wrong[0]} are not what its table says; run backupfs reindex"
    return None


class _Sums:
    """Numbers of records and sums of their checks, by seq."""

    def __init__(self, last: int) -> None:
        self.counts = np.zeros(last + 1, np.int64)
        self.checks = np.zeros(last + 1, np.uint64)

    def add(self, chain_no: int, regions: Words, records: Rows) -> None:
        seqs = records["seq"].astype(np.intp)
        ours = seqs < len(self.counts)
        np.add.at(self.counts, seqs[ours], 1)
        np.add.at(self.checks, seqs[ours], checks(records, record_seeds(chain_no, regions))[ours])


def _rows(layer: Layer, chunks: int) -> Iterator[Rows]:
    """Yield a table's rows, zero runs cut at the borders of slabs."""
    for first in range(0, chunks, _SLAB):
        end = min(first + _SLAB, chunks)
        for rows in layer.rows(first, end):
            yield cut(rows, first, end)


def layer_records(index: Index, chain_no: int, seq: int, first: int, end: int) -> tuple[Words, Rows]:
    """Return the records of one layer in the regions [first, end): the region of each, and the records.

    Raises:
        Corrupt: the index is damaged there.
    """
    found = [(np.empty(0, np.uint64), np.empty(0, RECORD))]
    for regions, records in _held(index, chain_no, first, end):
        ours = records["seq"] == seq
        found.append((regions[ours], records[ours]))
    return np.concatenate([r for r, _ in found]), np.concatenate([r for _, r in found])


def _held(index: Index, chain_no: int, first: int = 0, end: int = 1 << 32) -> Iterator[tuple[Words, Rows]]:
    """Yield the records of a chain in the regions [first, end). Raises Corrupt."""
    region, count = index.next_region(chain_no, first), 1
    while region is not None and region < end:
        regions, records = index.records(chain_no, region, min(region + count, end))
        yield regions, records
        region = index.next_region(chain_no, region + count)
        count = min(2 * count, _REGIONS) if len(records) < _RECORDS else max(count // 2, 1)
