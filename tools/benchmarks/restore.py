"""`tools/bench restore`: restore against qemu-img convert, verify against reading and decompressing.

A repository and a chain of qcow2 overlays hold the same bytes: a disk of real files and 30 deltas. All is in the page
cache; each contender starts as a process of its own, and what it writes is on the disk when it ends.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from backupfs.repository import codec
from backupfs.repository.format import CODEC_SHIFT, LENGTH_MASK, Rows
from backupfs.repository.layer import Layer
from backupfs.repository.visible import spans
from backupfs.units import GiB, KiB, MiB
from benchmarks.disks import make_real_disk, warm
from benchmarks.read import Deltas, Plan, build_overlays, build_repository
from benchmarks.report import BACKUPFS, Report, Row
from benchmarks.workplace import Workplace, run

_DELTAS = 30
_CODECS = ("none", "zstd")
_AT_LEAST = 0.7  # of the peer's speed


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build both chains, then measure."""
    raw = place.path("disk.raw")
    size = make_real_disk(raw, arguments.size or (128 * MiB if arguments.quick else GiB))
    plan = Plan(size=size, depths=(_DELTAS,), overlays=(_DELTAS,), rounds=arguments.rounds, seconds=0)
    deltas = Deltas(np.memmap(raw, np.uint8, "r"))
    points = {name: build_repository(place, report, name, deltas, plan)[_DELTAS] for name in _CODECS}
    build_overlays(place, report, raw, deltas, _DELTAS)
    top = place.path(f"{_DELTAS}.qcow2")
    warm(*(p for p in place.folder.rglob("*") if p.suffix in (".layer", ".qcow2")))
    for stored in points.items():
        measure_restore(place, report, plan, top, stored)
    for name in _CODECS:
        measure_verify(place, report, plan, name)


def measure_restore(place: Workplace, report: Report, plan: Plan, top: Path, stored: tuple[str, str]) -> None:
    """Restore to a raw and to a qcow2 file, in turn with qemu-img; then over what is the same already.

    Args:
        stored: the codec, and the point.
    """
    name, point = stored
    for image_format in ("raw", "qcow2"):
        ours, theirs = [], []
        for number in range(plan.rounds + 1):
            target, copy = place.path("target"), place.path("copy")
            for path in (target, copy):
                path.unlink(missing_ok=True)
            command = (BACKUPFS, "-r", place.path(name), "restore", f"vm/{point}/vda", target, "--format", image_format)
            mine = place.measure(*command).seconds
            # -t writeback: put on the disk at the end, as ours is; the default never is.
            peer = place.measure("qemu-img", "convert", "-t", "writeback", "-O", image_format, top, copy).seconds
            if number:
                ours.append(plan.size / MiB / mine)
                theirs.append(plan.size / MiB / peer)
            else:
                run("qemu-img", "compare", "-f", image_format, "-F", "qcow2", target, top)
        row = f"restore to {image_format}, {name}, {_DELTAS} deltas"
        report.add(Row(row, ours, "MiB/s", "qemu-img convert", theirs, at_least=_AT_LEAST))
        report.say(row)
    target = place.path("target.raw")
    command = (BACKUPFS, "-r", place.path(name), "restore", f"vm/{point}/vda", target)
    run(*command, "--force")
    again = [place.measure(*command, "--differential").seconds for _ in range(plan.rounds + 1)][1:]
    report.add(Row(f"restore --differential, nothing differs, {name}", [plan.size / MiB / s for s in again], "MiB/s"))
    target.unlink()


def measure_verify(place: Workplace, report: Report, plan: Plan, name: str) -> None:
    """Verify all; in turn with a process that reads and decompresses the same payloads, and hashes nothing."""
    ours: list[float] = []
    peers: dict[int, list[float]] = {1: [], 2: []}
    peak = 0
    payload = sum(int(rows["length"].sum()) for _, rows in _jobs(place.path(name)))
    for number in range(plan.rounds + 1):
        spent = place.measure(BACKUPFS, "-r", place.path(name), "verify")
        peak = max(peak, spent.peak_bytes)
        if number:
            ours.append(payload / MiB / spent.seconds)
        for threads, values in peers.items():
            command = (sys.executable, "-m", "benchmarks.restore", place.path(name), str(threads))
            seconds = place.measure(*command).seconds
            if number:
                values.append(payload / MiB / seconds)
    for threads, values in peers.items():
        peer = f"read and decompress, {threads} threads"
        limit = _AT_LEAST if threads == 1 else None
        report.add(Row(f"verify, {name}", ours, "MiB/s stored", peer, values, at_least=limit))
    report.add(Row(f"verify, {name}, memory", [peak / MiB], "MiB", at_most=200))


def _jobs(repository: Path) -> list[tuple[Layer, Rows]]:
    """Return the pieces of all layers, as verify cuts them."""
    jobs = []
    for path in sorted(repository.rglob("*.layer")):
        layer = Layer(str(path))
        for rows in layer.rows():
            data = rows[rows["codec"] != codec.ZERO]
            data = data[np.argsort(data["offset"])]
            jobs += [(layer, data[first:end]) for first, end in spans(data, 4 * MiB, 64 * KiB)] if len(data) else []
    return jobs


def _decompress(job: tuple[Layer, Rows]) -> None:
    layer, rows = job
    begin = int(rows["offset"][0])
    data = memoryview(layer.pread(begin, int((rows["offset"] + rows["length"]).max()) - begin))
    packed = (rows["length"] | rows["codec"] << CODEC_SHIFT).tolist()
    for offset, word in zip((rows["offset"] - np.uint64(begin)).tolist(), packed, strict=True):
        if word >> CODEC_SHIFT == codec.ZSTD:
            codec.decompress(data[offset : offset + (word & LENGTH_MASK)], layer.header.chunk_size)


if __name__ == "__main__":
    with ThreadPoolExecutor(int(sys.argv[2])) as workers:
        for _ in workers.map(_decompress, _jobs(Path(sys.argv[1]))):
            pass
