"""The partitions and logical volumes of stored disks, as files in the mount: DISK.parts/ beside DISK.raw.

The disks of a point are looked at when somebody looks into such a folder, all of them, since a volume group may lie on
several. What was found is kept for the points that were looked at last; it is worked out from the point alone, so it
comes out the same each time. From any thread.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from backupfs.errors import BackupfsError
from backupfs.fuse.catalogue import DiskFile, Folder, TextFile
from backupfs.guest.scan import Division, scan
from backupfs.guest.volumes import Volume, assemble
from backupfs.image import Image
from backupfs.repository.cache import LruCache
from backupfs.units import MiB

log = logging.getLogger(__name__)

PROBLEMS = "ERROR.txt"
"""Stands in the folder of a disk of which something can't be shown, or should be known, and says what."""

_SUFFIX = ".raw"
_KEPT = 8 * MiB  # bytes, about
_STEPS = 1024  # that finding out how much of a point's volumes is allocated may take; one is 0.3 ms at most
_STEP = 16 * MiB

Files = tuple[DiskFile | TextFile, ...]


@dataclass(frozen=True, slots=True)
class _Point:
    """A point's disks, all of them.

    Two are equal if they are the same moment of the same disks.
    """

    vm: str
    point: str
    versions: tuple[tuple[str, str], ...]


class Volumes:
    """Finds out and remembers what the disks of points are divided into."""

    def __init__(self) -> None:
        self._known: LruCache[_Point, dict[str, Files]] = LruCache(_KEPT)
        self._checked: LruCache[tuple[_Point, str], bool] = LruCache(10_000)

    def folders(self, vm: str, point: str, disks: Sequence[DiskFile]) -> list[Folder]:
        """Return a folder for each of a point's disks. Nothing is read before one is looked into."""
        return [Folder(f"{_name(disk)}.parts", partial(self._files, vm, point, disks, _name(disk))) for disk in disks]

    def _files(self, vm: str, point: str, disks: Sequence[DiskFile], name: str) -> Files:
        key = _Point(vm, point, tuple((disk.name, disk.version) for disk in disks))
        known = self._known.get(key)
        if known is None:
            by_name = {_name(disk): disk for disk in disks}
            known, cost = self._look(key, by_name)
            if cost:
                self._known.put(key, known, cost)
        return known[name]

    def _look(self, key: _Point, disks: dict[str, DiskFile]) -> tuple[dict[str, Files], int]:
        """Return each disk's files, and about how much memory they take; 0 if something could not be read."""
        images, unreadable = dict[str, Image](), dict[str, Division]()
        try:
            for name, disk in disks.items():
                try:
                    images[name] = disk.open()
                except BackupfsError as e:
                    unreadable[name] = Division((), (f"the disk can't be opened: {e}",), complete=False)
            found = scan(images) | unreadable
            steps = _STEPS // max(1, sum(len(division.volumes) for division in found.values())) + 1
            files = dict[str, Files]()
            for name, division in found.items():
                sizes = [(volume, _allocated(volume, images, steps)) for volume in division.volumes]
                files[name] = (*(self._file(key, disks, *size) for size in sizes), *_problems(division))
            return files, _cost(found.values()) if all(division.complete for division in found.values()) else 0
        finally:
            for image in images.values():
                image.close()

    def _file(self, key: _Point, disks: dict[str, DiskFile], volume: Volume, allocated: int) -> DiskFile:
        on = [disks[name] for name in volume.disks]
        facts = {"vm": key.vm, "point": key.point, "disk": " ".join(volume.disks), "volume": volume.name}
        content = repr((volume.runs, [(disk.name, disk.version) for disk in on]))
        return DiskFile(
            name=volume.name + _SUFFIX,
            size=volume.size,
            allocated=allocated,
            version=hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            xattrs={f"user.backupfs.{name}": value.encode() for name, value in facts.items()},
            open=partial(_open, volume, on),
            check=partial(self._check, key, on),
        )

    def _check(self, key: _Point, disks: Sequence[DiskFile], _volume: Image) -> None:
        """Check the disks of a volume as they are checked themselves, but not again for each volume."""
        for disk in disks:
            if disk.check is None or self._checked.get((key, disk.name)):
                continue
            image = disk.open()
            try:
                disk.check(image)
            finally:
                image.close()
            self._checked.put((key, disk.name), True, 1)


def _open(volume: Volume, disks: Sequence[DiskFile]) -> Image:
    images = dict[str, Image]()
    try:
        for disk in disks:
            images[_name(disk)] = disk.open()
        return assemble(volume, images)
    except BaseException:
        for image in images.values():
            image.close()
        raise


def _name(disk: DiskFile) -> str:
    return disk.name.removesuffix(_SUFFIX)


def _problems(division: Division) -> list[TextFile]:
    if not division.problems:
        return []
    return [TextFile(PROBLEMS, "".join(f"{line}\n" for line in division.problems).encode(errors="replace"))]


def _allocated(volume: Volume, images: dict[str, Image], steps: int) -> int:
    """Return how many of a volume's bytes are no holes; of what takes too long to look at all bytes count."""
    allocated, seen, left = 0, 0, steps * _STEP
    try:
        for extent in assemble(volume, images).extents(0, volume.size):
            seen = extent.end
            left -= _STEP if extent.flag else max(extent.length, _STEP)
            allocated += 0 if extent.flag else extent.length
            if left < 0:
                break
    except BackupfsError as e:
        log.warning("how much of %s is allocated can't be read: %s", volume.name, e)
    return allocated + volume.size - seen


def _cost(divisions: Iterable[Division]) -> int:
    """Return about how many bytes of memory it takes to remember them as files."""
    return sum(
        1000
        + sum(2000 + 200 * len(volume.runs) for volume in division.volumes)
        + sum(100 + len(problem) for problem in division.problems)
        for division in divisions
    )
