"""Commands that show what there is."""

import contextlib
import json

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_json_list, print_table
from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import names
from backupfs.repository.manifest import Manifest
from backupfs.services import points as listing
from backupfs.services.gc import freed_by_deleting
from backupfs.units import format_size


@click.command(epilog="Example: backupfs points web01 --json")
@repository_option
@click.argument("vm", required=False)
@click.option("--freed", is_flag=True, help="Also what gc would give back if a point alone went; reads layers' tables.")
@json_option
def points(vm: str | None, freed: bool, as_json: bool) -> None:
    """List points: id, kind per disk, sizes, tags."""
    manifests: list[Manifest] = []
    damaged: Corrupt | None = None
    sizes: dict[tuple[str, str], int] | None = {} if freed else None
    with open_repository() as repository:
        try:
            for manifest in listing.list_manifests(repository, names.check_name(vm, "VM") if vm else None):
                manifests.append(manifest)
        except Corrupt as e:
            damaged = e
        if sizes is not None:
            for name in dict.fromkeys(m.vm for m in manifests):
                with contextlib.suppress(RepositoryError):  # something is damaged or missing: verify says what
                    found = freed_by_deleting(repository, name)
                    sizes.update(((name, point), size) for point, size in found.items())
    _print_points(manifests, sizes, as_json)
    if damaged:
        raise damaged  # after what can be listed


def _print_points(manifests: list[Manifest], freed: dict[tuple[str, str], int] | None, as_json: bool) -> None:
    if as_json:
        more = [{} if freed is None else {"freed_bytes": freed.get((m.vm, m.id))} for m in manifests]
        print_json([{**listing.point_summary(m), **extra} for m, extra in zip(manifests, more, strict=True)])
        return
    head = ("VM", "POINT", "DISK", "SIZE", "KIND", "CHAIN", "READ", "DATA", "STORED")
    rows: list[tuple[str, ...]] = [(*head, *(() if freed is None else ("FREED",)), "TAGS")]
    for m in manifests:
        for d in m.disks:
            sizes: tuple[str, ...] = (format_size(d.data_bytes), format_size(d.stored_bytes))
            tags = " ".join([*m.tags, *(["pinned"] if m.pinned else [])])
            if freed is not None:  # of the point, so beside its first disk
                size = freed.get((m.vm, m.id))
                sizes += ("" if d is not m.disks[0] else "unknown" if size is None else format_size(size),)
            rows.append((m.vm, m.id, d.name, format_size(d.size), d.kind, f"{d.chain}/{d.seq}", d.read, *sizes, tags))
    print_table(rows)


@click.command(epilog="Example: backupfs show web01/latest")
@repository_option
@click.argument("point", metavar="VM/POINT")
@json_option
def show(point: str, as_json: bool) -> None:
    """Show one point's manifest. POINT may be `latest`."""
    with open_repository() as repository:
        vm, point_id = listing.parse_point(repository, point)
        manifest = repository.manifest(vm, point_id)
        document = json.loads(repository.manifest_json(vm, point_id))
        try:
            freed: int | None = freed_by_deleting(repository, vm)[point_id]
        except RepositoryError:
            freed = None  # something is damaged or missing: verify says what
    if as_json:
        print_json({**document, "freed_bytes": freed})
        return
    for key, value in document.items():
        if key != "disks":
            click.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    if freed is not None:
        click.echo(f"deleting it alone frees: {format_size(freed)}")
    for disk in document["disks"]:
        click.echo(f"\ndisk {disk.pop('name')}")
        for key, value in disk.items():
            shown = f"{value} ({format_size(value)})" if key.endswith(("size", "bytes")) else value
            click.echo(f"  {key}: {shown}")
    assert manifest.id == point_id


@click.command("map", epilog="Example: backupfs map web01/latest/vda --json")
@repository_option
@click.argument("disk", metavar="VM/POINT/DISK")
@json_option
def map_(disk: str, as_json: bool) -> None:
    """Show a disk's extents: offset, length, zero or data, and from which point the data comes."""
    with open_repository() as repository:
        extents = listing.disk_map(repository, *listing.parse_disk(repository, disk))
        if as_json:
            print_json_list(extents)
            return
        for e in extents:
            click.echo(
                f"{e['offset']:>16} {e['length']:>16} {'zero' if e['zero'] else 'data'} {e['point'] or ''}".rstrip()
            )


@click.command(epilog="Example: backupfs diff web01/20261122T200000Z web01/latest --disk vda --json")
@repository_option
@click.argument("left", metavar="VM/POINT")
@click.argument("right", metavar="VM/POINT")
@click.option("--disk", metavar="NAME", help="Only this disk.")
@json_option
def diff(left: str, right: str, disk: str | None, as_json: bool) -> None:
    """Show the extents in which two points differ, in whole chunks; reads the index and no data.

    A disk that only one of them has differs as a whole, and so does what a disk has beyond the other one's end.
    """
    from backupfs.services import diff as service  # noqa: PLC0415, as the other services

    with open_repository() as repository:
        points = listing.parse_point(repository, left), listing.parse_point(repository, right)
        found = service.differences(repository, *points, names.check_name(disk, "disk") if disk else None)
        if as_json:
            print_json_list(found)
            return
        for e in found:
            click.echo(f"{e['disk']} {e['offset']:>16} {e['length']:>16}")
