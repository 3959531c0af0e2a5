"""A full file system: nothing is published, older points stay readable, the next try works."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import backupfs
from repositories import MOMENT, add_point, read_point

from backupfs.errors import RepositoryError
from backupfs.repository.repository import Repository
from backupfs.repository.writer import DiskWriter, PointWriter
from backupfs.services.gc import gc
from backupfs.services.prune import delete
from backupfs.units import MiB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100M", "backupfs-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Leave `left` bytes free."""
    space = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(max(space.f_bavail * space.f_frsize - left, 0)))


def write_all(point: PointWriter, target: DiskWriter, data: bytes) -> None:
    for offset in range(0, len(data), MiB):
        target.write(offset, memoryview(data)[offset : offset + MiB])
    point.finish_disk(target, read="all", reason="")


@pytest.mark.parametrize("left", [0, 300_000, 3 * MiB, 20 * MiB])
def test_no_space_while_writing(small: Path, left: int) -> None:
    """`left`: bytes that are still free after the writer's own check; the point needs 24 MiB."""
    path = small / "repo"
    Repository.init(str(path), codec_name="none")
    old, new = random.Random(1).randbytes(4 * MiB), random.Random(2).randbytes(24 * MiB)
    with Repository.open(str(path)) as repository:
        first = add_point(repository, old)

        with repository.writer() as writer:
            end = writer.chain_ends("web01", ["vda"], "main")["vda"]
            assert end is not None
            point = writer.begin("web01", MOMENT)
            target = point.add_disk("vda", len(new), "main", end)
            fill(small, left)
            with pytest.raises(RepositoryError, match="No space left"):
                write_all(point, target, new)
            point.abandon()
        assert repository.points("web01") == [first.id]
        assert read_point(repository, first.id) == old
        assert not list((path / "tmp").iterdir())
        with pytest.raises(RepositoryError, match="no space left"):
            add_point(repository, new)
        (small / "ballast").unlink()
        second = add_point(repository, new)
        assert read_point(repository, second.id) == new
        assert read_point(repository, first.id) == old


def test_no_space_for_a_new_index(small: Path) -> None:
    """An error, and no SIGBUS; gc needs none."""
    path = small / "repo"
    Repository.init(str(path))
    data = [random.Random(i).randbytes(4 * MiB) for i in range(2)]
    with Repository.open(str(path)) as repository:
        points = [add_point(repository, d, full=True).id for d in data]
    shutil.rmtree(path / "index")
    fill(small, 0)
    assert "No space left" in backupfs(path, "map", "web01/latest/vda", code=1)
    with Repository.open(str(path)) as repository:
        assert gc(repository).freed == 0
        delete(repository, [("web01", points[0])])
        assert gc(repository).freed > 4 * MiB
        assert read_point(repository, points[1]) == data[1]


def test_no_space_for_the_index_alone(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The point is published all the same; the next open catches up."""
    path = small / "repo"
    Repository.init(str(path), chunk_size=4096, codec_name="zstd")
    disk = bytearray(40 * MiB)
    with Repository.open(str(path)) as repository:
        first = add_point(repository, bytes(disk))
        for offset in range(0, len(disk), 4096):
            disk[offset] = 1 + offset // 4096 % 250
        with repository.writer() as writer:
            end = writer.chain_ends("web01", ["vda"], "main")["vda"]
            point = writer.begin("web01", MOMENT)
            target = point.add_disk("vda", len(disk), "main", end)
            write_all(point, target, bytes(disk))
            fill(small, 100_000)
            manifest = writer.commit(point, parent=first.id)
        assert "published, but not indexed" in caplog.text
    (small / "ballast").unlink()
    with Repository.open(str(path)) as repository:
        assert repository.points("web01") == [first.id, manifest.id]
        assert read_point(repository, manifest.id) == disk
        assert read_point(repository, first.id) == bytes(len(disk))
