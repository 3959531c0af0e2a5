"""A domain that is off: its disks' images, read as files, and the persistent bitmaps in them.

The bitmaps have the names of libvirt's checkpoints, so that a running domain's backups go on from here, and back.
The new bitmap is added first, which takes QEMU's lock for writing; then the image is opened for reading under QEMU's
lock against writers. Between the two the domain may be started: then opening it is refused. While it is read, the
domain can't be started, except on a file system without locks: `check` looks at that.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from backupfs.errors import BackupfsError, ConnectError, SourceError
from backupfs.sources import domain_xml
from backupfs.sources.domain_checkpoints import images_of, moved_disks, remove_stored
from backupfs.sources.domain_moment import DomainMoment
from backupfs.sources.machine import MachineDisk, Recorders, Track
from backupfs.sources.qemu_img import add_bitmap, stored_bitmaps
from backupfs.sources.qemu_nbd import open_image
from backupfs.sources.source import Source

if TYPE_CHECKING:
    from backupfs.sources.domain import Domain

log = logging.getLogger(__name__)


class StoppedDomain:
    """A domain that is off. A Machine. There is nothing to freeze. Made by `open_domain` only."""

    def __init__(self, domain: "Domain", disks: Sequence[domain_xml.DomainDisk], timeout_s: float) -> None:
        self._domain = domain
        self._timeout_s = timeout_s
        self._begun: DomainMoment | None = None
        self._paths: dict[str, str] = {}
        for disk in disks:
            if disk.path is None:
                raise ConnectError(
                    f"domain {domain.name} is off, and disk {disk.name} ({disk.description}) is no file or block "
                    "device of this host: start the domain, or leave the disk out with --disk"
                )
            self._paths[disk.name] = disk.path
        self._wanted = {disk.name: disk for disk in disks}
        self.disks = [MachineDisk(d.name, domain.disk_size(d.name), d.description) for d in disks]

    def plan(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Mapping[str, str]:
        """See `Machine.plan`."""
        there = self._domain.checkpoints()
        return {name: self._problem(name, track, there) for name, track in tracks.items()}

    def begin(self, recorders: Recorders, tracks: Mapping[str, Track]) -> DomainMoment:
        """See `Machine.begin`."""
        self._take_over(recorders, tracks)
        problems = self.plan(recorders, tracks)
        recorded = [name for name in tracks if self._can_record(name)]
        with ExitStack() as undo:
            new = _New(self._domain, recorders, [self._wanted[name] for name in tracks], recorded, self._timeout_s)
            undo.callback(new.settle)
            for name in recorded:
                add_bitmap(self._paths[name], recorders.new)
            sources: dict[str, Source] = {}
            for name, track in tracks.items():
                old = None if problems[name] else track.recorder
                source = sources[name] = open_image(self._paths[name], old, self._timeout_s)
                undo.callback(source.close)
                source.bitmap_problem = problems[name] or source.bitmap_problem
                self._refuse_other_format(name, source.format)
            self._refuse_running()
            description = self._domain.xml()
            self._begun = DomainMoment(
                sources=sources,
                recorders=dict.fromkeys(recorded, recorders.new),
                consistency="crash",
                domain_xml=description,
                holds=self._refuse_running,
                publish=new.publish,
                undo=undo.pop_all(),
            )
            return self._begun

    def close(self) -> None:
        """See `Machine.close`."""
        if self._begun is not None:
            self._begun.close()
        self._domain.close()

    def _refuse_running(self) -> None:
        if self._domain.is_active():
            raise ConnectError(f"domain {self._domain.name} was started meanwhile: begin again")

    def _can_record(self, name: str) -> bool:
        disk = self._wanted[name]
        return (
            disk.image_format == "qcow2"
            and not disk.shared
            and stored_bitmaps(self._paths[name], self._timeout_s).possible
        )

    def _problem(self, name: str, track: Track, checkpoints: Collection[str]) -> str:
        disk = self._wanted[name]
        if disk.shared:
            return "other machines write to it, too, and no bitmap knows what"
        if disk.image_format != "qcow2":
            return f"a {disk.image_format} image has no persistent bitmaps"
        if track.recorder is None:
            return track.reason
        were = self._domain.checkpoint_images(track.recorder) if track.recorder in checkpoints else {}
        moved = moved_disks({**were, **images_of(track, name)}, [disk])
        if moved:
            return moved[name]
        if track.recorder in stored_bitmaps(self._paths[name], self._timeout_s).sound:
            return ""
        return f"the image has no bitmap {track.recorder} that is sound and knows all changes"

    def _refuse_other_format(self, name: str, found: str) -> None:
        """A guest can write another format's header, naming any file of the host, on a raw disk."""
        declared = self._wanted[name].image_format
        if found != declared:
            raise SourceError(
                f"{self._paths[name]}: looks like {found}, and domain {self._domain.name} says that it is {declared}: "
                "a guest can write such a header. It can be backed up while the domain runs"
            )

    def _take_over(self, recorders: Recorders, tracks: Mapping[str, Track]) -> None:
        """Remove the bitmaps of backups that were killed."""
        for name, track in tracks.items():
            if track.recorder is not None:
                remove_others(recorders, self._wanted[name], track.recorder, self._timeout_s)


class _New:
    """The new bitmaps, until it is known whether they or the old ones stay."""

    def __init__(
        self,
        domain: "Domain",
        recorders: Recorders,
        disks: Sequence[domain_xml.DomainDisk],
        recorded: Sequence[str],
        timeout_s: float,
    ) -> None:
        self._domain = domain
        self._recorders = recorders
        self._disks = disks
        self._recorded = recorded
        self._timeout_s = timeout_s
        self._published = False

    def publish(self) -> None:
        """Say that the point is there."""
        self._published = True

    def settle(self) -> None:
        """Remove the old ones when the point is published, else the new ones."""
        new = self._recorders.new
        if not self._published:
            remove_stored(new, self._recording(), self._timeout_s)
            return
        try:
            for disk in self._recording():
                remove_others(self._recorders, disk, new, self._timeout_s)
            self._tell()
        except BackupfsError as e:
            log.warning("%s", e)

    def _recording(self) -> list[domain_xml.DomainDisk]:
        return [disk for disk in self._disks if disk.name in self._recorded]

    def _tell(self) -> None:
        """Tell libvirt which checkpoints there are now. A running domain's backup would find it out by itself."""
        others = {disk.name for disk in domain_xml.disks(self._domain.xml())} - {disk.name for disk in self._disks}
        for name in self._domain.checkpoints():
            if self._recorders.owns(name) and not others & self._domain.checkpoint_disks(name).keys():
                self._domain.delete_checkpoint(name, bitmaps=False)
        if self._recorded:
            self._domain.tell_checkpoint(self._recorders.new, self._recorded)


def remove_others(recorders: Recorders, disk: domain_xml.DomainDisk, keep: str, timeout_s: float) -> None:
    """Remove this chain's bitmaps from an image, except one."""
    if disk.path is not None and disk.image_format == "qcow2":
        for name in stored_bitmaps(disk.path, timeout_s).names:
            if recorders.owns(name) and name != keep:
                remove_stored(name, [disk], timeout_s)
