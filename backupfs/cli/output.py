"""What commands print: JSON, tables, progress."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from backupfs.units import format_size


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def print_json_list(items: Iterable[Any]) -> int:
    """Print a list as one JSON document, each item as it comes: a list may be longer than memory is large.

    Returns how many they were.
    """
    count = 0
    for count, item in enumerate(items, 1):
        sys.stdout.write((",\n  " if count > 1 else "[\n  ") + json.dumps(item, ensure_ascii=False))
    sys.stdout.write("\n]\n" if count else "[]\n")
    return count


def tell(message: str) -> None:
    """Say something to whoever waits."""
    click.echo(f"backupfs: {message}", err=True)


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int, int], None]]:
    """Show a bar for each disk, with its rate, when stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda disk, done, size, read: None
        return
    from rich import progress as bars  # noqa: PLC0415, slow to import, and only for people
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("read {task.fields[read]}"),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def report(disk: str, done: int, size: int, read: int) -> None:
            if disk not in tasks:
                tasks[disk] = shown.add_task(disk, total=size, read="0 B")
            shown.update(tasks[disk], completed=done, read=format_size(read))

        yield report
