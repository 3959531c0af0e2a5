"""`tools/bench read`: reads of points with so many deltas, against the peers that show as many qcow2 overlays.

Everybody shows the same bytes, and has processes of its own for each disk. Warm: the files behind are in the page
cache, and everybody has read the disk once, and where it is read at random, at random for some seconds, too. Cold: new
processes that have opened the disk, and nothing is in the page cache. Each round measures everybody once, in turn.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from benchmarks import chart
from benchmarks.chains import CHUNK
from benchmarks.contenders import (
    LEGEND,
    NATIVE,
    NBDFUSE,
    NONE,
    OURS,
    PASSTHROUGH,
    PEERS,
    PYFUSE3,
    QEMU,
    QEMU_THREADS,
    ZSTD,
    Chain,
    Contender,
    drop_caches,
    hydrate,
    opened,
)
from benchmarks.disks import warm
from benchmarks.fio import read_in_order, read_randomly
from benchmarks.grid import Cell, Line, tabulate
from benchmarks.read_data import DISK, SPARSE, Data, find_sizes
from benchmarks.report import Report, Row
from benchmarks.workloads import WORKLOADS, Workload, walk
from benchmarks.workplace import Failed, Workplace

_DEPTHS = (0, 1, 30, 100, 365, 1000)
_QUICK_DEPTHS = (0, 1, 30, 100)
_DEEP = 30  # deltas, where only one depth is measured
_WARM_S = 8.0  # a disk is read once before, or as far as it goes in this time; and so long at random
_IDLE_SHARE = 0.1  # of a processor: less is idle


@dataclass(frozen=True, slots=True)
class Limit:
    """What a median of ratios has to be: of one contender at one depth to another."""

    workload: str
    ours: tuple[str, int]
    peer: tuple[str, int]
    at_least: float | None = None
    at_most: float | None = None


_LIMITS = (
    Limit("random-direct-4", (NONE, 0), (QEMU, 0), at_least=1.4),
    Limit("random-direct-4", (NONE, 0), (QEMU_THREADS, 0), at_least=1.4),
    Limit("random-direct-4", (NONE, 30), (QEMU, 30), at_least=2.5),
    Limit("random-direct-4", (NONE, 100), (QEMU, 100), at_least=7),
    Limit("random-direct-4", (NONE, 1000), (NONE, 0), at_least=0.9),
    Limit("random-direct-4", (NONE, 30), (PYFUSE3, 30), at_least=3),
    Limit("random-direct-4", (ZSTD, 30), (QEMU, 30), at_least=1.3),
    Limit("sequential", (NONE, 30), (QEMU, 30), at_least=2),
    Limit("sequential", (ZSTD, 30), (QEMU, 30), at_least=1.3),
    Limit("files", (NONE, 30), (NATIVE, 30), at_most=1.5),
    Limit("files", (ZSTD, 30), (NATIVE, 30), at_most=1.5),
    *(
        Limit(name, (PASSTHROUGH, 30), (NATIVE, 30), at_least=0.9)
        for name in ("random-direct-4", "random-cached-4", "sequential-direct", "sequential")
    ),
)


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Build what is read, unless it is there; measure; show the table, and draw the chart."""
    depths = tuple(sorted(set(arguments.deltas or (_QUICK_DEPTHS if arguments.quick else _DEPTHS))))
    benchmark = _Benchmark(place, report, arguments, depths)
    wanted = [w for w in WORKLOADS if not arguments.only or w.name in arguments.only]
    try:
        for (chain, fresh, _), workloads in groupby(wanted, lambda w: (w.chain, w.fresh, w.everywhere)):
            benchmark.measure(chain, fresh, list(workloads))
    finally:
        benchmark.finish(arguments.chart)


class _Benchmark:
    def __init__(
        self, place: Workplace, report: Report, arguments: argparse.Namespace, depths: tuple[int, ...]
    ) -> None:
        self._place, self._report = place, report
        self._rounds, self._depths, self._quick = arguments.rounds, depths, arguments.quick
        self._seconds = arguments.seconds or (0.3 if arguments.quick else 1)
        self._deep = min(_DEEP, max(depths))
        sizes = find_sizes(arguments, depths, self._deep)
        self._data = Data(place, report, Path(arguments.data or place.path("data")).resolve(), sizes)
        self._hydrated: set[Path] = set()
        self._lines: list[Line] = []
        for who in (*OURS, *PEERS):
            report.say(f"{who + ':':12} {LEGEND[who]}")

    def measure(self, chain_name: str, fresh: bool, workloads: Sequence[Workload]) -> None:
        """Measure workloads with the same disks open; or each time with new processes."""
        line_up = sorted({key for w in workloads for key in self._line_up(w)}, key=lambda key: key[1])
        if not line_up:
            return
        chain = self._data.chain(chain_name)
        if any(who == PASSTHROUGH for who, _ in line_up) and chain.folder not in self._hydrated:
            hydrate(chain, self._deep)
            self._hydrated.add(chain.folder)
        if fresh:
            for workload in workloads:
                self._measure_rounds(workload, chain, self._line_up(workload), {})
            return
        with contextlib.ExitStack() as stack:
            contenders = {}
            for who, depth in line_up:
                started = time.monotonic()
                try:
                    contenders[who, depth] = stack.enter_context(opened(self._place, chain, who, depth))
                except Failed as e:
                    self._report.note(f"left out: {who} with {depth} deltas: {e}")
                    continue
                if (took := time.monotonic() - started) > 3:
                    self._report.note(f"{who} with {depth} deltas took {took:.0f} s to start")
            if chain_name == DISK:
                self._warm(chain, list(contenders.values()), randomly=workloads[0].everywhere and not self._quick)
            if chain_name == SPARSE:
                contenders = self._same_walks(contenders)
            for workload in workloads:
                keys = [key for key in self._line_up(workload) if key in contenders]
                self._measure_rounds(workload, chain, keys, contenders)

    def _line_up(self, workload: Workload) -> list[tuple[str, int]]:
        """Return who is measured at which depth, those of one depth next to each other."""
        ours_and_qemu = [(w, d) for d in self._depths if d in workload.depths for w in (NONE, ZSTD, QEMU)]
        few = [(who, d) for d in self._depths if d in workload.depths and d <= 100 for who in (QEMU_THREADS, NBDFUSE)]
        deep = [(w, self._deep) for w in (*OURS, *PEERS) if self._deep in self._depths and w not in workload.without]
        return sorted({*ours_and_qemu, *few, *deep}, key=lambda key: (key[1], (*OURS, *PEERS).index(key[0])))

    def _warm(self, chain: Chain, contenders: Sequence[Contender], *, randomly: bool) -> None:
        started = time.monotonic()
        warm(*(p for p in chain.folder.rglob("*") if p.is_file() and p.parent != chain.folder))
        _compare(contenders)
        for contender in contenders:
            read_in_order(contender.path, _WARM_S, direct=False, keep=False)
            if randomly:
                read_randomly(contender.path, 4, _WARM_S, direct=True)
        _wait_until_idle(contenders, 1)
        self._report.say(f"warmed in {time.monotonic() - started:.0f} s")

    def _same_walks(self, contenders: dict[tuple[str, int], Contender]) -> dict[tuple[str, int], Contender]:
        """Return those that find the same data as a raw file has. Raises Failed where backupfs does not."""
        right = {}
        native = contenders.get((NATIVE, self._deep))
        wanted = walk(native.path) if native else None
        for key, contender in contenders.items():
            found = walk(contender.path)
            wanted = wanted or found
            if found == wanted:
                right[key] = contender
                continue
            what = f"{key[0]} finds {len(found):,} pieces of data of {len(wanted):,}"
            if key[0] in (NONE, ZSTD):
                raise Failed(what)
            self._report.note(f"left out of the walk: {what}")
        return right

    def _measure_rounds(
        self,
        workload: Workload,
        chain: Chain,
        keys: Sequence[tuple[str, int]],
        contenders: dict[tuple[str, int], Contender],
    ) -> None:
        cells = {key: Cell() for key in keys}
        loads: list[float] = []
        for depth in sorted({depth for _, depth in keys}):
            at = {who: cell for (who, d), cell in cells.items() if d == depth}
            units = workload.unit, workload.cpu_unit
            self._lines.append(Line(workload.name, workload.title, depth, *units, at, loads))
        for key in keys:
            if workload.prepare and key in contenders:
                workload.prepare(contenders[key])
        said: dict[int, set[str]] = {}
        for number in range(self._rounds):
            for key in keys:
                with self._ready(chain, key, contenders) as contender:
                    used = contender.cpu_s()
                    sample = workload.measure(self._place, contender, self._seconds)
                    used = contender.cpu_s() - used
                cells[key].values.append(sample.value)
                if contender.pids:
                    cells[key].cpu.append(used / sample.work)
                if sample.said:
                    said.setdefault(key[1], set()).add(sample.said)
            loads.append(os.getloadavg()[0])
            self._report.say(f"{workload.title}: round {number + 1} of {self._rounds}, load {loads[-1]:.1f}")
        if any(len(different) > 1 for different in said.values()):
            raise Failed(f"{workload.title}: not everybody has the same bytes: {said}")

    @contextlib.contextmanager
    def _ready(
        self, chain: Chain, key: tuple[str, int], contenders: dict[tuple[str, int], Contender]
    ) -> Iterator[Contender]:
        if key in contenders:
            yield contenders[key]
            return
        with opened(self._place, chain, *key) as contender, contender.path.open("rb", buffering=0) as file:
            file.read(CHUNK)
            _wait_until_idle([contender], 0.2)
            drop_caches()
            yield contender

    def finish(self, chart_path: str | None) -> None:
        """Show everything that was measured, also after an error in the middle; and the limits."""
        if not self._lines:
            return
        self._report.add_table(tabulate(self._lines, (*OURS, *PEERS)), [line.as_dict() for line in self._lines])
        cells = {(line.workload, who, line.depth): c for line in self._lines for who, c in line.cells.items()}
        titles = {line.workload: (line.title, line.unit) for line in self._lines}
        for limit in _LIMITS:
            ours = cells.get((limit.workload, *limit.ours), Cell()).values
            theirs = cells.get((limit.workload, *limit.peer), Cell()).values
            if ours and len(ours) == len(theirs):
                title, unit = titles[limit.workload]
                what, peer = f"{title}: {_name(limit.ours)}", _name(limit.peer)
                self._report.add(Row(what, ours, unit, peer, theirs, at_least=limit.at_least, at_most=limit.at_most))
        if chart_path:
            drawn = [line for line in self._lines if line.workload == "random-direct-4"]
            medians = {
                who: {line.depth: statistics.median(line.cells[who].values) for line in drawn if _has(line, who)}
                for who in (NONE, ZSTD, PYFUSE3, QEMU, NBDFUSE)
            }
            series = {LEGEND[who]: points for who, points in medians.items() if points}
            chart.draw(Path(chart_path), "4 KiB random reads a second, O_DIRECT, 4 in flight", "deltas", series)


def _has(line: Line, who: str) -> bool:
    return who in line.cells and bool(line.cells[who].values)


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}, {key[1]} deltas"


def _compare(contenders: Sequence[Contender]) -> None:
    """Check in samples that all of one depth hold the same bytes. Raises Failed."""
    rng = np.random.default_rng(0)
    offsets = (rng.integers(0, contenders[0].path.stat().st_size // CHUNK, 100) * CHUNK).tolist()
    by_depth: dict[int, list[bytes]] = {}
    for contender in contenders:
        with contender.path.open("rb", buffering=0) as file:
            content = [os.pread(file.fileno(), CHUNK, offset) for offset in offsets]
        if content != by_depth.setdefault(contender.depth, content):
            raise Failed(f"{contender.who} with {contender.depth} deltas does not hold the bytes that others do")


def _wait_until_idle(contenders: Sequence[Contender], every_s: float, limit_s: float = 300) -> None:
    """Wait until nobody works any more: points that were opened are checked in the background."""
    started, used, quiet = time.monotonic(), -1.0, 0
    while quiet < 2:
        if time.monotonic() - started > limit_s:
            raise Failed(f"somebody still works after {limit_s:.0f} s")
        time.sleep(every_s)
        before, used = used, sum(c.cpu_s() for c in contenders)
        quiet = quiet + 1 if used - before <= _IDLE_SHARE * every_s else 0
