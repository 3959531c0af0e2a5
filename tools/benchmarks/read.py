"""`tools/bench read`: reads of points deep in a chain, against QEMU's FUSE export of a chain of qcow2 overlays.

Both chains hold the same bytes: a disk of real files, and on it the same 64 changed chunks a delta or overlay.
"""

import argparse
import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository, Writer
from backupfs.repository.writer import ChainEnd
from backupfs.units import GiB, KiB, MiB
from benchmarks.disks import distinct, forget, make_real_disk, warm, writing
from benchmarks.random_reads import reads_per_second
from benchmarks.report import Report, Row
from benchmarks.workplace import Failed, Mount, Workplace, run

_CHUNK = 64 * KiB
_CHANGES = 64  # chunks a delta
_STEP = 4 * MiB  # written at a time into the base
_DEEP = 0.9  # of point 1's reads
_PLAIN = "pyfuse3"  # a mount of codec none whose reads are answered by pyfuse3
_TIMES_PLAIN = 3
# (codec, overlays) -> at least so many times QEMU's reads: 4 KiB random, 4 in flight; sequential
_TIMES_RANDOM = {("none", 1): 1.4, ("none", 30): 2.5, ("none", 100): 7.0, ("zstd", 30): 1.3}
_TIMES_SEQUENTIAL = {("none", 30): 2.0, ("zstd", 30): 1.3}
_CODECS = ("none", "zstd")
_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)

Changes = tuple[int, Iterator[tuple[int, memoryview]]]  # the disk's size, and what is written: offset and bytes
Values = dict[tuple[str, int], list[float]]  # (contender, deltas) -> a value a round


@dataclass(frozen=True, slots=True)
class Plan:
    """What is built and measured: how many deltas lie on the base at each point that is read."""

    size: int
    depths: tuple[int, ...]
    overlays: tuple[int, ...]
    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Deltas:
    """The changes, always the same ones: chunks of the disk moved elsewhere, each with a mark of its own."""

    disk: np.ndarray  # the whole disk, bytes

    def of(self, number: int) -> list[tuple[int, bytes]]:
        """Return (offset, bytes) of each change of a delta, in order."""
        rng = np.random.default_rng(number)
        chunks = len(self.disk) // _CHUNK
        places, sources = np.sort(distinct(rng, chunks, _CHANGES)), rng.integers(0, chunks, _CHANGES)
        changes = []
        for i, (place, source) in enumerate(zip(places.tolist(), sources.tolist(), strict=True)):
            mark = number.to_bytes(8, "little") + i.to_bytes(8, "little")
            start = source * _CHUNK
            changes.append((place * _CHUNK, mark + self.disk[start + len(mark) : start + _CHUNK].tobytes()))
        return changes


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build both chains, then measure."""
    quick = arguments.quick
    raw = place.path("disk.raw")
    size = make_real_disk(raw, arguments.size or (128 * MiB if quick else GiB))
    plan = Plan(
        size=size,
        depths=(1, 30, 100) if quick else (1, 30, 100, 365, 1000),
        overlays=(1, 30, 100) if quick else (1, 30, 100, 365),
        rounds=arguments.rounds,
        seconds=arguments.seconds or (0.5 if quick else 2),
    )
    deltas = Deltas(np.memmap(raw, np.uint8, "r"))
    points = {codec: build_repository(place, report, codec, deltas, plan) for codec in _CODECS}
    build_overlays(place, report, raw, deltas, max(plan.overlays))
    warm(*(p for p in place.folder.rglob("*") if p.suffix in (".layer", ".qcow2")))
    with contextlib.ExitStack() as stack:
        mounts = {codec: stack.enter_context(place.mounted(place.path(codec))) for codec in _CODECS}
        plain = stack.enter_context(place.mounted(place.path("none"), read_lane=False))
        exports = dict(_exports(place, report, plan, stack))
        disks = {(c, n): mounts[c].disk(points[c][n]) for c in _CODECS for n in plan.depths}
        disks[_PLAIN, 30] = plain.disk(points["none"][30])
        disks |= {("qemu", n): path for n, path in exports.items()}
        compare(disks)
        _wait_for_checks(report, mounts | {_PLAIN: plain})
        for in_flight in (1, 4):
            measure_random(report, plan, disks, in_flight)
        measure_sequential(report, plan, disks)
    for codec in _CODECS:
        measure_images(report, plan, place.path(codec), codec, points[codec])


def build_repository(place: Workplace, report: Report, codec: str, deltas: Deltas, plan: Plan) -> dict[int, str]:
    """Write a full point and its deltas through the library. Returns the points that are read, by their depth."""
    count = max(plan.depths)
    report.say(f"making a repository with {count} deltas, codec {codec}")
    path = place.path(codec)
    Repository.init(str(path), codec_name=codec)
    started = time.monotonic()
    with Repository.open(str(path)) as repository, repository.writer() as writer:
        data = memoryview(deltas.disk)
        whole = ((offset, data[offset : offset + _STEP]) for offset in range(0, plan.size, _STEP))
        end = _add_point(repository, writer, None, 0, (plan.size, whole))
        points = {}
        for number in range(1, count + 1):
            changes = ((offset, memoryview(chunk)) for offset, chunk in deltas.of(number))
            end = _add_point(repository, writer, end, number, (plan.size, changes))
            if number in plan.depths:
                points[number] = end.point
    report.say(f"  {(time.monotonic() - started) / (count + 1) * 1000:.0f} ms a point")
    return points


def _add_point(repository: Repository, writer: Writer, end: ChainEnd | None, number: int, changes: Changes) -> ChainEnd:
    """Write a point of one disk; return what the next one continues."""
    size, pieces = changes
    point = writer.begin("vm", _MOMENT + timedelta(hours=number))
    try:
        chain = end.entry.chain if end else writer.next_chain("vm", "vda", "main")
        target = point.add_disk("vda", size, chain, end)
        for offset, data in pieces:
            target.write(offset, data)
        entry = point.finish_disk(target, read="all", reason="a benchmark")
        manifest = writer.commit(point, parent=end.point if end else None)
    finally:
        point.abandon()
    return ChainEnd(manifest.id, entry, repository.open_image("vm", manifest.id, "vda"))


def build_overlays(place: Workplace, report: Report, raw: Path, deltas: Deltas, count: int) -> None:
    """Make the same chain of qcow2 files: 0.qcow2, and an overlay for each delta."""
    report.say(f"making a chain of {count} qcow2 overlays")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, place.path("0.qcow2"))
    for number in range(1, count + 1):
        overlay, behind = place.path(f"{number}.qcow2"), place.path(f"{number - 1}.qcow2")
        # Whole clusters are written, so nothing is read of the files behind: they are hidden, which saves opening them.
        run("qemu-img", "create", "-q", "-f", "qcow2", overlay, str(len(deltas.disk)))
        with writing(place, overlay, "qcow2") as handle:
            for offset, data in deltas.of(number):
                handle.pwrite(data, offset)
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", behind, overlay)


def _exports(place: Workplace, report: Report, plan: Plan, stack: contextlib.ExitStack) -> Iterator[tuple[int, Path]]:
    for number in plan.overlays:
        try:
            yield number, stack.enter_context(place.exported_by_qemu(place.path(f"{number}.qcow2"), plan.size))
        except Failed as e:
            report.note(f"qemu-storage-daemon with {number} overlays: {e}")


def compare(disks: dict[tuple[str, int], Path]) -> None:
    """Check that everything that is called the same disk holds the same bytes, in samples. Raises Failed."""
    rng = np.random.default_rng(0)
    by_depth: dict[int, dict[str, list[bytes]]] = {}
    offsets = (rng.integers(0, next(iter(disks.values())).stat().st_size // _CHUNK, 200) * _CHUNK).tolist()
    for (name, depth), path in disks.items():
        with path.open("rb", buffering=0) as file:
            by_depth.setdefault(depth, {})[name] = [os.pread(file.fileno(), _CHUNK, o) for o in offsets]
    for depth, contents in by_depth.items():
        first = next(iter(contents.values()))
        if any(content != first for content in contents.values()):
            raise Failed(f"with {depth} deltas {', '.join(contents)} do not hold the same bytes")


def _wait_for_checks(report: Report, mounts: dict[str, Mount]) -> None:
    for codec, mount in mounts.items():
        report.say(f"mount, codec {codec}: idle after {mount.wait_until_idle():.0f} s")


def measure_in_turn(
    report: Report, rounds: int, what: str, disks: dict[tuple[str, int], Path], measure: Callable[[Path], float]
) -> Values:
    """Measure every disk once a round, those of one depth next to each other; a first round does not count."""
    values: Values = {key: [] for key in disks}
    for number in range(rounds + 1):
        for key in sorted(disks, key=lambda k: k[1]):
            value = measure(disks[key])
            if number:
                values[key].append(value)
        report.say(f"{what}: round {number} of {rounds}" + ("" if number else ", the warming up"))
    return values


def measure_random(report: Report, plan: Plan, disks: dict[tuple[str, int], Path], in_flight: int) -> None:
    """Compare random 4 KiB reads: with point 1, and with QEMU at the same depth."""
    what = f"4 KiB random, {in_flight} in flight"
    values = measure_in_turn(
        report, plan.rounds, what, disks, lambda path: reads_per_second(path, in_flight, plan.seconds)
    )
    for codec in _CODECS:
        add_depth_rows(report, plan, f"{what}, {codec}", "reads/s", {n: values[codec, n] for n in plan.depths})
        for n in plan.overlays:
            if ("qemu", n) in values:
                limit = _TIMES_RANDOM.get((codec, n)) if in_flight == 4 else None
                add_peer_row(report, what, "reads/s", values, (codec, n), limit)
    ours, plain = values["none", 30], values[_PLAIN, 30]
    report.add(Row(f"{what}, none, 30 deltas", ours, "reads/s", "pyfuse3's reads", plain, at_least=_TIMES_PLAIN))
    rows = sorted((n, v) for (name, n), v in values.items() if name == "qemu" and n != 1)
    for n, v in rows:
        report.add(Row(f"{what}, qemu alone, {n} overlays", v, "reads/s", "its overlay 1", values["qemu", 1]))


def add_depth_rows(report: Report, plan: Plan, what: str, unit: str, by_depth: dict[int, list[float]]) -> None:
    """Compare each point with the first of them."""
    for n in plan.depths[1:]:
        report.add(Row(f"{what}, {n} deltas", by_depth[n], unit, "point 1", by_depth[1], at_least=_DEEP))


def add_peer_row(  # noqa: PLR0917
    report: Report, what: str, unit: str, values: Values, key: tuple[str, int], limit: float | None
) -> None:
    """Compare with QEMU at a depth; where we have no point of that depth, our next deeper one."""
    codec, overlays = key
    depth = min((n for name, n in values if name == codec and n >= overlays), default=None)
    if depth is not None:
        peer, theirs = f"qemu, {overlays} overlays", values["qemu", overlays]
        ours = values[codec, depth]
        report.add(Row(f"{what}, {codec}, {depth} deltas", ours, unit, peer, theirs, at_least=limit))


def measure_sequential(report: Report, plan: Plan, disks: dict[tuple[str, int], Path]) -> None:
    """Compare reads of the whole disk by dd, through the page cache (emptied before) and without it."""
    wanted = {key: path for key, path in disks.items() if key[1] in (1, 30, 365) and key[0] != _PLAIN}
    for flags in ((), ("iflag=direct",)):
        what = "sequential, direct" if flags else "sequential"

        def once(path: Path, flags: tuple[str, ...] = flags) -> float:
            forget(path)
            started = time.monotonic()
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *flags], check=True)
            return plan.size / MiB / (time.monotonic() - started)

        values = measure_in_turn(report, plan.rounds, what, wanted, once)
        for codec in _CODECS:
            for n in plan.overlays:
                if ("qemu", n) in values:
                    limit = None if flags else _TIMES_SEQUENTIAL.get((codec, n))
                    add_peer_row(report, what, "MiB/s", values, (codec, n), limit)


def measure_images(report: Report, plan: Plan, path: Path, codec: str, points: dict[int, str]) -> None:
    """Measure without FUSE: reads in one thread of this process, and how soon a point that is opened answers."""
    rng = np.random.default_rng(1)
    offsets = (rng.integers(0, plan.size // 4096, 20_000) * 4096).tolist()
    reads: dict[int, list[float]] = {n: [] for n in points}
    first: dict[int, list[float]] = {n: [] for n in points}
    cold: list[float] = []
    for number in range(plan.rounds + 1):
        for n, point in points.items():
            started = time.monotonic()
            with Repository.open(str(path)) as repository:
                repository.open_image("vm", point, "vda").readinto(0, bytearray(4096))
                cold.append((time.monotonic() - started) * 1000)
                first[n].append(_first_byte_ms(repository, point, offsets[number]))
                value = _image_reads(repository.open_image("vm", point, "vda"), offsets, plan.seconds)
                if number:
                    reads[n].append(value)
    add_depth_rows(report, plan, f"4 KiB random, no FUSE, {codec}", "reads/s", reads)
    firsts = [value for values in first.values() for value in values]
    report.add(Row(f"open_image to first byte, {codec}", firsts, "ms"))
    report.add(Row(f"  with Repository.open, {len(points)} of {max(points) + 1} points", cold, "ms"))


def _first_byte_ms(repository: Repository, point: str, offset: int) -> float:
    started = time.monotonic()
    repository.open_image("vm", point, "vda").readinto(offset, bytearray(4096))
    return (time.monotonic() - started) * 1000


def _image_reads(image: PointImage, offsets: list[int], seconds: float) -> float:
    buffer = bytearray(4096)
    for offset in offsets[:: max(1, len(offsets) // 2000)]:
        image.readinto(offset, buffer)
    started, done = time.monotonic(), 0
    while (took := time.monotonic() - started) < seconds:
        for i in range(done, done + 64):
            image.readinto(offsets[i % len(offsets)], buffer)
        done += 64
    return done / took
