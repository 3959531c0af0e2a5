"""Giving a layer's space back to the file system: which ranges no live chunk touches, and holes in their place.

A hole changes nothing else: the file keeps its length, header, table and trailer. What was freed stays freed, whatever
breaks off what.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator

import numpy as np

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import codec
from backupfs.repository.format import ALIGNMENT, LAYER_MODE, round_up
from backupfs.repository.layer import Layer
from backupfs.repository.reach import Flags, Numbers
from backupfs.units import GiB

_SEGMENT = 128 * GiB  # of a layer, looked at at a time: 32 MiB of flags
_ROWS = 4096  # whose blocks are marked at a time
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # Source: <linux/falloc.h>
_libc = ctypes.CDLL(None, use_errno=True)


def dead_ranges(layer: Layer, live: Flags) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of all blocks of 4 KiB among the payloads that no live payload touches, in order.

    Args:
        live: of each chunk with data, in the table's order.

    Raises:
        Corrupt: the table is damaged.
    """
    head, end = layer.data_range
    end = round_up(end, ALIGNMENT)
    for start in range(head, end, _SEGMENT):
        blocks = (min(start + _SEGMENT, end) - start) // ALIGNMENT
        used = np.zeros(blocks, np.bool_)
        for offset, after in _live_spans(layer, live):
            first = np.maximum((offset - start) // ALIGNMENT, 0)
            last = np.minimum(-(-(after - start) // ALIGNMENT), blocks)
            lengths = np.maximum(last - first, 0)
            within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            used[np.repeat(first, lengths) + within] = True
        borders = np.flatnonzero(np.diff(used, prepend=True, append=True))
        for begin, stop in borders.reshape(-1, 2).tolist():
            yield start + begin * ALIGNMENT, (stop - begin) * ALIGNMENT


def _live_spans(layer: Layer, live: Flags) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield where live payloads begin and end, many at a time."""
    done, (begin, end) = 0, layer.data_range
    end += layer.header.chunk_size if layer.header.plain else 0  # the last chunk is behind the disk's end in part
    for rows in layer.rows():
        data = rows[rows["codec"] != codec.ZERO]
        kept = data[live[done : done + len(data)]]
        done += len(data)
        for i in range(0, len(kept), _ROWS):
            offset: Numbers = kept["offset"][i : i + _ROWS].astype(np.int64)
            after: Numbers = offset + kept["length"][i : i + _ROWS].astype(np.int64)
            if np.any(offset < begin) or np.any(after > end):
                raise Corrupt(layer.path, layer.trailer().table_offset, "a row's payload is not among the payloads")
            yield offset, after


def allocated(path: str) -> int:
    """Return the bytes that a file takes on its file system."""
    return os.stat(path).st_blocks * 512


def is_alone(path: str) -> bool:
    """Whether a file has no other name, and this one is no symbolic link: what is another's must not change."""
    found = os.lstat(path)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def stored(fd: int, offset: int, length: int) -> int:
    """Return how many bytes of a range are no hole. Source: lseek(2), SEEK_DATA."""
    total, position, end = 0, offset, offset + length
    while position < end:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        hole = os.lseek(fd, position, os.SEEK_HOLE)
        total += max(min(hole, end) - position, 0)
        position = hole
    return total


class Puncher:
    """Makes holes in one layer file. It must have no other name: what is another's must not change.

    Raises:
        RepositoryError: it can't be opened for writing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            try:
                self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:  # not root: a layer is read-only
                os.chmod(path, 0o600)
                self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                os.fchmod(self.fd, LAYER_MODE)
        except OSError as e:
            raise RepositoryError(f"{path}: {e.strerror}") from e

    def punch(self, offset: int, length: int) -> bool:
        """Make a hole. Returns whether this file system can do that.

        Raises:
            RepositoryError: it failed.
        """
        done = _libc.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length))
        if done == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise RepositoryError(f"{self._path}: space can't be given back: {os.strerror(code)}")

    def close(self) -> None:
        os.close(self.fd)
