"""Small files of guests, read before somebody asks: who reads one file of a folder mostly reads the next one too.

Next in the order that the folder is listed in, as `find` and `tar` go, or in that of the names, as `rsync` does. To ask
the parser for twenty small files takes hardly longer than to ask for three. From any thread.
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
_FIRST, _BATCH, _BATCH_BYTES = 16, 64, 2 * MiB  # that are read at a time
_EARLY = 128  # files before the end of what was read more is
_KEPT = 8 * MiB
_NAMES = 50_000  # in the folders that are known


def is_small(found: Stat) -> bool:
    """Whether a file is read whole when it is opened."""
    return stat.S_ISREG(found.mode) and 0 <= found.size <= LARGEST and found.size <= max(found.allocated, _LARGEST_HOLE)


class _Folder:
    """The small files of a folder in both orders, inode and size; and how far they were read ahead in one of them."""

    def __init__(self, found: Mapping[bytes, Stat]) -> None:
        small = {name: (s.inode, s.size) for name, s in found.items() if is_small(s)}
        self.orders = [*small.values()], [small[name] for name in sorted(small)]
        self.before: int | None = None  # what was opened last
        self.order: list[tuple[int, int]] = []  # that somebody follows
        self.end = 0  # place in it behind what was read
        self.reading = False

    def follow(self, places: Sequence[int]) -> bool:
        """Whether the file at these places is the first, or comes behind the last one, in one of the orders."""
        for order, place in zip(self.orders, places, strict=True):
            if (self.before is None and not place) or (place and order[place - 1][0] == self.before):
                self.order, self.end = order, place
                return True
        return False

    def next(self, most: int) -> list[tuple[int, int]]:
        """Return what is to be read now."""
        batch: list[tuple[int, int]] = []
        total = 0
        for number, size in self.order[self.end : self.end + most]:
            total += size
            if batch and total > _BATCH_BYTES:
                break
            batch.append((number, size))
        self.end += len(batch)
        return batch


class ReadAhead:
    """What was read ahead in a file system.

    Args:
        contents: returns the contents of files of at most LARGEST bytes, None for what it has not got. May block.
    """

    def __init__(self, contents: Callable[[Sequence[int], int], Sequence[bytes | None]]) -> None:
        self._contents = contents
        self._lock = threading.Lock()
        self._places: dict[int, tuple[_Folder, list[int]]] = {}  # where an inode is in the orders
        self._ahead: dict[int, bytes] = {}
        self._bytes = 0

    def note(self, found: Mapping[bytes, Stat]) -> None:
        """Know a folder that was listed."""
        folder = _Folder(found)
        with self._lock:
            if len(self._places) + len(folder.orders[0]) > _NAMES:
                self._places.clear()
            for i, (inode, _) in enumerate(folder.orders[0]):
                self._places[inode] = folder, [i]
            for j, (inode, _) in enumerate(folder.orders[1]):
                self._places[inode][1][1:] = [j]

    def take(self, inode: int) -> bytes | None:
        """Return a file's content if it is there, once: the kernel keeps it. Does not block."""
        if inode not in self._ahead:
            return None
        with self._lock:
            content = self._ahead.pop(inode, None)
            if content is not None:
                self._bytes -= len(content)
                if inode in self._places:
                    self._places[inode][0].before = inode
            return content

    def wants_more(self, inode: int) -> bool:
        """Whether it is time to read on behind a file that was taken. Does not block."""
        folder, places = self._places.get(inode) or (None, [])
        if folder is None or folder.reading or folder.end >= len(folder.order):
            return False
        place = places[0] if folder.order is folder.orders[0] else places[1]
        return folder.end - _EARLY <= place < folder.end

    def read_on(self, inode: int) -> None:
        """Read on behind a file that was taken."""
        with self._lock:
            folder, _ = self._places.get(inode) or (None, [])
            if folder is None or folder.reading:
                return
            folder.reading, batch = True, folder.next(_BATCH)
        try:
            self._read(batch)
        finally:
            folder.reading = False

    def read(self, inode: int) -> bytes | None:
        """Read a file, and some more, if it comes behind the last one.

        Returns:
            Its content; None: it is to be read by itself.
        """
        with self._lock:
            folder, places = self._places.get(inode) or (None, [])
            batch = folder.next(_FIRST) if folder and folder.follow(places) else []
            if folder:
                folder.before = inode
        if len(batch) < 2:
            return None
        self._read(batch)
        return self.take(inode)

    def _read(self, batch: Sequence[tuple[int, int]]) -> None:
        try:
            contents = self._contents([number for number, _ in batch], LARGEST)
        except BackupfsError:
            return  # who asks for one alone is told
        found = {
            number: data
            for (number, size), data in zip(batch, contents, strict=False)
            if data is not None and len(data) == size
        }
        with self._lock:
            if self._bytes > _KEPT:
                self._ahead.clear()
                self._bytes = 0
            for number, data in found.items():
                self._bytes += len(data) - len(self._ahead.get(number, b""))
                self._ahead[number] = data
