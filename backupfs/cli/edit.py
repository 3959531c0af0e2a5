"""The command that changes what a person may change of a point."""

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, tell
from backupfs.services import points as listing
from backupfs.services.edit import edit as edit_point


@click.command(epilog='Example: backupfs edit web01/latest --note "before the upgrade" --tag upgrade --pin')
@repository_option
@click.argument("point", metavar="VM/POINT")
@click.option("--note", metavar="TEXT", help="Replaces the note.")
@click.option("--tag", "add", multiple=True, metavar="TAG", help="Add a tag (repeatable).")
@click.option("--untag", "remove", multiple=True, metavar="TAG", help="Remove a tag (repeatable).")
@click.option("--pin/--no-pin", "pinned", default=None, help="prune and delete leave a pinned point alone.")
@json_option
def edit(
    point: str, note: str | None, add: tuple[str, ...], remove: tuple[str, ...], pinned: bool | None, as_json: bool
) -> None:
    """Change a point's note and tags, or pin it."""
    with open_repository() as repository:
        vm, point_id = listing.parse_point(repository, point)
        manifest = edit_point(repository, vm, point_id, note=note, add=add, remove=remove, pinned=pinned, waiting=tell)
    if as_json:
        print_json(listing.point_summary(manifest))
        return
    tags = " ".join([*manifest.tags, *(["pinned"] if manifest.pinned else [])]) or "none"
    click.echo(f"{vm}/{point_id}: tags: {tags}; note: {manifest.note or 'none'}")
