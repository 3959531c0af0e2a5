"""Commands that mount."""

import click

from backupfs.cli.options import repository_option, repository_path


@click.command(epilog="Example: backupfs -r /srv/backups mount /mnt/backups")
@repository_option
@click.argument("mountpoint")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr: for service managers.")
@click.option("--allow-other", is_flag=True, help="Let other users read it too.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, as mount(8) gives them.")
def mount(mountpoint: str, foreground: bool, allow_other: bool, options: tuple[str, ...]) -> None:
    """Show the repository as files at MOUNTPOINT; returns when it is mounted.

    Each disk of each point is a read-only raw file: MOUNTPOINT/VM/POINT/DISK.raw; VM/latest is the newest point.
    """
    from backupfs.services import mount as service  # noqa: PLC0415, pyfuse3 is not needed for the other commands

    service.mount(repository_path(), mountpoint, foreground=foreground, allow_other=allow_other, options=options)


@click.command(epilog="Example: backupfs umount /mnt/backups")
@repository_option
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Take a mount away."""
    from backupfs.services import mount as service  # noqa: PLC0415, as in mount

    service.unmount(mountpoint)
