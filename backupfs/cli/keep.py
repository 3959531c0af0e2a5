"""Commands that keep a repository in order."""

import click

from backupfs.cli.options import open_repository, repository_option


@click.command(epilog="Example: backupfs -r /srv/backups reindex")
@repository_option
def reindex() -> None:
    """Build the index again from manifests and layers. Loses nothing; mounts go on."""
    with open_repository() as repository:
        count = repository.reindex()
    click.echo(f"{count} points indexed")
