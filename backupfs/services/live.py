"""The live disks of a mount: which there are, and how they look in the tree."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backupfs.errors import NotFound
from backupfs.fuse.catalogue import LIVE, DiskFile, PointEntry
from backupfs.fuse.nodes import Stale
from backupfs.image import Image
from backupfs.repository import names
from backupfs.sources.live import LiveDisk, check_uri
from backupfs.sources.live_link import Export

_START_S = 3.0  # a mount that begins waits so long for its live disks to be there

Exports = Mapping[tuple[str, str], Export]
"""By VM and disk."""


def check_exports(exports: Exports) -> None:
    """Refuse what can't be shown. Raises UsageError."""
    for (vm, disk), export in exports.items():
        names.check_name(vm, "VM")
        names.check_name(disk, "disk")
        check_uri(export.uri)


@dataclass(frozen=True, slots=True)
class _Disk:
    name: str
    live: LiveDisk


class LiveDisks:
    """The exports of a mount.

    A disk is in its VM's folder once its export has been there. While that is away, it stays listed with the size that
    it had, and can't be opened; it is looked for again whenever somebody looks at the folder or opens the file. Before
    that it is not listed, as its size is not known: a copy of it would be empty, without an error.

    Args:
        exports: by VM and disk.

    Attributes:
        begun_ns: when the mount began.
    """

    def __init__(self, exports: Exports) -> None:
        self._disks: dict[str, list[_Disk]] = {}
        self.begun_ns = time.time_ns()
        for (vm, disk), export in exports.items():
            live = LiveDisk(export, f"{vm}/live/{disk}.raw ({export.uri})")
            self._disks.setdefault(vm, []).append(_Disk(disk, live))

    def begin(self) -> None:
        """Look for all exports; wait a little for those that do not answer."""
        deadline = time.monotonic() + _START_S
        disks = [disk.live for disks in self._disks.values() for disk in disks]
        for disk in disks:
            disk.look()
        for disk in disks:
            disk.settle(max(0.0, deadline - time.monotonic()))

    def vms(self) -> list[str]:
        """Return the VMs that have live disks."""
        return list(self._disks)

    def entry(self, vm: str) -> PointEntry:
        """Return what is in a VM's folder of live disks. Waits for none. Raises NotFound."""
        if vm not in self._disks:
            raise NotFound(f"VM {vm!r} has no live disks")
        files = [file for disk in self._disks[vm] if (file := _file(vm, disk)) is not None]
        return PointEntry(self.begun_ns, files)

    def close(self) -> None:
        """End all connections."""
        for disks in self._disks.values():
            for disk in disks:
                disk.live.close()


class LiveCatalogue:
    """Live disks, and nothing else. A Catalogue."""

    def __init__(self, disks: LiveDisks) -> None:
        self._disks = disks

    def vms(self) -> Sequence[str]:
        """See `Catalogue.vms`."""
        return self._disks.vms()

    def points(self, vm: str) -> Mapping[str, int]:
        """See `Catalogue.points`."""
        return {LIVE: self._disks.begun_ns} if vm in self._disks.vms() else {}

    def point(self, vm: str, point: str) -> PointEntry:
        """See `Catalogue.point`."""
        return self._disks.entry(vm)

    def usage(self) -> os.statvfs_result:
        """See `Catalogue.usage`: nothing is stored; the root's."""
        return os.statvfs("/")


def _file(vm: str, disk: _Disk) -> DiskFile | None:
    look = disk.live.look()
    if look is None:
        return None

    def open_image() -> Image:
        shown = disk.live.open()
        if shown.version != look.version:
            raise Stale(f"{vm}/live/{disk.name}.raw came back")
        return shown

    facts = {"vm": vm, "disk": disk.name, "kind": "live"}
    return DiskFile(
        name=f"{disk.name}.raw",
        size=look.size,
        allocated=look.allocated,
        version=look.version,
        xattrs={f"user.backupfs.{name}": value.encode() for name, value in facts.items()},
        open=open_image,
        time_ns=look.since_ns,
        live=True,
    )
