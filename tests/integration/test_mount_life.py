"""How mounts begin and end: signals, crashes, options, users. Each is a process of its own (fake_mount.py)."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_mount import content
from mounts import AS_NOBODY, LANES, FakeMount, choose_lane, fails_with, let_in, needs_fuse, pread, wait_until

from backupfs.errors import MountError
from backupfs.fuse import mountpoint, session
from backupfs.services import mount as service

pytestmark = [pytest.mark.timeout(60), needs_fuse]


@pytest.fixture(params=LANES)
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeMount]:
    choose_lane(monkeypatch, request.param)
    fake = FakeMount(tmp_path)
    try:
        yield fake
    finally:
        fake.clean()


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
    assert "all returned: False" in mounted.said()


def test_a_check_that_runs_when_it_is_unmounted_is_waited_for(mounted: FakeMount) -> None:
    pread(mounted.disk("condemned"), 1, 0)
    subprocess.run(["umount", mounted.path], check=True)
    assert mounted.ended() == 0
    assert "every read of it fails from now on" in mounted.said()
    assert "all returned: True" in mounted.said()


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


def test_one_that_does_not_answer_is_not_called_busy(mounted: FakeMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "_ANSWER_S", 0.5)
    mounted.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(MountError, match="its process does not answer"):
            service.unmount(str(mounted.path))
    finally:
        mounted.process.send_signal(signal.SIGCONT)
    wait_until(lambda: subprocess.run(["umount", mounted.path], check=False).returncode == 0)  # our question is there
    assert mounted.ended() == 0


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
    ("options", "found"),
    [
        ([], set()),
        (["ro,nosuid,x-systemd.automount", "noauto"], set()),
        (["rw,allow_other"], {"allow_other"}),
        (["no_passthrough,ro", "allow_other"], {"allow_other", "no_passthrough"}),
    ],
)
def test_mount_options(options: list[str], found: set[str]) -> None:
    assert session.check_options(options) == found


def test_an_unknown_mount_option_is_named() -> None:
    with pytest.raises(MountError, match="'direct_oi' is not known"):
        session.check_options(["ro,direct_oi"])


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
    not shutil.which("fusermount3") or not os.stat("/dev/fuse").st_mode & 0o006,
    reason="users may not use FUSE here: chmod 666 /dev/fuse",
)
def test_a_user_mounts_and_unmounts(tmp_path: Path) -> None:
    let_in(tmp_path)
    os.chown(tmp_path, 65534, 65534)
    (tmp_path / "mnt").mkdir()
    os.chown(tmp_path / "mnt", 65534, 65534)
    script = "import sys; from backupfs.fuse.mountpoint import take_away; take_away(sys.argv[1])"
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
