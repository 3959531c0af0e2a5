"""`tools/bench scale`: an index of millions of records, and a dense disk of 1 TiB.

The repositories are real in all but one thing: the rows of a layer share a few payloads, so that they can be made
without writing terabytes. A reader can't tell.
"""

import argparse
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import blake3
import numpy as np
import xxhash

from backupfs.repository import codec
from backupfs.repository.chunkmap import POSITION
from backupfs.repository.format import DEFAULT_CHUNK, REGION_CHUNKS, ROW
from backupfs.repository.repository import Repository
from backupfs.repository.writer import ChainEnd, DiskWriter
from backupfs.services.prune import delete
from backupfs.units import GiB, MiB, TiB, format_size
from benchmarks.disks import distinct, forget
from benchmarks.fio import read_times
from benchmarks.report import BACKUPFS, Report, Row
from benchmarks.workplace import Workplace

_PAYLOADS = 8  # in an append
_BATCH = 1 << 16  # rows in an append
_OPENS = 50
_READS = 20_000
_REGIONS = 500  # looked up
_FIRST_BYTE_MS = 100
_MOUNT_MIB = 200
_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a repository looks like: a disk with a dense base, and deltas of random chunks, all of one size."""

    name: str
    disk: int  # bytes
    deltas: int
    records: int  # of all deltas

    @property
    def chunks(self) -> int:
        """Chunks of the disk."""
        return self.disk // DEFAULT_CHUNK


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build the repositories one after the other, and measure each."""
    if arguments.quick:
        shapes = {"records": Shape("records", GiB, 60, 100_000), "disk": Shape("disk", 16 * GiB, 20, 20_000)}
    else:
        shapes = {"records": Shape("records", 100 * GiB, 365, 7_000_000), "disk": Shape("disk", TiB, 100, 1_000_000)}
    for name, shape in shapes.items():
        if arguments.only in (None, name):
            title = f"{shape.records:,} records in {shape.deltas} deltas of {format_size(shape.disk)}"
            measure_shape(place, report, shape, title, arguments)


def measure_shape(place: Workplace, report: Report, shape: Shape, title: str, arguments: argparse.Namespace) -> None:
    """Build one repository and measure its index, its look-ups and its mount."""
    repository = place.path(shape.name)
    commits = Builder(shape).build(repository, report)
    report.add(Row(f"{title}: commit of a point", [s * 1000 for s in commits], "ms"))
    measure_index(place, report, repository, shape, arguments.rounds)
    measure_look_ups(report, repository, arguments.rounds)
    measure_first_bytes(place, report, repository)
    measure_memory(place, report, repository, 2_000 if arguments.quick else _READS)
    measure_gc(place, report, repository)
    shutil.rmtree(repository)


class Builder:
    """Writes a repository of a shape through the library's own writers, but with rows made many at a time."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._rng = np.random.default_rng(shape.deltas)
        self._held = np.zeros((shape.chunks, 2), np.uint64)  # the identity that each chunk has now

    def build(self, path: Path, report: Report) -> list[float]:
        """Make the repository; return how long the commit of each delta took, seconds."""
        shape = self._shape
        Repository.init(str(path), codec_name="none")
        with Repository.open(str(path)) as repository:
            started = time.monotonic()
            end = self._add_point(repository, None, np.arange(shape.chunks, dtype=np.uint64))[0]
            report.say(f"a base of {shape.chunks:,} rows: {time.monotonic() - started:.1f} s")
            commits = []
            started = time.monotonic()
            for number in range(shape.deltas):
                count = shape.records * (number + 1) // shape.deltas - shape.records * number // shape.deltas
                chunks = np.sort(distinct(self._rng, shape.chunks, count)).astype(np.uint64)
                end, seconds = self._add_point(repository, end, chunks)
                commits.append(seconds)
            report.say(f"{shape.deltas} deltas: {time.monotonic() - started:.1f} s")
        return commits

    def _add_point(self, repository: Repository, end: ChainEnd | None, chunks: np.ndarray) -> tuple[ChainEnd, float]:
        """Add a point in which these chunks are new; return where the chain ends now, and the seconds of its commit."""
        with repository.writer() as writer:
            number = end.entry.seq + 1 if end else 0
            point = writer.begin("vm", _MOMENT + timedelta(hours=number))
            chain = end.entry.chain if end else writer.next_chain("vm", "vda", "main")
            target = point.add_disk("vda", self._shape.disk, chain, end)
            for first in range(0, len(chunks), _BATCH):
                self._append(target, chunks[first : first + _BATCH], new=end is None)
            entry = point.finish_disk(target, read="all", reason="a benchmark")
            started = time.monotonic()
            manifest = writer.commit(point, parent=end.point if end else None)
            seconds = time.monotonic() - started
        return ChainEnd(manifest.id, entry, repository.open_image("vm", manifest.id, "vda")), seconds

    def _append(self, target: DiskWriter, chunks: np.ndarray, *, new: bool) -> None:
        """Give rows to the layer, in turn with one of a few payloads."""
        payloads = [self._rng.bytes(DEFAULT_CHUNK) for _ in range(_PAYLOADS)]
        xxh3 = np.array([xxhash.xxh3_64_intdigest(p) for p in payloads], np.uint64)
        identities = np.array([np.frombuffer(blake3.blake3(p).digest(length=16), "<u8") for p in payloads])
        numbers = chunks.astype(np.intp)
        which = np.arange(len(chunks)) % _PAYLOADS
        rows = np.zeros(len(chunks), ROW)
        rows["chunk_no"], rows["offset"], rows["xxh3"] = chunks, which * DEFAULT_CHUNK, xxh3[which]
        rows["id0"], rows["id1"] = identities[which].T
        rows["length"], rows["codec"] = DEFAULT_CHUNK, codec.NONE
        olds = np.zeros(len(chunks), POSITION)
        olds["id0"], olds["id1"] = self._held[numbers].T
        olds["packed"] = 0 if new else 1
        # Private: DiskWriter.write would do this for us, but only chunk by chunk and from the bytes themselves.
        target._account(chunks, olds, rows)
        self._held[numbers] = identities[which]
        target.layer.append(rows, payloads)


def measure_index(place: Workplace, report: Report, repository: Path, shape: Shape, rounds: int) -> None:
    """Measure the building of the index from the layers, by `backupfs reindex`, and its size."""
    spent = [place.measure(BACKUPFS, "-r", repository, "reindex") for _ in range(min(rounds, 3))]
    report.add(Row("  reindex", [s.seconds for s in spent], "s"))
    report.add(Row("  reindex", [shape.records / s.seconds for s in spent], "records/s"))
    report.add(Row("  reindex, peak memory", [s.peak_bytes / MiB for s in spent], "MiB"))
    size = (repository / "index" / "data.mdb").stat().st_size
    report.add(Row("  data.mdb, a record", [size / shape.records], "bytes"))
    report.note(f"data.mdb: {format_size(size)} for {shape.records:,} records")


def measure_look_ups(report: Report, path: Path, rounds: int) -> None:
    """Measure without FUSE: a region's look-up from the disk, from the page cache and from our own; check_map."""
    with Repository.open(str(path)) as repository:
        ids = repository.points("vm")
    for name, point in (("point 1", ids[1]), (f"point {len(ids) - 1}", ids[-1])):
        forget(path / "index" / "data.mdb")
        for layer in path.rglob("*.layer"):
            forget(layer)
        with Repository.open(str(path)) as repository:
            image = repository.open_image("vm", point, "vda")
            regions = random.sample(range(image.size // DEFAULT_CHUNK // REGION_CHUNKS), 64)
            report.add(Row(f"  region at {name}, from the disk", _timed_ms(image.map.positions, regions), "ms"))
            regions = random.choices(range(image.size // DEFAULT_CHUNK // REGION_CHUNKS), k=_REGIONS)  # noqa: S311
            _timed_ms(image.map.positions, regions)
            report.add(Row(f"  region at {name}, cold", _timed_ms(image.map.positions, regions), "ms"))
            _timed_ms(image.map.region, regions)
            warm_us = [1000 * ms for ms in _timed_ms(image.map.region, regions)]
            report.add(Row(f"  region at {name}, warm", warm_us, "us"))
            started = time.monotonic()
            image.check_map()
            report.add(Row(f"  check_map at {name}", [time.monotonic() - started], "s"))
            report.say(f"{name}: check_map took {time.monotonic() - started:.1f} s")


def _timed_ms(look_up: Callable[[int], object], regions: list[int]) -> list[float]:
    times = []
    for region in regions:
        started = time.perf_counter()
        look_up(region)
        times.append((time.perf_counter() - started) * 1000)
    return times


def measure_first_bytes(place: Workplace, report: Report, path: Path) -> None:
    """Measure through a fresh mount: open(2) of a point's disk to the first byte.

    Once with each point opened right after the other, while the mount checks the maps of those before, and once with
    the mount idle at every open.
    """
    with Repository.open(str(path)) as repository:
        ids = repository.points("vm")
    chosen = random.sample(ids, min(_OPENS, len(ids)))
    with place.mounted(path) as mount:
        times = [_first_byte_ms(mount.disk(point)) for point in chosen]
        report.add(Row("  open(2) to first byte, one after the other", times, "ms", at_most=_FIRST_BYTE_MS))
        report.say(f"{len(chosen)} points opened; processor time of the mount so far: {mount.cpu_s():.1f} s")
    times = []
    for point in random.sample(ids, 5):
        with place.mounted(path) as mount:
            times.append(_first_byte_ms(mount.disk(point)))
    report.add(Row("  open(2) to first byte, the mount's very first", times, "ms", at_most=_FIRST_BYTE_MS))


def _first_byte_ms(path: Path) -> float:
    started = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 4096, random.randrange(os.fstat(fd).st_size // 4096) * 4096)  # noqa: S311
        return (time.monotonic() - started) * 1000
    finally:
        os.close(fd)


def measure_memory(place: Workplace, report: Report, path: Path, reads: int) -> None:
    """Measure the memory of the mount's process after reads all over the disk, and after the checks of both points."""
    with Repository.open(str(path)) as repository:
        ids = repository.points("vm")
    with place.mounted(path) as mount:
        fresh = mount.memory()
        for point in (ids[-1], ids[0]):
            seconds = read_times(mount.disk(point), reads)
            report.add(Row(f"  {reads:,} random reads of point {ids.index(point)}", [reads / seconds], "reads/s"))
        report.say(f"idle after {mount.wait_until_idle():.0f} s")
        after = mount.memory()
    report.add(Row("  mount, VmRSS after reads and check_map", [after["VmRSS"] / MiB], "MiB", at_most=_MOUNT_MIB))
    for name in ("RssAnon", "RssFile", "VmHWM"):
        report.add(Row(f"    {name}", [after[name] / MiB], "MiB"))
    report.add(Row("    VmRSS when it was fresh", [fresh["VmRSS"] / MiB], "MiB"))


def measure_gc(place: Workplace, report: Report, path: Path) -> None:
    """Measure gc after every second point was deleted, the first and the last among them.

    It finds hardly anything to punch, since rows share payloads here; but it looks at all of them.
    """
    with Repository.open(str(path)) as repository:
        delete(repository, [("vm", point) for point in [*repository.points("vm")[::2], repository.points("vm")[-1]]])
    for what in ("gc --dry-run", "gc"):
        spent = place.measure(BACKUPFS, "-r", path, *what.split())
        report.add(Row(f"  {what}", [spent.seconds], "s"))
        report.add(Row(f"  {what}, peak memory", [spent.peak_bytes / MiB], "MiB", at_most=_MOUNT_MIB))
