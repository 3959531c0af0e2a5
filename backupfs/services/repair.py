"""Putting right what `verify` found, from where the right bytes can be had; only what has the right BLAKE3 counts."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import blake3
import numpy as np

from backupfs.errors import Corrupt, RepositoryError, SourceError
from backupfs.image import Image
from backupfs.repository import catalog, names
from backupfs.repository.format import NO_LAYER, LayerHeader, LayerId
from backupfs.repository.indexcheck import layer_records
from backupfs.repository.layer import Layer, raw_path
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.mend import check_chunk, identity, mend, rows_like
from backupfs.repository.plain import clear, image_records
from backupfs.repository.point import disk_folder, layer_path
from backupfs.repository.rebuild import rebuild
from backupfs.repository.repository import Repository
from backupfs.services.damage import BadRows, Damage, Report
from backupfs.services.verify import verify
from backupfs.sources import open_source

_AT_ONCE = 1 << 16  # chunks that are looked for at a time

# A damaged chunk: its rows, and which of them.
_Place = tuple[BadRows, int]


def repair(
    repository: Repository,
    report: Report,
    sources: Sequence[tuple[str | None, str]],
    waiting: Callable[[str], None] | None,
) -> None:
    """Repair what can be repaired, and note in the report where it came from.

    Args:
        sources: (disk, or None for any; path or NBD URI) where a disk's bytes may be found at their own offsets.
        waiting: called with a message when another process writes to the repository, before waiting for that.

    Raises:
        Locked: another process writes to it, and `waiting` is None.
        RepositoryError: it can't be written to.
        SourceError: a source can't be opened.
    """
    if any(_is_of_a_layer(d) for d in report.damage):
        # First: a delta's rows may be in the index, as long as nobody builds it again.
        with repository.exclusive(waiting):
            for damage in filter(_is_of_a_layer, report.damage):
                _rebuild_layer(repository, damage)
        _look_again(repository, report)
    for damage in report.damage:
        if damage.kind == "image":
            with repository.exclusive(waiting):
                clear(repository.path, Layer(os.path.splitext(damage.file)[0] + names.LAYER))
            damage.repaired = "zeroes, which is what the table says"
    if any(d.kind == "index" for d in report.damage):
        _rebuild_index(repository, report)
    if not report.bad:
        return
    with repository.exclusive(waiting):
        places = ((bad, i) for bad in report.bad for i in range(len(bad.rows)))
        while some := list(islice(places, _AT_ONCE)):
            _repair(repository, some, sources)


def _is_of_a_layer(damage: Damage) -> bool:
    return damage.kind in ("layer", "table") and damage.file.endswith(".layer")


def _rebuild_layer(repository: Repository, damage: Damage) -> None:
    """Put a layer's header, table and trailer right, if what can be had is enough for it."""
    if not os.path.exists(damage.file):
        damage.what += "; only a copy of the file can bring it back"
        return
    vm = damage.vm
    found = [
        e for e in _entries(repository, vm) if layer_path(repository.path, vm, e.name, e.chain, e.seq) == damage.file
    ]
    if not found:
        damage.what += "; its point has no manifest any more, so nothing says what was there"
        return
    entry = found[0]
    if entry.raw is not None and (path := raw_path(damage.file)) and not _is_as_long(path, entry.size):
        # Whose bytes those are nobody knows: it may be another disk's image, so it is left to a person.
        by_hand = f"`truncate -s {entry.size} {shlex.quote(path)}`, and --repair looks at the rest of it"
        damage.what += f"; {by_hand if os.path.isfile(path) else 'only a copy of the file can bring it back'}"
        return
    header, records = _header_of(repository, vm, entry), None
    chain_no = _chain_no(repository, vm, entry)
    if entry.raw is not None:
        records = partial(image_records, raw_path(damage.file), repository.settings.chunk_size)
    elif chain_no is not None and entry.kind == "delta":
        records = partial(layer_records, repository.store.index, chain_no, entry.seq)
    if rebuild(repository.path, damage.file, header, entry, records):
        damage.repaired = "the manifest, the index and the rest of the layer"
    else:
        damage.what += "; what is left of it is not enough to repair it"


def _is_as_long(path: str, size: int) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == size


def _entries(repository: Repository, vm: str) -> Iterator[DiskEntry]:
    for point in repository.points(vm):
        with contextlib.suppress(RepositoryError):  # told by verify
            yield from repository.manifest(vm, point).disks


def _chain_no(repository: Repository, vm: str, entry: DiskEntry) -> int | None:
    with contextlib.suppress(RepositoryError):
        return repository.store.index.chain_no(vm, entry.name, entry.chain)
    return None


def _header_of(repository: Repository, vm: str, entry: DiskEntry) -> LayerHeader | None:
    """Return what the header of a point's layer has to be, or None."""
    parent: tuple[int, str] | None = (0, NO_LAYER.hex()) if entry.kind == "full" else None
    if entry.parent is not None:
        with contextlib.suppress(RepositoryError):
            before = repository.manifest(vm, entry.parent).disk(entry.name)
            parent = (before.seq, before.layer_id) if before else None
    chain_no = _chain_no(repository, vm, entry)
    if parent is None and chain_no is not None:  # the parent's point was deleted; its layer is there
        with contextlib.suppress(RepositoryError):
            index = repository.store.index
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


def _look_again(repository: Repository, report: Report) -> None:
    """Verify what a layer that was damaged kept from being verified."""
    repaired = [d for d in report.damage if _is_of_a_layer(d) and d.repaired]
    for vm in {d.vm for d in repaired}:
        again = verify(repository, vm, None, report.sample, lambda *_: None)
        told = {d.file: d for d in report.damage if d.vm == vm}
        for damage in again.damage:  # what could not be repaired says why already
            damage.what = told[damage.file].what if damage.file in told else damage.what
        report.damage[:] = [d for d in report.damage if d.vm != vm or d in repaired] + again.damage
        report.bad[:] = [bad for bad in report.bad if bad.vm != vm] + again.bad


def _rebuild_index(repository: Repository, report: Report) -> None:
    repository.reindex()
    stale = [d for d in report.damage if d.kind == "index"]
    for vm in {d.vm for d in stale}:
        again = [d for d in verify(repository, vm, None, 0, lambda *_: None).damage if d.kind == "index"]
        for damage in stale:
            left = {point for d in again if d.disk == damage.disk for point in d.points}
            if damage.vm == vm and not left.intersection(damage.points):
                damage.repaired = "built again from the layers"


def _repair(repository: Repository, places: list[_Place], sources: Sequence[tuple[str | None, str]]) -> None:
    missing: dict[bytes, list[_Place]] = {}
    for bad, i in places:
        missing.setdefault(identity(bad.rows[i]), []).append((bad, i))
    for layer in _layers(repository):
        if not missing:
            return
        wanted = np.array(sorted({int.from_bytes(i[:8], "little") for i in missing}), np.uint64)
        for rows in rows_like(layer, wanted):
            for row in rows:
                if identity(row) not in missing:
                    continue
                try:
                    chunk = check_chunk(layer, row, repository.settings.chunk_size)
                except Corrupt:
                    continue  # the damaged one itself, for one
                _mend(repository, missing, chunk, layer.data.path)
    for disk, spec in sources:
        wanted_here = [p for found in missing.values() for p in found if disk in (None, p[0].disk)]
        if wanted_here:
            _from_source(repository, missing, wanted_here, spec)


def _layers(repository: Repository) -> Iterator[Layer]:
    """Yield every layer that is there, of every chain; those with a damaged header are passed over."""
    for vm in catalog.vms(repository.path):
        folder = os.path.dirname(disk_folder(repository.path, vm, "x"))
        disks = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for disk in (d for name in disks if (d := names.unescape(name))):
            for chain in catalog.chains(repository.path, vm, disk):
                place = os.path.join(disk_folder(repository.path, vm, disk), chain)
                for name in sorted(os.listdir(place)):
                    if name.endswith(".layer"):
                        try:
                            layer = Layer(os.path.join(place, name))
                        except RepositoryError:
                            continue
                        if layer.header.chunk_size == repository.settings.chunk_size:
                            yield layer


def _from_source(repository: Repository, missing: dict[bytes, list[_Place]], places: list[_Place], spec: str) -> None:
    source = open_source(spec)
    try:
        for bad, i in places:
            if identity(bad.rows[i]) not in missing:
                continue  # it was the same as another one
            number = int(bad.rows["chunk_no"][i])
            try:
                chunk = _chunk_at(source, number, repository.settings.chunk_size)
            except SourceError as e:
                bad.what[i] += f"; {e}"
                continue
            if chunk is not None:
                _mend(repository, missing, chunk, spec)
    finally:
        source.close()


def _chunk_at(image: Image, number: int, chunk_size: int) -> bytes | None:
    offset = number * chunk_size
    if offset >= image.size:
        return None
    chunk = bytearray(chunk_size)  # the disk's last one is filled up with zeroes
    image.readinto(offset, memoryview(chunk)[: min(chunk_size, image.size - offset)])
    return bytes(chunk)


def _mend(repository: Repository, missing: dict[bytes, list[_Place]], chunk: bytes, origin: str) -> None:
    """Put a chunk everywhere where it is missing; any other chunk changes nothing."""
    for bad, i in missing.pop(blake3.blake3(chunk).digest(length=16), []):
        try:
            done = mend(repository.path, bad.layer, bad.rows[i], chunk)
        except Corrupt as e:
            bad.what[i] = e.what
            continue
        if done:
            bad.repaired[i] = origin
        else:
            bad.what[i] += f"; the bytes are in {origin}, but fit into no payload of {int(bad.rows['length'][i])} bytes"
