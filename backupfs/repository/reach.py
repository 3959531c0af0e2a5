"""What the points of one chain see of its layers. What gc goes by: so from the layers' own tables, not from the index.

A *root* is a layer whose point is there, or is still open somewhere. A stored chunk is *live* when a root sees it. The
maps that come out are compared with the digests in the manifests of all roots before anybody acts on them.

Memory: about 100 bytes for each of the rows in a window of the disk, at most 131,072 of them, and one byte for each
stored chunk of the chain.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.cache import LruCache
from backupfs.repository.format import REGION_CHUNKS, ROW, LayerId, Rows, digest_terms, format_digest
from backupfs.repository.layer import Layer
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import Chain, check_address, layer_path

_OPEN_LAYERS = 200
_WINDOW_ROWS = 1 << 17  # with the chunks of zero runs counted one by one

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
# The seqs of the roots, each with what its manifest says of it; None for a point that was deleted and is still open.
Roots = Mapping[int, DiskEntry | None]


@dataclass(frozen=True, slots=True)
class Reach:
    """What the roots of a chain see.

    Attributes:
        live: by seq, of every layer that a root stands on: of each of its chunks with data, in the table's order,
            whether a root sees it. A layer that is not here nobody needs.
        only: by seq of a root, the bytes of payload that no other root sees.
        visible: bytes of payload that any root sees.
    """

    live: dict[int, Flags]
    only: dict[int, int]
    visible: int


class ChainLayers:
    """The layers of a chain, opened as they are needed."""

    def __init__(self, chain: Chain, repository_id: bytes) -> None:
        self.chain = chain
        self._repository_id = repository_id
        self._open: LruCache[int, Layer] = LruCache(_OPEN_LAYERS)

    def path(self, seq: int) -> str:
        """Return a layer's path."""
        return layer_path(self.chain.root, self.chain.vm, self.chain.disk, self.chain.name, seq)

    def layer(self, seq: int, layer_id: LayerId | None = None) -> Layer:
        """Return the layer `seq`, open. Raises Corrupt: it is missing, damaged or not `layer_id`."""
        held = self._open.get(seq)
        if held is None:
            held = Layer(self.path(seq))
            self._open.put(seq, held, 1)
        check_address(held, self._repository_id, self.chain, seq, layer_id)
        return held

    def ancestry(self, seq: int, layer_id: LayerId | None) -> list[int]:
        """Return the seqs that lead from the base to a layer.

        Raises:
            Corrupt: an ancestor is missing or damaged.
        """
        found = []
        while True:
            layer = self.layer(seq, layer_id)
            header = layer.header
            found.append(seq)
            if header.is_base != (seq == 0) or (seq and header.parent_seq >= seq):
                raise Corrupt(layer.path, 0, "the layer's place in its chain can't be")
            if header.is_base:
                return found[::-1]
            seq, layer_id = header.parent_seq, header.parent_id


def reach(layers: ChainLayers, roots: Roots) -> Reach:
    """Work out what the roots of a chain see.

    Raises:
        Corrupt: a layer that a root stands on is missing or damaged, or the layers do not give what a
            root's manifest says.
    """
    ancestries = {s: layers.ancestry(s, LayerId(bytes.fromhex(e.layer_id)) if e else None) for s, e in roots.items()}
    live: dict[int, Flags] = {}
    only: dict[int, int] = {}
    visible = 0
    for path in _paths(ancestries):
        for seq in path:
            if seq not in live:
                live[seq] = np.zeros(layers.layer(seq).trailer().data_chunks, np.bool_)
        here = {seq: entry for seq, entry in roots.items() if seq in path}
        alone, more = _walk(layers, path, here, live)
        visible += more
        for seq, size in alone.items():
            only[seq] = min(size, only.get(seq, size))
    return Reach(live, only, visible)


def _paths(ancestries: Mapping[int, list[int]]) -> list[list[int]]:
    """Return the ways from the base to each root that no other root stands on: one, but for deleted points in use."""
    inner = {seq for root, path in ancestries.items() for seq in path if seq != root}
    return [path for root, path in sorted(ancestries.items()) if root not in inner]


def _walk(layers: ChainLayers, path: list[int], roots: Roots, live: dict[int, Flags]) -> tuple[dict[int, int], int]:
    """Set the flags in `live` of what `roots`, all on the path, see; check their maps.

    Returns:
        By seq of a root, the bytes of payload that it alone of them sees; the bytes of payload whose flags were set.
    """
    before = np.searchsorted(np.array(sorted(roots), np.int64), np.array(path, np.int64))
    tally = _Tally(np.append(before, len(roots)))
    done = [0] * len(path)
    visible = 0
    for part in _parts(layers, path):
        seen = tally.add(part)
        at = 0
        for i, count in enumerate(part.counts):
            flags = live[path[i]][done[i] : done[i] + count]
            new = seen[at : at + count] & ~flags
            visible += int(part.rows["length"][at : at + count][new].sum(dtype=np.int64))
            flags |= new
            done[i] += count
            at += count
    for seq, count in zip(path, done, strict=True):
        layer = layers.layer(seq)
        if count != layer.trailer().data_chunks:
            raise Corrupt(layer.path, layer.trailer().table_offset, "the table has another number of rows than it says")
    for seq, digest, chunks in zip(sorted(roots), *tally.maps(), strict=True):
        entry = roots[seq]
        if entry and (digest, chunks * layers.layer(seq).header.chunk_size) != (entry.digest, entry.allocated_bytes):
            what = "the chunks that its chain's layers give for this point are not those that were published"
            raise Corrupt(layers.path(seq), 0, what)
    return dict(zip(sorted(roots), tally.only[:-1].tolist(), strict=True)), visible


@dataclass(frozen=True, slots=True)
class _Part:
    """What a path's layers have in one window of the disk.

    Attributes:
        first: the window's first chunk.
        rows: those with data, layer by layer.
        counts: how many of them each layer has.
        chunks: of those rows, and then of all zeroes, a run's chunks one by one; counted from `first`.
        places: of those rows' and zeroes' layers on the path.
    """

    first: int
    rows: Rows
    counts: list[int]
    chunks: Numbers
    places: Numbers


def _parts(layers: ChainLayers, path: list[int]) -> Iterator[_Part]:
    """Yield what the layers have, a window of the disk after the other."""
    end = max(-(-h.virtual_size // h.chunk_size) for h in (layers.layer(seq).header for seq in path))
    first, count = 0, 64 * REGION_CHUNKS
    while first < end:
        part = _part(layers, path, first, count, _WINDOW_ROWS if count > REGION_CHUNKS else None)
        if part is None:
            count //= 2
            continue
        yield part
        first += count
        if len(part.chunks) < _WINDOW_ROWS // 4:
            count *= 2


def _part(layers: ChainLayers, path: list[int], first: int, count: int, at_most: int | None) -> _Part | None:
    """Return what the layers have in [first, first + count) chunks, or None when that is more than `at_most`."""
    end = first + count
    data: list[Rows] = [np.empty(0, ROW)]
    counts: list[int] = []
    runs: list[Numbers] = [np.empty((0, 3), np.int64)]  # first chunk, chunks, place
    total = 0
    for place, seq in enumerate(path):
        counts.append(0)
        for rows in layers.layer(seq).rows(first, end):
            zero = rows["codec"] == codec.ZERO
            data.append(rows[~zero])
            counts[-1] += len(data[-1])
            begin = rows["chunk_no"][zero].astype(np.int64)
            stop = np.minimum(begin + rows["length"][zero].astype(np.int64), end)
            begin = np.maximum(begin, first)
            runs.append(np.stack((begin - first, stop - begin, np.full_like(begin, place)), axis=1))
            total += len(data[-1]) + int((stop - begin).sum())
            if at_most is not None and total > at_most:
                return None
    held = np.concatenate(data)
    begin, length, of = np.concatenate(runs).T
    within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return _Part(
        first,
        held,
        counts,
        np.concatenate((held["chunk_no"].astype(np.int64) - first, np.repeat(begin, length) + within)),
        np.concatenate((np.repeat(np.arange(len(path)), counts), np.repeat(of, length))),
    )


class _Tally:
    """Adds up, over the parts of a disk, what each root on a path sees.

    Args:
        before: of each place on the path, how many roots are before it; at the end, how many there are.
    """

    def __init__(self, before: Numbers) -> None:
        self._before = before
        count = int(before[-1]) + 1
        self._lanes = np.zeros((2, count), np.uint64)  # differences from root to root
        self._chunks = np.zeros(count, np.int64)
        self.only = np.zeros(count, np.int64)

    def add(self, part: _Part) -> Flags:
        """Return of each row with data whether a root sees it."""
        # Each version of a chunk shows from its own layer on to the one with the next version.
        order = np.lexsort((part.places, part.chunks))
        chunks, places = part.chunks[order], part.places[order]
        until = np.full(len(order), len(self._before) - 1)
        followed = np.flatnonzero(chunks[1:] == chunks[:-1])
        until[followed] = places[followed + 1]
        begin, end = np.empty((2, len(order)), np.int64)
        begin[order], end[order] = self._before[places], self._before[until]
        rows = part.rows
        begin, end = begin[: len(rows)], end[: len(rows)]
        seen: Flags = end > begin
        rows, begin, end = rows[seen], begin[seen], end[seen]
        for lane, terms in zip(self._lanes, digest_terms(rows["chunk_no"], rows["id0"], rows["id1"]), strict=True):
            np.add.at(lane, begin, terms)
            np.subtract.at(lane, end, terms)
        np.add.at(self._chunks, begin, 1)
        np.subtract.at(self._chunks, end, 1)
        alone = end == begin + 1
        np.add.at(self.only, begin[alone], rows["length"][alone].astype(np.int64))
        return seen

    def maps(self) -> tuple[list[str], list[int]]:
        """Return the digest of each root's map, and the number of its chunks that have data."""
        lane0, lane1 = np.cumsum(self._lanes[:, :-1], axis=1, dtype=np.uint64).tolist()
        digests = [format_digest(a, b) for a, b in zip(lane0, lane1, strict=True)]
        return digests, np.cumsum(self._chunks[:-1]).tolist()
