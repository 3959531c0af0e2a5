"""The table that a benchmark ends with, the machine that it ran on, and the same as JSON. Measures nothing but that."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent.parent
BACKUPFS = str(TOP / ".venv" / "bin" / "backupfs")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison, or, without a peer, one measurement.

    Attributes:
        ours, theirs: one value a round, in `unit`; those with the same place were measured in the same round.
        at_most, at_least: the limit. With a peer it holds for the median of the ratios ours/theirs; without one
            for every value.
    """

    workload: str
    ours: Sequence[float]
    unit: str
    peer: str = ""
    theirs: Sequence[float] = field(default=())
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, a round each."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)] if self.theirs else []

    @property
    def verdict(self) -> str:
        """`ok` or `MISSED`, by the median; nothing where there is no limit."""
        judged = statistics.median(self.ratios or self.ours)
        if self.at_most is None and self.at_least is None:
            return ""
        good = (self.at_most is None or judged <= self.at_most) and (self.at_least is None or judged >= self.at_least)
        return "ok" if good else "MISSED"

    def cells(self) -> tuple[str, ...]:
        """Return the row as the table shows it."""
        ours = format_value(statistics.median(self.ours), self.unit)
        theirs = f"{self.peer} {format_value(statistics.median(self.theirs), self.unit)}" if self.theirs else ""
        ratios = self.ratios
        middle = f"{statistics.median(ratios):.2f}" if ratios else ""
        shown = (
            [f"{v:.2f}" for v in (min(ratios), max(ratios))]
            if ratios
            else [format_number(v) for v in _range(self.ours)]
        )
        limit = f"<= {self.at_most:g}" if self.at_most is not None else ""
        limit = f">= {self.at_least:g}" if self.at_least is not None else limit
        return self.workload, ours, theirs, middle, "–".join(shown) if len(self.ours) > 1 else "", limit, self.verdict


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def format_number(value: float) -> str:
    """Return a number to three digits, or to its unit."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_value(value: float, unit: str) -> str:
    """Return a number with its unit, to three digits."""
    return f"{format_number(value)} {unit}"


class Report:
    """Collects rows; says at once what it is told, and prints the table at the end.

    Args:
        options: of the command line, for the JSON.
        folder: where the work files are: its file system is part of the machine.
    """

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        self._options = options
        self._machine = describe_machine(folder)
        self._rows: list[Row] = []
        self._notes: list[str] = []
        self._tables: list[Sequence[tuple[str, ...]]] = []
        self._lines: list[dict[str, object]] = []
        for name, value in self._machine.items():
            print(f"{name + ':':14}{value}", flush=True)

    def add(self, row: Row) -> None:
        """Add a row to the table."""
        self._rows.append(row)

    def add_table(self, table: Sequence[tuple[str, ...]], lines: Sequence[dict[str, object]]) -> None:
        """Add a table of its own, its head first, that is shown before the rows, and the same for the JSON."""
        self._tables.append(table)
        self._lines.extend(lines)

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self._notes.append(text)
        self.say(text)

    def say(self, text: str) -> None:
        """Tell who waits what is being done."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print what there is, also after an error in the middle, and write the JSON."""
        for table in self._tables:
            _print_table(table)
        if self._rows:
            head = ("WORKLOAD", "OURS", "PEER", "RATIO", "MIN–MAX", "LIMIT", "")
            cells = [head, *(row.cells() for row in self._rows)]
            _print_table(cells)
            print(
                "\nours and peer: medians; ratio: median of the rounds' ratios ours/peer, and their range; without a "
                "peer the range of ours"
            )
        for note in self._notes:
            print(f"* {note}")
        if self._options.get("json"):
            rows = [asdict(row) | {"ratios": row.ratios, "verdict": row.verdict} for row in self._rows]
            document = {"machine": self._machine, "options": self._options, "rows": rows, "notes": self._notes}
            document |= {"lines": self._lines} if self._lines else {}
            Path(self._options["json"]).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _print_table(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def describe_machine(folder: Path) -> dict[str, str]:
    """Return what a reader has to know of where the numbers come from."""
    cpu = _field("/proc/cpuinfo", "model name") or os.uname().machine
    memory = int(_field("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20)
    return {
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.1f} GiB",
        "kernel": os.uname().release,
        "file system": _line("findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", "--target", str(folder)),
        "round trip": f"{_round_trip_us():.1f} us, of a byte to a process that sleeps and back",
        "load before": Path("/proc/loadavg").read_text().split()[0],
        "qemu": _line("qemu-img", "--version"),
        "nbdcopy": _line("nbdcopy", "--version"),
        "fio": _line("fio", "--version"),
        "backupfs": f"{_line(BACKUPFS, '--version')} ({_commit()})",
        "python": sys.version.split()[0],
    }


def _commit() -> str:
    commit = _line("git", "-C", str(TOP), "describe", "--always", "--abbrev=12", "--dirty")
    return f"commit {commit}" if commit else "no git"


def _round_trip_us() -> float:
    """Return what waking a process costs: each request of a FUSE mount waits for that twice.

    A virtual machine whose processors are given back to the host whenever they are idle takes ten times as long.
    """
    took = list[float]()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as other:
        assert other.stdin is not None, "a pipe"
        assert other.stdout is not None, "a pipe"
        for _ in range(3000):
            begun = time.perf_counter()
            other.stdin.write(b".")
            other.stdout.read(1)
            took.append(time.perf_counter() - begun)
        other.stdin.close()
    return statistics.median(took) * 1e6


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _line(*command: str) -> str:
    """Return the first line that a command prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return " ".join((done.stdout.splitlines() or [""])[0].split()) if done.returncode == 0 else ""
