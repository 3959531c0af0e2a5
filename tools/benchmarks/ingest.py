"""`tools/bench ingest`: full backups against nbdcopy and qemu-img, incremental ones by the size of the disk."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from backupfs.units import GiB, KiB, MiB, TiB, format_size
from benchmarks.disks import BITMAP, add_bitmap, make_real_disk, make_sparse, scatter
from benchmarks.report import BACKUPFS, Report, Row
from benchmarks.workplace import Failed, Spent, Workplace, run

_LIMITS = {"none": 1.5, "zstd": 2.5}  # full backup, times nbdcopy
_GROWTH = 1.5  # incremental of a disk ten times the size, with as much changed

Contenders = dict[str, Callable[[], Spent]]


def run_in_turn(report: Report, contenders: Contenders, rounds: int) -> dict[str, list[Spent]]:
    """Measure every contender once a round, in the same order."""
    spent: dict[str, list[Spent]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, measure in contenders.items():
            spent[name].append(measure())
            last = spent[name][-1]
            report.say(f"round {number + 1}: {name}: {last.seconds:.2f} s, {last.cpu_s:.2f} s of processors")
    return spent


def seconds(spent: list[Spent]) -> list[float]:
    """Return only the time on the clock."""
    return [s.seconds for s in spent]


def init(repository: Path, codec: str) -> None:
    """Make an empty repository."""
    run(BACKUPFS, "-r", repository, "init", "--codec", codec)


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Measure what was asked for."""
    if arguments.only in (None, "full"):
        measure_full(place, report, arguments)
    if arguments.only in (None, "incremental"):
        measure_incremental(place, report, arguments)
    if arguments.only in (None, "huge"):
        measure_huge(place, report, arguments)


def measure_full(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Compare full backups of real files with copies of the same export."""
    raw = place.path("files.raw")
    size = make_real_disk(raw, arguments.size or (256 * MiB if arguments.quick else 2 * GiB))
    out = place.path("out.raw")
    with place.serving(raw, "raw") as uri:
        peers = {
            "nbdcopy": ("nbdcopy", uri, out),
            "nbdcopy --flush": ("nbdcopy", "--flush", uri, out),
            "qemu-img convert -W": ("qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "raw", uri, out),
        }
        contenders: Contenders = {name: _copy(place, command, out) for name, command in peers.items()}
        for codec in _LIMITS:
            contenders[codec] = _full_backup(place, uri, codec)
        spent = run_in_turn(report, contenders, arguments.rounds)
    for codec, limit in _LIMITS.items():
        for peer in peers:
            most = limit if peer.startswith("nbdcopy") else None
            name = f"full backup, {format_size(size)} of files, codec {codec}"
            report.add(Row(name, seconds(spent[codec]), "s", peer, seconds(spent[peer]), at_most=most))
        report.add(Row(f"  processor time, codec {codec}", [s.cpu_s for s in spent[codec]], "s"))
    report.add(Row("  processor time, nbdcopy --flush", [s.cpu_s for s in spent["nbdcopy --flush"]], "s"))
    raw.unlink()


def _copy(place: Workplace, command: tuple[str | Path, ...], out: Path) -> Callable[[], Spent]:
    def once() -> Spent:
        spent = place.measure(*command)
        out.unlink()
        return spent

    return once


def _full_backup(place: Workplace, source: str | Path, codec: str) -> Callable[[], Spent]:
    def once() -> Spent:
        repository = place.path("repository")
        init(repository, codec)
        spent = place.measure(BACKUPFS, "-r", repository, "backup", "vm", f"vda={source}")
        shutil.rmtree(repository)
        return spent

    return once


def measure_incremental(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Compare incremental backups by bitmap of two disks, one ten times the size, with as much changed."""
    small, large = (GiB, 10 * GiB) if arguments.quick else (10 * GiB, 100 * GiB)
    changed = 128 * MiB if arguments.quick else GiB
    for piece in (MiB, 64 * KiB):
        contenders: Contenders = {}
        for size in (small, large):
            name = format_size(size)
            report.say(f"making a disk of {name} with {format_size(changed)} changed in pieces of {format_size(piece)}")
            disk, repository = _changed_disk(place, size, changed, piece)
            contenders[name] = _incremental(place, disk, repository, bitmap=True)
            if size == large and piece == MiB and not arguments.quick:
                contenders["all"] = _incremental(place, disk, repository, bitmap=False)
        spent = run_in_turn(report, contenders, arguments.rounds)
        ours, peer = (seconds(spent[format_size(size)]) for size in (large, small))
        what = f"{format_size(changed)} changed in {format_size(piece)} pieces of {format_size(large)}"
        report.add(Row(f"incremental, {what}", ours, "s", f"of {format_size(small)}", peer, at_most=_GROWTH))
        if "all" in spent:
            report.add(Row("  the same without a bitmap", seconds(spent["all"]), "s", "with", ours))
        for path in (place.path("disks"), place.path("repositories")):
            shutil.rmtree(path)


def _changed_disk(place: Workplace, size: int, changed: int, piece: int) -> tuple[Path, Path]:
    """Make a qcow2, a repository with its full point, and then the changes, which its bitmap records."""
    disk, repository = place.path("disks") / f"{size}.qcow2", place.path("repositories") / str(size)
    for path in (disk, repository):
        path.parent.mkdir(exist_ok=True)
    make_sparse(disk, size)
    scatter(place, disk, changed // 4, MiB, seed=1)
    init(repository, "none")  # the bytes are random: compressing them in vain would only add to both sides
    run(BACKUPFS, "-r", repository, "backup", "vm", f"vda={disk}")
    add_bitmap(disk)
    scatter(place, disk, changed, piece, seed=2)
    return disk, repository


def _incremental(place: Workplace, disk: Path, repository: Path, *, bitmap: bool) -> Callable[[], Spent]:
    """Return the measurement of a backup into a copy of the repository; it checks how the disk was read."""
    copy = place.path("copy")
    words = ["--bitmap", f"vda={BITMAP}"] if bitmap else []

    def once() -> Spent:
        run("cp", "-a", repository, copy)
        spent = place.measure(BACKUPFS, "-r", copy, "backup", "vm", f"vda={disk}", *words)
        entry = json.loads(run(BACKUPFS, "-r", copy, "show", "vm/latest", "--json"))["disks"][0]
        if entry["read"] != ("dirty" if bitmap else "all"):
            raise Failed(f"the disk was read as {entry['read']!r}: {entry['reason']}")
        shutil.rmtree(copy)
        return spent

    return once


def measure_huge(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Take a 10 TiB disk that is nearly empty from `init` to a mounted point."""
    data = 256 * MiB if arguments.quick else 2 * GiB
    disk, repository = place.path("huge.qcow2"), place.path("huge")
    make_sparse(disk, 10 * TiB)
    scatter(place, disk, data, MiB, seed=3)
    totals, spents = [], []
    for _ in range(min(arguments.rounds, 3)):
        os.sync()
        started = time.monotonic()
        init(repository, "zstd")
        spents.append(place.measure(BACKUPFS, "-r", repository, "backup", "vm", f"vda={disk}"))
        with place.mounted(repository) as mount:
            mount.disk("latest").stat()
            totals.append(time.monotonic() - started)
        shutil.rmtree(repository)
    name = f"10 TiB sparse qcow2 with {format_size(data)}"
    report.add(Row(f"{name}: init, backup, mount", totals, "s"))
    report.add(Row("  the backup of it", seconds(spents), "s"))
    report.add(Row("  peak memory of backup or its qemu-nbd", [s.peak_bytes / MiB for s in spents], "MiB"))
    disk.unlink()
