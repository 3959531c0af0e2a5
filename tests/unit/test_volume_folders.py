"""What of a point's disks is looked at, remembered and checked, for the folders of their volumes; no mount."""

from dataclasses import dataclass, field

import pytest
from guest_disks import entry, put, table
from images import BytesImage

from backupfs.errors import Corrupt, NotFound
from backupfs.fuse.catalogue import DiskFile, TextFile
from backupfs.image import Image
from backupfs.services.volumes import PROBLEMS, Volumes
from backupfs.units import MiB


@dataclass
class Disk:
    """A disk of two partitions, how often it was opened, closed and checked, and what there is against it."""

    name: str = "vda"
    version: str = "1"
    opened: int = 0
    closed: int = 0
    checked: int = 0
    missing: bool = False
    wrong: bool = False
    data: bytes = field(default=b"")

    def __post_init__(self) -> None:
        disk = bytearray(b"x" * 4 * MiB)
        put(disk, 0, table(entry(0x83, 2048, 2048), entry(0x83, 4096, 4096)))
        self.data = self.data or bytes(disk)

    def file(self) -> DiskFile:
        return DiskFile(f"{self.name}.raw", len(self.data), 0, self.version, {}, self.open, self.check)

    def open(self) -> Image:
        if self.missing:
            raise NotFound("a layer is missing")
        self.opened += 1
        image = BytesImage(self.data)
        image.close = self.close  # type: ignore[method-assign]
        return image

    def close(self) -> None:
        self.closed += 1

    def check(self, image: Image) -> None:
        assert image.size == len(self.data)
        self.checked += 1
        if self.wrong:
            raise Corrupt("index", 0, "another")


def look(volumes: Volumes, *disks: Disk, which: int = 0) -> dict[str, DiskFile | TextFile]:
    folders = volumes.folders("web01", "p", [disk.file() for disk in disks])
    assert [folder.name for folder in folders] == [f"{disk.name}.parts" for disk in disks]
    return {file.name: file for file in folders[which].files()}


def test_nothing_is_opened_before_somebody_looks_and_then_once() -> None:
    volumes, a, b = Volumes(), Disk("vda"), Disk("vdb")
    volumes.folders("web01", "p", [a.file(), b.file()])
    assert a.opened == 0
    assert list(look(volumes, a, b)) == ["1.raw", "2.raw"]
    assert (a.opened, a.closed, b.opened, b.closed) == (1, 1, 1, 1)
    again = look(volumes, a, b, which=1)
    assert (a.opened, b.opened) == (1, 1)
    volumes_of_others = look(Volumes(), a, b, which=1)
    assert {f.version for f in again.values()} == {f.version for f in volumes_of_others.values()}
    assert len({f.version for f in again.values()}) == 2
    assert [f.allocated for f in again.values()] == [1 * MiB, 2 * MiB]


def test_another_disk_is_looked_at_again() -> None:
    volumes, disk = Volumes(), Disk()
    first = look(volumes, disk)
    other = look(volumes, Disk(version="2"))
    assert first["1.raw"].version != other["1.raw"].version


def test_what_could_not_be_read_is_not_remembered() -> None:
    volumes, a, b = Volumes(), Disk("vda"), Disk("vdb", missing=True)
    (told,) = look(volumes, a, b, which=1).values()
    assert isinstance(told, TextFile)
    assert (told.name, told.content) == (PROBLEMS, b"the disk can't be opened: a layer is missing\n")
    assert list(look(volumes, a, b)) == ["1.raw", "2.raw"]
    b.missing = False
    assert list(look(volumes, a, b, which=1)) == ["1.raw", "2.raw"]


def test_a_disk_is_checked_once_for_all_its_volumes() -> None:
    volumes, disk = Volumes(), Disk()
    for _ in range(2):
        for file in look(volumes, disk).values():
            assert isinstance(file, DiskFile)
            assert file.check
            image = file.open()
            file.check(image)
            image.close()
    assert disk.checked == 1
    assert disk.opened == disk.closed


def test_a_disk_that_is_wrong_is_wrong_for_each_volume() -> None:
    volumes, disk = Volumes(), Disk(wrong=True)
    for file in look(volumes, disk).values():
        assert isinstance(file, DiskFile)
        assert file.check
        with pytest.raises(Corrupt):
            file.check(file.open())
    assert disk.checked == 2


def test_an_open_file_reads_its_part() -> None:
    file = look(Volumes(), Disk(data=bytes(Disk().data[: 1 * MiB]) + b"y" * 3 * MiB))["1.raw"]
    assert isinstance(file, DiskFile)
    buffer = bytearray(file.size)
    file.open().readinto(0, buffer)
    assert buffer == b"y" * 1 * MiB
    assert file.xattrs == {
        "user.backupfs.vm": b"web01",
        "user.backupfs.point": b"p",
        "user.backupfs.disk": b"vda",
        "user.backupfs.volume": b"1",
    }
