"""The command line: parse, call a service, print. The only place that prints errors and exits."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from backupfs import __version__
from backupfs.errors import INTERRUPTED, BackupfsError, Corrupt, UsageError
from backupfs.repository import codec, names
from backupfs.repository.format import DEFAULT_CHUNK
from backupfs.repository.manifest import Manifest
from backupfs.repository.repository import Repository
from backupfs.services import points as listing
from backupfs.units import format_size, parse_size, parse_time

if TYPE_CHECKING:
    from backupfs.services.backup import PlannedDisk

F = TypeVar("F", bound=Callable[..., Any])

_SECTIONS = {
    "Take backups": ["init", "backup"],
    "Look": ["points", "show", "map"],
    "Mount": ["mount", "umount"],
    "Repair": ["reindex"],
}


class SectionedGroup(click.Group):
    """Lists the commands by the work that they do."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections of --help."""
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(80)) for name in commands])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Take `backupfs REPO MOUNTPOINT [-o OPTIONS]`, mount(8)'s way to call, for `-r REPO mount MOUNTPOINT`."""
        if len(args) >= 2 and args[0] not in self.commands and "/" in args[0] and os.path.isdir(args[0]):
            _set_repository(ctx, None, args[0])
            args = ["mount", *args[1:]]
        return super().resolve_command(ctx, args)


def _set_repository(ctx: click.Context, _: click.Parameter | None, value: str | None) -> None:
    if value:
        ctx.ensure_object(dict)["repository"] = value


def _repository_option(function: F) -> F:
    """Add -r, which may stand before or after the command's name."""
    return click.option(
        "-r",
        "--repository",
        metavar="FOLDER",
        expose_value=False,
        callback=_set_repository,
        help="The repository; without it, BACKUPFS_REPOSITORY.",
    )(function)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def _path() -> str:
    path = click.get_current_context().ensure_object(dict).get("repository") or os.environ.get("BACKUPFS_REPOSITORY")
    if not path:
        raise UsageError("no repository named: use -r FOLDER or set BACKUPFS_REPOSITORY")
    return str(path)


def _open() -> Repository:
    return Repository.open(_path())


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@_repository_option
@click.version_option(__version__, message="backupfs %(version)s")
def cli() -> None:
    """Take agentless backups of KVM disks; mount every backup point as a read-only raw disk.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 10 not found, 11 locked, 12 unsupported format, 20 damaged,
    30 no connection to a source, 31 a source's error, 32 bitmap unusable, 40 mount failed, 130 interrupted.
    """


@cli.command(epilog="Example: backupfs -r /srv/backups init")
@_repository_option
@click.option("--chunk-size", default=str(DEFAULT_CHUNK // 1024) + "KiB", show_default=True, help="A power of two.")
@click.option(
    "--codec", "codec_name", type=click.Choice(sorted(codec.NAMES, reverse=True)), default="zstd", show_default=True
)
def init(chunk_size: str, codec_name: str) -> None:
    """Make an empty repository in a new or empty folder."""
    Repository.init(_path(), chunk_size=parse_size(chunk_size), codec_name=codec_name)


@cli.command(
    epilog="""Examples:

    \b
    backupfs backup web01 vda=disk.qcow2
    backupfs backup web01 vda=nbd+unix:///vda?socket=/run/web01.nbd --bitmap vda=b0
    backupfs backup web01 --qmp /run/web01.qmp
    backupfs backup web01 --libvirt qemu:///system
    """
)
@_repository_option
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
@click.option(
    "--scratch",
    default="/var/tmp",  # noqa: S108, private folders are made in it
    show_default=True,
    metavar="FOLDER",
    help="Where what the guest overwrites meanwhile is kept; better not where its disks are.",
)
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
@click.option("--time", "time", metavar="TIME", help="The point's time, UTC; without it, now.")
@click.option("--dry-run", is_flag=True, help="Say how each disk would be read; touch nothing.")
@click.option("--no-wait", is_flag=True, help="Fail when another process writes to the repository; else wait for it.")
@_json_option
def backup(
    vm: str,
    disks: tuple[str, ...],
    bitmaps: tuple[str, ...],
    since: str | None,
    qmp: str | None,
    libvirt: str | None,
    domain: str | None,
    only: tuple[str, ...],
    freeze: Literal["auto", "never", "require"],
    scratch: str,
    audit: int,
    full: bool,
    chain: str,
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
                disks=_pairs(disks, "DISK=SOURCE", "DISK=SOURCE"),
                bitmaps=_pairs(bitmaps, "--bitmap", "DISK=NAME"),
                qmp=qmp,
                libvirt=libvirt,
                domain=domain or vm,
                only=only,
                freeze=freeze,
                scratch=scratch,
            )
        ),
        moment=parse_time(time) if time is not None else None,
        since=since,
        audit=audit,
        full=full,
        chain=names.check_chain(chain),
    )
    if dry_run:
        with _open() as repository:
            _print_plan(service.plan(repository, request), as_json)
        return
    with _open() as repository, _progress() as progress:
        manifest = service.backup(repository, request, progress, None if no_wait else _tell)
    if as_json:
        _print_json(listing.point_summary(manifest))
        return
    click.echo(f"{manifest.vm}/{manifest.id}")
    for d in manifest.disks:
        stored = f"{format_size(d.data_bytes)} of data, {format_size(d.stored_bytes)} stored"
        click.echo(f"  {d.name}: {d.kind}, {stored}, read {d.read}" + (f" ({d.reason})" if d.reason else ""))


def _tell(message: str) -> None:
    click.echo(f"backupfs: {message}", err=True)


def _print_plan(plan: "list[PlannedDisk]", as_json: bool) -> None:
    if as_json:
        _print_json([dataclasses.asdict(d) for d in plan])
        return
    rows: list[tuple[str, ...]] = [("DISK", "SIZE", "KIND", "READ", "SOURCE", "REASON")]
    rows += [(d.name, format_size(d.size), d.kind, d.read, d.source, d.reason) for d in plan]
    _print_table(rows)


@cli.command(epilog="Example: backupfs points web01 --json")
@_repository_option
@click.argument("vm", required=False)
@_json_option
def points(vm: str | None, as_json: bool) -> None:
    """List points: id, kind per disk, sizes, tags."""
    manifests: list[Manifest] = []
    damaged: Corrupt | None = None
    with _open() as repository:
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
        _print_json([listing.point_summary(m) for m in manifests])
        return
    rows: list[tuple[str, ...]] = [("VM", "POINT", "DISK", "SIZE", "KIND", "CHAIN", "READ", "DATA", "STORED", "TAGS")]
    for m in manifests:
        for d in m.disks:
            sizes = format_size(d.data_bytes), format_size(d.stored_bytes)
            tags = " ".join([*m.tags, *(["pinned"] if m.pinned else [])])
            rows.append((m.vm, m.id, d.name, format_size(d.size), d.kind, f"{d.chain}/{d.seq}", d.read, *sizes, tags))
    _print_table(rows)


@cli.command(epilog="Example: backupfs show web01/latest")
@_repository_option
@click.argument("point", metavar="VM/POINT")
@_json_option
def show(point: str, as_json: bool) -> None:
    """Show one point's manifest. POINT may be `latest`."""
    with _open() as repository:
        vm, point_id = listing.parse_point(repository, point)
        manifest = repository.manifest(vm, point_id)
        document = json.loads(repository.manifest_json(vm, point_id))
    if as_json:
        _print_json(document)
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


@cli.command("map", epilog="Example: backupfs map web01/latest/vda --json")
@_repository_option
@click.argument("disk", metavar="VM/POINT/DISK")
@_json_option
def map_(disk: str, as_json: bool) -> None:
    """Show a disk's extents: offset, length, zero or data, and from which point the data comes."""
    with _open() as repository:
        extents = listing.disk_map(repository, *listing.parse_disk(repository, disk))
        if as_json:
            _print_json(list(extents))
            return
        for e in extents:
            click.echo(
                f"{e['offset']:>16} {e['length']:>16} {'zero' if e['zero'] else 'data'} {e['point'] or ''}".rstrip()
            )


@cli.command(epilog="Example: backupfs -r /srv/backups mount /mnt/backups")
@_repository_option
@click.argument("mountpoint")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr: for service managers.")
@click.option("--allow-other", is_flag=True, help="Let other users read it too.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, as mount(8) gives them.")
def mount(mountpoint: str, foreground: bool, allow_other: bool, options: tuple[str, ...]) -> None:
    """Show the repository as files at MOUNTPOINT; returns when it is mounted.

    Each disk of each point is a read-only raw file: MOUNTPOINT/VM/POINT/DISK.raw; VM/latest is the newest point.
    """
    from backupfs.services import mount as service  # noqa: PLC0415, pyfuse3 is not needed for the other commands

    service.mount(_path(), mountpoint, foreground=foreground, allow_other=allow_other, options=options)


@cli.command(epilog="Example: backupfs umount /mnt/backups")
@_repository_option
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Take a mount away."""
    from backupfs.services import mount as service  # noqa: PLC0415, as in mount

    service.unmount(mountpoint)


@cli.command(epilog="Example: backupfs -r /srv/backups reindex")
@_repository_option
def reindex() -> None:
    """Build the index again from manifests and layers. Loses nothing; mounts go on."""
    with _open() as repository:
        count = repository.reindex()
    click.echo(f"{count} points indexed")


def _pairs(texts: Iterable[str], what: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key or not value:
            raise UsageError(f"{text!r} is not {form}")
        if key in pairs:
            raise UsageError(f"{what}: disk {key!r} is named twice")
        pairs[key] = value
    return pairs


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int, int], None]]:
    """Show a bar for each disk, with its rate, when stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda disk, done, size, read: None
        return
    from rich import progress as bars  # noqa: PLC0415, slow to import, and only for people
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("read {task.fields[read]}"),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def report(disk: str, done: int, size: int, read: int) -> None:
            if disk not in tasks:
                tasks[disk] = shown.add_task(disk, total=size, read="0 B")
            shown.update(tasks[disk], completed=done, read=format_size(read))

        yield report


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the program and exit with its code."""
    logging.basicConfig(format="backupfs: %(levelname)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli(standalone_mode=False, prog_name="backupfs")
    except BackupfsError as e:
        _fail(str(e), e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was published", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    click.echo(f"backupfs: {message}", err=True)
    sys.exit(code)
