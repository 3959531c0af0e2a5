"""A running VM's disks as they are now, as files: fleecing set up, mounted, and undone when the mount goes."""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from backupfs.repository import names
from backupfs.services.mount import show_exports
from backupfs.sources.live_link import Export
from backupfs.sources.qmp import open_qmp
from backupfs.sources.qmp_moment import FleecedSource

_TIMEOUT_S = 30.0


def view(
    vm: str,
    qmp: str,
    mountpoint: str,
    *,
    disks: Sequence[str],
    scratch: str,
    allow_other: bool,
    on_ready: Callable[[], None],
) -> None:
    """Show one moment of a running QEMU's disks as MOUNTPOINT/VM/live/DISK.raw until the mount is taken away.

    Args:
        vm: what the VM is called in the mount.
        qmp: the path of its QMP socket.
        mountpoint: a folder.
        disks: which; none: all.
        scratch: a folder, for what the guest overwrites meanwhile.
        allow_other: let other users read it too.
        on_ready: called when it is mounted.

    Raises:
        SourceError: the moment can't be made. Nothing is left in QEMU.
        MountError: it can't be mounted, or the mount has crashed.
    """
    names.check_name(vm, "VM")
    with contextlib.closing(open_qmp(qmp, disks or None, scratch=scratch, timeout_s=_TIMEOUT_S)) as machine:
        for disk in machine.disks:
            names.check_name(disk.name, "disk")
        with contextlib.closing(machine.view()) as moment:
            # The mount ends, and with it what fills the scratch. Its session takes the signal as umount.
            moment.call_when_broken(lambda: os.kill(os.getpid(), signal.SIGTERM))
            exports = {(vm, name): _export(source) for name, source in moment.sources.items()}
            show_exports(exports, mountpoint, allow_other=allow_other, on_ready=on_ready)
            moment.check()


def _export(source: FleecedSource) -> Export:
    return Export(source.uri, source.witness.uri if source.witness else None)
