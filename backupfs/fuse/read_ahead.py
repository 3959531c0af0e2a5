"""Small files of guests, read before somebody asks: who reads one file of a folder mostly reads the next one too.

Next in the order that the folder is listed in, as `find` and `tar` go, or in that of the names, as `rsync` does. To ask
the parser for a hundred small files takes hardly longer than to ask for three. From any thread.
"""

import stat
import threading
from collections.abc import Callable, Mapping, Sequence

from backupfs.errors import BackupfsError
from backupfs.filesystem import Stat
from backupfs.units import KiB, MiB

LARGEST = 128 * KiB
"""Bytes of a file that is small."""
_LARGEST_HOLE = 4 * KiB  # a file of holes is small only up to here: its holes are not told of
_BATCH, _BATCH_BYTES = 128, 2 * MiB  # that are read at a time
_KEPT = 8 * MiB
_NAMES = 50_000  # in the folders that are known


def is_small(found: Stat) -> bool:
    """Whether a file is read whole when it is opened."""
    return stat.S_ISREG(found.mode) and 0 <= found.size <= LARGEST and found.size <= max(found.allocated, _LARGEST_HOLE)


class _Folder:
    """The small files of a folder in both orders: inode and size."""

    def __init__(self, found: Mapping[bytes, Stat]) -> None:
        small = {name: (s.inode, s.size) for name, s in found.items() if is_small(s)}
        self.orders = [*small.values()], [small[name] for name in sorted(small)]
        self.before: int | None = None  # what was opened last


class ReadAhead:
    """What was read ahead in a file system.

    Args:
        contents: returns the contents of files of at most LARGEST bytes, None for what it has not got. May block.
    """

    def __init__(self, contents: Callable[[Sequence[int], int], Sequence[bytes | None]]) -> None:
        self._contents = contents
        self._lock = threading.Lock()
        self._places: dict[int, tuple[_Folder, int, int]] = {}  # where an inode is in the orders
        self._ahead: dict[int, bytes] = {}
        self._bytes = 0

    def note(self, found: Mapping[bytes, Stat]) -> None:
        """Know a folder that was listed."""
        folder = _Folder(found)
        places = {inode: i for i, (inode, _) in enumerate(folder.orders[0])}
        with self._lock:
            if len(self._places) + len(places) > _NAMES:
                self._places.clear()
            for j, (inode, _) in enumerate(folder.orders[1]):
                self._places[inode] = folder, places[inode], j

    def take(self, inode: int) -> bytes | None:
        """Return a file's content if it is there, once: the kernel keeps it. Does not block."""
        if inode not in self._ahead:
            return None
        with self._lock:
            content = self._ahead.pop(inode, None)
            if content is not None:
                self._bytes -= len(content)
                self._places[inode][0].before = inode
            return content

    def read(self, inode: int, ahead: dict[int, bytes]) -> bytes | None:
        """Read a file and, if it is the one behind the last, the next ones, which are put into `ahead`.

        Returns None if it is to be read by itself.
        """
        with self._lock:
            place = self._places.get(inode)
            if place is None:
                return None
            wanted = _next(*place)
            place[0].before = inode
        if len(wanted) < 2:
            return None
        try:
            found = dict(zip(wanted, self._contents([number for number, _ in wanted], LARGEST), strict=False))
        except BackupfsError:
            return None  # who asks for it alone is told
        content = None
        with self._lock:
            if self._bytes > _KEPT:
                self._ahead.clear()
                self._bytes = 0
            for (number, size), data in found.items():
                if data is None or len(data) != size:
                    continue
                if number == inode:
                    content = data
                elif number in self._places and number not in self._ahead:
                    self._ahead[number] = ahead[number] = data
                    self._bytes += size
        return content


def _next(folder: _Folder, i: int, j: int) -> list[tuple[int, int]]:
    """Return a file and those that come behind it, if it comes itself behind the last one or is the first."""
    for order, position in zip(folder.orders, (i, j), strict=True):
        if (folder.before is None and not position) or (position and order[position - 1][0] == folder.before):
            found: list[tuple[int, int]] = []
            total = 0
            for number, size in order[position : position + _BATCH]:
                total += size
                if found and total > _BATCH_BYTES:
                    break
                found.append((number, size))
            return found
    return []
