"""Commands that tell whether all is well."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_table, progress_bars, tell
from backupfs.errors import BackupfsError, Corrupt, NotFound, UsageError
from backupfs.repository import names
from backupfs.services import points as listing
from backupfs.units import format_size, parse_duration

if TYPE_CHECKING:
    from backupfs.services.damage import Damage, Report
    from backupfs.services.status import Status

_SHOWN = 50  # ranges, in text


def _share(_: click.Context, __: click.Parameter, value: str | None) -> float:
    if value is None:
        return 1.0
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {value}: write for example 5%")
    return share


@click.command(
    epilog="""Examples:

    \b
    backupfs verify
    backupfs verify web01 --sample 5%
    backupfs verify web01/latest --repair --from vda=disk.qcow2
    """
)
@repository_option
@click.argument("what", metavar="[VM[/POINT]]", required=False)
@click.option("--sample", metavar="P%", callback=_share, help="Read this share of the chunks, chosen at random.")
@click.option("--repair", is_flag=True, help="Put right what can be had elsewhere or worked out, with the same BLAKE3.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="[DISK=]SOURCE",
    help="Where else --repair may look: an image or an NBD URI of the disk.",
)
@json_option
def verify(what: str | None, sample: float, repair: bool, sources: tuple[str, ...], as_json: bool) -> None:
    """Read and check; say which points and ranges are damaged.

    Every layer's header, table and trailer, every manifest and the index are checked, and each stored chunk that a
    point sees is read once. Exits with 20 when something is damaged and was not repaired.
    """
    from backupfs.services import repair as repairing  # noqa: PLC0415, libnbd is not needed for the other commands
    from backupfs.services import status as state  # noqa: PLC0415, as above
    from backupfs.services import verify as service  # noqa: PLC0415, as above

    if sources and not repair:
        raise UsageError("--from is for --repair")
    others = [_source(s) for s in sources]
    service.check_sources(others)  # now, and not after hours
    with open_repository() as repository, progress_bars() as progress:
        vm, point = None, None
        if what is not None and "/" in what:
            vm, point = listing.parse_point(repository, what)
        elif what is not None:
            vm = names.check_name(what, "VM")
        service.check_disks(repository, vm, [disk for disk, _ in others if disk])
        try:
            report = service.verify(repository, vm, point, sample, progress)
        except (UsageError, NotFound):
            raise  # nothing was tried
        except BaseException as e:
            state.keep_failed_verification(repository, [vm] if vm else repository.vms(), e)
            raise
        try:
            if repair:
                repairing.repair(repository, report, others, tell)
        finally:
            state.keep_verification(repository, [vm] if vm else repository.vms(), point, report)
        damage = list(report.all_damage(repository.settings.chunk_size))
    _print(report, damage, as_json)
    left = [d for d in damage if d.repaired is None]
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise Corrupt(left[0].file, left[0].file_offset, left[0].what + more)


def _source(text: str) -> tuple[str | None, str]:
    """Return the disk, None for any, and the source of `[DISK=]SOURCE`. A URI or a path may have a = in it, too."""
    disk, separator, source = text.partition("=")
    if separator and source and "/" not in disk:
        return disk, source
    return None, text


def _print(report: "Report", damage: "list[Damage]", as_json: bool) -> None:
    facts: dict[str, Any] = {
        "points": report.points,
        "layers": report.layers,
        "chunks": report.chunks,
        "stored_bytes": report.stored_bytes,
        "sample": report.sample,
        "seconds": report.seconds,
    }
    if as_json:
        print_json({**facts, "damage": [dataclasses.asdict(d) for d in damage]})
        return
    share = "" if report.sample == 1 else f", a sample of {report.sample:.3g} of the chunks"
    click.echo(
        f"{report.points} points, {report.layers} layers, {report.chunks} chunks, "
        f"{format_size(report.stored_bytes)} read and checked in {report.seconds:.1f} s{share}"
    )
    for d in damage[:_SHOWN]:
        where = f"{d.vm}/{d.disk}" if d.disk else d.vm
        span = f" offset {d.offset} length {d.length}" if d.offset is not None else ""
        fate = f"repaired from {d.repaired}" if d.repaired else "DAMAGED"
        click.echo(f"{fate}: {d.kind} of {where}{span}: {d.what}")
        click.echo(f"  in {d.file} at {d.file_offset}; seen by {', '.join(d.points) or 'no point'}")
    if len(damage) > _SHOWN:
        click.echo(f"… and {len(damage) - _SHOWN} more; --json shows all")


@click.command(
    epilog="Example: backupfs status --max-age 26h --metrics /var/lib/prometheus/node-exporter/backupfs.prom"
)
@repository_option
@click.option("--max-age", metavar="TIME", help="A VM's newest point must not be older: 26h, 2d, 1w.")
@click.option(
    "--max-verify-age", metavar="TIME", help="No VM must have been without a `verify`, of all of it, for longer."
)
@click.option("--metrics", metavar="FILE", help="Also write a text file for Prometheus, also where all fails.")
@json_option
def status(max_age: str | None, max_verify_age: str | None, metrics: str | None, as_json: bool) -> None:
    """Tell how things stand: newest points, last results, free space, known damage. Exits with 1 if something is wrong.

    The first line says it all. It reads no layers; what `verify` found last is what it knows of damage. A failed
    backup of a VM that has no points is wrong for 8 days, and then only listed.
    """
    from backupfs.services import status as state  # noqa: PLC0415, not needed for the other commands

    most = parse_duration(max_age) if max_age is not None else None
    most_unchecked = parse_duration(max_verify_age) if max_verify_age is not None else None
    try:
        with open_repository() as repository:
            found = state.status(repository, most, most_unchecked)
    except BackupfsError:
        if metrics is not None:
            try:
                state.write_metrics(None, metrics)
            except BackupfsError as unwritten:
                tell(str(unwritten))
        raise
    if as_json:
        print_json(found.as_json())
    else:
        _print_status(found)
    if metrics is not None:
        state.write_metrics(found, metrics)  # last: where it can't be written the state is told all the same
    if found.problems:
        raise SystemExit(1)


def _print_status(found: "Status") -> None:
    # The first line is what Nagios and the like show.
    more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
    click.echo(f"WRONG: {found.problems[0]}{more}" if found.problems else f"GOOD: {len(found.vms)} VMs")
    rows: list[tuple[str, ...]] = [("VM", "NEWEST", "AGE", "POINTS", "DAMAGED", "VERIFIED")]
    rows += [
        (v.vm, v.newest, f"{v.age_s / 3600:.1f} h", str(v.points), str(v.damaged), v.verified or "never")
        for v in found.vms
    ]
    print_table(rows)
    for r in found.results:
        name = f"{r.what} {r.vm}" if r.vm else r.what
        click.echo(f"{name}: {'good' if r.ok else 'FAILED'}, {r.finished}, {r.seconds:.0f} s")
    click.echo(f"{format_size(found.free_bytes)} of {format_size(found.size_bytes)} free")
    for problem in found.problems[1:]:
        click.echo(f"WRONG: {problem}")
