"""A disk that can be written to, over an image that can't: what is written goes to a file beside it.

    Changes        what was written to one disk: a sparse data file, the disk's own offsets in it, and a BlockMap
    OverlayImage   an Image of a point's disk with its Changes on it, one for each time that it is open

A block is first written to the data file, whole, and then marked in the map; so whatever fails on the way leaves the
old bytes or the new ones. The map in the file follows in `flush`, which puts the data on the disk first: what the file
calls WRITTEN or ZERO has been so since a flush at the latest, also after a crash. What was not flushed may be lost, as
in the cache of any disk. The data file below a block that is not WRITTEN may hold anything.

All methods may be called from any thread. Those that change something wait for each other; reading waits for nobody.
"""

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from backupfs.errors import BackupfsError
from backupfs.extents import Extent
from backupfs.image import Buffer, Gatherer, Image, check_range, gather
from backupfs.services.blockmap import BLOCK, PAGE, POINTS, WRITTEN, ZERO, BlockMap

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # Source: <linux/falloc.h>
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Files:
    """Where changes are written to. Both are descriptors, open for reading and writing.

    Args:
        data: as long as the disk.
        map: a byte a block, in whole pages; None: the map is not kept.
        name: for messages.
    """

    data: int
    map: int | None
    name: str


class Changes:
    """What was written to a disk.

    Args:
        size: of the disk, bytes.
        block_map: what is there already.
        files: the same; None: nothing is there.
        make: makes the files, at the first write. Raises OSError.
    """

    def __init__(self, size: int, block_map: BlockMap, files: Files | None, make: Callable[[], Files]) -> None:
        self.size = size
        self.map = block_map
        self.written_ns: int | None = os.fstat(files.data).st_mtime_ns if files else None
        self._files = files
        self._make = make
        self._writing = threading.Lock()
        self._flushing = threading.Lock()  # first, of the two
        self._broken: str | None = None
        self._at_once = True
        self._checking = threading.Lock()
        self._checked = False

    def check_once(self, check: Callable[[], None]) -> None:
        """Make the check of the point's disk, unless it was made and found right. Raises as `check`."""
        with self._checking:
            if not self._checked:
                check()
                self._checked = True

    @property
    def allocated(self) -> int:
        """Bytes that the data takes on its file system."""
        return os.fstat(self._files.data).st_blocks * 512 if self._files else 0

    def read(self, offset: int, into: memoryview) -> None:
        """Read bytes of blocks that are WRITTEN. Raises BackupfsError."""
        files = self._there()
        while into:
            try:
                got = os.preadv(files.data, [into], offset)
            except OSError as e:
                raise BackupfsError(f"{files.name}: can't be read at {offset}: {e.strerror}") from e
            if not got:
                raise BackupfsError(f"{files.name}: ends before {offset}; it was cut off")
            into, offset = into[got:], offset + got

    def read_at_once(self, offset: int, into: list[memoryview]) -> bool:
        """The same, if that waits for no disk. Returns whether it was done."""
        if not self._at_once:
            return False
        try:
            return os.preadv(self._there().data, into, offset, os.RWF_NOWAIT) == len(into[0])
        except BlockingIOError:
            return False
        except OSError:
            self._at_once = False  # this file system can't tell
            return False

    def write(self, offset: int, data: Buffer | bytes, old: Callable[[int, memoryview], None]) -> None:
        """Write bytes.

        Args:
            offset, data: inside the disk.
            old: fills memory with the point's bytes from an offset on.

        Raises:
            OSError: they can't be written. Each block has its old bytes or the new ones.
            BackupfsError: the rest of a block that is written in part can't be read; nothing was written.
        """
        if len(data):
            with self._writing:
                self._write(offset, data, old)

    def _write(self, offset: int, data: Buffer | bytes, old: Callable[[int, memoryview], None]) -> None:
        files = self._begun()
        end = offset + len(data)
        head = self._rest(offset // BLOCK * BLOCK, offset, old)
        tail = self._rest(end, min(-(-end // BLOCK) * BLOCK, self.size), old)
        begin, whole = offset - len(head), end + len(tail)
        pieces, done = [p for p in (memoryview(head), memoryview(data), memoryview(tail)) if p], begin
        try:
            while pieces:
                count = os.pwritev(files.data, pieces, done)
                done += count
                while pieces and count >= len(pieces[0]):
                    count -= len(pieces.pop(0))
                if pieces:
                    pieces[0] = pieces[0][count:]
        finally:
            # A block that `begin` lies within is WRITTEN already, and so is one that `whole` does.
            last = -(-whole // BLOCK) if done == whole else done // BLOCK
            self.map.set(begin // BLOCK, last, WRITTEN)
            self.written_ns = time.time_ns()

    def _rest(self, begin: int, end: int, old: Callable[[int, memoryview], None]) -> bytearray:
        """Return the rest of a block that is written in part, empty if it need not be written."""
        if begin == end or self.map.state(begin // BLOCK) == WRITTEN:
            return bytearray()
        rest = bytearray(end - begin)
        if self.map.state(begin // BLOCK) == POINTS:
            old(begin, memoryview(rest))
        return rest

    def zero(self, offset: int, length: int, old: Callable[[int, memoryview], None]) -> None:
        """Make a range zeroes, and give its space back where that can be. Arguments and errors as of `write`."""
        end = offset + length
        first = -(-offset // BLOCK)
        last = self.map.blocks if end == self.size else end // BLOCK
        with self._writing:
            files = self._begun()
            if first > last or (first == last and offset != end):
                self._write(offset, bytes(length), old)  # within a block, or over the border of two
                return
            if offset < first * BLOCK:
                self._write(offset, bytes(first * BLOCK - offset), old)
            if last * BLOCK < end:
                self._write(last * BLOCK, bytes(end - last * BLOCK), old)
            if first < last:
                self.map.set(first, last, ZERO)
                # It may fail: then the space is not given back.
                _libc.fallocate(
                    files.data,
                    _PUNCH_HOLE | _KEEP_SIZE,
                    ctypes.c_int64(first * BLOCK),
                    ctypes.c_int64((last - first) * BLOCK),
                )
                self.written_ns = time.time_ns()

    def flush(self) -> None:
        """Put all that was written on the disk, if it is kept at all. When it returns, a crash loses none of it.

        Raises:
            OSError: it can't be put there.
        """
        with self._flushing:
            with self._writing:
                self._refuse_broken()
                files = self._files
                if files is None or files.map is None:
                    return
                changed = self.map.take_changed()
            try:
                os.fdatasync(files.data)
            except OSError as e:
                # What the kernel could not write it forgets, and says so only once: nothing of it can be trusted.
                self._broken = f"{files.name}: could not be put on the disk: {e.strerror}"
                log.error("%s; nothing of it can be read or written any more", self._broken)
                raise
            try:
                for number, page in changed.items():
                    _pwrite(files.map, page, number * PAGE)
                if changed:
                    os.fdatasync(files.map)
            except OSError:
                with self._writing:
                    self.map.give_back(changed)
                raise

    def close(self) -> None:
        """Let the files go. Not while anything else is called."""
        files, self._files = self._files, None
        self._broken = "the mount has ended"
        if files is not None:
            os.close(files.data)
            if files.map is not None:
                os.close(files.map)

    def _there(self) -> Files:
        self._refuse_broken()
        files = self._files
        if files is None:
            raise BackupfsError("nothing was written")
        return files

    def _begun(self) -> Files:
        self._refuse_broken()
        if self._files is None:
            self._files = self._make()
        return self._files

    def _refuse_broken(self) -> None:
        if self._broken:
            raise BackupfsError(self._broken)


class OverlayImage:
    """A disk with its changes on it: a Gatherer, and Writable (fuse/catalogue.py).

    Args:
        base: the disk; closed with this.
        changes: outlive this.
        check: whether `base` can be trusted: see DiskFile.check. Made once, by `check_base`, and before any of its
            bytes are copied into the changes.
    """

    def __init__(self, base: Image, changes: Changes, check: Callable[[Image], None]) -> None:
        self.size = base.size
        self._base = base
        self._changes = changes
        self._check = check
        self._base_at_once = base.at_once if isinstance(base, Gatherer) else None

    def check_base(self) -> None:
        """Check the disk, if that was not done. Raises BackupfsError."""
        self._changes.check_once(lambda: self._check(self._base))

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        for state, begin, end in self._changes.map.runs(offset, len(buffer)):
            part = view[begin - offset : end - offset]
            if state == POINTS:
                self._base.readinto(begin, part)
            elif state == WRITTEN:
                self._changes.read(begin, part)
            else:
                part[:] = bytes(len(part))

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        state, _, end = next(self._changes.map.runs(offset, length))
        if state == POINTS and end == offset + length:
            return gather(self._base, offset, length)
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return (buffer,)

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        length = len(into[0])
        if not 0 <= offset <= self.size - length:
            return False
        state, _, end = next(self._changes.map.runs(offset, length))
        if end != offset + length:
            return False
        if state == WRITTEN:
            return self._changes.read_at_once(offset, into)
        if state == ZERO:
            into[0][:] = bytes(length)
            return True
        return self._base_at_once is not None and self._base_at_once(offset, into)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        for state, begin, end in self._changes.map.runs(offset, length):
            if state == POINTS:
                yield from self._base.extents(begin, end - begin)
            else:
                yield Extent(begin, end - begin, state == ZERO)

    def write(self, offset: int, data: Buffer | bytes) -> None:
        """See Writable."""
        check_range(self, offset, len(data))
        self._changes.write(offset, data, self._old)

    def zero(self, offset: int, length: int) -> None:
        """See Writable."""
        check_range(self, offset, length)
        if length:
            self._changes.zero(offset, length, self._old)

    def flush(self) -> None:
        """See Writable."""
        self._changes.flush()

    def close(self) -> None:
        try:
            self._changes.flush()
        except OSError as e:
            # Nobody can be told any more; it is tried again by the next flush, and at the end of the mount.
            log.error("what was written last could not be kept: %s", e.strerror)
        except BackupfsError:
            pass  # that was said when it broke
        finally:
            self._base.close()

    def _old(self, offset: int, into: memoryview) -> None:
        self.check_base()
        self._base.readinto(offset, into)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
