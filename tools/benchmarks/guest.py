"""`tools/bench guest`: a Linux guest that writes and flushes: alone, during backups, during copies by qemu-img."""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from backupfs.sources.machine import Recorders, Track
from backupfs.sources.qmp import open_qmp
from backupfs.units import GiB, MiB
from benchmarks.disks import make_real_disk
from benchmarks.report import BACKUPFS, TOP, Report, Row
from benchmarks.workplace import Failed, Workplace, run

sys.path.insert(0, str(TOP / "tests"))  # the guest is the tests' own
from guest import Guest, GuestDisk, guest

_WRITING_S = 3.0  # each of the two ways to write
_ALONE = "no backup"


@dataclass(frozen=True, slots=True)
class Felt:
    """What the guest measured: us for a 4 KiB write with its flush, and MB/s in order."""

    median_us: float
    p99_us: float
    worst_us: float
    mb_per_s: float


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Measure the guest in turn: alone, during a full backup, during a copy of the same export by qemu-img."""
    raw, disk = place.path("files.raw"), place.path("vda.qcow2")
    size = make_real_disk(raw, arguments.size or (512 * MiB if arguments.quick else 2 * GiB))
    run("qemu-img", "convert", "-O", "qcow2", raw, disk)
    writer, program = place.path("writer"), place.path("writer.raw")
    run("gcc", "-O2", "-static", "-o", writer, TOP / "tools/benchmarks/guest_writer.c")
    program.write_bytes(writer.read_bytes().ljust(4 * MiB, b"\0"))
    repository = place.path("repository")
    run(BACKUPFS, "-r", repository, "init")
    disks = [GuestDisk(disk), GuestDisk(program, "raw", "vdb")]
    with guest(disks) as vm:
        vm.run("dd if=/dev/vdb of=/bin/writer bs=1M 2>/dev/null && chmod +x /bin/writer")
        ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
            _ALONE: contextlib.nullcontext,
            "backupfs": lambda: _backup(vm, repository),
            "qemu-img convert": lambda: _convert(vm, place),
        }
        felt: dict[str, list[Felt]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for way, during in ways.items():
                with during():
                    felt[way].append(_write(vm, size))
                report.say(f"round {number + 1}: {way}: {felt[way][-1]}")
    for peer in (_ALONE, "qemu-img convert"):
        for what, unit in (("median_us", "us"), ("p99_us", "us"), ("mb_per_s", "MB/s")):
            ours, theirs = ([float(getattr(f, what)) for f in felt[way]] for way in ("backupfs", peer))
            name = {"median_us": "write + flush, median", "p99_us": "write + flush, p99", "mb_per_s": "in order"}[what]
            report.add(Row(f"guest during a full backup: {name}", ours, unit, peer, theirs))
    worst = max(f.worst_us for f in felt["backupfs"]) / 1000
    report.note(f"the worst single write with its flush during a backup took {worst:.0f} ms")


def _write(vm: Guest, size: int) -> Felt:
    _, median, p99, worst, speed = vm.run(f"/bin/writer /dev/vda {size} {_WRITING_S}").split()
    return Felt(float(median), float(p99), float(worst), float(speed) / 1e6)


@contextlib.contextmanager
def _backup(vm: Guest, repository: Path) -> Iterator[None]:
    """Full backups, one after another, while the block runs."""
    loop = 'while :; do "$@" || exit 1; done'
    words = [BACKUPFS, "-r", repository, "backup", "vm", "--qmp", vm.qmp_path, "--disk", "vda", "--full"]
    with _running("sh", "-c", loop, "sh", *map(str, words)):
        yield


@contextlib.contextmanager
def _convert(vm: Guest, place: Workplace) -> Iterator[None]:
    """Copies of a fleecing export by qemu-img, one after another, while the block runs."""
    with contextlib.closing(open_qmp(vm.qmp_path, ["vda"], scratch=str(place.folder))) as machine:
        names = Recorders("0" * 32, "bench", "20000101T000000Z")
        with contextlib.closing(machine.begin(names, {"vda": Track(None, "")})) as moment:
            uri = moment.sources["vda"].uri
            loop = 'while :; do "$@" || exit 1; done'
            copy = ["qemu-img", "convert", "-W", "-O", "raw", uri, str(place.path("copy.raw"))]
            with _running("sh", "-c", loop, "sh", *copy):
                yield


@contextlib.contextmanager
def _running(*words: str) -> Iterator[None]:
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0) as child:
        try:
            yield
            if child.poll() is not None and child.stderr is not None:
                raise Failed(f"{words[4]} ended: {child.stderr.read().decode(errors='replace')}")
        finally:
            subprocess.run(["pkill", "-INT", "-g", str(child.pid)], check=False)
