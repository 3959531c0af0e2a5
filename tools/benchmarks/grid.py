"""One table for many contenders: a line for a workload and a depth, a column for each who was measured."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.report import format_number


@dataclass(slots=True)
class Cell:
    """What one contender did in one workload at one depth.

    Attributes:
        values: one a round.
        cpu: the processor time of its processes, one a round; empty where it has none.
    """

    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """A workload at a depth.

    Attributes:
        depth: deltas.
        unit, cpu_unit: of the cells' values, and of their processor time.
        cells: by contender.
        loads: the machine's load average after each round.
    """

    workload: str
    title: str
    depth: int
    unit: str
    cpu_unit: str
    cells: dict[str, Cell]
    loads: list[float]

    def as_dict(self) -> dict[str, object]:
        """Return it for the JSON."""
        cells = {who: {"values": cell.values, "cpu": cell.cpu} for who, cell in self.cells.items()}
        names = {"workload": self.workload, "title": self.title, "deltas": self.depth}
        return names | {"unit": self.unit, "cpu_unit": self.cpu_unit, "contenders": cells, "loads": self.loads}


def tabulate(lines: Iterable[Line], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the head and the lines of the table: medians, each with half of its range in percent; then the CPU's."""
    table = [("WORKLOAD", "DELTAS", *columns, "")]
    for line in lines:
        table.append((line.title, str(line.depth), *(_values(line, who) for who in columns), line.unit))
        if any(cell.cpu for cell in line.cells.values()):
            table.append(("  processor", "", *(_cpu(line, who) for who in columns), line.cpu_unit))
    return table


def _values(line: Line, who: str) -> str:
    cell = line.cells.get(who)
    if cell is None or not cell.values:
        return "–"
    middle = statistics.median(cell.values)
    spread = (max(cell.values) - min(cell.values)) / 2 / middle if middle else 0
    return f"{format_number(middle)} ±{spread * 100:.0f}%"


def _cpu(line: Line, who: str) -> str:
    cell = line.cells.get(who)
    return f"{statistics.median(cell.cpu):.2f}" if cell and cell.cpu else "–"
