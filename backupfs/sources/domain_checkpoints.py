"""A running domain's checkpoints: which can be used, and which can go."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from backupfs.errors import ConnectError
from backupfs.sources import domain_xml
from backupfs.sources.machine import Recorders, Track
from backupfs.sources.qemu_img import StoredBitmaps, remove_bitmap, stored_bitmaps, too_full

if TYPE_CHECKING:
    from backupfs.sources.domain import Domain

log = logging.getLogger(__name__)

_UNKNOWN = StoredBitmaps(possible=True, names=(), sound=frozenset())


class Checkpoints:
    """The checkpoints of one domain.

    Args:
        disks: those that are backed up.
    """

    def __init__(self, domain: "Domain", disks: Sequence[domain_xml.DomainDisk], timeout_s: float) -> None:
        self._domain = domain
        self._disks = {disk.name: disk for disk in disks}
        self._timeout_s = timeout_s
        self._stored: dict[str, StoredBitmaps] = {}

    def can_record(self, disk: str) -> bool:
        """Whether a disk can have a bitmap that outlives QEMU's process: libvirt makes no others."""
        return self._problem(disk) == ""

    def _problem(self, disk: str) -> str:
        image_format = self._disks[disk].image_format
        if self._disks[disk].shared:
            return "other machines write to it, too, and no bitmap knows what"
        if image_format != "qcow2":
            return f"a {image_format} image has no persistent bitmaps"
        return "" if self._bitmaps(disk).possible else "a qcow2 image of version 2 has no persistent bitmaps"

    def _bitmaps(self, disk: str) -> StoredBitmaps:
        path = self._disks[disk].path
        if path is None or self._disks[disk].image_format != "qcow2":
            return _UNKNOWN
        if disk not in self._stored:
            try:
                self._stored[disk] = stored_bitmaps(path, self._timeout_s)
            except ConnectError as e:
                log.debug("%s", e)  # it may be readable for QEMU only
                self._stored[disk] = _UNKNOWN
        return self._stored[disk]

    def problems(self, recorders: Recorders, tracks: Mapping[str, Track], *, keep: bool) -> dict[str, str]:
        """Say for each disk why its old checkpoint can't be used; "" if it can.

        Args:
            keep: whether libvirt may go on knowing a checkpoint that it had lost.
        """
        found = {disk: self._problem(disk) or track.reason for disk, track in tracks.items()}
        there = self._domain.checkpoints()
        for name in {track.recorder for track in tracks.values() if track.recorder}:
            disks = [disk for disk, track in tracks.items() if track.recorder == name and not found[disk]]
            were = self._domain.checkpoint_images(name) if name in there else {}
            for disk in disks:  # libvirt may have lost the checkpoint, or been told of it anew; our manifest has not
                were.update(images_of(tracks[disk], disk))
            moved = moved_disks(were, [self._disks[disk] for disk in disks])
            usable = self._usable(name, disks, known=name in there, keep=keep)
            for disk in disks:
                missing = "" if disk in usable else f"checkpoint {name} has no sound bitmap of the disk"
                found[disk] = moved.get(disk) or missing
        return found

    def _usable(self, name: str, disks: Sequence[str], *, known: bool, keep: bool) -> set[str]:
        """Return those of `disks` that a checkpoint has a sound bitmap of; none if it is not there."""
        if not disks:
            return set()
        if known:
            return _sound(self._domain.checkpoint_disks(name))
        # libvirt believes what it is told, and says only then which bitmaps are sound.
        self._domain.tell_checkpoint(name, disks)
        sound = _sound(self._domain.checkpoint_disks(name))
        if not keep or sound != set(disks):
            self._domain.delete_checkpoint(name, bitmaps=False)
        if keep and sound and sound != set(disks):
            self._domain.tell_checkpoint(name, sound)
        return sound

    def retire(self, recorders: Recorders, disks: Collection[str], keep: Collection[str]) -> None:
        """Delete this chain's checkpoints that no point of these disks needs.

        One that other disks have a part in is left alone: their chain may need it.

        Args:
            recorders: whose checkpoints.
            disks: those whose checkpoints can be told to be needed or not.
            keep: the checkpoints that are needed.
        """
        others = {disk.name for disk in domain_xml.disks(self._domain.xml())} - set(disks)
        there = self._domain.checkpoints()
        for name in there:
            if recorders.owns(name) and name not in keep and not others & self._domain.checkpoint_disks(name).keys():
                self.delete(name)
        # Bitmaps that libvirt does not know of: of a checkpoint that it lost, or of a backup while the domain was off.
        lost: dict[str, list[str]] = {}
        for disk in disks:
            for name in self._bitmaps(disk).names:
                if recorders.owns(name) and name not in keep and name not in there:
                    lost.setdefault(name, []).append(disk)
        for name, having in lost.items():
            self._delete_bitmaps(name, having)
        self._stored.clear()

    def delete(self, name: str) -> None:
        """Delete a checkpoint, if there is one of that name, with those of its bitmaps that are there."""
        if name not in self._domain.checkpoints():
            return
        if not self._domain.is_active():
            disks = [d for d in self._domain.checkpoint_disks(name) if d in self._disks]
            self._domain.delete_checkpoint(name, bitmaps=False)
            remove_stored(name, [self._disks[d] for d in disks], self._timeout_s)
            return
        full = [path for disk in self._disks.values() if (path := disk.path) is not None and too_full(path)]
        if full:
            log.warning("checkpoint %s stays for now: %s: the file system is too full", name, ", ".join(full))
            return
        try:
            self._domain.delete_checkpoint(name, bitmaps=True)
        except ConnectError as e:
            log.debug("%s: deleting its bitmaps one by one", e)
            disks = list(self._domain.checkpoint_disks(name))
            self._domain.delete_checkpoint(name, bitmaps=False)
            self._delete_bitmaps(name, disks)

    def _delete_bitmaps(self, name: str, disks: Iterable[str]) -> None:
        """Delete the bitmaps of a checkpoint that libvirt does not know. libvirt refuses all when one is missing."""
        for disk in disks:
            self._domain.tell_checkpoint(name, [disk])
            try:
                self._domain.delete_checkpoint(name, bitmaps=True)
            except ConnectError as e:
                log.debug("%s", e)
                self._domain.delete_checkpoint(name, bitmaps=False)


def images_of(track: Track, disk: str) -> dict[str, str]:
    """Return the description of the image that a disk had at its chain's last point, by the disk; none if unknown."""
    there = domain_xml.disks(track.domain_xml) if track.domain_xml else []
    return {found.name: found.description for found in there if found.name == disk}


def moved_disks(were: Mapping[str, str], disks: Iterable[domain_xml.DomainDisk]) -> dict[str, str]:
    """Say of those disks that have another image than at their chain's last point that they have.

    Two disks that changed places have a sound bitmap of the checkpoint's name each: the other one's.

    Args:
        were: by disk, the description of its image then.
    """
    return {
        disk.name: f"its image was {were[disk.name]} at its chain's last point"
        for disk in disks
        if disk.name in were and were[disk.name] not in {disk.description, *disk.below}
    }


def remove_stored(name: str, disks: Iterable[domain_xml.DomainDisk], timeout_s: float) -> None:
    """Remove a bitmap from the images of a domain that is off, where it is there. Logs what can't be done."""
    for disk in disks:
        if disk.path is None or disk.image_format != "qcow2":
            continue
        try:
            if name in stored_bitmaps(disk.path, timeout_s).names:
                remove_bitmap(disk.path, name)
        except ConnectError as e:
            log.warning("bitmap %s stays for now: %s", name, e)


def _sound(disks: Mapping[str, bool]) -> set[str]:
    return {disk for disk, sound in disks.items() if sound}
