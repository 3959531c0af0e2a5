"""Real mounts, each answered by a process of its own (fake_mount.py). The test process looks at them from outside."""

import contextlib
import errno
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_mount import BAD_AT, ODD, SLOW_S, content
from repositories import add_point

from backupfs.errors import Corrupt, MountError, NotFound
from backupfs.fuse import mountpoint, session
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service
from backupfs.units import KiB, MiB

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK) and not os.environ.get("CI"), reason="no FUSE"),
]

P1, P2, P3 = "20260101T000000Z", "20260102T000000Z", "20260103T000000Z"
TESTS = str(Path(__file__).parent.parent)


class FakeMount:
    """A mounted fake catalogue and the process that answers."""

    def __init__(self, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self.control, self.path, self.log = folder / "control", folder / "mnt", folder / "log"
        self.path.mkdir(exist_ok=True)
        self.add(P1, P2)
        self.start(*options, prefix=prefix)

    def start(self, *options: str, prefix: Sequence[str] = ()) -> None:
        command = [sys.executable, str(Path(__file__).parent / "fake_mount.py"), str(self.control), str(self.path)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": TESTS},
                start_new_session=True,
            )
        assert self.process.stdout
        if self.process.stdout.readline() != b"ready\n":
            self.clean()
            pytest.fail(self.said())

    def add(self, *points: str) -> None:
        for point in points:
            (self.control / "web" / point).mkdir(parents=True)

    def said(self) -> str:
        return self.log.read_text()

    def disk(self, name: str, point: str = P1) -> str:
        return str(self.path / "web" / point / f"{name}.raw")

    def ended(self) -> int:
        """Wait for the process's end and return its status."""
        assert self.process.stdout
        self.process.stdout.close()
        return self.process.wait(15)

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stdout:
            self.process.stdout.close()
        self.process.wait(15)
        unmount_all(str(self.path))


def unmount_all(path: str) -> None:
    while mountpoint.find(path):
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[FakeMount]:
    fake = FakeMount(tmp_path)
    try:
        yield fake
    finally:
        fake.clean()


def pread(path: str, length: int, offset: int, flags: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def fails_with(code: int, call: Callable[..., object], *args: object) -> None:
    said = 0
    try:
        call(*args)
    except OSError as e:
        said = e.errno or 0
    assert said == code, os.strerror(said)


def wait_until(condition: Callable[[], object], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_read(mounted: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "expected").write_bytes(content("good"))
    subprocess.run(["cmp", tmp_path / "expected", mounted.disk("good")], check=True)
    for name in ("good", "weiß 💾"):
        data = content(name)
        assert Path(mounted.disk(name)).read_bytes() == data
        for offset, length in ((0, 1), (4095, 2), (ODD - 1, 1), (ODD - 10, 4096), (1 * MiB - 7, 1 * MiB + 14)):
            assert pread(mounted.disk(name), length, offset) == data[offset : offset + length]
        assert pread(mounted.disk(name), 100, ODD) == b""
        assert pread(mounted.disk(name), 100, ODD + MiB) == b""
        fd = os.open(mounted.disk(name), os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            os.close(fd)
            assert mapped[:] == data
    assert Path(mounted.disk("empty")).read_bytes() == b""
    assert mounted.said() == ""


def test_direct_reads(mounted: FakeMount) -> None:
    data, buffer = content("good"), mmap.mmap(-1, 1 * MiB)
    fd = os.open(mounted.disk("good"), os.O_RDONLY | os.O_DIRECT)
    try:
        for offset in (0, 4096, 1 * MiB, 3 * MiB):
            got = os.preadv(fd, [buffer], offset)
            assert buffer[:got] == data[offset : offset + 1 * MiB]
        assert os.preadv(fd, [buffer], 4 * MiB) == 0
    finally:
        os.close(fd)


def test_what_stat_and_the_tools_say(mounted: FakeMount) -> None:
    status = os.stat(mounted.disk("good"))
    day = 1767225600
    assert (status.st_size, status.st_blocks, status.st_nlink) == (ODD, ODD // 4096, 1)
    assert (status.st_mode & 0o7777, status.st_uid) == (0o400, os.geteuid())
    assert (status.st_mtime_ns, status.st_ctime_ns) == (day * 10**9, day * 10**9)
    assert os.stat(mounted.path / "web" / P1).st_mtime == day
    assert [os.stat(mounted.path / p).st_nlink for p in ("", "web", f"web/{P1}")] == [3, 4, 2]
    assert os.readlink(mounted.path / "web" / "latest") == P2
    files = subprocess.run(["find", mounted.path, "-type", "f"], capture_output=True, text=True, check=True).stdout
    assert len(files.splitlines()) == 2 * 10
    du = subprocess.run(["du", "-k", "--apparent-size", mounted.disk("good")], capture_output=True, check=True)
    assert int(du.stdout.split()[0]) == -(-ODD // 1024)
    assert mountpoint.find(str(mounted.path)).source == "fake:ä, b\\c"  # type: ignore[union-attr]
    assert os.statvfs(mounted.path).f_blocks == os.statvfs(mounted.control).f_blocks
    assert os.statvfs(mounted.path).f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == 15


def test_extended_attributes(mounted: FakeMount) -> None:
    path = mounted.disk("good")
    assert sorted(os.listxattr(path)) == ["user.backupfs.point", "user.backupfs.vm"]
    assert os.getxattr(path, "user.backupfs.vm") == b"web"
    for name in ("user.backupfs.none", "user.other", "security.capability"):
        fails_with(errno.ENODATA, os.getxattr, path, name)
    assert os.listxattr(mounted.path / "web") == []
    assert os.listxattr(mounted.path / "web" / P1 / "point.json") == []


def test_nothing_can_be_written(mounted: FakeMount) -> None:
    folder, path = str(mounted.path / "web"), mounted.disk("good")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC):
        fails_with(errno.EROFS, os.open, path, flags)
    fails_with(errno.EROFS, os.open, folder + "/new", os.O_CREAT | os.O_WRONLY)
    fails_with(errno.EROFS, os.mkdir, folder + "/new")
    fails_with(errno.EROFS, os.rmdir, f"{folder}/{P1}")
    fails_with(errno.EROFS, os.unlink, path)
    fails_with(errno.EROFS, os.rename, path, path + "x")
    fails_with(errno.EROFS, os.symlink, "x", folder + "/new")
    fails_with(errno.EROFS, os.link, path, path + "x")
    fails_with(errno.EROFS, os.truncate, path, 0)
    fails_with(errno.EROFS, os.chmod, path, 0o777)
    fails_with(errno.EROFS, os.chown, path, 1, 1)
    fails_with(errno.EROFS, os.utime, path)
    fails_with(errno.EROFS, os.setxattr, path, "user.x", b"")
    fails_with(errno.EROFS, os.removexattr, path, "user.backupfs.vm")
    fails_with(errno.EROFS, os.mkfifo, folder + "/new")


@pytest.mark.parametrize("name", ["bad", "buggy"])
def test_a_damaged_range_is_eio_and_the_rest_is_right(mounted: FakeMount, name: str) -> None:
    data = content(name)
    for flags in (0, os.O_DIRECT):
        fd = os.open(mounted.disk(name), os.O_RDONLY | flags)
        buffer = mmap.mmap(-1, 4 * KiB)
        try:
            for offset in range(BAD_AT - 8 * KiB, BAD_AT + 72 * KiB, 4 * KiB):
                if BAD_AT <= offset < BAD_AT + 64 * KiB:
                    fails_with(errno.EIO, os.preadv, fd, [buffer], offset)
                else:
                    assert os.preadv(fd, [buffer], offset) == 4 * KiB
                    assert buffer[:] == data[offset : offset + 4 * KiB]
        finally:
            os.close(fd)
    assert Path(mounted.disk("good")).read_bytes() == content("good")
    assert f"web/{P1}/{name}.raw" in mounted.said()
    assert mounted.said().count("ERROR") == 1
    assert mounted.said().count("Traceback") == (name == "buggy")


def test_an_image_that_cannot_be_opened(mounted: FakeMount) -> None:
    fails_with(errno.EIO, os.open, mounted.disk("missing"), os.O_RDONLY)
    assert "missing.raw: open failed: a layer is missing" in mounted.said()
    assert Path(mounted.disk("good")).read_bytes() == content("good")


def test_a_condemned_image_answers_nothing_more_not_even_what_was_read(mounted: FakeMount) -> None:
    fd = os.open(mounted.disk("condemned"), os.O_RDONLY)
    try:
        assert os.pread(fd, 64 * KiB, 0) == content("condemned")[: 64 * KiB]
        wait_until(lambda: "condemned.raw: every read of it fails" in mounted.said())
        time.sleep(0.1)  # the pages are dropped right after
        fails_with(errno.EIO, os.pread, fd, 64 * KiB, 0)
        fails_with(errno.EIO, os.pread, fd, 64 * KiB, 2 * MiB)
    finally:
        os.close(fd)
    assert Path(mounted.disk("good")).read_bytes() == content("good")


def test_a_slow_read_blocks_nobody_else(mounted: FakeMount) -> None:
    with ThreadPoolExecutor(20) as pool:
        begun = time.monotonic()
        slow = [pool.submit(pread, mounted.disk("slow"), 4096, i * 128 * KiB, os.O_RDONLY) for i in range(8)]
        time.sleep(0.2)
        assert Path(mounted.disk("good")).read_bytes() == content("good")
        assert len(os.listdir(mounted.path / "web")) == 3
        assert time.monotonic() - begun < SLOW_S
        assert b"".join(f.result() for f in slow) == b"".join(content("slow")[i * 128 * KiB :][:4096] for i in range(8))


def test_many_readers_at_once(mounted: FakeMount) -> None:
    data = content("good")

    def read(seed: int) -> bool:
        fd = os.open(mounted.disk("good", (P1, P2)[seed % 2]), os.O_RDONLY)
        try:
            offsets = [(seed * 7919 + i * 104729) % ODD for i in range(30)]
            return all(os.pread(fd, 5000, o) == data[o : o + 5000] for o in offsets)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(read, range(128)))
    assert mounted.said() == ""


def test_points_arrive_and_latest_moves(mounted: FakeMount) -> None:
    folder = mounted.path / "web"
    fails_with(errno.ENOENT, os.stat, folder / P3)
    mounted.add(P3)
    assert (folder / P3 / "good.raw").read_bytes() == content("good")
    assert sorted(os.listdir(folder)) == [P1, P2, P3, "latest"]
    assert os.readlink(folder / "latest") == P3
    assert (folder / "latest" / "good.raw").stat().st_mtime == (folder / P3).stat().st_mtime


def test_a_listing_holds_still_while_points_come_and_go(mounted: FakeMount) -> None:
    points = [f"2026{month:02}{day:02}T000000Z" for month in range(3, 11) for day in range(1, 29)]
    mounted.add(*points)
    with os.scandir(mounted.path / "web") as entries:
        seen = [next(entries).name for _ in range(10)]
        for point in points[::2]:
            (mounted.control / "web" / point).rmdir()
        mounted.add("20260201T000000Z")
        seen += [e.name for e in entries]
    assert sorted(seen) == sorted([P1, P2, "latest", *points])


def test_what_is_open_stays_readable_when_the_point_goes(mounted: FakeMount) -> None:
    with open(mounted.disk("good"), "rb") as file:
        (mounted.control / "web" / P1).rmdir()
        assert file.read() == content("good")
    fails_with(errno.ENOENT, os.open, mounted.disk("good"), os.O_RDONLY)


def test_a_point_made_again_shows_its_own_bytes(mounted: FakeMount) -> None:
    path = Path(mounted.disk("good"))
    assert path.read_bytes() == content("good")
    (mounted.control / "web" / P1 / "VERSION").write_text("2")
    assert path.read_bytes() == content("good", "2")


def test_an_edited_point_json_shows(mounted: FakeMount) -> None:
    path, note = mounted.path / "web" / P1 / "point.json", mounted.control / "web" / P1 / "NOTE"
    note.write_text("first")
    assert path.read_text() == "first"
    note.write_text("the second, longer")
    assert path.read_text() == "the second, longer"
    wait_until(lambda: path.stat().st_size == len("the second, longer"), 3)


def test_unmounting_from_outside_ends_the_process(mounted: FakeMount) -> None:
    subprocess.run(["umount", mounted.path], check=True)
    assert mounted.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(mounted: FakeMount, number: int) -> None:
    fd = os.open(mounted.disk("good"), os.O_RDONLY)
    mounted.process.send_signal(number)
    assert mounted.ended() == 0
    fails_with(errno.ENOTCONN, os.pread, fd, 1, 0)
    with contextlib.suppress(OSError):  # close(2) sends a FLUSH
        os.close(fd)
    assert mountpoint.find(str(mounted.path)) is None


def test_a_signal_ends_it_even_when_a_read_hangs(mounted: FakeMount) -> None:
    failed = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            pread(mounted.disk("stuck"), 1, 0)
        failed.set()

    threading.Thread(target=read).start()
    time.sleep(0.3)
    mounted.process.terminate()
    time.sleep(0.3)
    mounted.process.terminate()  # the second one waits for nobody
    assert mounted.ended() == 0
    assert failed.wait(5)
    assert mountpoint.find(str(mounted.path)) is None


def test_a_crash_leaves_a_dead_mount_that_the_next_start_cleans_up(mounted: FakeMount) -> None:
    mounted.process.kill()
    mounted.ended()
    fails_with(errno.ENOTCONN, os.stat, mounted.path)
    mounted.start()
    assert Path(mounted.disk("good")).read_bytes() == content("good")
    assert "a dead mount of fake:ä, b\\c was left here" in mounted.said()
    mountpoint.take_away(str(mounted.path))
    assert mounted.ended() == 0
    assert mountpoint.find(str(mounted.path)) is None


def test_a_dead_mount_can_be_unmounted(mounted: FakeMount) -> None:
    mounted.process.kill()
    mounted.ended()
    service.unmount(str(mounted.path))
    assert mountpoint.find(str(mounted.path)) is None


def test_a_busy_mount_is_not_taken_away(mounted: FakeMount) -> None:
    with (
        open(mounted.disk("good"), "rb"),
        pytest.raises(MountError, match="is in use; `fuser -vm"),
    ):
        service.unmount(str(mounted.path))
    service.unmount(str(mounted.path))
    assert mounted.ended() == 0
    with pytest.raises(MountError, match="nothing is mounted here"):
        service.unmount(str(mounted.path))


def test_where_nothing_can_be_mounted(mounted: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (mounted.path, "mounted here already"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "is not a folder"),
    ):
        with pytest.raises(MountError, match=message):
            mountpoint.prepare(mountpoint.resolve(str(path)))
    with pytest.raises(MountError, match="a proc is mounted here"):
        service.unmount("/proc")


def test_a_link_to_the_mount_point_will_do(mounted: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("mnt")
    service.unmount(str(tmp_path / "link"))
    assert mounted.ended() == 0


@pytest.mark.parametrize(
    ("options", "allow_other"),
    [([], False), (["ro,nosuid,x-systemd.automount", "noauto"], False), (["rw,allow_other"], True)],
)
def test_mount_options(options: list[str], allow_other: bool) -> None:
    assert session.check_options(options) is allow_other


def test_an_unknown_mount_option_is_named() -> None:
    with pytest.raises(MountError, match="'direct_oi' is not known"):
        session.check_options(["ro,direct_oi"])


AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def let_in(folder: Path) -> None:
    """Let other users walk to a folder that pytest made for its own user."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and above.name.startswith("pytest"):
            above.chmod(0o755)
    folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("options", [(), ("allow_other",)])
def test_other_users(tmp_path: Path, options: tuple[str, ...]) -> None:
    let_in(tmp_path)
    fake = FakeMount(tmp_path, *options)
    try:
        seen = subprocess.run([*AS_NOBODY, "cat", fake.disk("good")], capture_output=True, check=False)
        assert seen.stdout == (content("good") if options else b""), seen.stderr
        assert (seen.returncode == 0) == bool(options)
    finally:
        fake.clean()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.skipif(
    not shutil.which("fusermount3") or not os.stat("/dev/fuse").st_mode & 0o006, reason="users may not use FUSE here"
)
def test_a_user_mounts_and_unmounts(tmp_path: Path) -> None:
    let_in(tmp_path)
    os.chown(tmp_path, 65534, 65534)
    (tmp_path / "mnt").mkdir()
    os.chown(tmp_path / "mnt", 65534, 65534)
    script = (
        f"import sys; sys.path.append({TESTS!r})\nfrom backupfs.fuse.mountpoint import take_away as t\nt(sys.argv[1])"
    )
    unmount = [*AS_NOBODY, sys.executable, "-c", script, str(tmp_path / "mnt")]
    fake = FakeMount(tmp_path, prefix=AS_NOBODY)
    try:
        seen = subprocess.run([*AS_NOBODY, "cat", fake.disk("good")], capture_output=True, check=True)
        assert seen.stdout == content("good")
        assert mountpoint.find(str(fake.path)).source == "fake:ä, b\\c"  # type: ignore[union-attr]
        subprocess.run(unmount, check=True)
        assert fake.ended() == 0
        fake.start(prefix=AS_NOBODY)
        fake.process.terminate()
        assert fake.ended() == 0
        assert mountpoint.find(str(fake.path)) is None
        fake.start(prefix=AS_NOBODY)
        fake.process.kill()
        fake.ended()
        subprocess.run(unmount, check=True)
        assert mountpoint.find(str(fake.path)) is None
    finally:
        fake.clean()


@dataclass(frozen=True)
class RealMount:
    """A repository of two points, and where it is to be mounted."""

    repository: str
    path: str
    contents: dict[str, bytes]

    def mount(self, **how: Any) -> None:
        service.mount(self.repository, self.path, **{"foreground": False, "allow_other": False, "options": [], **how})

    def file(self, point: str, name: str = "vda.raw") -> str:
        return f"{self.path}/web01/{point}/{name}"

    def process(self) -> int:
        """Return the id of the process that answers: the only one with this command line."""
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and (folder / "cmdline").read_bytes().endswith(f"\0{self.path}\0".encode()):
                    return int(folder.name)
        raise AssertionError("no process")


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealMount]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Repository.init(str(tmp_path / "a repo"))
    first = random.Random(1).randbytes(1 * MiB + 700)
    second = first[: 64 * KiB] + bytes(512 * KiB) + first[576 * KiB :]
    with Repository.open(str(tmp_path / "a repo")) as repository:
        points = {add_point(repository, data).id: data for data in (first, second)}
    (tmp_path / "mnt").mkdir()
    real = RealMount(str(tmp_path / "a repo"), str(tmp_path / "mnt"), points)
    try:
        yield real
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(real.process(), signal.SIGKILL)
        unmount_all(real.path)


def test_a_repository_in_the_background(real: RealMount) -> None:
    real.mount()
    assert sorted(os.listdir(f"{real.path}/web01")) == sorted([*real.contents, "latest"])
    for point, data in real.contents.items():
        assert Path(real.file(point)).read_bytes() == data
        xattrs = {n: os.getxattr(real.file(point), n) for n in os.listxattr(real.file(point))}
        assert xattrs.keys() == {
            f"user.backupfs.{n}" for n in ("vm", "point", "disk", "kind", "chain", "data_bytes", "digest")
        }
        assert xattrs["user.backupfs.point"] == point.encode()
        assert json.loads(Path(real.file(point, "point.json")).read_text())["id"] == point
    newest = list(real.contents)[-1]
    assert os.readlink(f"{real.path}/web01/latest") == newest
    assert os.stat(real.file(newest)).st_blocks * 512 == 576 * KiB  # the zeroes are holes, the last chunk is whole
    assert mountpoint.find(real.path).source == f"backupfs:{real.repository}"  # type: ignore[union-attr]
    with Repository.open(real.repository) as repository:
        third = add_point(repository, b"x" * 4096).id
    assert Path(real.file("latest")).read_bytes() == b"x" * 4096
    assert os.readlink(f"{real.path}/web01/latest") == third
    pid = real.process()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.getsid(pid) == pid
    service.unmount(real.path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log = Path(background.log_path(real.path))
    assert "is mounted at" in log.read_text()
    assert "ERROR" not in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_damage_is_eio_and_logged(real: RealMount) -> None:
    layer = next(Path(real.repository).glob("vms/web01/disks/vda/main/000000.layer"))
    layer.chmod(0o600)
    with open(layer, "r+b") as file:
        file.seek(100_000)
        file.write(b"damage")
    real.mount()
    fails_with(errno.EIO, Path(real.file(next(iter(real.contents)))).read_bytes)
    assert "000000.layer: damaged at offset" in Path(background.log_path(real.path)).read_text()


def test_the_child_tells_why_it_failed(real: RealMount, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a repository"):
        service.mount(str(tmp_path), real.path, foreground=False, allow_other=False, options=[])
    with pytest.raises(MountError, match="'bad' is not known"):
        real.mount(options=["bad"])
    settings = Path(real.repository) / "backupfs.json"
    settings.chmod(0o600)
    settings.write_text("nonsense")
    with pytest.raises(Corrupt) as raised:
        real.mount()
    assert (raised.value.file, raised.value.offset) == (str(settings), 0)
    assert mountpoint.find(real.path) is None


def test_a_second_mount_at_the_same_place_is_refused(real: RealMount) -> None:
    real.mount()
    with pytest.raises(MountError, match="mounted here already"):
        real.mount()
    assert Path(real.file("latest")).stat().st_size == 1 * MiB + 700


def test_killed_and_mounted_again(real: RealMount) -> None:
    real.mount()
    os.kill(real.process(), signal.SIGKILL)
    wait_until(lambda: mountpoint.is_dead(real.path))
    real.mount(options=["allow_other"])
    assert Path(real.file("latest")).read_bytes() == list(real.contents.values())[-1]
    service.unmount(real.path)


def test_a_child_that_dies_without_a_word(real: RealMount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho some words >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(MountError, match=r"died \(status -9\): some words"):
        real.mount()


def test_a_parent_that_is_gone(real: RealMount) -> None:
    """Who started it can't be told: it must not stay mounted behind everybody's back."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "backupfs", "-r", real.repository, "mount", "--foreground", real.path]
    os.close(reader)
    child = subprocess.Popen(command, pass_fds=[writer], env={**os.environ, background.READY_FD: str(writer)})
    os.close(writer)
    assert child.wait(20) == 0
    assert mountpoint.find(real.path) is None
    assert "is gone" in Path(background.log_path(real.path)).read_text()


def test_an_error_arrives_as_it_was_sent() -> None:
    for error in (Corrupt("a.layer", 7, "flipped"), NotFound("no such ü")):
        received = background._decode_error(json.loads(background._encode_error(error)))
        assert (type(received), str(received), vars(received)) == (type(error), str(error), vars(error))


def test_a_long_mount_point_gets_a_log_of_its_own() -> None:
    one, other = (os.path.basename(background.log_path("/a/" + "ü" * 200 + end)) for end in ("1", "2"))
    assert one != other
    assert len(one) < 255
    assert os.path.basename(background.log_path("/mnt/a b")) == "%2Fmnt%2Fa%20b.log"
