"""Reads and seeks of stored points through a mount, by many at once. BACKUPFS_LONG=1 reads for ten minutes."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import BytesImage
from mounts import LANES, choose_lane, fails_with, needs_fuse, process_of, unmount_all, wait_until
from repositories import MOMENT, add_point

from backupfs.errors import Corrupt
from backupfs.extents import Extent
from backupfs.fuse import session
from backupfs.fuse.lane import Lane
from backupfs.image import ZeroImage, seek
from backupfs.repository.repository import Repository
from backupfs.services import mount as service
from backupfs.services.gc import gc
from backupfs.services.prune import delete
from backupfs.units import KiB, MiB, TiB

LONG = bool(os.environ.get("BACKUPFS_LONG"))
READERS, SECONDS = (32, 600) if LONG else (6, 5)
READER = str(Path(__file__).parent / "lane_reader.py")

pytestmark = [pytest.mark.timeout(SECONDS + 90), needs_fuse]


class Place:
    """A repository that grows and shrinks, its mount, and what every point holds."""

    def __init__(self, folder: Path, codec: str) -> None:
        self.repository, self.path, self.expected = folder / "repo", folder / "mnt", folder / "expected"
        for new in (self.path, self.expected):
            new.mkdir()
        Repository.init(str(self.repository), codec_name=codec)
        self.rng = random.Random(7)
        text = b"".join(b"line %d of a file\n" % i for i in range(90_000))
        self.disk = bytearray(text + bytes(1 * MiB) + self.rng.randbytes(1 * MiB + 777))
        self.points: list[str] = []
        self.days = 0

    def add(self) -> None:
        """Add a point in which a few ranges changed, some of them to zeroes."""
        for _ in range(4):
            offset, length = self.rng.randrange(len(self.disk) - 200_000), self.rng.randrange(200_000)
            self.disk[offset : offset + length] = self.rng.choice((self.rng.randbytes(length), bytes(length)))
        holding = self.expected / "new"
        holding.write_bytes(self.disk)
        with Repository.open(str(self.repository)) as repository:
            # Never the id of one that was removed: a reader may have taken that one's bytes for what to expect.
            self.days += 1
            point = add_point(repository, bytes(self.disk), day=self.days).id
        holding.rename(self.expected / point)
        self.points.append(point)

    def remove(self) -> None:
        """Delete a point, not the newest, and give its space back, beside whoever reads it."""
        point = self.points.pop(self.rng.randrange(len(self.points) - 1))
        with Repository.open(str(self.repository)) as repository:
            delete(repository, [("web01", point)])
            gc(repository)

    def mount(self) -> None:
        service.mount(str(self.repository), str(self.path), foreground=False, allow_other=False, options=[])

    def process(self) -> int:
        return process_of(str(self.path))

    def read(self, count: int, seconds: float) -> list["subprocess.Popen[str]"]:
        """Start readers."""
        arguments = [sys.executable, "-I", READER, str(self.path / "web01"), str(self.expected)]
        return [
            subprocess.Popen([*arguments, str(seed), str(seconds)], stdout=subprocess.PIPE, text=True)
            for seed in range(count)
        ]


@pytest.fixture(params=["none", "zstd"])
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Place]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = Place(tmp_path, request.param)
    try:
        yield place
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(place.process(), signal.SIGKILL)
        unmount_all(str(place.path))


def usage(pid: int) -> tuple[int, int, int]:
    """Return a process' descriptors, threads and anonymous memory."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), int(status["RssAnon"].split()[0]) * KiB


def finish(readers: list["subprocess.Popen[str]"], within_s: float) -> list[tuple[int, str]]:
    """Wait for readers; return their statuses and what they said."""
    end = time.monotonic() + within_s
    try:
        outputs = [reader.communicate(timeout=max(0.1, end - time.monotonic()))[0] for reader in readers]
        return [(reader.returncode, output) for reader, output in zip(readers, outputs, strict=True)]
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def test_many_read_while_points_come_and_go(place: Place) -> None:
    for _ in range(4):
        place.add()
    place.mount()
    pid = place.process()
    readers = place.read(READERS, SECONDS)
    half: tuple[int, int, int] | None = None
    begun = time.monotonic()
    while any(reader.poll() is None for reader in readers):
        place.add()
        if len(place.points) > 6:
            place.remove()
        time.sleep(SECONDS / 20)
        if half is None and time.monotonic() - begun > SECONDS / 2:
            half = usage(pid)
    assert finish(readers, 30) == [(0, "")] * READERS
    assert half
    layers = len(list(place.repository.rglob("*.layer")))
    wait_until(lambda: usage(pid)[0] <= layers + 30, 5)  # the layers stay open; nothing else does
    assert usage(pid)[1] < 32 + 8 + 40  # workers, the lane's own, and trio's that wait to be used again
    assert usage(pid)[2] - half[2] < 64 * MiB
    service.unmount(str(place.path))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_killed_under_load(place: Place) -> None:
    place.add()
    place.mount()
    readers = place.read(4, 0)
    wait_until(lambda: usage(place.process())[0] > 10)
    time.sleep(0.5)  # in the middle of it
    os.kill(place.process(), signal.SIGKILL)
    killed = time.monotonic()
    for status, said in finish(readers, 10):
        assert status == 1
        assert said.split()[1] in {str(e) for e in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)}, said
    assert time.monotonic() - killed < 10  # a second, and what a busy machine needs to end processes
    place.mount()
    assert (place.path / "web01" / place.points[-1] / "vda.raw").read_bytes() == place.disk
    service.unmount(str(place.path))


def test_pieces_are_what_readinto_reads(place: Place) -> None:
    for _ in range(3):
        place.add()
    with Repository.open(str(place.repository)) as repository:
        image = repository.open_image("web01", place.points[-1], "vda")
        at_hand = 0
        for _ in range(3000):
            offset = place.rng.randrange(image.size)
            length = min(place.rng.choice((1, 4096, 70_000, 1 * MiB)), image.size - offset)
            expected, buffer = place.disk[offset : offset + length], bytearray(length)
            if image.at_once(offset, [memoryview(buffer)]):
                assert buffer == expected
                at_hand += 1
            assert b"".join(image.gather(offset, length)) == expected
            image.readinto(offset, buffer)
            assert buffer == expected
        assert at_hand > 1000


def test_what_others_brought_into_memory_is_checked(tmp_path: Path) -> None:
    """A chunk that was right once, went bad on the disk, and was read from there by somebody else."""
    Repository.init(str(tmp_path / "repo"), codec_name="none")
    disk = random.Random(5).randbytes(8 * 64 * KiB)
    with Repository.open(str(tmp_path / "repo"), chunk_cache=1) as repository:  # of a chunk
        image = repository.open_image("web01", add_point(repository, disk).id, "vda")
        offset = 3 * 64 * KiB + 4096
        assert b"".join(image.gather(offset, 4096)) == disk[offset : offset + 4096]
        found = bytearray(4096)
        into = [memoryview(found)]
        assert image.at_once(offset, into)
        assert found == disk[offset : offset + 4096]
        assert image.at_once(0, into), "another chunk is in the cache now"
        (layer,) = tmp_path.rglob("*.raw")
        layer.chmod(0o600)
        place = layer.read_bytes().index(disk[offset : offset + 4096])
        fd = os.open(layer, os.O_RDWR)
        try:
            os.pwrite(fd, b"?", place + 100)  # as if the disk had turned it
        finally:
            os.close(fd)
        layer.read_bytes()
        for at in (offset, offset - 4096):
            assert not image.at_once(at, into)
            with pytest.raises(Corrupt, match="checksum does not match"):
                image.gather(at, 4096)
        with pytest.raises(Corrupt, match="checksum does not match"):
            image.gather(offset - 4096, 128 * KiB)
        assert b"".join(image.gather(0, 3 * 64 * KiB)) == disk[: 3 * 64 * KiB]
        image.close()


@pytest.mark.parametrize("lane", LANES)
def test_sparse_tools_skip_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
    choose_lane(monkeypatch, lane)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path, size, data_at = tmp_path / "mnt", 1 * TiB, 700 * (1 << 30)
    path.mkdir()
    Repository.init(str(tmp_path / "repo"))
    data = random.Random(3).randbytes(640 * KiB)
    with Repository.open(str(tmp_path / "repo")) as repository, repository.writer() as writer:
        point = writer.begin("web01", MOMENT)
        try:
            target = point.add_disk("vda", size, writer.next_chain("web01", "vda", "main"), None)
            target.write(data_at, memoryview(data))
            point.finish_disk(target, read="all", reason="test")
            writer.commit(point, parent=None)
        finally:
            point.abandon()
    service.mount(str(tmp_path / "repo"), str(path), foreground=False, allow_other=False, options=[])
    try:
        disk = str(path / "web01" / "latest" / "vda.raw")
        fd = os.open(disk, os.O_RDONLY)
        try:
            if lane == "pyfuse3":  # which has no LSEEK: all is data
                assert os.lseek(fd, 0, os.SEEK_DATA) == 0
                return
            assert os.lseek(fd, 0, os.SEEK_DATA) == data_at
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert os.lseek(fd, data_at + 4096, os.SEEK_DATA) == data_at + 4096
            assert os.lseek(fd, data_at, os.SEEK_HOLE) == data_at + len(data)
            for offset, whence in ((data_at + len(data), os.SEEK_DATA), (size, os.SEEK_DATA), (size, os.SEEK_HOLE)):
                fails_with(errno.ENXIO, os.lseek, fd, offset, whence)
        finally:
            os.close(fd)
        for command in (
            ["cp", "--sparse=auto", disk, str(tmp_path / "cp")],
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", disk, str(tmp_path / "qemu-img")],
        ):
            subprocess.run(command, check=True, timeout=20)  # reading a TiB takes minutes
            copy = Path(command[-1])
            assert copy.stat().st_size == size
            assert copy.stat().st_blocks * 512 <= 2 * MiB
            with copy.open("rb") as file:
                file.seek(data_at)
                assert file.read(len(data)) == data
            copy.unlink()
    finally:
        service.unmount(str(path))


class Striped(BytesImage):
    """Data and holes of 100 bytes in turn, told in extents of at most what was asked for."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        while length:
            piece = min(100 - offset % 100, length)
            yield Extent(offset, piece, offset // 100 % 2 == 1)
            offset, length = offset + piece, length - piece


@pytest.mark.parametrize(
    ("offset", "data", "hole"),
    [(0, 0, 100), (99, 99, 100), (100, 200, 100), (250, 250, 300), (399, None, 399), (299, 299, 300)],
)
def test_seek_in_an_image(offset: int, data: int | None, hole: int) -> None:
    image = Striped(bytes(400))
    assert seek(image, offset, os.SEEK_HOLE) == hole
    if data is not None:
        assert seek(image, offset, os.SEEK_DATA) == data
        return
    with pytest.raises(OSError, match="no more data"):
        seek(image, offset, os.SEEK_DATA)


def test_seek_where_nothing_is() -> None:
    image = ZeroImage(1 << 50)
    assert seek(image, 5, os.SEEK_HOLE) == 5
    for offset, whence, code in (
        (0, os.SEEK_DATA, errno.ENXIO),
        (1 << 50, os.SEEK_HOLE, errno.ENXIO),
        (0, 0, errno.EINVAL),
    ):
        fails_with(code, seek, image, offset, whence)
    assert seek(BytesImage(b"x"), 0, os.SEEK_HOLE) == 1


def test_without_a_lane_pyfuse3_answers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    attached: list[int] = []

    def attach(_: object, device: int) -> None:
        attached.append(device)
        if len(attached) == 1:
            raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr(session, "attach", attach)
    lanes: list[Lane | None] = []
    open_before = len(os.listdir("/proc/self/fd"))
    _, lane = session._attach(lanes.append, 99, passthrough=True, keep_acls=False)  # type: ignore[arg-type]
    assert lane is None
    assert lanes[0] is not None
    assert lanes[1] is None
    assert attached == [lanes[0].session, 99]
    assert [r.message for r in caplog.records] == [
        "reads are slower than they could be, without the read lane: fuse_session_mount failed"
    ]
    assert len(os.listdir("/proc/self/fd")) == open_before
