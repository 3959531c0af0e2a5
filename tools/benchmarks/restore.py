"""`tools/bench restore`: restore against qemu-img convert, verify against reading and decompressing.

A repository and a chain of qcow2 overlays hold the same bytes: a disk of real files and 30 deltas. All is in the page
cache, or, where a row says cold, nothing; each contender starts as a process of its own, and what it writes is on the
disk when it ends. Verifying and its peers are timed without the start of the process.
"""

import argparse
import json
import sys
from pathlib import Path

from backupfs.units import GiB, MiB
from benchmarks import payloads
from benchmarks.chains import CODECS, MovedChunks, build_overlays, build_repository
from benchmarks.disks import forget, make_real_disk, warm
from benchmarks.report import BACKUPFS, Report, Row
from benchmarks.workplace import Workplace, run

_DELTAS = 30
_CHANGES = 64  # chunks a delta
_AT_LEAST = 0.7  # of the peer's speed
_LIMIT = "read and decompress, 1 thread"
# What only reads, and its arguments: threads, and whether BLAKE3 is worked out too.
_PEERS = {
    _LIMIT: ("1",),
    "read and decompress, 2 threads": ("2",),
    "the same and BLAKE3, 2 threads": ("2", "blake3"),
}


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build both chains, then measure."""
    raw = place.path("disk.raw")
    make_real_disk(raw, arguments.size or (128 * MiB if arguments.quick else GiB))
    disk = MovedChunks(raw, _CHANGES)
    report.say(f"making two repositories and a qcow2 chain with {_DELTAS} deltas")
    points = {name: build_repository(place.path(name), disk, _DELTAS, name)[-1] for name in CODECS}
    build_overlays(place.path("qcow2"), disk, _DELTAS)
    top = place.path("qcow2") / f"{_DELTAS}.qcow2"
    warm(*(p for p in place.folder.rglob("*") if p.suffix in (".layer", ".qcow2")))
    for stored in points.items():
        measure_restore(place, report, arguments.rounds, top, stored)
    for name in CODECS:
        measure_verify(place, report, arguments.rounds, name)


def measure_restore(place: Workplace, report: Report, rounds: int, top: Path, stored: tuple[str, str]) -> None:
    """Restore to a raw and to a qcow2 file, in turn with qemu-img; then over what is the same already.

    Args:
        stored: the codec, and the point.
    """
    name, point = stored
    size = place.path("disk.raw").stat().st_size
    for image_format in ("raw", "qcow2"):
        ours, theirs = [], []
        for number in range(rounds + 1):
            target, copy = place.path("target"), place.path("copy")
            for path in (target, copy):
                path.unlink(missing_ok=True)
            restore = (BACKUPFS, "-r", place.path(name), "restore", f"vm/{point}/vda", target, "--format", image_format)
            mine = place.measure(*restore).seconds
            # -t writeback: put on the disk at the end, as ours is; the default never is.
            peer = place.measure("qemu-img", "convert", "-t", "writeback", "-O", image_format, top, copy).seconds
            if number:
                ours.append(size / MiB / mine)
                theirs.append(size / MiB / peer)
            else:
                run("qemu-img", "compare", "-f", image_format, "-F", "qcow2", target, top)
        row = f"restore to {image_format}, {name}, {_DELTAS} deltas"
        report.add(Row(row, ours, "MiB/s", "qemu-img convert", theirs, at_least=_AT_LEAST))
        report.say(row)
    target = place.path("target.raw")
    command = (BACKUPFS, "-r", place.path(name), "restore", f"vm/{point}/vda", target)
    run(*command, "--force")
    again = [place.measure(*command, "--differential").seconds for _ in range(rounds + 1)][1:]
    report.add(Row(f"restore --differential, nothing differs, {name}", [size / MiB / s for s in again], "MiB/s"))
    target.unlink()


def measure_verify(place: Workplace, report: Report, rounds: int, name: str) -> None:
    """Verify all; in turn with processes that read and decompress the same payloads, one of which hashes them too."""
    repository = place.path(name)
    layers = list(repository.rglob("*.layer"))
    payload = sum(int(rows["length"].sum()) for _, rows in payloads.jobs(repository))
    for cold in (False, True):
        speeds: dict[str, list[float]] = {what: [] for what in ("verify", *_PEERS)}
        peak = 0
        for number in range(rounds + 1):
            for what, values in speeds.items():
                for layer in layers if cold else ():
                    forget(layer)
                if what == "verify":
                    spent = place.measure(BACKUPFS, "-r", repository, "verify", "--json")
                    seconds, peak = json.loads(spent.said)["seconds"], max(peak, spent.peak_bytes)
                else:
                    spent = place.measure(sys.executable, payloads.__file__, repository, *_PEERS[what])
                    seconds = float(spent.said)
                if number:
                    values.append(payload / MiB / seconds)
        row = f"verify, {name}" + (", cold" if cold else "")
        for peer in _PEERS:
            limit = _AT_LEAST if peer == _LIMIT else None
            report.add(Row(row, speeds["verify"], "MiB/s stored", peer, speeds[peer], at_least=limit))
        report.add(Row(f"{row}, memory", [peak / MiB], "MiB", at_most=200))
        report.say(row)
