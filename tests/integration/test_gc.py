"""Deleting any point of a chain, and gc beside readers, damage, full disks and files that can't be changed."""

import ctypes
import errno
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from commands import backupfs
from reader import Reader
from repositories import MOMENT, add_point, read_point

from backupfs.errors import BackupfsError, Corrupt, Locked, NotFound, RepositoryError
from backupfs.extents import Extent
from backupfs.image import Buffer
from backupfs.repository import catalog, locks, manifest, repository, space
from backupfs.repository.repository import Repository
from backupfs.services.gc import GcReport, freed_by_deleting, gc
from backupfs.services.ingest import DiskBackup
from backupfs.services.prune import delete, prune
from backupfs.services.retention import KeepRules
from backupfs.units import MiB

CHUNK = 4096
VM = "web01"


class Disk:
    """A repository and the bytes of each of its points."""

    def __init__(self, path: Path, *, codec: str = "none") -> None:
        Repository.init(str(path), chunk_size=CHUNK, codec_name=codec)
        self.path = path
        self.repository = Repository.open(str(path))
        self.rng = random.Random(3)
        self.data = bytearray(self.rng.randbytes(700 * CHUNK + 5))
        self.points: dict[str, bytes] = {}
        self.days = 0

    def change(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self.data[chunk * CHUNK : (chunk + 1) * CHUNK] = self.rng.randbytes(CHUNK)

    def take(self, *, full: bool = False) -> str:
        self.days += 1
        point = add_point(self.repository, bytes(self.data), full=full, day=self.days)
        self.points[point.id] = bytes(self.data)
        return point.id

    def delete(self, *points: str) -> None:
        delete(self.repository, [(VM, point) for point in points])
        for point in points:
            del self.points[point]

    def check(self) -> None:
        assert self.repository.points(VM) == sorted(self.points)
        for point, data in self.points.items():
            assert read_point(self.repository, point) == data
            self.repository.open_image(VM, point, "vda").check_map()

    def layer(self, seq: int, chain: str = "main") -> Path:
        return self.path / "vms" / VM / "disks/vda" / chain / f"{seq:06d}.layer"

    def seq(self, point: str) -> int:
        return self.repository.manifest(VM, point).disks[0].seq

    def taken(self) -> int:
        return sum(layer.stat().st_blocks * 512 for layer in self.path.rglob("*.layer"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Five points, each with 40 chunks that the next one overwrites in part."""
    disk = Disk(tmp_path / "repo")
    for number in range(5):
        disk.take()
        disk.change(range(number * 20, number * 20 + 40))
    yield disk
    disk.repository.close()


@pytest.mark.parametrize("which", [[0], [2], [4], [0, 1], [3, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
def test_any_point_of_a_chain_may_go(disk: Disk, which: list[int]) -> None:
    ids = list(disk.points)
    before = freed_by_deleting(disk.repository, VM)
    disk.delete(*(ids[i] for i in which))
    disk.check()
    report = gc(disk.repository)
    assert report.freed > 0
    if len(which) == 1:
        assert before[ids[which[0]]] <= report.freed <= before[ids[which[0]]] + 8 * CHUNK  # a layer's header and table
    disk.check()
    assert gc(disk.repository) == GcReport(before=report.before - report.freed, visible=report.visible)
    new = disk.take()
    assert disk.seq(new) == (5 if len(which) < 5 else 0)
    assert disk.repository.manifest(VM, new).disks[0].chain == ("main" if len(which) < 5 else "main.2")
    disk.check()
    assert disk.repository.reindex() == len(disk.points)
    disk.check()
    disk.change([1])
    disk.take()
    gc(disk.repository)
    disk.check()
    assert not list(disk.path.rglob("*.gone"))


def test_a_deleted_newest_point_does_not_show_through(disk: Disk) -> None:
    """The disk goes back to what it was before that point; nothing of it is in the next layer."""
    ids = list(disk.points)
    disk.data[:] = disk.points[ids[3]]
    with Reader(disk.path) as reader:
        assert reader.open(ids[4])
        was = reader.digest(ids[4])
        disk.delete(ids[4])
        new = disk.take()
        assert disk.repository.manifest(VM, new).disks[0].data_bytes == 0
        disk.check()
        assert reader.open(new), "no reindex, and no other mount, is needed"
        assert reader.open(ids[3])
        assert reader.digest(new) == reader.digest(ids[3])
        assert reader.digest(ids[4]) == was
        assert gc(disk.repository).open == [f"{VM}/vda/main/4"]
        assert reader.digest(ids[4]) == was
    assert gc(disk.repository).layers == 1
    disk.check()


@pytest.mark.parametrize("again", ["", "gc", "gc, reindex"])
def test_no_bitmap_continues_over_a_deleted_point(disk: Disk, again: str) -> None:
    """It may have recorded since the point that was taken away: by its word nothing changed, and all has."""
    ids = list(disk.points)
    disk.delete(ids[4])
    if "gc" in again:
        assert gc(disk.repository).layers == 1
        assert [p.name for p in disk.path.rglob("*.gone")] == ["000004.gone"]
    if "reindex" in again:
        disk.repository.reindex()
    with disk.repository.writer() as writer:
        end = writer.chain_ends(VM, ["vda"], "main")["vda"]
        assert end is not None
        assert end.point == ids[3]
        point = writer.begin(VM, MOMENT)
        source = CleanSource(bytes(disk.data))
        backup = DiskBackup("vda", source, end, lambda *_: None, known_since=False, probed=False, audit=0, new="")
        backup.take(writer, point, "main", None)
        taken = writer.commit(point, parent=end.point)
    assert taken.disks[0].seq == 5
    assert taken.disks[0].read == "all"
    assert "taken away" in taken.disks[0].reason
    assert read_point(disk.repository, taken.id) == disk.data


class CleanSource:
    """A disk whose bitmap says that nothing changed."""

    description, format, request_size, bitmap, bitmap_problem = "test", "nbd", CHUNK * 16, "b0", None

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def readinto(self, offset: int, buffer: Buffer) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, False)

    dirty = extents

    def status(self, offset: int, length: int) -> Iterator[tuple[Extent, Extent]]:
        yield Extent(offset, length, False), Extent(offset, length, False)

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        for offset, length in ranges:
            yield offset, memoryview(self._data)[offset : offset + length]

    def close(self) -> None:
        pass


def test_gc_beside_open_images(disk: Disk) -> None:
    ids = list(disk.points)
    image = disk.repository.open_image(VM, ids[2], "vda")
    expected = disk.points[ids[2]]
    with Reader(disk.path) as reader:
        assert reader.open(ids[0])
        first = reader.digest(ids[0])
        disk.delete(*ids[:4])
        report = gc(disk.repository)
        assert sorted(report.open) == [f"{VM}/vda/main/0", f"{VM}/vda/main/2"]
        data = bytearray(image.size)
        image.readinto(0, data)
        assert data == expected
        assert reader.digest(ids[0]) == first
        assert not reader.open(ids[1])
        image.close()
        assert gc(disk.repository).open == [f"{VM}/vda/main/0"]
        assert reader.digest(ids[0]) == first
    report = gc(disk.repository)
    assert (report.open, report.freed > 0) == ([], True)
    disk.check()


def test_a_point_deleted_while_it_is_being_opened(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin comes too late for gc to see: the image must not open."""
    point = list(disk.points)[1]

    class LatePin(locks.Pin):
        def __init__(self, path: str) -> None:
            monkeypatch.undo()
            delete(disk.repository, [(VM, point)])
            super().__init__(path)

    monkeypatch.setattr(repository, "Pin", LatePin)
    with pytest.raises(NotFound):
        disk.repository.open_image(VM, point, "vda")


def damage(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        was = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([was ^ 1]))


@pytest.mark.parametrize("what", ["manifest", "header", "row", "trailer", "missing", "swapped", "digest"])
def test_gc_refuses_when_something_is_damaged(disk: Disk, what: str) -> None:
    ids = list(disk.points)
    disk.delete(ids[0], ids[4])
    path, points = disk.layer(2), disk.path / "vms" / VM / "points"
    if what == "manifest":
        damage(points / f"{ids[2]}.json", 100)
    elif what == "missing":
        path.unlink()
    elif what == "swapped":
        path.rename(path.with_name("x"))
        disk.layer(1).rename(path)
    elif what == "digest":  # a valid manifest that says something else: our own arithmetic must not be trusted alone
        found = disk.repository.manifest(VM, ids[2])
        entry = manifest.msgspec.structs.replace(found.disks[0], digest="0" * 32)
        forged = manifest.seal(manifest.msgspec.structs.replace(found, disks=[entry]))
        (points / f"{ids[2]}.json").write_bytes(forged)
    else:
        damage(path, {"header": 30, "row": -72 - 8 - 100, "trailer": -20}[what])
    before = disk.taken()
    with pytest.raises(Corrupt):
        gc(disk.repository)
    assert disk.taken() == before
    assert disk.layer(4).exists()


@pytest.mark.parametrize("what", ["flipped", "fifo", "sector"])
def test_a_damaged_manifest_can_be_deleted(disk: Disk, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(disk.points)
    path = disk.path / "vms" / VM / "points" / f"{ids[2]}.json"
    if what == "flipped":
        damage(path, 100)
    elif what == "fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        opened = catalog.open_regular

        def bad(name: str) -> int:
            if name == str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
            return opened(name)

        monkeypatch.setattr(catalog, "open_regular", bad)
    with pytest.raises(Corrupt):
        gc(disk.repository)
    verdicts = prune(disk.repository, VM, KeepRules(last=1), dry_run=True)
    assert [v.rules for v in verdicts if v.id == ids[2]] == [["damaged"]]
    disk.delete(ids[2])
    gc(disk.repository)
    disk.check()


def test_a_damaged_layer_without_a_point_hinders_nothing(disk: Disk) -> None:
    disk.delete(list(disk.points)[4])
    damage(disk.layer(4), 30)
    assert gc(disk.repository).layers == 1
    disk.check()


def test_delete_checks_all_first(disk: Disk) -> None:
    ids = list(disk.points)
    with pytest.raises(NotFound):
        delete(disk.repository, [(VM, ids[0]), (VM, "20200101T000000Z")])
    pinned = manifest.msgspec.structs.replace(disk.repository.manifest(VM, ids[1]), pinned=True)
    (disk.path / "vms" / VM / "points" / f"{ids[1]}.json").write_bytes(manifest.seal(pinned))
    with pytest.raises(RepositoryError, match="pinned"):
        delete(disk.repository, [(VM, ids[0]), (VM, ids[1])])
    disk.check()


def test_writers_exclude_gc_and_delete(disk: Disk) -> None:
    with disk.repository.writer():
        for work in (
            lambda: gc(disk.repository),
            lambda: gc(disk.repository, dry_run=True),
            lambda: delete(disk.repository, [(VM, next(iter(disk.points)))]),
        ):
            with pytest.raises(Locked):
                work()
    disk.check()


def test_a_layer_with_another_name_is_left_whole(disk: Disk) -> None:
    """A copy made of hard links shows its own points."""
    ids = list(disk.points)
    points = dict(disk.points)
    copy = disk.path.with_name("copy")
    subprocess.run(["cp", "-al", disk.path, copy], check=True)
    (copy / "lock").unlink()
    disk.delete(ids[0], ids[4])
    promised = gc(disk.repository, dry_run=True)
    said = backupfs(disk.path, "gc", "--dry-run")
    assert "have other names" in said
    assert "makes no holes" not in said
    report = gc(disk.repository)
    assert report.stuck > 0
    assert (report.linked, promised.stuck, promised.linked) == (report.stuck,) * 3
    disk.check()
    with Repository.open(str(copy)) as repository:
        for point, data in points.items():
            assert read_point(repository, point) == data


def test_a_dry_run_needs_no_right_to_write(disk: Disk, tmp_path: Path) -> None:
    ids = list(disk.points)
    disk.delete(ids[0], ids[4])
    disk.repository.close()
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "--bind", disk.path, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        said = backupfs(folder, "gc", "--dry-run")
        assert "lock: Read-only file system" in backupfs(folder, "gc", code=1)
        with disk.repository.writer():
            assert "is writing to this repository" in backupfs(folder, "gc", "--dry-run", "--no-wait", code=11)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert said == backupfs(disk.path, "gc", "--dry-run")


def test_a_stray_file_is_no_vm(disk: Disk) -> None:
    (disk.path / "vms/notes.txt").write_text("mine")
    disk.delete(next(iter(disk.points)))
    assert gc(disk.repository).freed > 0
    assert disk.repository.vms() == [VM]
    disk.check()


@pytest.mark.parametrize(("code", "stuck"), [(errno.EIO, False), (errno.EOPNOTSUPP, True)])
def test_holes_that_can_not_be_made(disk: Disk, monkeypatch: pytest.MonkeyPatch, code: int, stuck: bool) -> None:
    disk.delete(*list(disk.points)[:4])

    class Failing:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(space, "_libc", Failing)
    if stuck:
        report = gc(disk.repository)
        assert (report.stuck > 0, report.linked) == (True, 0)
    else:
        with pytest.raises(RepositoryError, match="Input/output"):
            gc(disk.repository)
    disk.check()
    monkeypatch.undo()
    report = gc(disk.repository)
    assert (report.stuck, report.freed > 0) == (0, True)
    disk.check()


def test_a_full_disk_is_made_empty(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100M", "backupfs-test", str(folder)], check=True)
    try:
        disk = Disk(folder / "repo")
        for _ in range(3):
            disk.take()
            disk.change(range(700))
        room = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize))
        with pytest.raises(BackupfsError, match="no space"):
            disk.take()
        disk.repository.close()
        disk.repository = Repository.open(str(disk.path))
        disk.delete(*list(disk.points)[:2])
        assert gc(disk.repository).freed > 4 * MiB
        disk.check()
        disk.repository.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
