"""Commands that get things back."""

import dataclasses
from typing import Literal

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, progress_bars
from backupfs.services import points as listing
from backupfs.units import format_size


@click.command(
    epilog="""Examples:

    \b
    backupfs restore web01/latest/vda disk.raw
    backupfs restore web01/20261122T200000Z/vda disk.qcow2 --format qcow2
    backupfs restore web01/latest/vda /dev/vg0/web01 --differential
    backupfs restore web01/latest/vda nbd://storage/web01 --force
    """
)
@repository_option
@click.argument("disk", metavar="VM/POINT/DISK")
@click.argument("target")
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2"]), help="Of a file; without it, raw.")
@click.option("--force", is_flag=True, help="Overwrite what is there; a file is replaced when the new one is complete.")
@click.option(
    "--differential", is_flag=True, help="Write into what is there, and only what differs: reads all of it first."
)
@json_option
def restore(
    disk: str,
    target: str,
    image_format: Literal["raw", "qcow2"] | None,
    force: bool,
    differential: bool,
    as_json: bool,
) -> None:
    """Write a disk back: to a new file, a block device or an NBD URI.

    A new file gets its name when it is complete; until then it is TARGET.backupfs-partial, and after an interruption
    the same command goes on from there. A device or an export has to be empty (all zeroes) without --force or
    --differential; what it has beyond the disk's end stays as it is.
    """
    from backupfs.services import restore as service  # noqa: PLC0415, not needed for the other commands

    with open_repository() as repository, progress_bars() as progress:
        vm, point, name = listing.parse_disk(repository, disk)
        request = service.RestoreRequest(
            vm=vm, point=point, disk=name, target=target, format=image_format, force=force, differential=differential
        )
        done = service.restore(repository, request, progress)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    click.echo(
        f"{done.vm}/{done.point}/{done.disk} is in {target} ({done.format}): {format_size(done.size)}, "
        f"{format_size(done.written)} written, {format_size(done.zeroed)} zeroed, in {done.seconds:.1f} s"
        + (", what was there already was checked" if done.resumed or differential else "")
    )
    if done.rest:
        click.echo(f"backupfs: {target} is {format_size(done.rest)} larger than the disk; that is as it was", err=True)
