"""Decoded chunks, kept in memory up to a limit. From any thread.

Who reads a chunk again and again holds its cell, and looks nothing up: hashing a key twice costs as much as all else of
a read that is not the kernel's. A chunk that was looked at since it was last its turn to go stays for another round.
"""

import threading
from collections import OrderedDict

Key = tuple[int, int, int, int]
"""The chain's number, seq, offset, xxh3."""


class Cell:
    """A chunk, as long as it is kept; then None. Who looks at it sets `used`."""

    __slots__ = ("chunk", "used")

    def __init__(self, chunk: memoryview | None) -> None:
        self.chunk = chunk
        self.used = False


NOTHING = Cell(None)


class ChunkCache:
    """Keeps chunks of at most `limit` bytes together, but always one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._cells: OrderedDict[Key, Cell] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Cell:
        """Return a chunk's cell, NOTHING if it is not kept."""
        return self._cells.get(key, NOTHING)

    def put(self, key: Key, chunk: bytes) -> Cell:
        """Keep a chunk; others go."""
        cell = Cell(memoryview(chunk))
        with self._lock:
            self._drop(self._cells.pop(key, NOTHING))
            while self._cells and self._bytes + len(chunk) > self._limit:
                oldest, held = self._cells.popitem(last=False)
                if held.used:
                    held.used = False
                    self._cells[oldest] = held
                else:
                    self._drop(held)
            self._cells[key] = cell
            self._bytes += len(chunk)
        return cell

    def _drop(self, cell: Cell) -> None:
        if cell.chunk is not None:
            self._bytes -= len(cell.chunk)
            cell.chunk = None

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            for cell in self._cells.values():
                self._drop(cell)
            self._cells.clear()
