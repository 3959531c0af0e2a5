"""Listing: points, and the extents of a disk at a point, in the shape of the command line's JSON."""

import logging
from collections.abc import Iterator
from typing import Any

from backupfs.errors import Corrupt, UsageError
from backupfs.repository import names
from backupfs.repository.manifest import Manifest
from backupfs.repository.repository import Repository

log = logging.getLogger(__name__)

_DISK_FIELDS = ("name", "size", "kind", "chain", "seq", "read", "reason", "data_bytes", "stored_bytes")


def point_summary(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON object of one point. Source: cli.md's `points --json`."""
    return {
        "vm": manifest.vm,
        "id": manifest.id,
        "time": manifest.time,
        "parent": manifest.parent,
        "disks": [{field: getattr(disk, field) for field in _DISK_FIELDS} for disk in manifest.disks],
        "consistency": manifest.consistency,
        "tags": manifest.tags,
        "note": manifest.note,
        "pinned": manifest.pinned,
    }


def list_manifests(repository: Repository, vm: str | None) -> Iterator[Manifest]:
    """Yield the manifests of one VM, or of all, oldest first within a VM; damaged ones after the others, as an error.

    Raises:
        NotFound: there is no such VM.
        Corrupt: manifests are damaged; raised for the first of them when all others were yielded.
    """
    if vm is not None:
        repository.resolve(vm, "latest")
    damaged: Corrupt | None = None
    for name in repository.vms() if vm is None else [vm]:
        for point in repository.points(name):
            try:
                yield repository.manifest(name, point)
            except Corrupt as e:
                damaged = damaged or e
    if damaged:
        raise damaged


def parse_point(repository: Repository, text: str) -> tuple[str, str]:
    """Return (vm, point id) of `VM/POINT`, where POINT may be `latest`. Raises UsageError, NotFound."""
    parts = text.split("/")
    if len(parts) != 2:
        raise UsageError(f"{text!r} is not VM/POINT")
    vm = names.check_name(parts[0], "VM")
    return vm, repository.resolve(vm, parts[1])


def parse_disk(repository: Repository, text: str) -> tuple[str, str, str]:
    """Return (vm, point id, disk) of `VM/POINT/DISK`. Raises as `parse_point`."""
    parts = text.split("/")
    if len(parts) != 3:
        raise UsageError(f"{text!r} is not VM/POINT/DISK")
    vm, point = parse_point(repository, "/".join(parts[:2]))
    return vm, point, names.check_name(parts[2], "disk")


def disk_map(repository: Repository, vm: str, point: str, disk: str) -> Iterator[dict[str, Any]]:
    """Yield the extents of a disk, covering it exactly: offset, length, zero, and the point that the data came with.

    The point is None for zeroes, and for data of a point that was deleted since or has a damaged manifest.

    Raises:
        NotFound: no such disk.
        Corrupt: the index is damaged.
    """
    image = repository.open_image(vm, point, disk)
    image.check_map()
    owners = {}
    here = repository.manifest(vm, point).disk(disk)
    try:
        for manifest in list_manifests(repository, vm):
            entry = manifest.disk(disk)
            if entry and here and entry.chain == here.chain:
                owners[entry.seq] = manifest.id
    except Corrupt as e:  # after all others
        log.warning("%s; what came with this point has no point in the list", e)
    held: dict[str, Any] | None = None
    for extent, seq in image.placed_extents(0, image.size):
        owner = owners.get(seq)
        if held and (held["zero"], held["point"]) == (extent.flag, owner):
            held["length"] += extent.length
            continue
        if held:
            yield held
        held = {"offset": extent.offset, "length": extent.length, "zero": extent.flag, "point": owner}
    if held:
        yield held
