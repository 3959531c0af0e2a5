"""Repositories mounted in the background, as the command line does it."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mounts import LANES, choose_lane, fails_with, needs_fuse, process_of, unmount_all, wait_until
from repositories import add_point

from backupfs.errors import Corrupt, MountError, NotFound
from backupfs.fuse import mountpoint
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(60), needs_fuse]


@dataclass
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
        return process_of(self.path)


@pytest.fixture(params=LANES)
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[RealMount]:
    choose_lane(monkeypatch, request.param)
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
    wait_until(lambda: os.readlink(f"{real.path}/web01/latest") == third, 1)
    assert Path(real.file("latest")).read_bytes() == b"x" * 4096
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


@pytest.mark.parametrize("place", ["repository", "in it", "above it", "above the cache", "above the log"])
def test_it_is_not_mounted_where_it_would_wait_for_itself(
    real: RealMount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/backupfs").mkdir(parents=True)
    path = {
        "repository": real.repository,
        "in it": f"{real.repository}/vms",
        "above it": str(tmp_path),
        "above the cache": str(tmp_path / "cache"),
        "above the log": str(tmp_path / "state"),
    }[place]
    real.path = path  # for the clean-up
    with pytest.raises(MountError, match="mount it elsewhere"):
        real.mount()
    assert mountpoint.find(path) is None
    assert Repository.open(real.repository).vms() == ["web01"]


@pytest.mark.parametrize("below", ["", "repo"])
def test_nor_over_the_disk_that_the_repository_is_on(tmp_path: Path, below: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        Repository.init(str(disk / below))
        with pytest.raises(MountError, match="mount it elsewhere"):
            service.mount(str(disk / below), str(disk), foreground=False, allow_other=False, options=[])
        mounted = mountpoint.find(str(disk))
        assert mounted
        assert mounted.file_system == "tmpfs"
    finally:
        unmount_all(str(disk))


def test_a_repository_that_is_not_there_any_more_is_not_an_empty_one(real: RealMount, tmp_path: Path) -> None:
    """An rsync of the mount would empty its copy."""
    real.mount()
    away = tmp_path / "away"
    os.rename(real.repository, away)
    fails_with(errno.EIO, os.listdir, real.path)
    Repository.init(real.repository)
    fails_with(errno.EIO, os.listdir, real.path)
    assert "is another folder" in Path(background.log_path(real.path)).read_text()
    shutil.rmtree(real.repository)
    os.rename(away, real.repository)
    assert os.listdir(real.path) == ["web01"]
    os.rename(f"{real.repository}/vms", away)
    fails_with(errno.EIO, os.listdir, real.path)


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
