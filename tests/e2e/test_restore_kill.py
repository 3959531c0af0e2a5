"""Restores that are interrupted or killed: no half of a disk under the name, and the same command goes on."""

import contextlib
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json, children_of_backupfs
from servers import run

from backupfs.services.restore import PARTIAL
from backupfs.units import MiB

SIZE = 192 * MiB
DATA = SIZE // 16 * 12
ROUNDS = 60 if os.environ.get("BACKUPFS_LONG") else 3


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a repository with one point, and the disk it was taken from."""
    folder = tmp_path_factory.mktemp("kill")
    disk = folder / "disk.raw"
    with open(disk, "wb") as file:
        file.truncate(SIZE)
        for i in range(0, SIZE, 16 * MiB):
            file.seek(i)
            file.write(random.Random(i).randbytes(12 * MiB))
    backupfs(folder / "repo", "init")
    backupfs(folder / "repo", "backup", "web01", f"vda={disk}")
    return folder / "repo", disk


def wait_for_some(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the restore, or its qemu-nbd, has the file open, and something was written to it."""
    deadline = time.monotonic() + 30
    while process.poll() is None:
        opened = str(path) in opened_by(process.pid) or any(str(path) in c for c in children_of_backupfs())
        if opened and path.stat().st_blocks * 512 > MiB:
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


def opened_by(process: int) -> set[str]:
    """Return the files that a process has open."""
    found = set()
    with suppress(OSError):
        for descriptor in os.scandir(f"/proc/{process}/fd"):
            with suppress(OSError):
                found.add(os.readlink(descriptor.path))
    return found


def wait_until_nobody_writes(partial: Path) -> None:
    """A qemu-nbd that is killed keeps its lock on the image as long as the disk takes for what it has under way."""
    deadline = time.monotonic() + 10
    while any(str(partial) in c for c in children_of_backupfs()) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_broken_off_and_again(
    disk: tuple[Path, Path], tmp_path: Path, image_format: str, number: signal.Signals
) -> None:
    repo, original = disk
    target = tmp_path / "restored"
    partial = tmp_path / f"restored{PARTIAL}"
    command = [*BACKUPFS, "-r", str(repo), "restore", "web01/latest/vda", str(target), "--format", image_format]
    broken = 0
    rng = random.Random(int(number))
    for _ in range(ROUNDS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for_some(partial, process)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        # Once Python itself ends, and all is done, it does not handle signals any more.
        if process.returncode == 0 or (process.returncode == -number == -signal.SIGINT and target.exists()):
            target.unlink()
            continue
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
        if number == signal.SIGINT:
            assert b"goes on from there" in said
        broken += 1
        assert not target.exists()
        wait_until_nobody_writes(partial)
    done = backupfs_json(repo, "restore", "web01/latest/vda", target, "--format", image_format)
    assert done["resumed"] == (broken > 0)
    assert broken
    run("qemu-img", "compare", "-f", "raw", "-F", image_format, original, target)
    assert not partial.exists()
    assert not [c for c in children_of_backupfs() if str(partial) in c]


def test_an_interrupted_qcow2_has_what_was_written(disk: tuple[Path, Path], tmp_path: Path) -> None:
    """The tables that lead to it are in qemu-nbd's memory until they are flushed."""
    repo, original = disk
    target, partial = tmp_path / "restored", tmp_path / f"restored{PARTIAL}"
    command = [*BACKUPFS, "-r", str(repo), "restore", "web01/latest/vda", str(target), "--format", "qcow2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.stat().st_blocks * 512 < 60 * MiB:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    done = backupfs_json(repo, "restore", "web01/latest/vda", target, "--format", "qcow2")
    assert done["resumed"]
    assert done["written"] <= DATA - 40 * MiB  # what was on its way may be lost
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", original, target)


@pytest.mark.parametrize("options", [["--differential"], []])
def test_an_interrupted_restore_in_place_says_what_is_left(
    disk: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    repo, original = disk
    target = tmp_path / "there.raw"
    with open(target, "xb") as file:
        file.truncate(SIZE)
    with contextlib.ExitStack() as stack:
        where = str(target)
        if not options:  # into nothing but zeroes
            stack.callback(
                subprocess.run, ["losetup", "--detach", where := run("losetup", "-f", "--show", target).strip()]
            )
        command = [*BACKUPFS, "-r", str(repo), "restore", "web01/latest/vda", where, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while target.stat().st_blocks * 512 < 2 * MiB:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert f"interrupted; {where} is a mixture".encode() in said
        assert (b"the same command makes" if options else b"the same command with --differential") in said
        assert b"half published" not in said
        backupfs(repo, "restore", "web01/latest/vda", where, "--differential")
        run("cmp", original, where)


def test_an_interrupted_replacement_leaves_the_old_file(disk: tuple[Path, Path], tmp_path: Path) -> None:
    repo, original = disk
    target = tmp_path / "restored"
    target.write_bytes(b"old")
    command = [*BACKUPFS, "-r", str(repo), "restore", "web01/latest/vda", str(target), "--force"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_some(tmp_path / f"restored{PARTIAL}", process)
    process.kill()
    if process.wait() != 0:
        assert target.read_bytes() == b"old"
    backupfs(repo, "restore", "web01/latest/vda", target, "--force")
    run("cmp", original, target)
