"""Commands that keep a repository in order."""

import contextlib
import dataclasses

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_table, tell
from backupfs.repository import names, results
from backupfs.services import gc as collecting
from backupfs.services import points as listing
from backupfs.services import prune as pruning
from backupfs.services.retention import KeepRules
from backupfs.units import format_size, parse_duration

no_wait_option = click.option(
    "--no-wait", is_flag=True, help="Fail when another process writes to the repository; else wait for it."
)


@click.command(epilog="Example: backupfs delete web01/20261122T200000Z")
@repository_option
@click.argument("points", nargs=-1, required=True, metavar="VM/POINT…")
@no_wait_option
def delete(points: tuple[str, ...], no_wait: bool) -> None:
    """Delete points, any of a chain. Space comes back by `gc`; mounts that have one open read on."""
    with open_repository() as repository:
        wanted = [listing.parse_point(repository, text) for text in points]
        for vm, point in pruning.delete(repository, wanted, None if no_wait else tell):
            click.echo(f"{vm}/{point} deleted")


@click.command(epilog="Example: backupfs prune web01 --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run")
@repository_option
@click.argument("vm", required=False)
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="Keep the N newest points.")
@click.option("--keep-hourly", type=click.IntRange(1), metavar="N", help="Keep the newest of each of N hours.")
@click.option("--keep-daily", type=click.IntRange(1), metavar="N", help="Keep the newest of each of N days.")
@click.option("--keep-weekly", type=click.IntRange(1), metavar="N", help="Keep the newest of each of N ISO weeks.")
@click.option("--keep-monthly", type=click.IntRange(1), metavar="N", help="Keep the newest of each of N months.")
@click.option("--keep-yearly", type=click.IntRange(1), metavar="N", help="Keep the newest of each of N years.")
@click.option("--keep-within", metavar="TIME", help="Keep what is not older than the newest by more: 36h, 30d, 4w.")
@click.option("--dry-run", is_flag=True, help="Delete nothing.")
@no_wait_option
@json_option
def prune(
    vm: str | None,
    keep_last: int | None,
    keep_hourly: int | None,
    keep_daily: int | None,
    keep_weekly: int | None,
    keep_monthly: int | None,
    keep_yearly: int | None,
    keep_within: str | None,
    dry_run: bool,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Delete the points that no rule keeps, of VM or of each VM; say of each point which rules keep it.

    A period counts when it has a point; times are UTC. Pinned points stay. Space comes back by `gc`.
    """
    rules = KeepRules(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within=parse_duration(keep_within) if keep_within is not None else None,
    )
    checked = names.check_name(vm, "VM") if vm is not None else None  # "" must not mean all: prune "$VM"
    with open_repository() as repository:
        verdicts = pruning.prune(repository, checked, rules, dry_run=dry_run, waiting=None if no_wait else tell)
    if as_json:
        print_json([{"vm": v.vm, "id": v.id, "kept": bool(v.rules), "rules": v.rules} for v in verdicts])
        return
    goes = "would go" if dry_run else "deleted"
    rows = [(v.vm, v.id, "stays" if v.rules else goes, ", ".join(v.rules)) for v in verdicts]
    print_table([("VM", "POINT", "", "KEPT BY"), *rows])


@click.command(epilog="Example: backupfs gc --dry-run")
@repository_option
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@no_wait_option
@json_option
def gc(dry_run: bool, no_wait: bool, as_json: bool) -> None:
    """Give back the space of what no point needs any more. Mounts go on, also those of deleted points."""
    with (
        open_repository() as repository,
        contextlib.nullcontext() if dry_run else results.recording(repository.path, "gc") as result,
    ):
        report = collecting.gc(repository, dry_run=dry_run, waiting=None if no_wait else tell)
        if result:
            result.facts["freed"] = report.freed
    if as_json:
        print_json({**dataclasses.asdict(report), "dry_run": dry_run})
        return
    freed = f"{format_size(report.freed)} of {format_size(report.before)}"
    click.echo(f"{freed} {'would be freed' if dry_run else 'freed'}; {report.layers} layers without a point")
    click.echo(f"{format_size(report.visible)} of data are seen by the points that stay")
    if report.rewritten:
        again = f"{format_size(report.written)} in {report.rewritten} layers"
        click.echo(f"{again} {'would have to be' if dry_run else 'were'} written again for that")
    for name in report.open:
        click.echo(f"kept because somebody reads it: deleted point of {name}")
    if report.linked:
        click.echo(
            f"{format_size(report.linked)} stay: those files have other names (links), maybe in a copy of all this"
        )
    if report.stuck > report.linked:
        click.echo(f"{format_size(report.stuck - report.linked)} stay: this file system makes no holes in files")


@click.command(epilog="Example: backupfs -r /srv/backups reindex")
@repository_option
def reindex() -> None:
    """Build the index again from manifests and layers. Loses nothing; mounts go on.

    Exits with 20 when points had to be left out: `verify --repair` is what may bring them back.
    """
    with open_repository() as repository:
        count = repository.reindex()
        click.echo(f"{count} points indexed")
        repository.check_indexed()
