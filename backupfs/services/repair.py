"""Putting right what `verify` found, from where the right bytes can be had; only what has the right BLAKE3 counts."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import blake3
import numpy as np

from backupfs.errors import Corrupt, RepositoryError, SourceError
from backupfs.image import Image
from backupfs.repository import catalog, names
from backupfs.repository.layer import Layer
from backupfs.repository.mend import check_chunk, identity, mend, rows_like
from backupfs.repository.plain import clear
from backupfs.repository.point import disk_folder
from backupfs.repository.repository import Repository
from backupfs.services.damage import BadRows, Report
from backupfs.services.repair_layers import is_of_a_layer, mend_layers_without_points, open_indexes, rebuild_layer
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
    if any(is_of_a_layer(d) for d in report.damage):
        # First: a delta's rows may be in the index, as long as nobody builds it again.
        with repository.exclusive(waiting), open_indexes(repository) as indexes:
            for damage in filter(is_of_a_layer, report.damage):
                rebuild_layer(repository, indexes, damage)
            mend_layers_without_points(repository, indexes, report)
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


def _look_again(repository: Repository, report: Report) -> None:
    """Verify what a layer that was damaged kept from being verified."""
    repaired = [d for d in report.damage if is_of_a_layer(d) and d.repaired]
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
