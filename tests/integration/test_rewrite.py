"""Layers that gc writes again: what they keep, who refuses, and readers and indexes that know nothing of it."""

import ctypes
import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs
from mounts import needs_fuse, unmount_all
from repositories import add_point, read_point

from backupfs.errors import BackupfsError
from backupfs.repository import point as points_module
from backupfs.repository import rewrite, space
from backupfs.repository.index import Index
from backupfs.repository.layer import Layer
from backupfs.repository.payloads import Payloads
from backupfs.repository.repository import Repository
from backupfs.services import gc as collecting
from backupfs.services.gc import gc
from backupfs.services.prune import delete
from backupfs.services.repair import repair
from backupfs.services.verify import verify

CHUNK, CHUNKS = 65536, 120
DAYS = 24
VM = "web01"


class Disk:
    """A repository of compressed points, each with single chunks changed that lie all over the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        Repository.init(str(path))
        self.repository = Repository.open(str(path))
        self.rng = random.Random(7)
        self.data = bytearray(b"".join(self._chunk() for _ in range(CHUNKS)))
        self.points: dict[str, bytes] = {}
        self.days = 0
        for _ in range(DAYS):
            self.take()

    def _chunk(self) -> bytes:
        kind = self.rng.random()
        if kind < 0.1:
            return bytes(CHUNK)
        if kind < 0.15:
            return self.rng.randbytes(CHUNK)  # stored as it is
        return self.rng.randbytes(self.rng.randrange(100, 16_000)).ljust(CHUNK, b"x")

    def take(self) -> None:
        self.points[add_point(self.repository, bytes(self.data), day=self.days).id] = bytes(self.data)
        self.days += 1
        for chunk in self.rng.sample(range(CHUNKS), 12):
            self.data[chunk * CHUNK : (chunk + 1) * CHUNK] = self._chunk()

    def delete_all_but(self, *kept: int) -> None:
        ids = sorted(self.points)
        stay = {ids[i] for i in kept}
        gone = [point for point in ids if point not in stay]
        delete(self.repository, [(VM, point) for point in gone])
        for point in gone:
            del self.points[point]

    def grow(self) -> None:
        """Take points and delete all but the last; images may be open of those that were there."""
        for _ in range(5):
            self.take()
        self.delete_all_but(-1)

    def renew(self) -> None:
        self.repository.close()
        self.repository = Repository.open(str(self.path))

    def check(self) -> None:
        for point, data in self.points.items():
            assert read_point(self.repository, point) == data
            self.repository.open_image(VM, point, "vda").check_map()

    def verify(self) -> list[str]:
        report = verify(self.repository, None, None, 1, lambda *_: None)
        return [d.what for d in report.damage] + [what for bad in report.bad for what in bad.what]

    def layers(self) -> dict[int, Layer]:
        return {int(path.stem): Layer(str(path)) for path in self.path.rglob("*.layer")}

    def rewritten(self) -> set[int]:
        return {seq for seq, layer in self.layers().items() if layer.header.edition}

    def taken(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.path.rglob("*.layer"))

    def is_indexed(self) -> bool:
        index = self.repository.store.index
        no = index.chain_no(VM, "vda", "main")
        assert no is not None
        return all(index.edition(no, seq) == layer.header.edition for seq, layer in self.layers().items())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    disk = Disk(tmp_path_factory.mktemp("rewrite") / "repo")
    disk.repository.close()
    return disk


@pytest.fixture
def disk(built: Disk, tmp_path: Path) -> Iterator[Disk]:
    """A copy of it, of which the last point and two others are left."""
    disk = Disk.__new__(Disk)
    disk.path = tmp_path / "repo"
    shutil.copytree(built.path, disk.path)
    disk.rng, disk.data, disk.points = random.Random(8), bytearray(built.data), dict(built.points)
    disk.days = DAYS
    disk.repository = Repository.open(str(disk.path))
    disk.delete_all_but(3, DAYS - 2, DAYS - 1)
    yield disk
    disk.repository.close()


def test_what_is_kept_is_what_is_seen(disk: Disk) -> None:
    roots = {disk.repository.manifest(VM, point).disks[0].seq for point in disk.points}
    before = disk.taken()
    promised = gc(disk.repository, dry_run=True)
    assert disk.taken() == before
    report = gc(disk.repository)
    assert report.rewritten == promised.rewritten == len(disk.rewritten()) > 3
    assert abs(report.freed - promised.freed) <= 4096 * len(disk.layers())
    assert report.freed == before - disk.taken()
    assert not roots & disk.rewritten()
    fixed = sum(8192 + layer.length - layer.trailer().table_offset + 4096 for layer in disk.layers().values())
    assert disk.taken() - fixed <= 1.05 * report.visible
    assert disk.is_indexed()
    disk.check()
    assert disk.verify() == []
    again = gc(disk.repository)
    assert (again.rewritten, again.freed) == (0, 0)
    disk.take()
    disk.delete_all_but(-1)
    assert gc(disk.repository).rewritten > 0, "what was written again may be so once more"
    assert disk.repository.reindex() == 1
    disk.check()
    assert disk.verify() == []
    assert not list((disk.path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("slack", "least_gain"), [(0.2, 0.0), (0.0, 0.3)], ids=["little is kept beyond", "little can be won"]
)
def test_nothing_is_written_again_for_little(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, slack: float, least_gain: float
) -> None:
    gc(disk.repository)
    before = {seq: layer.header.edition for seq, layer in disk.layers().items()}
    disk.data[:CHUNK] = bytes(CHUNK)
    disk.take()
    disk.delete_all_but(0, 1, -1)
    assert gc(disk.repository, dry_run=True).rewritten > 0, "few small layers: headers and tables count too"
    monkeypatch.setattr(collecting, "SLACK", slack)
    monkeypatch.setattr(collecting, "_LEAST_GAIN", least_gain)
    report = gc(disk.repository)
    assert report.rewritten == 0
    after = {seq: layer.header.edition for seq, layer in disk.layers().items()}
    assert after == {seq: before.get(seq, 0) for seq in after}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("index", ["of before", "missing", "of before, renewed by verify"])
def test_an_index_that_does_not_know(disk: Disk, monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    """gc was killed before it told the index."""

    def killed(*_: object) -> None:
        raise Killed

    for _ in range(4):  # after one more layer that it wrote again
        monkeypatch.setattr(Index, "renew", killed)
        with pytest.raises(Killed):
            gc(disk.repository)
        monkeypatch.undo()
        if index == "missing":
            shutil.rmtree(disk.path / "index")
        disk.renew()
        disk.check()
        assert disk.is_indexed() == (index == "missing")
        if "verify" in index:
            assert disk.verify() == []
            assert disk.is_indexed()
            disk.check()
    assert len(disk.rewritten()) > 3
    gc(disk.repository)
    assert disk.is_indexed()
    disk.check()
    assert disk.verify() == []


def test_a_layer_that_came_back_as_it_was(disk: Disk) -> None:
    """A power cut took the rename back, and the index, which another process had told of it, is ahead."""
    index = disk.repository.store.index
    layers = disk.layers()
    saved = {seq: Path(layer.path).read_bytes() for seq, layer in layers.items()}
    gc(disk.repository)
    for seq in disk.rewritten():
        Path(layers[seq].path).unlink()
        Path(layers[seq].path).write_bytes(saved[seq])
    assert not disk.is_indexed()
    disk.repository.store.opened.clear()
    disk.check()
    assert disk.verify() == []
    assert disk.is_indexed()
    assert disk.repository.store.index is index
    assert gc(disk.repository).rewritten > 3
    disk.check()


@pytest.mark.parametrize("opened", [1, 4096])
def test_readers_do_not_notice(disk: Disk, monkeypatch: pytest.MonkeyPatch, opened: int) -> None:
    """Open images, many threads, and next to no layers kept open: most reads open a file that may be another by now."""
    monkeypatch.setattr(points_module, "_OPEN_LAYERS", opened)
    monkeypatch.setattr(collecting, "SLACK", 0.0)
    threads, stop = 3, threading.Event()
    moved = []
    place = Payloads.place
    monkeypatch.setattr(Payloads, "place", lambda *args: moved.append(args) or place(*args))
    disk.repository.close()
    disk.repository = Repository.open(str(disk.path), chunk_cache=1)
    images = {point: disk.repository.open_image(VM, point, "vda") for point in disk.points}
    contents = dict(disk.points)

    def read(seed: int) -> int:
        rng = random.Random(seed)
        reads = 0
        while not stop.is_set() or reads < 100:
            point = rng.choice(sorted(images))
            size = rng.choice([100, 4096, 3 * CHUNK])
            offset = rng.randrange(len(contents[point]) - size)
            image = images[point]
            found = bytearray(size)
            if not image.at_once(offset, [memoryview(found)]):
                found[:] = b"".join(image.gather(offset, size))
            assert found == contents[point][offset : offset + size]
            reads += 1
        return reads

    with ThreadPoolExecutor(threads) as pool:
        readers = [pool.submit(read, seed) for seed in range(threads)]
        try:
            for _ in range(2):
                assert gc(disk.repository).rewritten > 0
                disk.grow()
        finally:
            stop.set()
        assert all(reader.result() >= 100 for reader in readers)
    for point, image in images.items():
        data = bytearray(image.size)
        image.readinto(0, data)
        assert data == contents[point]
        image.check_map()
    assert moved or opened > 1


def test_a_damaged_chunk_stays_where_it_is(disk: Disk) -> None:
    """It is not copied, so that verify --repair finds it, and what was there before it."""
    entry = disk.repository.manifest(VM, max(disk.points)).disks[0]
    image = disk.repository.open_image(VM, max(disk.points), "vda")
    seen = next(e for e, seq in image.placed_extents(0, image.size) if seq == 0)
    chunk = seen.offset // CHUNK
    layer = disk.layers()[0]
    row = next(r for rows in layer.rows(chunk, chunk + 1) for r in rows)
    path = Path(layer.path)
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(int(row["offset"]) + 20)
        byte = file.read(1)[0]
        file.seek(int(row["offset"]) + 20)
        file.write(bytes([byte ^ 4]))
    report = gc(disk.repository)
    assert report.rewritten > 3
    assert 0 not in disk.rewritten()
    disk.renew()
    with pytest.raises(BackupfsError):
        disk.check()
    source = disk.path.parent / "disk.raw"
    source.write_bytes(disk.points[max(disk.points)])
    found = verify(disk.repository, None, None, 1, lambda *_: None)
    repair(disk.repository, found, [("vda", str(source))], None)
    assert [bad.repaired for bad in found.bad] == [[str(source)]]
    disk.renew()
    gc(disk.repository)
    disk.check()
    assert entry == disk.repository.manifest(VM, max(disk.points)).disks[0]


def test_a_copy_made_of_hard_links_is_left_alone(disk: Disk) -> None:
    copy = disk.path.with_name("copy")
    subprocess.run(["cp", "-al", disk.path, copy], check=True)
    before = {path: path.stat().st_ino for path in copy.rglob("*.layer")}
    assert gc(disk.repository).rewritten == 0
    disk.check()
    assert before == {path: path.stat().st_ino for path in copy.rglob("*.layer")}


def test_where_no_holes_can_be_made(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(space, "_libc", Failing)
    report = gc(disk.repository)
    assert report.rewritten > 3
    assert report.stuck < 0.05 * report.visible
    disk.check()


def test_too_little_space_for_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def little(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 0  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", little)
    report = gc(disk.repository)
    assert report.rewritten == 0
    assert report.freed > 0
    monkeypatch.undo()
    assert gc(disk.repository).rewritten > 3
    disk.check()


def test_what_comes_back_wrong_is_not_used(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the new file and loses a part of it."""
    layers = {seq: Path(layer.path).stat().st_ino for seq, layer in disk.layers().items()}
    finish = rewrite.LayerWriter.finish

    def damaging(writer: rewrite.LayerWriter) -> object:
        facts = finish(writer)
        path = Path(writer.path)
        path.chmod(0o600)
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(bytes(4096))
        return facts

    monkeypatch.setattr(rewrite.LayerWriter, "finish", damaging)
    assert gc(disk.repository).rewritten == 0
    assert {seq: Path(layer.path).stat().st_ino for seq, layer in disk.layers().items()} == layers
    assert not list((disk.path / "tmp").iterdir())
    disk.check()


@needs_fuse
@pytest.mark.timeout(120)
@pytest.mark.parametrize("files", [48, 4096])
def test_a_mount_reads_through_it(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """With few files the mount may keep a quarter of them open as layers: most are opened again all the time."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(collecting, "SLACK", 0.0)
    path, stop = tmp_path / "mnt", threading.Event()
    path.mkdir()
    limit = ["prlimit", f"--nofile={files}:{files}"]
    try:
        subprocess.run([*limit, *BACKUPFS, "-r", disk.path, "mount", path], check=True, timeout=60)
        contents = dict(disk.points)
        opened = {point: os.open(path / VM / point / "vda.raw", os.O_RDONLY) for point in contents}

        def read(seed: int) -> int:
            rng = random.Random(seed)
            reads = 0
            while not stop.is_set() or reads < 50:
                point = rng.choice(sorted(opened))
                size = rng.choice([512, 4096, 3 * CHUNK])
                offset = rng.randrange(len(contents[point]) - size)
                os.posix_fadvise(opened[point], 0, 0, os.POSIX_FADV_DONTNEED)  # so that the mount is asked
                assert os.pread(opened[point], size, offset) == contents[point][offset : offset + size]
                reads += 1
            return reads

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read, seed) for seed in range(3)]
            try:
                for _ in range(2):
                    assert gc(disk.repository).rewritten > 0
                    disk.grow()
            finally:
                stop.set()
            assert all(reader.result() >= 50 for reader in readers)
        for fd in opened.values():
            os.close(fd)
        for point, data in disk.points.items():
            assert (path / VM / point / "vda.raw").read_bytes() == data
        backupfs(disk.path, "umount", path)
    finally:
        unmount_all(str(path))
