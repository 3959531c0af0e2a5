"""Putting right a layer whose own point is gone and that other points stand on: after a prune, mostly the base.

No manifest has the BLAKE3 of its header, table and trailer. What they may have been (remains.py) is proven by

- the header: its own checksum, or the address that the rows of its table were made for, which is the same;
- each row: its check, if it is still in the file; or the records of an index, which have their own;
- the trailer, if it is whole: what is put together has the very same;
- all of it: the layers of the chain then give, for every point that stands on them, the chunk map whose digest (128
  bits, over the number and the BLAKE3 of each chunk that is seen) its manifest has.

What no point sees no digest says. So where a row of a raw image has to be made again, and no point sees its chunk, it
gets no hashes: who still has the deleted point open can't read that chunk, rather than read something else.

Several layers of a chain may be damaged at once; they are proven together. Under the writer lock.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import catalog, names
from backupfs.repository.format import LayerHeader, checks
from backupfs.repository.indexcheck import layer_records
from backupfs.repository.layer import Layer, raw_path
from backupfs.repository.lost_header import Surroundings, proven_header
from backupfs.repository.plain import image_records
from backupfs.repository.rebuild import opened, write
from backupfs.repository.remains import Patch, Piece, Records, Remains, Version, read
from backupfs.repository.visible import Lineage, Pass, lineages

_MOST_CHOICES = 100  # of what the layers of a chain may have been, together


@dataclass(frozen=True, slots=True)
class Orphan:
    """A layer without a point that was put right.

    Attributes:
        fault: what was wrong.
        points: those that stand on it.
    """

    path: str
    fault: Corrupt
    points: list[str]


def mend_orphans(around: Surroundings) -> list[Orphan]:
    """Put all damaged layers of a chain right whose points are gone, if what they were can be proven.

    Raises:
        RepositoryError: one can't be written.
    """
    found: dict[str, list[_Choice]] = {}
    faults: dict[str, Corrupt] = {}
    for seq in _without_points(around):
        path = around.path(seq)
        fault = _fault(path)
        choices = _choices(around, seq) if fault else []
        if fault and choices:
            found[path], faults[path] = choices, fault
    if math.prod(map(len, found.values())) > _MOST_CHOICES:
        return []
    for together in itertools.product(*found.values()):
        chosen = dict(zip(found, together, strict=True))
        proof = _prove(around, chosen)
        if proof is not None:
            return [_write(around, path, chosen[path], faults[path], proof) for path in sorted(proof.points)]
    return []


def _without_points(around: Surroundings) -> list[int]:
    newest = max(around.entries, default=0)
    seqs = {seq for seq, suffix in catalog.chain_files(around.folder()) if suffix == names.LAYER}
    return sorted(seq for seq in seqs - around.entries.keys() if seq < newest)


def _fault(path: str) -> Corrupt | None:
    try:
        for _ in Layer(path).rows():
            pass
    except Corrupt as e:
        return e
    except RepositoryError:
        return None  # missing, of another version, or nobody lets us
    return None


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a layer may have been, and what has to be written for that."""

    header: LayerHeader
    version: Version
    pieces: list[Piece]


def _choices(around: Surroundings, seq: int) -> list[_Choice]:
    path, found = around.path(seq), list[_Choice]()
    with opened(path) as fd:
        header = proven_header(around, fd, seq)
        if header is None:
            return []
        for version in Remains(fd, path, header, None).versions(_sources(around, path, header)):
            found.append(_Choice(header, version, version.pieces(fd)))
    return found


def _sources(around: Surroundings, path: str, header: LayerHeader) -> list[Records]:
    if header.plain:
        return [partial(image_records, raw_path(path), around.chunk_size)]
    found: list[Records] = []
    for index, number in around.numbered():
        with contextlib.suppress(RepositoryError):
            # Places in the file are those of its edition.
            held = index.layer_id(number, header.seq), index.edition(number, header.seq)
            if held == (header.layer_id, header.edition) and not header.is_base:
                found.append(partial(layer_records, index, number, header.seq))
    return found


class _Mended(Layer):
    """A layer as it would be with some of its bytes written over."""

    def __init__(self, path: str, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        super().__init__(path)

    def pread(self, offset: int, length: int) -> bytes:
        data = bytearray(read(self._file.fd, offset, length))
        for at, _, new in self._pieces:
            begin, end = max(at, offset), min(at + len(new), offset + length)
            if begin < end:
                data[begin - offset : end - offset] = new[begin - at : end - at]
        return bytes(data)


@dataclass(slots=True)
class _Proof:
    """Of layers by path: the points that stand on them, and the chunks of them that points see."""

    points: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, set[int]] = field(default_factory=dict)


def _prove(around: Surroundings, chosen: Mapping[str, _Choice]) -> _Proof | None:
    """Return for which layers the choice is right: all points come out right that stand on them and nothing else that
    is damaged, and the first of each is among these. None when one comes out wrong.
    """

    def open_layer(path: str) -> Layer:
        return _Mended(path, chosen[path].pieces) if path in chosen else Layer(path)

    proof, unproven, broken = _Proof(), set[str](), list[int]()
    found = lineages(
        around.chain,
        around.repository_id,
        around.entries,
        around.known,
        lambda _, seq, __: broken.append(seq),
        open_layer=open_layer,
    )
    for lineage in found:
        tables = Pass(lineage, around.chunk_size, lambda _, seq, __: broken.append(seq))
        for part in tables.visible():
            if part.layer.path in chosen:
                proof.seen.setdefault(part.layer.path, set()).update(part.rows["chunk_no"].tolist())
        good = {seq: point for seq, (point, _) in lineage.points.items() if seq < min(broken, default=seq + 1)}
        if any(point in good.values() for point in tables.wrong_maps()):
            return None
        for path, seq in _standing(lineage, chosen):
            above = {s: point for s, (point, _) in lineage.points.items() if s >= seq}
            proof.points.setdefault(path, []).extend(above.values())
            if min(above) not in good:
                unproven.add(path)
        broken.clear()
    for path in unproven:
        del proof.points[path]
    return proof


def _standing(lineage: Lineage, chosen: Mapping[str, _Choice]) -> Iterator[tuple[str, int]]:
    """Yield the path and the seq of the chosen layers that points of a lineage stand on."""
    for layer in lineage.layers:
        if layer.path in chosen:
            yield layer.path, layer.header.seq


def _write(around: Surroundings, path: str, choice: _Choice, fault: Corrupt, proof: _Proof) -> Orphan:
    pieces = choice.pieces
    if choice.header.plain:
        version = _without_unseen(choice, proof.seen.get(path, set()))
        with opened(path) as fd:
            pieces = version.pieces(fd)
    write(around.chain.root, path, choice.header.layer_id.hex(), pieces)
    return Orphan(path, fault, proof.points[path])


def _without_unseen(choice: _Choice, seen: set[int]) -> Version:
    """Return the version in which rows that nothing proves have no hashes."""
    patches = []
    for patch in choice.version.patches:
        if patch.given:
            rows = patch.rows.copy()
            unseen = ~np.isin(rows["chunk_no"], np.array(sorted(seen), np.uint64))
            for name in ("xxh3", "id0", "id1"):
                rows[name][unseen] = 0
            rows["check"] = checks(rows, choice.header.seed)
            patches.append(Patch(patch.place, rows, given=True))
        else:
            patches.append(patch)
    return replace(choice.version, patches=patches)
