"""Hydrated disks through a mount: who reads them, when they count, and what may go wrong. BACKUPFS_LONG=1 lasts."""

import contextlib
import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import BACKUPFS, backupfs
from mounts import AS_NOBODY, choose_lane, fails_with, let_in, needs_fuse, process_of, unmount_all, wait_until
from repositories import add_point
from servers import freeze

from backupfs.errors import Corrupt, MountError
from backupfs.extents import Extent
from backupfs.fuse import mountpoint
from backupfs.repository.repository import Repository
from backupfs.services import background, hydrated
from backupfs.services import mount as service
from backupfs.services.gc import gc
from backupfs.services.hydrate import HydrateRequest, dehydrate, hydrate
from backupfs.services.prune import delete
from backupfs.units import KiB, MiB

SECONDS = 300 if os.environ.get("BACKUPFS_LONG") else 4
RELEASE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])

pytestmark = [
    pytest.mark.timeout(SECONDS + 60),
    needs_fuse,
    pytest.mark.skipif(os.geteuid() != 0 or RELEASE < (6, 9), reason="passthrough takes root and Linux 6.9"),
]


class Place:
    """A repository of two points, its mount, and its cache folder."""

    def __init__(self, folder: Path, codec: str) -> None:
        self.repository, self.path, self.cache = folder / "repo", folder / "mnt", folder / "cache"
        self.path.mkdir()
        Repository.init(str(self.repository), codec_name=codec)
        first = random.Random(1).randbytes(2 * MiB) + bytes(3 * MiB) + random.Random(2).randbytes(1 * MiB + 700)
        second = first[: 64 * KiB] + bytes(64 * KiB) + random.Random(3).randbytes(64 * KiB) + first[192 * KiB :]
        with Repository.open(str(self.repository)) as repository:
            changed = [Extent(0, 192 * KiB, False)]
            points = add_point(repository, first).id, add_point(repository, second, changed).id
        self.contents = dict(zip(points, (first, second), strict=True))
        self.first, self.second = points

    def mount(self, **how: Any) -> None:
        chosen = {"foreground": False, "allow_other": False, "options": [], **how}
        service.mount(str(self.repository), str(self.path), **chosen)

    def file(self, point: str) -> str:
        return f"{self.path}/web01/{point}/vda.raw"

    def process(self) -> int:
        return process_of(str(self.path))

    def hydrate(self, point: str, limit: int | None = None) -> Path:
        with Repository.open(str(self.repository)) as repository:
            request = HydrateRequest(vm="web01", point=point, limit=limit)
            (done,) = hydrate(repository, request, lambda *_: None)
        return Path(done.path)

    def dehydrate(self, *points: str) -> None:
        with Repository.open(str(self.repository)) as repository:
            dehydrate(repository, [("web01", point) for point in points] or None)

    def log(self) -> str:
        return Path(background.log_path(str(self.path))).read_text()

    def reads_alone(self, fd: int, offset: int, within_s: float) -> bytes | None:
        """Return 4 KiB of an open file that the kernel reads while the mount's process is stopped, None if it can't."""
        found: list[bytes] = []
        pid = self.process()
        try:
            freeze(pid)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what the kernel keeps of a mount's file
            thread = threading.Thread(target=lambda: found.append(os.pread(fd, 4 * KiB, offset)))
            thread.start()
            thread.join(within_s)
            alone = bool(found)
        finally:
            os.kill(pid, signal.SIGCONT)
        thread.join()
        return found[0] if alone else None

    def is_passed_through(self, point: str) -> bool:
        """Open a file, of which nothing is open, and find out who reads it; compare all its bytes."""
        expected = self.contents[point]
        with opened(self.file(point)) as fd:
            alone = self.reads_alone(fd, 1 * MiB, 0.5)
            assert alone in (None, expected[1 * MiB : 1 * MiB + 4 * KiB])
            assert read_all(fd) == expected
        return alone is not None

    def expect_passthrough(self, point: str) -> None:
        # The kernel tells of a file's end when it was closed, not before: so maybe not the next time that it is opened.
        wait_until(lambda: self.is_passed_through(point), 20)


@contextlib.contextmanager
def opened(path: str, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_all(fd: int) -> bytes:
    """Read an open file from its beginning to its end."""
    pieces: list[bytes] = []
    while piece := os.pread(fd, 300_000, sum(map(len, pieces))):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Place]:
    choose_lane(monkeypatch, "lane")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = Place(tmp_path, getattr(request, "param", "zstd"))
    try:
        yield place
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(place.process(), signal.SIGKILL)
        unmount_all(str(place.path))


def test_the_kernel_reads_by_itself_and_reads_the_same(place: Place, tmp_path: Path) -> None:
    place.hydrate(place.second)
    place.mount()
    data = place.contents[place.second]
    with opened(place.file(place.second)) as fd:
        assert place.reads_alone(fd, 130 * KiB, 20) == data[130 * KiB : 134 * KiB]
        assert read_all(fd) == data
        assert os.pread(fd, 100, len(data) - 3) == data[-3:]
        assert os.pread(fd, 100, len(data)) == b""
        assert os.lseek(fd, 64 * KiB, os.SEEK_HOLE) == 64 * KiB
        assert os.lseek(fd, 64 * KiB, os.SEEK_DATA) == 128 * KiB
        assert os.lseek(fd, 128 * KiB, os.SEEK_HOLE) == 2 * MiB
        assert os.lseek(fd, 0, os.SEEK_END) == len(data)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == data
    with opened(place.file(place.second), os.O_DIRECT) as fd, mmap.mmap(-1, 1 * MiB) as buffer:
        assert os.preadv(fd, [buffer], 128 * KiB) == 1 * MiB
        assert buffer[:] == data[128 * KiB :][: 1 * MiB]
    subprocess.run(["cp", "--sparse=auto", place.file(place.second), tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == data
    assert (tmp_path / "copy").stat().st_blocks * 512 < 4 * MiB
    # The other point goes the mount's own way.
    assert not place.is_passed_through(place.first)
    assert "WARNING" not in place.log()
    assert "ERROR" not in place.log()
    service.unmount(str(place.path))


def test_what_is_open_keeps_its_way(place: Place) -> None:
    place.mount()
    data = place.contents[place.first]
    with opened(place.file(place.first)) as before:
        assert os.pread(before, 4096, 0) == data[:4096]
        place.hydrate(place.first)
        with opened(place.file(place.first)) as after:
            for fd in (before, after):
                assert place.reads_alone(fd, 1 * MiB, 0.5) is None
                assert read_all(fd) == data
    place.expect_passthrough(place.first)
    with opened(place.file(place.first)) as before:
        assert place.reads_alone(before, 1 * MiB, 20)
        place.dehydrate()
        with opened(place.file(place.first)) as after:
            for fd in (before, after):
                assert place.reads_alone(fd, 5 * MiB, 20) == data[5 * MiB : 5 * MiB + 4 * KiB]
                assert read_all(fd) == data
    wait_until(lambda: not place.is_passed_through(place.first))
    assert "ERROR" not in place.log()


def overwrite(path: Path) -> None:
    before = path.stat()
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(1 * MiB)
        file.write(b"wrong")
    path.chmod(0o400)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    before = path.stat()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o400)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path) -> None:
    """Put the record of another point, and its file, in the place of this one."""
    other = next(p for p in path.parent.glob("*.raw") if p != path)
    for suffix in (".raw", ".json"):
        path.with_suffix(suffix).unlink()
        os.link(other.with_suffix(suffix), path.with_suffix(suffix))


@pytest.mark.parametrize(
    "change",
    [
        overwrite,
        replace,
        swap,
        lambda path: path.touch(),
        lambda path: os.truncate(path, 1 * MiB),
        lambda path: path.chmod(0o440),
        lambda path: os.chown(path, 65534, -1),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{}"),
    ],
)
def test_a_file_that_is_not_as_it_was_does_not_count(place: Place, change: Callable[[Path], object]) -> None:
    place.hydrate(place.second)
    path = place.hydrate(place.first)
    change(path)
    place.mount()
    assert not place.is_passed_through(place.first)
    again = place.hydrate(place.first)
    assert again.read_bytes() == place.contents[place.first]
    assert again.stat().st_mode & 0o7777 == 0o400
    place.expect_passthrough(place.first)
    assert "ERROR" not in place.log()


@pytest.mark.parametrize("how", [{"passthrough": False}, {"options": ["ro,no_passthrough"]}])
def test_switched_off(place: Place, how: dict[str, Any]) -> None:
    place.hydrate(place.first)
    place.mount(**how)
    assert not place.is_passed_through(place.first)
    pid = place.process()
    service.unmount(str(place.path))
    os.waitpid(pid, 0)
    word = ["--no-passthrough"] if "passthrough" in how else ["-o", "no_passthrough"]
    backupfs(place.repository, "mount", place.path, *word)
    assert not place.is_passed_through(place.first)


def test_the_end_of_a_mount_under_open_files(place: Place) -> None:
    place.hydrate(place.first)
    data = place.contents[place.first]
    for number in (signal.SIGTERM, signal.SIGKILL):
        place.mount()
        with opened(place.file(place.first)) as fd:
            assert place.reads_alone(fd, 0, 20)
            with pytest.raises(MountError, match="in use"):
                service.unmount(str(place.path))
            pid = place.process()
            os.kill(pid, number)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == (0 if number == signal.SIGTERM else -number)
            assert read_all(fd) == data  # the kernel needs nobody for it
            if number == signal.SIGTERM:
                assert mountpoint.find(str(place.path)) is None
            else:
                wait_until(lambda: mountpoint.is_dead(str(place.path)))
                fails_with(errno.ENOTCONN, os.open, place.file(place.first), os.O_RDONLY)
            place.mount()
            assert place.is_passed_through(place.first)
            assert read_all(fd) == data
            pid = place.process()
        service.unmount(str(place.path))
        os.waitpid(pid, 0)  # before the next one is looked for


@pytest.mark.parametrize("place", ["none"], indirect=True)
def test_a_raw_image_of_the_repository(place: Place) -> None:
    """A plain layer's is read by the kernel once it is verified; and kept while it is, even by a mount that died."""
    data = place.contents[place.first]
    place.mount()
    assert not place.is_passed_through(place.first)
    image = place.hydrate(place.first)
    assert image.is_relative_to(place.repository)
    place.expect_passthrough(place.first)
    with opened(place.file(place.first)) as fd:
        assert place.reads_alone(fd, 0, 20)
        pid = place.process()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with Repository.open(str(place.repository)) as repository:
            delete(repository, [("web01", place.first)])
            report = gc(repository)
            assert (report.freed, report.open) == (0, ["web01/vda/main/0"])
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert read_all(fd) == data
    place.mount()  # takes the dead one away, and with it what the kernel held
    with Repository.open(str(place.repository)) as repository:

        def freed() -> bool:
            return gc(repository).freed >= 128 * KiB

        wait_until(freed)
    with opened(place.file(place.second)) as fd:
        assert read_all(fd) == place.contents[place.second]


@pytest.mark.parametrize("place", ["none"], indirect=True)
def test_a_repository_of_another_user(place: Place) -> None:
    for path in (place.repository, *place.repository.rglob("*")):
        os.chown(path, 65534, 65534)
    image = place.hydrate(place.first)
    place.mount()
    place.expect_passthrough(place.first)
    os.chown(image, 65533, 65533)
    wait_until(lambda: not place.is_passed_through(place.first))


@pytest.mark.parametrize("place", ["none"], indirect=True)
def test_a_raw_image_that_was_changed(place: Place) -> None:
    image = place.hydrate(place.first)
    overwrite(image)
    place.mount()
    with opened(place.file(place.first)) as fd:
        assert place.reads_alone(fd, 4 * MiB, 0.5) is None
        fails_with(errno.EIO, os.pread, fd, 4096, 1 * MiB)
    with pytest.raises(Corrupt, match=r"000000\.raw: damaged at offset 1048576"):
        place.hydrate(place.first)


def test_where_the_kernel_cannot_do_it(place: Place, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("lower", "upper", "work", "cache")]
    for folder in folders:
        folder.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(*folders)
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", folders[3]], check=True)
    try:
        place.hydrate(place.first)
        place.hydrate(place.second)
        place.mount()
        assert not place.is_passed_through(place.first)
        assert not place.is_passed_through(place.second)
        warnings = [line for line in place.log().splitlines() if "WARNING" in line or "ERROR" in line]
        assert len(warnings) == 1, warnings
        assert "passthrough can't be used" in warnings[0]
        service.unmount(str(place.path))
    finally:
        subprocess.run(["umount", folders[3]], check=True)


@pytest.mark.skipif(
    not shutil.which("fusermount3") or not os.stat("/dev/fuse").st_mode & 0o006,
    reason="users may not use FUSE here: chmod 666 /dev/fuse",
)
def test_a_user_reads_as_before(place: Place, tmp_path: Path) -> None:
    let_in(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    command = [*AS_NOBODY, *BACKUPFS, "-r", place.repository]
    subprocess.run([*command, "hydrate", f"web01/{place.first}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "mount", place.path], check=True)
    seen = subprocess.run([*AS_NOBODY, "cat", place.file(place.first)], check=True, capture_output=True)
    assert seen.stdout == place.contents[place.first]
    assert "WARNING" not in place.log()
    subprocess.run([*command, "umount", place.path], check=True)


def test_many_read_while_points_are_hydrated_and_not(place: Place) -> None:
    place.mount()
    failures: list[BaseException] = []
    ends = time.monotonic() + SECONDS

    def read(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < ends:
                point = rng.choice(list(place.contents))
                data = place.contents[point]
                with opened(place.file(point)) as fd:
                    for _ in range(rng.randrange(4)):
                        offset, length = rng.randrange(len(data)), rng.randrange(300_000)
                        assert os.pread(fd, length, offset) == data[offset : offset + length]
        except BaseException as e:  # noqa: BLE001, the test reports it
            failures.append(e)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        for point in place.contents:
            place.hydrate(point)
        place.dehydrate()
    assert not failures
    for point in place.contents:
        place.hydrate(point)
        place.expect_passthrough(point)
    assert "WARNING" not in place.log()
    assert "ERROR" not in place.log()
    # No raw file stays registered that nobody has open.
    held = []
    for fd in Path(f"/proc/{place.process()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(os.readlink(fd))
    assert held
    assert not [path for path in held if path.startswith(hydrated.folder(""))]
    service.unmount(str(place.path))
