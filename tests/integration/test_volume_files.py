"""Partitions and logical volumes of stored disks in a real mount."""

import contextlib
import errno
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_disks import DATA_AT, entry, group, logical, put, put_gpt, put_pv, segment, table
from mounts import LANES, choose_lane, fails_with, needs_fuse, process_of, unmount_all, wait_until
from repositories import MOMENT
from servers import need, run

from backupfs.repository import manifest
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(90), needs_fuse]

EXTENT = 64 * KiB
SIZE = 24 * MiB
PV_AT, PV = 12 * MiB, DATA_AT + 48 * EXTENT
TEXT = group(
    logical("root", segment(0, 3, '"pv0", 2'), segment(3, 20, '"pv1", 7')),
    logical("fast-one", segment(0, 40, '"pv0", 20, "pv1", 28', stripe_sectors=64)),
    logical("thin", segment(0, 1, '"pv0", 9', kind="thin")),
    pvs=[3, 4],
    extents=48,
)


def first_disk() -> bytearray:
    """A file system in partition 1, a logical one (5) that is half a hole and does not begin with a chunk, LVM in 2."""
    disk = bytearray(SIZE)
    disk[1 * MiB :] = random.Random(1).randbytes(SIZE - 1 * MiB)
    put(disk, 0, table(entry(0x83, 2048, 8 * 2048, 0x80), entry(0x8E, PV_AT // 512, PV // 512), entry(5, 18432, 6000)))
    put(disk, 18432 * 512, table(entry(0x83, 63, 4001)))
    put(disk, 18495 * 512 + 1000 * 512, bytes(1000 * 512))
    put(disk, PV_AT + DATA_AT + 20 * EXTENT, bytes(10 * EXTENT))
    put_pv(disk, PV_AT, PV, 3, TEXT)
    return disk


def second_disk() -> bytearray:
    """The other physical volume, on all of the disk."""
    disk = bytearray(random.Random(2).randbytes(PV))
    put(disk, 0, bytes(64 * KiB))
    put(disk, DATA_AT + 28 * EXTENT, bytes(4 * EXTENT))
    put_pv(disk, 0, PV, 4)
    return disk


def expected(first: bytearray, second: bytearray) -> dict[str, bytes]:
    at, other = PV_AT + DATA_AT, DATA_AT
    fast = b""
    for i in range(0, 20 * EXTENT, 32 * KiB):
        fast += first[at + 20 * EXTENT + i :][: 32 * KiB] + second[other + 28 * EXTENT + i :][: 32 * KiB]
    return {
        "vda.parts/1.raw": bytes(first[1 * MiB : 9 * MiB]),
        "vda.parts/2.raw": bytes(first[PV_AT : PV_AT + PV]),
        "vda.parts/5.raw": bytes(first[18495 * 512 :][: 4001 * 512]),
        "vda.parts/vg0-root.raw": bytes(
            first[at + 2 * EXTENT :][: 3 * EXTENT] + second[other + 7 * EXTENT :][: 20 * EXTENT]
        ),
        "vda.parts/vg0-fast--one.raw": fast,
        "vdb.parts/0.raw": bytes(second),
    }


class Mounted:
    """A mounted repository."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.path = str(folder / "repo"), str(folder / "mnt")
        os.mkdir(self.path)
        Repository.init(self.repository)

    def add(self, **disks: bytes | bytearray) -> str:
        """Add a point with these disks."""
        with Repository.open(self.repository) as repository, repository.writer() as writer:
            point = writer.begin("web01", MOMENT)
            for name, data in disks.items():
                target = point.add_disk(name, len(data), "main", None)
                for offset in range(0, len(data), 1 * MiB):
                    target.write(offset, memoryview(data)[offset : offset + 1 * MiB])
                point.finish_disk(target, read="all", reason="test")
            return writer.commit(point, parent=None).id

    def mount(self) -> None:
        service.mount(self.repository, self.path, foreground=False, allow_other=False, options=[])

    def file(self, name: str) -> Path:
        return Path(self.path, "web01/latest", name)

    def log(self) -> str:
        return Path(background.log_path(self.path)).read_text()


@pytest.fixture(params=LANES)
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    choose_lane(monkeypatch, request.param)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mounted = Mounted(tmp_path)
    try:
        yield mounted
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(process_of(mounted.path), signal.SIGKILL)
        unmount_all(mounted.path)


def holes(path: Path, size: int) -> list[tuple[int, int]]:
    """Return the holes that SEEK_HOLE and SEEK_DATA find."""
    found, position = [], 0
    with path.open("rb") as file:
        while position < size:
            start = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            try:
                position = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                position = size
            if start < position:
                found.append((start, position))
    return found


def test_every_volume_is_a_file(mounted: Mounted) -> None:
    first, second = first_disk(), second_disk()
    mounted.add(vda=first, vdb=second)
    mounted.mount()
    names = sorted(p.name for p in mounted.file("").iterdir())
    assert names == ["point.json", *(f"{disk}.{what}" for disk in ("vda", "vdb") for what in ("files", "parts", "raw"))]
    volumes = expected(first, second)
    volumes |= {name.replace("vda", "vdb"): volumes[name] for name in volumes if "vg0" in name}
    found = {f"{folder}/{name}" for folder in ("vda.parts", "vdb.parts") for name in os.listdir(mounted.file(folder))}
    assert found == {*volumes, "vda.parts/ERROR.txt", "vdb.parts/ERROR.txt"}
    for folder in ("vda.parts", "vdb.parts"):
        said = mounted.file(f"{folder}/ERROR.txt").read_text()
        assert said == "vg0/thin: logical volumes of type thin are not supported\n"
    inodes = set()
    for name, content in volumes.items():
        path = mounted.file(name)
        assert path.read_bytes() == content, name
        status = path.stat()
        inodes.add(status.st_ino)
        assert (status.st_size, status.st_mtime, status.st_mode & 0o777) == (len(content), MOMENT.timestamp(), 0o400)
        if "BACKUPFS_NO_READ_LANE" not in os.environ:  # without it nothing is asked for holes
            gaps = holes(path, len(content))
            assert all(not any(content[start:end]) for start, end in gaps)
            allocated = len(content) - sum(end - start for start, end in gaps)
            assert status.st_blocks == -(-allocated // 512)
            assert (status.st_blocks * 512 < status.st_size) == (
                path.name in ("2.raw", "5.raw", "0.raw", "vg0-fast--one.raw")
            )
        assert os.getxattr(path, "user.backupfs.volume").decode() == path.stem
    assert len(inodes) == len(volumes)
    with mounted.file("vda.parts/1.raw").open("rb") as file:
        fails_with(errno.EROFS, os.open, mounted.file("vda.parts/1.raw"), os.O_RDWR)
        assert os.pread(file.fileno(), 10, 8 * MiB - 3) == first[9 * MiB - 3 : 9 * MiB]
        assert os.pread(file.fileno(), 10, 8 * MiB) == b""
    assert os.getxattr(mounted.file("vdb.parts/vg0-root.raw"), "user.backupfs.disk") == b"vda vdb"
    for name in ("vda.parts/3.raw", "vda.parts/0.raw", "vdc.parts", "vda.parts/vda.raw", "vda.parts/.."):
        assert mounted.file(name).exists() == name.endswith("..")
    service.unmount(mounted.path)
    assert "ERROR" not in mounted.log()
    assert "WARNING" not in mounted.log()


def test_a_partition_is_mounted_without_an_offset(mounted: Mounted, tmp_path: Path) -> None:
    """What the README says: `mount -o ro,loop` on the partition's file."""
    if os.geteuid() != 0:
        pytest.skip("loop mounts are root's")
    need("mkfs.ext4", "mkfs.xfs")
    tree, disk = tmp_path / "tree", bytearray(360 * MiB)
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hosts").write_text("127.0.0.1 web01\n")
    (tree / "large").write_bytes(random.Random(3).randbytes(5 * MiB))
    put_gpt(disk, {1: (2048, 2048 * 17 - 1), 3: (40960, 40960 + 320 * 2048 - 1)})
    for offset, size, command in ((1, 16, "mkfs.ext4"), (20, 320, "mkfs.xfs")):
        path = tmp_path / command
        path.touch()
        os.truncate(path, size * MiB)
        run(*([command, "-q", "-d", tree, path] if command == "mkfs.ext4" else [command, "-q", path]))
        put(disk, offset * MiB, path.read_bytes())
    mounted.add(vda=disk)
    mounted.mount()
    (tmp_path / "there").mkdir()
    for number, options in ((1, "ro,loop,noload"), (3, "ro,loop,norecovery")):
        run("mount", "-o", options, mounted.file(f"vda.parts/{number}.raw"), tmp_path / "there")
        try:
            if number == 1:
                run("diff", "-r", "--exclude=lost+found", tree, tmp_path / "there")
        finally:
            run("umount", tmp_path / "there")


def test_a_damaged_table_is_told_and_nothing_else_is_hurt(mounted: Mounted) -> None:
    """A guest's own damage, and the repository's."""
    gpt = bytearray(random.Random(5).randbytes(4 * MiB))
    put_gpt(gpt, {1: (2048, 4000)})
    gpt[600] ^= 1
    put_gpt(gpt, {1: (2048, 4000)}, copies=["first"])
    gpt[1030] ^= 1
    put(gpt, len(gpt) - 512, bytes(512))
    other = bytearray(random.Random(6).randbytes(4 * MiB))
    put(other, 0, table(entry(0x83, 2048, 2048)))
    mounted.add(vda=gpt, vdb=other, vdc=other)
    layer = next(Path(mounted.repository).glob("vms/web01/disks/vdc/main/000000.layer"))
    layer.chmod(0o600)
    with layer.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"damage")
    mounted.mount()
    assert os.listdir(mounted.file("vda.parts")) == ["ERROR.txt"]
    assert "GPT is damaged" in mounted.file("vda.parts/ERROR.txt").read_text()
    assert mounted.file("vdb.parts/1.raw").read_bytes() == other[1 * MiB : 2 * MiB]
    assert os.listdir(mounted.file("vdb.parts")) == ["1.raw"]
    assert os.listdir(mounted.file("vdc.parts")) == ["ERROR.txt"]
    assert "000000.layer: damaged at offset" in mounted.file("vdc.parts/ERROR.txt").read_text()


def test_a_wrong_map_condemns_the_volumes_too(mounted: Mounted) -> None:
    """A disk's map is compared with the manifest behind its first reader's back, also if that reads a part of it."""
    disk = bytearray(random.Random(7).randbytes(4 * MiB))
    put(disk, 0, table(entry(0x83, 2048, 2048), entry(0x83, 4096, 2048)))
    point = mounted.add(vda=disk)
    with Repository.open(mounted.repository) as repository:
        made = repository.manifest("web01", point)
    wrong = manifest.msgspec.structs.replace(made.disks[0], digest="0" * 32)
    forged = manifest.seal(manifest.msgspec.structs.replace(made, disks=[wrong]))
    Path(mounted.repository, f"vms/web01/points/{point}.json").write_bytes(forged)
    mounted.mount()
    for name in ("1.raw", "2.raw"):
        path = mounted.file(f"vda.parts/{name}")
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.pread(file.fileno(), 4096, 0)
        wait_until(lambda name=name: f"vda.parts/{name}: every read of it fails" in mounted.log())  # type: ignore[misc]
        fails_with(errno.EIO, path.read_bytes)


def test_points_appear_and_nobody_looks_before_he_is_asked(mounted: Mounted) -> None:
    """Listing a point's folder reads no disk: it works where a layer is gone."""
    disk = bytearray(random.Random(8).randbytes(4 * MiB))
    put(disk, 0, table(entry(0x83, 2048, 2048)))
    mounted.add(vda=disk)
    layer = next(Path(mounted.repository).glob("vms/web01/disks/vda/main/000000.layer"))
    layer.rename(layer.with_name("away"))
    mounted.mount()
    assert sorted(os.listdir(mounted.file(""))) == ["point.json", "vda.files", "vda.parts", "vda.raw"]
    assert mounted.file("vda.parts").is_dir()
    assert os.listdir(mounted.file("vda.parts")) == ["ERROR.txt"]
    layer.with_name("away").rename(layer)
    wait_until(lambda: os.listdir(mounted.file("vda.parts")) == ["1.raw"])
    assert mounted.file("vda.parts/1.raw").read_bytes() == disk[1 * MiB : 2 * MiB]


def test_the_tools_find_the_folders(mounted: Mounted) -> None:
    mounted.add(vda=first_disk(), vdb=second_disk())
    mounted.mount()
    found = subprocess.run(
        ["find", "-L", mounted.file(""), "-name", "*.raw"], capture_output=True, text=True, check=True
    )
    assert len(found.stdout.splitlines()) == 2 + 3 + 1 + 2 * 2
