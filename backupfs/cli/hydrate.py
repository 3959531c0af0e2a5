"""Commands that make points ready for being read by the kernel itself."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_table, progress_bars
from backupfs.errors import UsageError
from backupfs.services import points as listing
from backupfs.units import format_size, parse_size

if TYPE_CHECKING:
    from backupfs.services.hydrate import HydratedDisk


@click.command(
    epilog="""Examples:

    \b
    backupfs hydrate web01/latest
    backupfs hydrate web01/20261122T200000Z --disk vda --limit 200GiB
    backupfs hydrate --list
    """
)
@repository_option
@click.argument("point", metavar="VM/POINT", required=False)
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Only this disk (repeatable).")
@click.option(
    "--limit", metavar="SIZE", help="All hydrated points together: those that were not read for longest go for it."
)
@click.option("--list", "wants_list", is_flag=True, help="List what is hydrated.")
@json_option
def hydrate(point: str | None, disks: tuple[str, ...], limit: str | None, wants_list: bool, as_json: bool) -> None:
    """Put a point's disks together as plain raw files in a cache folder.

    Where root mounts (Linux 6.9 or later) the kernel then reads them by itself, at the speed of any file, from the next
    time that they are opened on. They are verified whole before; after that nobody looks at hashes, but a file whose
    size, times or inode are others than then is not used. The folder is ~/.cache/backupfs/hydrated, or
    $XDG_CACHE_HOME/backupfs/hydrated; on the repository's own XFS or Btrfs, with codec none, they share its blocks.
    A full backup with codec none is such a file already: it is verified where it lies, and takes no space.
    """
    from backupfs.services import hydrate as service  # noqa: PLC0415, not needed for the other commands

    if wants_list == (point is not None):
        raise UsageError("write VM/POINT, or --list")
    with open_repository() as repository, progress_bars() as progress:
        if point is None:
            found = service.list_hydrated(repository)
        else:
            vm, name = listing.parse_point(repository, point)
            request = service.HydrateRequest(
                vm=vm, point=name, disks=disks, limit=parse_size(limit) if limit is not None else None
            )
            found = service.hydrate(repository, request, progress)
    if as_json:
        print_json([dataclasses.asdict(disk) for disk in found])
    elif wants_list:
        _print_list(found)
    else:
        for disk in found:
            if disk.in_place:
                click.echo(f"{_name(disk)}: verified where it lies, {disk.path}")
                continue
            how = f"in {disk.seconds:.1f} s" if disk.shared is not None else "was there"
            shared = f", {format_size(disk.shared)} of it shared with layers" if disk.shared else ""
            click.echo(f"{_name(disk)}: {format_size(disk.allocated)} in {disk.path}{shared}, {how}")


def _print_list(found: "Sequence[HydratedDisk]") -> None:
    if found:
        rows = [(_name(disk), format_size(disk.allocated), disk.path) for disk in found]
        print_table([("DISK", "TAKES", "FILE"), *rows])


@click.command(epilog="Example: backupfs dehydrate web01/20261122T200000Z")
@repository_option
@click.argument("points", metavar="VM/POINT…", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of the repository's.")
@json_option
def dehydrate(points: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Take away what `backupfs hydrate` made.

    The points stay as they are, and so does what is open: who has a file open reads on.
    """
    from backupfs.services import hydrate as service  # noqa: PLC0415, as in hydrate

    if everything == bool(points):
        raise UsageError("write VM/POINT, or --all")
    with open_repository() as repository:
        gone = service.dehydrate(
            repository, None if everything else [listing.parse_point(repository, text) for text in points]
        )
    if as_json:
        print_json([dataclasses.asdict(disk) for disk in gone])
        return
    for disk in gone:
        what = "not used any more" if disk.in_place else f"{format_size(disk.allocated)} taken away"
        click.echo(f"{_name(disk)}: {what}")


def _name(disk: "HydratedDisk") -> str:
    return f"{disk.vm}/{disk.point}/{disk.disk}"
