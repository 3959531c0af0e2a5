"""Find out what a point's disks are divided into. A function on Images; nothing is opened or kept here.

Source: which ranges are looked at for physical volumes: LVM2, which takes partitions, and disks without any.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from backupfs.errors import BackupfsError
from backupfs.guest.lvm import Budget, PhysicalVolume, read_physical_volume
from backupfs.guest.lvm_groups import read_groups
from backupfs.guest.partitions import read_table
from backupfs.guest.volumes import Leg, Run, Volume
from backupfs.image import Image, SliceImage

_MOST_VOLUMES = 4096  # of a disk
_MOST_PROBLEMS = 1000  # lines for a disk


@dataclass(frozen=True, slots=True)
class Division:
    """What is on a disk.

    Args:
        volumes: its partitions, or under the name 0 all of a disk that has none; then the logical volumes of which a
            part lies on it.
        problems: what can't be shown and why, and what should be known, each in a line.
        complete: whether all could be read that had to be looked at. If not, it may be otherwise another time.
    """

    volumes: tuple[Volume, ...]
    problems: tuple[str, ...]
    complete: bool = True


class _Disk:
    def __init__(self, name: str, image: Image) -> None:
        self.name = name
        self.image = image
        self.volumes: list[Volume] = []
        self.problems: list[str] = []
        self.complete = True

    def read_partitions(self) -> None:
        try:
            table = read_table(self.image)
        except BackupfsError as e:
            self.fail(f"the partition table can't be read: {e}")
            return
        self.problems += table.problems
        self.volumes = [_range(self.name, str(p.number), p.offset, p.length) for p in table.partitions]
        if not self.volumes and not self.problems and self.image.size:
            self.volumes = [_range(self.name, "0", 0, self.image.size)]

    def find_physical(self, budget: Budget) -> list[PhysicalVolume]:
        found = []
        for volume in self.volumes:
            (leg,) = volume.runs[0].legs
            try:
                physical = read_physical_volume(
                    SliceImage(self.image, leg.offset, volume.size), self.name, leg.offset, budget
                )
            except BackupfsError as e:
                self.fail(f"{volume.name}: whether it belongs to LVM can't be read: {e}")
                continue
            if physical:
                found.append(physical)
                self.problems += (f"{volume.name}: {problem}" for problem in physical.problems)
        return found

    def fail(self, problem: str) -> None:
        self.problems.append(problem)
        self.complete = False


def scan(disks: Mapping[str, Image]) -> dict[str, Division]:
    """Return what is on each of a point's disks.

    Args:
        disks: all that can be opened, by name: a volume group may lie on several.
    """
    scanned = [_Disk(name, image) for name, image in disks.items()]
    budget, physical = Budget(), list[PhysicalVolume]()
    for disk in scanned:
        disk.read_partitions()
        physical += disk.find_physical(budget)
    groups = read_groups(physical)
    for disk in scanned:
        for group in groups:
            disk.volumes += (volume for volume in group.volumes if disk.name in volume.disks)
            if disk.name in group.disks:
                disk.problems += group.problems
        if len(disk.volumes) > _MOST_VOLUMES:
            disk.problems.insert(0, f"{len(disk.volumes)} volumes are too many: {_MOST_VOLUMES} of them are shown")
            del disk.volumes[_MOST_VOLUMES:]
    complete = all(disk.complete for disk in scanned)
    return {d.name: Division(tuple(d.volumes), tuple(d.problems[:_MOST_PROBLEMS]), complete) for d in scanned}


def _range(disk: str, name: str, offset: int, length: int) -> Volume:
    return Volume(name, (Run(length, (Leg(disk, offset),)),))
