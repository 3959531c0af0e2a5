"""What points see of a chain's layers, worked out from the layers' own tables: for verify and repair.

The index has no say here. One pass goes from the newest layer to the base and remembers of each chunk which newer
version hides it, so each stored version is met once, in the order of its layer's table, however many points see it.
From any thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from backupfs.errors import Corrupt, RepositoryError, UnsupportedFormat
from backupfs.repository import codec
from backupfs.repository.format import LayerId, Rows, Words, digest_terms, format_digest
from backupfs.repository.layer import Layer
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import Chain, check_address, layer_path

_SLAB = 1 << 22  # chunks of the disk in one pass: bounds what is remembered to 16 MiB
_NEVER = np.uint32(0xFFFFFFFF)  # no newer version

# (the layer's path, its seq, what is wrong): called for a layer that can't be used.
Broken = Callable[[str, int, RepositoryError], None]


@dataclass(frozen=True, slots=True)
class Lineage:
    """Layers that follow from one another, newest first, and the points that end at some of them.

    Attributes:
        layers: opened, and with a good header; the base is the last one, if the way back to it is whole.
        points: by seq, rising: the id of the point and its entry.
    """

    layers: list[Layer]
    points: dict[int, tuple[str, DiskEntry]]


@dataclass(frozen=True, slots=True)
class Visible:
    """Rows of one layer whose chunks some point sees: by row, the first and the last of these points.

    `first` and `last` count in the order of `Lineage.points`; `last` is not one of them.
    """

    layer: Layer
    rows: Rows
    first: int
    last: npt.NDArray[np.intp]


def lineages(
    chain: Chain,
    repository_id: bytes,
    entries: Mapping[int, tuple[str, DiskEntry]],
    parents: Mapping[str, DiskEntry],
    broken: Broken,
    *,
    open_layer: Callable[[str], Layer] = Layer,
) -> Iterator[Lineage]:
    """Follow the points of a chain back to its base. Mostly there is one lineage; a missing layer cuts it.

    Args:
        entries: by seq, the points that are asked for.
        parents: by point, every entry of this disk that is known: where a layer's header can't be read, its point's
            manifest tells what came before.
        broken: told of layers that are missing, or others than they should be; their points may be many.
        open_layer: how a path becomes a layer.

    Raises:
        RepositoryError: a layer can't be opened, for want of rights or descriptors: that says nothing of it.
    """
    left = dict(entries)
    by_seq = {entry.seq: entry for entry in parents.values() if entry.chain == chain.name}
    while left:
        seq: int | None = max(left)
        layer_id = LayerId(bytes.fromhex(left[max(left)][1].layer_id))
        layers: list[Layer] = []
        points: dict[int, tuple[str, DiskEntry]] = {}
        while seq is not None:
            path = layer_path(chain.root, chain.vm, chain.disk, chain.name, seq)
            if seq in left and bytes.fromhex(left[seq][1].layer_id) == layer_id:
                points[seq] = left.pop(seq)
            try:
                layer = open_layer(path)
                check_address(layer, repository_id, chain, seq, layer_id)
            except (Corrupt, UnsupportedFormat) as e:
                broken(path, seq, e)
                seq, layer_id = _parent_by_manifest(by_seq.get(seq), parents)
                continue
            layers.append(layer)
            header = layer.header
            if header.is_base:
                break
            if header.parent_seq >= seq:
                broken(path, seq, Corrupt(path, 0, "the layer's place in its chain can't be"))
                break
            seq, layer_id = header.parent_seq, header.parent_id
        yield Lineage(layers, dict(sorted(points.items())))


def _parent_by_manifest(entry: DiskEntry | None, known: Mapping[str, DiskEntry]) -> tuple[int | None, LayerId]:
    parent = known.get(entry.parent) if entry and entry.parent else None
    if parent is None or entry is None or parent.seq >= entry.seq or parent.chain != entry.chain:
        return None, LayerId(b"")
    return parent.seq, LayerId(bytes.fromhex(parent.layer_id))


class Pass:
    """One pass over a lineage's tables.

    Args:
        broken: told of a layer whose table can't be read; the pass goes on without what is missing of it.
    """

    def __init__(self, lineage: Lineage, chunk_size: int, broken: Broken) -> None:
        self._lineage = lineage
        self._chunk_size = chunk_size
        self._broken = broken
        self._told: set[str] = set()
        self._seqs = np.array(list(lineage.points), np.uint32)
        # Differences from each point to the next: of the lanes of their maps' digests, and of their chunks with data.
        self._lanes = np.zeros((2, len(self._seqs) + 1), np.uint64)
        self._chunks = np.zeros(len(self._seqs) + 1, np.int64)

    def visible(self) -> Iterator[Visible]:
        """Yield every stored chunk that a point of the lineage sees, thousands at a time, each layer's in order."""
        size = max((entry.size for _, entry in self._lineage.points.values()), default=0)
        chunks = -(-size // self._chunk_size)
        for start in range(0, chunks, _SLAB):
            end = min(start + _SLAB, chunks)
            hidden_by = np.full(end - start, _NEVER, np.uint32)
            for layer in self._lineage.layers:
                try:
                    yield from self._of_layer(layer, start, end, hidden_by)
                except Corrupt as e:
                    if layer.path not in self._told:
                        self._told.add(layer.path)
                        self._broken(layer.path, layer.header.seq, e)

    def _of_layer(self, layer: Layer, start: int, end: int, hidden_by: npt.NDArray[np.uint32]) -> Iterator[Visible]:
        seq = layer.header.seq
        first = int(np.searchsorted(self._seqs, seq))
        for rows in layer.rows(start, end):
            data = rows[rows["codec"] != codec.ZERO]
            places = (data["chunk_no"] - np.uint64(start)).astype(np.intp)
            last = np.searchsorted(self._seqs, hidden_by[places])
            hidden_by[places] = seq
            _hide(hidden_by, rows[rows["codec"] == codec.ZERO], start, seq)
            seen = last > first
            data, last = data[seen], last[seen]
            if len(data):
                self._count(data, first, last)
                yield Visible(layer, data, first, last)

    def _count(self, rows: Rows, first: int, last: npt.NDArray[np.intp]) -> None:
        self._chunks[first] += len(rows)
        np.subtract.at(self._chunks, last, 1)
        for lane, terms in zip(self._lanes, digest_terms(rows["chunk_no"], rows["id0"], rows["id1"]), strict=True):
            np.add.at(lane, first, terms.sum(dtype=np.uint64))
            np.subtract.at(lane, last, terms)

    def wrong_maps(self) -> Iterator[str]:
        """Yield the points that, by the tables, show other chunks than their manifests say.

        After `visible`, and only where no layer is broken.
        """
        lanes = np.cumsum(self._lanes, axis=1, dtype=np.uint64)
        chunks = np.cumsum(self._chunks)
        for i, (point, entry) in enumerate(self._lineage.points.values()):
            found = format_digest(int(lanes[0, i]), int(lanes[1, i])), int(chunks[i]) * self._chunk_size
            if found != (entry.digest, entry.allocated_bytes):
                yield point


def _hide(hidden_by: npt.NDArray[np.uint32], runs: Rows, start: int, seq: int) -> None:
    firsts = runs["chunk_no"].astype(np.int64) - start
    ends = firsts + runs["length"]
    for first, end in zip(np.maximum(firsts, 0).tolist(), ends.tolist(), strict=True):
        hidden_by[first:end] = seq


def spans(rows: Rows, longest: int, gap: int) -> Iterator[tuple[int, int]]:
    """Cut rows that are sorted by offset into pieces that are read at once: (first row, row after the last).

    Args:
        longest: bytes of a piece.
        gap: bytes between two payloads that are rather read than skipped.
    """
    offsets: Words = rows["offset"]
    ends = offsets + rows["length"].astype(np.uint64)
    # A new piece where the gap is wide, and where the next multiple of `longest` begins.
    wide = offsets[1:] > ends[:-1] + np.uint64(gap)
    borders = np.flatnonzero(wide | (offsets[1:] // np.uint64(longest) != offsets[:-1] // np.uint64(longest))) + 1
    edges: Sequence[int] = [0, *borders.tolist(), len(rows)]
    return pairwise(edges)
