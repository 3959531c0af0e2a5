"""Commands that take backups."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import click

from backupfs.cli.options import json_option, open_repository, pairs, repository_option, repository_path, scratch_option
from backupfs.cli.output import print_json, print_table, progress_bars, tell
from backupfs.repository import codec, names, results
from backupfs.repository.format import DEFAULT_CHUNK
from backupfs.repository.repository import Repository
from backupfs.services import points as listing
from backupfs.units import format_size, parse_size, parse_time

if TYPE_CHECKING:
    from backupfs.services.backup import PlannedDisk


@click.command(epilog="Example: backupfs -r /srv/backups init")
@repository_option
@click.option("--chunk-size", default=str(DEFAULT_CHUNK // 1024) + "KiB", show_default=True, help="A power of two.")
@click.option(
    "--codec",
    "codec_name",
    type=click.Choice(sorted(codec.NAMES, reverse=True)),
    default="zstd",
    show_default=True,
    help="With none a full backup is kept as a raw image.",
)
def init(chunk_size: str, codec_name: str) -> None:
    """Make an empty repository in a new or empty folder."""
    Repository.init(repository_path(), chunk_size=parse_size(chunk_size), codec_name=codec_name)


@click.command(
    epilog="""Examples:

    \b
    backupfs backup web01 vda=disk.qcow2
    backupfs backup web01 vda=nbd+unix:///vda?socket=/run/web01.nbd --bitmap vda=b0
    backupfs backup web01 --qmp /run/web01.qmp
    backupfs backup web01 --libvirt qemu:///system
    """
)
@repository_option
@click.argument("vm")
@click.argument("disks", nargs=-1, metavar="[DISK=SOURCE]…")
@click.option(
    "--bitmap",
    "bitmaps",
    multiple=True,
    metavar="DISK=NAME",
    help="The dirty bitmap that has recorded since the chain's last point.",
)
@click.option("--since", metavar="POINT", help="Refuse unless the chain ends at this point.")
@click.option(
    "--push", is_flag=True, help="The files are what a push-mode backup wrote; --since says what they go on from."
)
@click.option("--qmp", metavar="SOCKET", help="A running QEMU's QMP socket; bitmaps are made and kept by backupfs.")
@click.option(
    "--libvirt", metavar="URI", help="The same through libvirt's backup-begin; also for a domain that is off."
)
@click.option("--domain", metavar="NAME", help="The domain's name for libvirt; without it, VM.")
@click.option("--disk", "only", multiple=True, metavar="NAME", help="Only this disk of the running VM (repeatable).")
@click.option(
    "--freeze",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    show_default=True,
    help="Freeze the guest's file systems through its agent for the moment (libvirt).",
)
@scratch_option
@click.option(
    "--audit",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    metavar="N",
    help="Compare N random chunks that the bitmap calls clean.",
)
@click.option("--full", is_flag=True, help="Start a new chain.")
@click.option("--chain", default="main", show_default=True, metavar="NAME", help="One of several independent chains.")
@click.option(
    "--codec",
    "codec_name",
    type=click.Choice(sorted(codec.NAMES, reverse=True)),
    help="How this point is stored; without it, as the repository was made. A full backup with none is a raw image.",
)
@click.option("--time", "time", metavar="TIME", help="The point's time, UTC; without it, now.")
@click.option("--dry-run", is_flag=True, help="Say how each disk would be read; touch nothing.")
@click.option("--no-wait", is_flag=True, help="Fail when another process writes to the repository; else wait for it.")
@json_option
def backup(
    vm: str,
    disks: tuple[str, ...],
    bitmaps: tuple[str, ...],
    since: str | None,
    push: bool,
    qmp: str | None,
    libvirt: str | None,
    domain: str | None,
    only: tuple[str, ...],
    freeze: Literal["auto", "never", "require"],
    scratch: str,
    audit: int,
    full: bool,
    chain: str,
    codec_name: str | None,
    time: str | None,
    dry_run: bool,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Take one point of VM: from image files or NBD exports, a running QEMU, or a domain of libvirt's.

    The first point of a chain is full. The next ones hold what changed: by a dirty bitmap where one is there and
    usable, else by reading all of the disk and comparing it with the chain's last point.
    """
    from backupfs.services import backup as service  # noqa: PLC0415, libnbd is not needed for the other commands
    from backupfs.services import machines  # noqa: PLC0415, as above

    request = service.BackupRequest(
        vm=names.check_name(vm, "VM"),
        open=machines.opener(
            machines.Wanted(
                disks=pairs(disks, "DISK=SOURCE", "DISK=SOURCE"),
                bitmaps=pairs(bitmaps, "--bitmap", "DISK=NAME"),
                qmp=qmp,
                libvirt=libvirt,
                domain=domain or vm,
                only=only,
                freeze=freeze,
                scratch=scratch,
                push=push,
            )
        ),
        moment=parse_time(time) if time is not None else None,
        since=since,
        audit=audit,
        full=full,
        chain=names.check_chain(chain),
        codec=codec_name,
    )
    if dry_run:
        with open_repository() as repository:
            _print_plan(service.plan(repository, request), as_json)
        return
    with (
        open_repository() as repository,
        results.recording(repository.path, "backup", request.vm) as result,
        progress_bars() as progress,
    ):
        manifest = service.backup(repository, request, progress, None if no_wait else tell)
        result.facts["point"] = manifest.id
    if as_json:
        print_json(listing.point_summary(manifest))
        return
    click.echo(f"{manifest.vm}/{manifest.id}")
    for d in manifest.disks:
        stored = f"{format_size(d.data_bytes)} of data, {format_size(d.stored_bytes)} stored"
        click.echo(f"  {d.name}: {d.kind}, {stored}, read {d.read}" + (f" ({d.reason})" if d.reason else ""))


def _print_plan(plan: "list[PlannedDisk]", as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(d) for d in plan])
        return
    rows: list[tuple[str, ...]] = [("DISK", "SIZE", "KIND", "READ", "SOURCE", "REASON")]
    rows += [(d.name, format_size(d.size), d.kind, d.read, d.source, d.reason) for d in plan]
    print_table(rows)
