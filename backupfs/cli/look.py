"""Commands that show what there is."""

import json

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_table
from backupfs.errors import Corrupt
from backupfs.repository import names
from backupfs.repository.manifest import Manifest
from backupfs.services import points as listing
from backupfs.units import format_size


@click.command(epilog="Example: backupfs points web01 --json")
@repository_option
@click.argument("vm", required=False)
@json_option
def points(vm: str | None, as_json: bool) -> None:
    """List points: id, kind per disk, sizes, tags."""
    manifests: list[Manifest] = []
    damaged: Corrupt | None = None
    with open_repository() as repository:
        try:
            for manifest in listing.list_manifests(repository, names.check_name(vm, "VM") if vm else None):
                manifests.append(manifest)
        except Corrupt as e:
            damaged = e
    _print_points(manifests, as_json)
    if damaged:
        raise damaged  # after what can be listed


def _print_points(manifests: list[Manifest], as_json: bool) -> None:
    if as_json:
        print_json([listing.point_summary(m) for m in manifests])
        return
    rows: list[tuple[str, ...]] = [("VM", "POINT", "DISK", "SIZE", "KIND", "CHAIN", "READ", "DATA", "STORED", "TAGS")]
    for m in manifests:
        for d in m.disks:
            sizes = format_size(d.data_bytes), format_size(d.stored_bytes)
            tags = " ".join([*m.tags, *(["pinned"] if m.pinned else [])])
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
    if as_json:
        print_json(document)
        return
    for key, value in document.items():
        if key != "disks":
            click.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
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
            print_json(list(extents))
            return
        for e in extents:
            click.echo(
                f"{e['offset']:>16} {e['length']:>16} {'zero' if e['zero'] else 'data'} {e['point'] or ''}".rstrip()
            )
