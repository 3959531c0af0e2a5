"""What `tools/bench read` does with a disk, and what it counts."""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from backupfs.units import GiB, MiB
from benchmarks.chains import data_extents
from benchmarks.contenders import Contender
from benchmarks.disks import forget
from benchmarks.fio import read_in_order, read_randomly
from benchmarks.read_data import DISK, FILES, SPARSE
from benchmarks.workplace import Workplace, run, unmount

_ALL = (0, 1, 30, 100, 365, 1000)
_SOME = (0, 30, 365)
_SLOWEST_S = 10  # a disk that is read in order is read as far as it goes in so many times --seconds


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        value: in the workload's unit.
        work: what was done, in what the processor time is counted by.
        said: has to be the same from all who show the same disk.
    """

    value: float
    work: float
    said: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Something that is done with a disk.

    Attributes:
        name: for --only.
        chain: which disk.
        depths: after how many deltas. backupfs' lane and QEMU are measured at all of them, the others at one.
        everywhere: of a group of workloads that are measured with the same disks open.
        fresh: with new processes, and nothing in the page cache, each time.
        without: who is not measured.
        prepare: done with each disk before the rounds.
    """

    name: str
    title: str
    unit: str
    cpu_unit: str
    chain: str
    measure: Callable[[Workplace, Contender, float], Sample]
    depths: Sequence[int] = ()
    everywhere: bool = False
    fresh: bool = False
    without: Sequence[str] = ()
    prepare: Callable[[Contender], object] | None = None


def _random(in_flight: int, direct: bool, _: Workplace, contender: Contender, seconds: float) -> Sample:
    done = read_randomly(contender.path, in_flight, seconds, direct=direct)
    return Sample(done.reads / done.seconds, done.reads / 100_000)


def _in_order(direct: bool, _: Workplace, contender: Contender, seconds: float) -> Sample:
    limit_s = seconds * _SLOWEST_S
    # Not the host's file's own pages: they are what lies behind all others, and stay in the page cache there, too.
    done = read_in_order(contender.path, limit_s, direct=direct, keep=not contender.has_own_pages)
    return Sample(done.bytes / MiB / done.seconds, done.bytes / GiB)


def _sha256(_: Workplace, contender: Contender, __: float) -> Sample:
    if contender.has_own_pages:
        forget(contender.path)
    size = contender.path.stat().st_size
    started = time.monotonic()
    said = run("sha256sum", "--", contender.path).split()[0]
    return Sample(size / MiB / (time.monotonic() - started), size / GiB, said)


def _files(place: Workplace, contender: Contender, _: float) -> Sample:
    """Mount the file system, find its files, copy them; nothing is written to a disk."""
    mounted, copied = place.new_path("ext4"), place.new_path("tmpfs")
    mounted.mkdir()
    copied.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=90%", "bench", copied)
    try:
        started = time.monotonic()
        run("mount", "-o", "loop,ro", contender.path, mounted)
        found = run("find", mounted, "-type", "f", "-printf", "%s %P\n")
        run("rsync", "--archive", f"{mounted}/", f"{copied}/")
        seconds = time.monotonic() - started
        said = f"{len(found.splitlines())} files, {_digest(copied)}"
        return Sample(seconds, contender.path.stat().st_size / GiB, said)
    finally:
        unmount(copied)
        # Not lazily: the loop device has to be gone before the disk behind it is.
        subprocess.run(["umount", str(mounted)], capture_output=True, check=False)
        unmount(mounted)


def _digest(folder: Path) -> str:
    """Return a hash of the contents of all files in a folder."""
    hashed = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def walk(path: Path) -> list[tuple[int, int]]:
    """Return where data lies by SEEK_DATA and SEEK_HOLE, neighbours taken together."""
    found: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for start, end in data_extents(fd):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    finally:
        os.close(fd)
    return found


def _walk(_: Workplace, contender: Contender, __: float) -> Sample:
    started = time.monotonic()
    pieces = len(walk(contender.path))
    return Sample((time.monotonic() - started) * 1000, pieces / 100_000, str(pieces))


def _fill_cache(contender: Contender) -> None:
    read_in_order(contender.path, 60, direct=False, keep=True)


_READS = ("reads/s", "s/100,000 reads")
_STREAM = ("MiB/s", "s/GiB")

# Those that come after each other and differ in nothing but what is done share their disks and their warming up.
WORKLOADS = (
    *(
        Workload(
            f"random-direct-{n}",
            f"4 KiB random, O_DIRECT, {n} in flight",
            *_READS,
            DISK,
            partial(_random, n, True),
            _ALL if n == 4 else _SOME,
            everywhere=True,
        )
        for n in (1, 4, 16)
    ),
    Workload("sequential", "1 MiB sequential", *_STREAM, DISK, partial(_in_order, False), _SOME),
    Workload("sequential-direct", "1 MiB sequential, O_DIRECT", *_STREAM, DISK, partial(_in_order, True), _SOME),
    Workload("sha256sum", "sha256sum", *_STREAM, DISK, _sha256),
    *(
        Workload(
            f"random-cached-{n}",
            f"4 KiB random, page cache, {n} in flight",
            *_READS,
            DISK,
            partial(_random, n, False),
            prepare=_fill_cache,
        )
        for n in (1, 4, 16)
    ),
    *(
        Workload(
            f"random-cold-{n}",
            f"4 KiB random, cold, O_DIRECT, {n} in flight",
            *_READS,
            DISK,
            partial(_random, n, True),
            fresh=True,
        )
        for n in (1, 4, 16)
    ),
    Workload("files", "loop mount, find, rsync, cold", "s", "s/GiB of disk", FILES, _files, fresh=True),
    Workload("walk", "SEEK_DATA walk of 1 TiB", "ms", "s/100,000 pieces", SPARSE, _walk),
)
