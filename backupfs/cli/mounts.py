"""Commands that mount."""

import re

import click

from backupfs.cli.options import repository_option, repository_path
from backupfs.errors import UsageError


@click.command(epilog="Example: backupfs -r /srv/backups mount /mnt/backups")
@repository_option
@click.argument("mountpoint")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr: for service managers.")
@click.option(
    "--live", multiple=True, metavar="VM/DISK=URI", help="Show this NBD export as VM/live/DISK.raw (repeatable)."
)
@click.option("--allow-other", is_flag=True, help="Let other users read it too.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, as mount(8) gives them.")
def mount(
    mountpoint: str, foreground: bool, live: tuple[str, ...], allow_other: bool, options: tuple[str, ...]
) -> None:
    """Show the repository as files at MOUNTPOINT; returns when it is mounted.

    Each disk of each point is a read-only raw file: MOUNTPOINT/VM/POINT/DISK.raw; VM/latest is the newest point.
    A live export is EIO while it is away, and comes back when it does.
    """
    from backupfs.services import mount as service  # noqa: PLC0415, pyfuse3 is not needed for the other commands

    service.mount(
        repository_path(),
        mountpoint,
        foreground=foreground,
        allow_other=allow_other,
        options=options,
        live=dict(_export(text) for text in live),
    )


def _export(text: str) -> tuple[tuple[str, str], str]:
    """Return ((VM, disk), URI) of `VM/DISK=URI`. A disk's name may have `=` in it. Raises UsageError."""
    match = re.fullmatch(r"([^/]+)/([^/]+?)=(nbds?(?:\+\w+)?://.*)", text)
    if match is None:
        raise UsageError(f"--live {text!r} is not VM/DISK=URI, with a URI like nbd+unix:///EXPORT?socket=PATH")
    return (match[1], match[2]), match[3]


@click.command(epilog="Example: backupfs umount /mnt/backups")
@repository_option
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Take a mount away."""
    from backupfs.services import mount as service  # noqa: PLC0415, as in mount

    service.unmount(mountpoint)
