"""`backupfs live`: a running machine's disks as files, and nothing left of it in QEMU."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs
from guest import GuestDisk, Machine, machine
from servers import run

from backupfs.units import KiB, MiB

SIZE = 16 * MiB


def begin_view(vm: Machine, place: Path, *words: str) -> "subprocess.Popen[str]":
    """Start the command and wait until it says that it shows the disks."""
    command = [*BACKUPFS, "live", "web01", "--qmp", vm.qmp_path, "--mount", str(place), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "as it is now" in line:
            return process
    process.communicate()
    raise AssertionError(said)


def state(vm: Machine) -> tuple[object, ...]:
    """Return all that QEMU could have of ours."""
    nodes = vm.qmp("query-named-block-nodes")
    return (
        sorted(node["node-name"] for node in nodes),
        [node.get("dirty-bitmaps") for node in nodes],
        vm.qmp("query-block-exports"),
        vm.qmp("query-jobs"),
        [device["inserted"]["node-name"] for device in vm.qmp("query-block") if "inserted" in device],
    )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mount point."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


@pytest.mark.parametrize("end", ["umount", "interrupt"])
def test_a_moment_of_two_disks_is_shown_and_undone(tmp_path: Path, place: Path, end: str) -> None:
    disks = [GuestDisk(tmp_path / "a.qcow2", name="vda"), GuestDisk(tmp_path / "b.raw", "raw", "vdb")]
    for disk in disks:
        run("qemu-img", "create", "-q", "-f", disk.image_format, disk.path, str(SIZE))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with machine(disks) as vm:
        for disk in disks:
            vm.write(disk, 0, MiB, 0x11)
        before = state(vm)
        process = begin_view(vm, place, "--scratch", str(scratch))
        try:
            for disk in disks:
                vm.write(disk, 64 * KiB, 128 * KiB, 0x22)
            shown = {path.name: path for path in (place / "web01" / "live").iterdir()}
            assert sorted(shown) == ["vda.raw", "vdb.raw"]
            for path in shown.values():
                assert path.stat().st_size == SIZE
                assert path.read_bytes() == b"\x11" * MiB + bytes(SIZE - MiB)
            if end == "umount":
                backupfs(tmp_path, "umount", place)
            else:
                process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert not list(place.iterdir())
            assert state(vm) == before
            assert not list(scratch.iterdir())
            for disk in disks:
                vm.write(disk, 0, 64 * KiB, 0x33)
        finally:
            process.kill()
            process.communicate()


def test_what_a_killed_view_left_goes_with_the_next(tmp_path: Path, place: Path) -> None:
    disk = GuestDisk(tmp_path / "a.qcow2", name="vda")
    run("qemu-img", "create", "-q", "-f", "qcow2", disk.path, str(SIZE))
    with machine([disk]) as vm:
        before = state(vm)
        for number in (1, 2):
            process = begin_view(vm, place, "--scratch", str(tmp_path))
            try:
                assert (place / "web01/live/vda.raw").read_bytes()[:4096] == bytes([number - 1]) * 4096
                if number == 1:
                    process.kill()
                    vm.write(disk, 0, 64 * KiB, 1)
                else:
                    process.send_signal(signal.SIGTERM)
                process.wait(30)
            finally:
                process.kill()
                process.communicate()
        assert state(vm) == before
        deadline = time.monotonic() + 10
        while list(tmp_path.glob("backupfs-*")):
            assert time.monotonic() < deadline


def test_a_scratch_that_fills_up_ends_the_view_not_the_guest(tmp_path: Path, place: Path) -> None:
    disk = GuestDisk(tmp_path / "a.raw", "raw", "vda")
    run("qemu-img", "create", "-q", "-f", "raw", disk.path, "40M")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24M", "none", scratch)
    try:
        with machine([disk]) as vm:
            for number in range(40):
                vm.write(disk, number * MiB, MiB, 0x11)
            before = state(vm)
            process = begin_view(vm, place, "--scratch", str(scratch))
            try:
                for number in range(40):
                    vm.write(disk, number * MiB, MiB, 0x22)
                assert "too little space" in process.communicate(timeout=60)[1]
            finally:
                process.kill()
                process.communicate()
            assert process.returncode == 1
            assert state(vm) == before
            assert disk.path.read_bytes() == b"\x22" * 40 * MiB
            assert not list(scratch.iterdir())
    finally:
        run("umount", "--lazy", scratch)


def test_no_such_machine(tmp_path: Path) -> None:
    words = "live", "web01", "--qmp", tmp_path / "qmp", "--mount", tmp_path
    assert "qmp" in backupfs(tmp_path, *words, code=30)
