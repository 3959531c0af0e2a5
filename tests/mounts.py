"""Mounts for tests: a fake catalogue mounted by a process of its own, and what looks at it from outside."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from backupfs.fuse import mountpoint

P1, P2, P3 = "20260101T000000Z", "20260102T000000Z", "20260103T000000Z"
TESTS = Path(__file__).parent


needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) and not os.environ.get("CI"), reason="no FUSE"
)


LANES = ("lane", "pyfuse3")
"""Who answers reads: every test of mounts runs both ways."""


def choose_lane(monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
    """Have the mounts that are made from now on answered that way."""
    if lane == "lane":
        monkeypatch.delenv("BACKUPFS_NO_READ_LANE", raising=False)
    else:
        monkeypatch.setenv("BACKUPFS_NO_READ_LANE", "1")


class FakeMount:
    """A mounted fake catalogue and the process that answers."""

    def __init__(self, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self.control, self.path, self.log = folder / "control", folder / "mnt", folder / "log"
        self.path.mkdir(exist_ok=True)
        self.add(P1, P2)
        self.start(*options, prefix=prefix)

    def start(self, *options: str, prefix: Sequence[str] = ()) -> None:
        command = [sys.executable, str(TESTS / "integration" / "fake_mount.py"), str(self.control), str(self.path)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
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


def process_of(mountpoint: str) -> int:
    """Return the id of the process that answers for a mount: the only one whose command line ends so."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and (folder / "cmdline").read_bytes().endswith(f"\0{mountpoint}\0".encode()):
                return int(folder.name)
    raise AssertionError("no process")


AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def let_in(folder: Path) -> None:
    """Let other users walk to a folder that pytest made for its own user."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and above.name.startswith(("pytest", "popen-")):
            above.chmod(0o755)
    folder.chmod(0o755)
