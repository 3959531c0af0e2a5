"""Commands that mount."""

import re

import click

from backupfs.cli.options import repository_option, repository_path, scratch_option
from backupfs.errors import UsageError


@click.command(epilog="Example: backupfs -r /srv/backups mount /mnt/backups")
@repository_option
@click.argument("mountpoint")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr: for service managers.")
@click.option(
    "--live", multiple=True, metavar="VM/DISK=URI", help="Show this NBD export as VM/live/DISK.raw (repeatable)."
)
@click.option("--allow-other", is_flag=True, help="Let other users read it too.")
@click.option("--no-passthrough", is_flag=True, help="Check the bytes of hydrated disks too, at the speed of others.")
@click.option(
    "--scratch",
    metavar="FOLDER",
    help="Show each disk as DISK.rw too, which can be written to; what is written goes to FOLDER, a private one "
    "(not what --scratch of backup and live is for).",
)
@click.option("--keep-scratch", is_flag=True, help="Keep it when the mount ends, and go on with what was kept there.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, as mount(8) gives them.")
def mount(
    mountpoint: str,
    foreground: bool,
    live: tuple[str, ...],
    allow_other: bool,
    no_passthrough: bool,
    scratch: str | None,
    keep_scratch: bool,
    options: tuple[str, ...],
) -> None:
    """Show the repository as files at MOUNTPOINT; returns when it is mounted.

    Each disk of each point is a read-only raw file: MOUNTPOINT/VM/POINT/DISK.raw; VM/latest is the newest point.
    DISK.parts beside it has its partitions and logical volumes (LVM2) as raw files; ERROR.txt in it says what is not.
    DISK.files has the guest's own files in them, DISK.files/VOLUME/etc/hosts; UNSUPPORTED.txt says why there are none.
    A live export is EIO while it is away, and comes back when it does. What `backupfs hydrate` made ready is read by
    the kernel itself, without a look at hashes (root, Linux 6.9 or later).

    With --scratch there is a DISK.rw beside each DISK.raw: the same disk, but it can be written to, to boot the VM from
    it, replay a journal, or activate its LVM. The repository is never written to. Without --keep-scratch what was
    written is gone when the mount is.
    """
    from backupfs.services import mount as service  # noqa: PLC0415, pyfuse3 is not needed for the other commands

    service.mount(
        repository_path(),
        mountpoint,
        foreground=foreground,
        allow_other=allow_other,
        options=options,
        live=dict(_export(text) for text in live),
        passthrough=not no_passthrough,
        scratch=scratch,
        keep_scratch=keep_scratch,
    )


def _export(text: str) -> tuple[tuple[str, str], str]:
    """Return ((VM, disk), URI) of `VM/DISK=URI`. A disk's name may have `=` in it. Raises UsageError."""
    match = re.fullmatch(r"([^/]+)/([^/]+?)=(nbds?(?:\+\w+)?://.*)", text)
    if match is None:
        raise UsageError(f"--live {text!r} is not VM/DISK=URI, with a URI like nbd+unix:///EXPORT?socket=PATH")
    return (match[1], match[2]), match[3]


@click.command(epilog="Example: backupfs live web01 --qmp /run/web01.qmp --mount /mnt/live")
@click.argument("vm")
@click.option("--qmp", required=True, metavar="SOCKET", help="The running QEMU's QMP socket.")
@click.option("--mount", "mountpoint", required=True, metavar="MOUNTPOINT", help="A folder.")
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Only this disk (repeatable).")
@scratch_option
@click.option("--allow-other", is_flag=True, help="Let other users read it too.")
def live(vm: str, qmp: str, mountpoint: str, disks: tuple[str, ...], scratch: str, allow_other: bool) -> None:
    """Show a running VM's disks as they are at this moment, as MOUNTPOINT/VM/live/DISK.raw.

    Stays until the mount is taken away (`backupfs umount`) or Ctrl-C, and then undoes what it set up in QEMU. The
    guest goes on; what it overwrites is kept in the scratch meanwhile.
    """
    from backupfs.services import view as service  # noqa: PLC0415, as in mount

    def tell() -> None:
        click.echo(f"{mountpoint}/{vm}/live shows {vm} as it is now; Ctrl-C or `backupfs umount` ends it", err=True)

    service.view(vm, qmp, mountpoint, disks=disks, scratch=scratch, allow_other=allow_other, on_ready=tell)


@click.command(epilog="Example: backupfs umount /mnt/backups")
@repository_option
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Take a mount away."""
    from backupfs.services import mount as service  # noqa: PLC0415, as in mount

    service.unmount(mountpoint)
