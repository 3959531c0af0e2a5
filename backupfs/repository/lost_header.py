"""The header of a layer whose point is gone, worked out from what is around it. Reads only.

It counts only if its checksum is the one in the file, or the address that the table's rows were made for, which is the
same number.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from backupfs.errors import RepositoryError
from backupfs.repository import catalog, names
from backupfs.repository.format import HEADER_SIZE, NO_LAYER, LayerHeader, LayerId, decode_header, header_seed
from backupfs.repository.index import Index
from backupfs.repository.layer import raw_path
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import Chain, layer_path
from backupfs.repository.rebuild import opened
from backupfs.repository.remains import address_by_rows, find_table, read

_CHECK = 8  # bytes, at the end of a header
_EDITION = 8  # before it


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a chain beside its damaged layers.

    Attributes:
        entries: of the chain's good manifests, by seq: the point and its entry.
        known: by point, every entry of the disk.
        indexes: that may have records of its layers.
    """

    chain: Chain
    repository_id: bytes
    chunk_size: int
    entries: Mapping[int, tuple[str, DiskEntry]]
    known: Mapping[str, DiskEntry]
    indexes: Sequence[Index]

    def path(self, seq: int) -> str:
        return layer_path(self.chain.root, self.chain.vm, self.chain.disk, self.chain.name, seq)

    def folder(self) -> str:
        return os.path.dirname(self.path(0))

    def numbered(self) -> Iterator[tuple[Index, int]]:
        """Yield the indexes that have the chain, with its number there."""
        for index in self.indexes:
            with contextlib.suppress(RepositoryError):
                number = index.chain_no(self.chain.vm, self.chain.disk, self.chain.name)
                if number is not None:
                    yield index, number


def proven_header(around: Surroundings, fd: int, seq: int) -> LayerHeader | None:
    """Return a layer's header, proven; None when it can't be."""
    path, held = around.path(seq), read(fd, 0, HEADER_SIZE)
    for encoded in (held, _one_bit_flipped(held)):
        with contextlib.suppress(RepositoryError):
            return decode_header(encoded, path)
    sizes = {entry.size for entry in around.known.values()}
    others = list(_headers(around))
    sizes.update(header.virtual_size for header in others)
    with contextlib.suppress(OSError):
        sizes.add(os.path.getsize(raw_path(path)))
    chunks = -(-max(sizes, default=0) // around.chunk_size)
    proofs = {header_seed(held), address_by_rows(fd, path, chunks)}
    editions = {0, int.from_bytes(held[-_CHECK - _EDITION : -_CHECK], "little")}
    ids, parents = _relations(around, seq, others, editions)
    _, trailer = find_table(fd, path, None, 0, None)
    if trailer:
        ids.add(trailer.layer_id)
    for layer_id, parent, size, edition in itertools.product(ids, parents, sizes, editions):
        header = LayerHeader(
            repository_id=around.repository_id,
            layer_id=layer_id,
            parent_id=parent[1],
            parent_seq=parent[0],
            seq=seq,
            chunk_size=around.chunk_size,
            virtual_size=size,
            vm=around.chain.vm,
            disk=around.chain.disk,
            chain=around.chain.name,
            plain=os.path.exists(raw_path(path)),
            edition=edition,
        )
        if header.seed in proofs:
            return header
    return None


def _one_bit_flipped(encoded: bytes) -> bytes:
    """Return a header with the one bit flipped that makes its checksum right, if there is one."""
    body, stored = bytearray(encoded[:-_CHECK]), header_seed(encoded)
    right = xxhash.xxh3_64_intdigest(body)
    if (right ^ stored).bit_count() == 1:
        return bytes(body) + right.to_bytes(_CHECK, "little")
    for bit in range(8 * len(body)):
        body[bit // 8] ^= 1 << bit % 8
        if xxhash.xxh3_64_intdigest(body) == stored:
            return bytes(body) + encoded[-_CHECK:]
        body[bit // 8] ^= 1 << bit % 8
    return encoded


def _headers(around: Surroundings) -> Iterator[LayerHeader]:
    """Yield the good headers of the chain's layers."""
    for seq, suffix in catalog.chain_files(around.folder()):
        if suffix == names.LAYER:
            with contextlib.suppress(RepositoryError), opened(around.path(seq)) as fd:
                yield decode_header(read(fd, 0, HEADER_SIZE), around.path(seq))


def _relations(
    around: Surroundings, seq: int, others: Sequence[LayerHeader], editions: set[int]
) -> tuple[set[LayerId], set[tuple[int, LayerId]]]:
    """Return what the layer's id may be, and its parent's seq and id; add what its edition may be."""
    ids = {h.parent_id for h in others if h.parent_seq == seq and not h.is_base}
    parents = {(h.seq, h.layer_id) for h in others if h.seq < seq} if seq else {(0, NO_LAYER)}
    for index, number in around.numbered():
        with contextlib.suppress(RepositoryError):
            layer_id, edition = index.layer_id(number, seq), index.edition(number, seq)
            parent = index.layers(number).get(seq, seq)
            parent_id = index.layer_id(number, parent)
            ids |= {layer_id} if layer_id else set()
            parents |= {(parent, parent_id)} if parent_id and parent < seq else set()
            editions |= {edition} if edition is not None else set()
    return ids, parents
