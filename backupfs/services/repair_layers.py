"""Putting right what `verify` found of layers' headers, tables and trailers: finds out what is known of them.

How it is put together and proven is in repository/: rebuild.py for layers of points that are there, orphans.py for the
others.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from functools import partial

from backupfs.errors import RepositoryError
from backupfs.repository import names
from backupfs.repository.format import NO_LAYER, LayerHeader, LayerId
from backupfs.repository.index import Index
from backupfs.repository.indexcheck import layer_records
from backupfs.repository.layer import raw_path
from backupfs.repository.lost_header import Surroundings
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.orphans import mend_orphans
from backupfs.repository.plain import image_records
from backupfs.repository.point import Chain, layer_path
from backupfs.repository.rebuild import rebuild
from backupfs.repository.remains import Records
from backupfs.repository.repository import Repository
from backupfs.services.damage import Damage, Report


def is_of_a_layer(damage: Damage) -> bool:
    return damage.kind in ("layer", "table") and damage.file.endswith(".layer")


@contextlib.contextmanager
def open_indexes(repository: Repository) -> Iterator[list[Index]]:
    with contextlib.ExitStack() as stack:
        indexes: list[Index] = []
        with contextlib.suppress(RepositoryError):  # none can be opened, or built: there is no space
            indexes = stack.enter_context(repository.indexes())
        yield indexes


def rebuild_layer(repository: Repository, indexes: Sequence[Index], damage: Damage) -> None:
    """Put a layer's header, table and trailer right by its point's manifest, if what can be had is enough for it."""
    if not os.path.exists(damage.file):
        damage.what += "; only a copy of the file can bring it back"
        return
    vm = damage.vm
    found = [
        e for e in _entries(repository, vm) if layer_path(repository.path, vm, e.name, e.chain, e.seq) == damage.file
    ]
    if not found:
        return  # see `mend_layers_without_points`
    entry = found[0]
    if entry.raw is not None and (path := raw_path(damage.file)) and not _is_as_long(path, entry.size):
        # Whose bytes those are nobody knows: it may be another disk's image, so it is left to a person.
        by_hand = f"`truncate -s {entry.size} {shlex.quote(path)}`, and --repair looks at the rest of it"
        damage.what += f"; {by_hand if os.path.isfile(path) else 'only a copy of the file can bring it back'}"
        return
    numbered = list(_numbered(indexes, vm, entry))
    header = _header_of(repository, numbered, vm, entry)
    sources: list[Records] = []
    if entry.raw is not None:
        sources = [partial(image_records, raw_path(damage.file), repository.settings.chunk_size)]
    elif entry.kind == "delta":
        sources = [partial(layer_records, index, chain_no, entry.seq) for index, chain_no in numbered]
    if rebuild(repository.path, damage.file, header, entry, sources):
        damage.repaired = "the manifest, the index and the rest of the layer"
    else:
        damage.what += "; what is left of it is not enough to repair it"


def mend_layers_without_points(repository: Repository, indexes: Sequence[Index], report: Report) -> None:
    """Put layers right whose points are gone, by the points that stand on them."""
    left = [d for d in report.damage if is_of_a_layer(d) and not d.repaired and os.path.exists(d.file)]
    for vm, disk, chain in sorted({(d.vm, d.disk or "", os.path.basename(os.path.dirname(d.file))) for d in left}):
        known = {point: e for point, e in _entries_by_point(repository, vm) if e.name == disk}
        entries = {e.seq: (point, e) for point, e in known.items() if e.chain == chain}
        around = Surroundings(
            chain=Chain(repository.path, vm, disk, chain, -1),
            repository_id=bytes.fromhex(repository.settings.id),
            chunk_size=repository.settings.chunk_size,
            entries=entries,
            known=known,
            indexes=indexes,
        )
        mended = {orphan.path: orphan for orphan in mend_orphans(around)}
        told = {d.file: d for d in left}
        for path, orphan in mended.items():
            if path not in told:  # another one kept verify from it
                told[path] = Damage(
                    kind="table",
                    vm=vm,
                    disk=disk,
                    points=orphan.points,
                    file=path,
                    file_offset=orphan.fault.offset,
                    what=orphan.fault.what,
                )
                report.damage.append(told[path])
            told[path].repaired = "the points that stand on it, the index and the rest of the layer"
        for damage in left:
            seq = names.layer_seq(os.path.basename(damage.file))
            if (damage.vm, damage.disk) == (vm, disk) and seq not in entries and not damage.repaired:
                damage.what += "; its point is gone, and what is left of it is not enough to repair it"


def _is_as_long(path: str, size: int) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == size


def _entries(repository: Repository, vm: str) -> Iterator[DiskEntry]:
    for _, entry in _entries_by_point(repository, vm):
        yield entry


def _entries_by_point(repository: Repository, vm: str) -> Iterator[tuple[str, DiskEntry]]:
    for point in repository.points(vm):
        with contextlib.suppress(RepositoryError):  # told by verify
            for entry in repository.manifest(vm, point).disks:
                yield point, entry


def _numbered(indexes: Sequence[Index], vm: str, entry: DiskEntry) -> Iterator[tuple[Index, int]]:
    """Yield the indexes that have the chain of a point's layer, with its number there."""
    for index in indexes:
        with contextlib.suppress(RepositoryError):
            chain_no = index.chain_no(vm, entry.name, entry.chain)
            if chain_no is not None:
                yield index, chain_no


def _header_of(
    repository: Repository, numbered: Sequence[tuple[Index, int]], vm: str, entry: DiskEntry
) -> LayerHeader | None:
    """Return what the header of a point's layer has to be, or None."""
    parent: tuple[int, str] | None = (0, NO_LAYER.hex()) if entry.kind == "full" else None
    if entry.parent is not None:
        with contextlib.suppress(RepositoryError):
            before = repository.manifest(vm, entry.parent).disk(entry.name)
            parent = (before.seq, before.layer_id) if before else None
    for index, chain_no in numbered:
        if parent is None:  # the parent's point was deleted; its layer is there
            with contextlib.suppress(RepositoryError):
                seq = index.layers(chain_no).get(entry.seq)
                layer_id = index.layer_id(chain_no, seq) if seq is not None else None
                parent = (seq, layer_id.hex()) if seq is not None and layer_id else None
    if parent is None:
        return None
    return LayerHeader(
        repository_id=bytes.fromhex(repository.settings.id),
        layer_id=LayerId(bytes.fromhex(entry.layer_id)),
        parent_id=LayerId(bytes.fromhex(parent[1])),
        parent_seq=parent[0],
        seq=entry.seq,
        chunk_size=repository.settings.chunk_size,
        virtual_size=entry.size,
        vm=vm,
        disk=entry.name,
        chain=entry.chain,
        plain=entry.raw is not None,
    )
