"""`tools/bench space`: what gc keeps, against the stored bytes that the remaining points see; and what it wrote for it.

A disk of real files changes each day by 2 to 5 percent of its chunks, in runs or single ones, and all points but some
go. Compressed chunks share blocks of the file system, of which none can go as long as one is seen: the hard case.
"""

import argparse
from pathlib import Path

import numpy as np

from backupfs.repository.repository import Repository
from backupfs.services.gc import GcReport, gc
from backupfs.units import MiB
from benchmarks.chains import CHUNK, CODECS, Changes, build_repository
from benchmarks.disks import make_real_disk
from benchmarks.report import Report, Row
from benchmarks.workplace import Workplace, run

_SIZE = 256 * MiB
_LIMIT = 1.05
# Days, chunks that lie side by side in what changes, and which points stay, as a slice of their list.
_CASES = (
    (14, 8, "the first and the last 3 kept", lambda points: [points[0], *points[-3:]]),
    (14, 1, "the first and the last 3 kept", lambda points: [points[0], *points[-3:]]),
    (60, 4, "only the last kept", lambda points: points[-1:]),
    (60, 1, "only the last kept", lambda points: points[-1:]),
    (200, 1, "only the last kept", lambda points: points[-1:]),
)


class _Days:
    """A disk (chains.py) that changes by 2 to 5 percent a day, in runs of so many chunks."""

    def __init__(self, raw: Path, together: int) -> None:
        self.raw = raw
        self.size = raw.stat().st_size
        self._together = together
        self._bytes = np.memmap(raw, np.uint8, "r")

    def changes(self, number: int) -> Changes:
        rng, count = np.random.default_rng(number), self.size // CHUNK
        runs = int(rng.uniform(0.02, 0.05) * count / self._together)
        begins = rng.integers(0, count - self._together, runs)
        places = sorted({int(begin) + i for begin in begins for i in range(self._together)})
        return [(place * CHUNK, self._content(number, place, int(rng.integers(0, count)))) for place in places]

    def _content(self, number: int, place: int, source: int) -> bytes:
        mark = number.to_bytes(8, "little") + place.to_bytes(8, "little")
        return mark + self._bytes[source * CHUNK + len(mark) : (source + 1) * CHUNK].tobytes()


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build each chain with either codec, delete points, collect, and look at what the layers take."""
    raw = place.path("disk.raw")
    make_real_disk(raw, _SIZE // 8 if arguments.quick else _SIZE)
    for days, together, what, remain in _CASES[: 2 if arguments.quick else None]:
        for codec in CODECS:
            path = place.new_path("repository")
            points = build_repository(path, _Days(raw, together), days, codec)
            collected = _collect(path, set(points) - set(remain(points)))
            kept = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.suffix in (".layer", ".raw"))
            row = f"{days} days, {what}, runs of {together}, {codec}"
            report.add(Row(f"{row}: kept over seen", [kept / collected.visible], "times", at_most=_LIMIT))
            report.add(Row(f"{row}: written again", [collected.written / MiB], "MiB"))
            report.say(row)
            run("rm", "-r", path)


def _collect(path: Path, gone: set[str]) -> GcReport:
    with Repository.open(str(path)) as repository:
        repository.remove_points([("vm", point) for point in sorted(gone)])
        return gc(repository)
