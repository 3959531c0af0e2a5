"""One layer file: the chunks that one disk got at one point, with the table that finds them.

`LayerWriter` is used by one backup, `write` from several threads at once; `Layer` reads, from any thread. A crash
leaves a temporary file that the next writer removes: a layer gets its name only when it is whole and on the disk.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import blake3
import numpy as np
import xxhash

from backupfs.errors import Corrupt, NotFound, RepositoryError
from backupfs.repository import codec
from backupfs.repository.format import (
    ALIGNMENT,
    FENCE_ROWS,
    HEADER_SIZE,
    LAYER_MODE,
    ROW,
    TRAILER_SIZE,
    LayerHeader,
    LayerTrailer,
    Rows,
    Words,
    checks,
    decode_header,
    decode_trailer,
    header_seed,
    round_up,
)
from backupfs.units import MiB

_libc = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2
_WRITEBACK = 8 * MiB
_FICLONERANGE = 0x4020940D  # Source: linux/fs.h
_CLONE_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range: source, its offset, length, the target's offset
_GROUPS = 64  # of rows, read at a time: 900 KiB
_IOV_MAX = 512  # buffers per pwritev; Linux takes 1,024
_COPY_ROWS = 16 * 1024  # rows per write of the table


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a finished layer file is, for the manifest."""

    length: int
    blake3: str  # of the header and of all from the footer table on; the table holds the chunks' own
    data_chunks: int
    stored_bytes: int  # payloads


class Layer:
    """A published layer, opened for reading.

    The descriptor is closed when the last reference goes, so a thread that still reads never meets another file
    under the same number.

    Raises:
        NotFound: there is no such file.
        Corrupt: it is not the layer that it should be.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.length = os.fstat(self._fd).st_size
        except FileNotFoundError as e:
            raise NotFound(f"{path}: the layer file is missing") from e
        except OSError as e:
            raise RepositoryError(f"{path}: {e.strerror}") from e
        encoded = self.pread(0, HEADER_SIZE)
        self.header: LayerHeader = decode_header(encoded, path)
        self._seed = header_seed(encoded)
        self._lock = threading.Lock()
        self._trailer: LayerTrailer | None = None
        self._fences: Words = np.empty(0, np.uint64)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def is_current(self) -> bool:
        """Whether this file still has its name: gc may have put the layer, written again, in its place."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file from `offset` on.

        Raises:
            Corrupt: the file ends before, or the disk below can't read it.
        """
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    raise Corrupt(self.path, offset + len(data), "the file ends here, too early")
                data += more
        except (OSError, OverflowError) as e:
            raise Corrupt(self.path, offset, f"can't be read: {e}") from e
        return data

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset` on. Raises as `pread`."""
        try:
            done = os.preadv(self._fd, [buffer], offset)
        except (OSError, OverflowError) as e:
            raise Corrupt(self.path, offset, f"can't be read: {e}") from e
        if done < len(buffer):
            buffer[done:] = self.pread(offset + done, len(buffer) - done)

    def pread_at_once(self, offset: int, length: int) -> bytearray | None:
        """Return the same if the kernel has all of it in memory. Source: preadv2(2), RWF_NOWAIT."""
        buffer = bytearray(length)
        try:
            got = os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN; EOPNOTSUPP of file systems that can't tell
            return None
        return buffer if got == length else None

    def read_nothing_ahead(self) -> None:
        """Let the kernel read what is asked for and no more. Source: posix_fadvise(2)."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def forget_cached(self) -> None:
        """Let what is read next come from the disk. Source: posix_fadvise(2)."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def clone(self, offset: int, length: int, target: int, target_offset: int) -> None:
        """Have another file share the blocks of a range; all of it in multiples of the file system's block size.

        Raises:
            OSError: the file system can't, or they are on two. Source: ioctl_ficlonerange(2).
        """
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(self._fd, offset, length, target_offset))

    def trailer(self) -> LayerTrailer:
        """Return the checked trailer; the fences are loaded with it."""
        with self._lock:
            if self._trailer is None:
                place = max(self.length - TRAILER_SIZE, 0)
                trailer = decode_trailer(self.pread(place, min(TRAILER_SIZE, self.length)), self.length, self.path)
                if trailer.layer_id != self.header.layer_id:
                    raise Corrupt(self.path, place, "the trailer belongs to another layer")
                fences = self.pread(trailer.fences_offset, 8 * trailer.fence_count)
                if xxhash.xxh3_64_intdigest(fences) != trailer.fences_xxh3:
                    raise Corrupt(self.path, trailer.fences_offset, "the fences' checksum does not match")
                self._fences = np.frombuffer(fences, "<u8")
                self._trailer = trailer
            return self._trailer

    def rows(self, first: int = 0, end: int | None = None) -> Iterator[Rows]:
        """Yield the table's rows that cover chunks in [first, end), in order, hundreds at a time, each checked.

        A zero run that begins before `first` and reaches into the range is among them.

        Raises:
            Corrupt: a row's check does not match, or the rows are out of order.
        """
        trailer = self.trailer()
        group = max(int(np.searchsorted(self._fences, np.uint64(first), "right")) - 1, 0)
        last = trailer.fence_count if end is None else int(np.searchsorted(self._fences, np.uint64(end)))
        count = 1
        while group < last:
            count = min(count, last - group)
            rows = self._groups(trailer, group, count)
            group, count = group + count, min(2 * count, _GROUPS)
            if first or end is not None:
                spans = np.where(rows["codec"] == codec.ZERO, rows["length"], 1).astype(np.uint64)
                keep = rows["chunk_no"] + spans > first
                if end is not None:
                    keep &= rows["chunk_no"] < end
                rows = rows[keep]
            if len(rows):
                yield rows

    def _groups(self, trailer: LayerTrailer, group: int, groups: int) -> Rows:
        first = group * FENCE_ROWS
        count = min(FENCE_ROWS * groups, trailer.rows - first)
        offset = trailer.table_offset + first * ROW.itemsize
        rows = np.frombuffer(self.pread(offset, count * ROW.itemsize), ROW)
        wrong = np.flatnonzero(checks(rows, self._seed) != rows["check"])
        if len(wrong):
            raise Corrupt(self.path, offset + int(wrong[0]) * ROW.itemsize, "a row's check does not match")
        # Valid rows in the wrong place: only a misdirected write makes that.
        numbers = rows["chunk_no"]
        if np.any(numbers[::FENCE_ROWS] != self._fences[group : group + groups]) or np.any(numbers[1:] <= numbers[:-1]):
            raise Corrupt(self.path, offset, "the table's rows are out of order")
        return rows

    def next_chunk(self, first: int) -> int | None:
        """Return the first chunk at or after `first` that has a row, or None."""
        for rows in self.rows(first):
            return max(int(rows["chunk_no"][0]), first)
        return None


class LayerWriter:
    """Writes a layer to a temporary file.

    `append` may be called from several threads at once, with ranges of chunks that do not overlap. The rows wait in a
    second temporary file, so memory does not grow with the disk.
    """

    def __init__(self, path: str, header: LayerHeader) -> None:
        self.path = path
        self.header = header
        self._encoded = header.encode()
        self._seed = header_seed(self._encoded)
        self._lock = threading.Lock()
        self._end = self._begun = HEADER_SIZE  # where the next payload goes; up to where writing was begun
        self._gap = (0, 0)  # a place before that where payloads may still go: begin and end
        self._stored = 0
        self._data_chunks = 0
        self._batches: list[tuple[int, int, int]] = []  # first chunk, first row in the spool, rows
        self._spooled = 0
        self._fd = self._spool = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._spool = os.open(path + ".rows", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.unlink(path + ".rows")
            self._pwrite([self._encoded], 0)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError):
                raise _write_error(path, e) from e
            raise

    def append(self, rows: Rows, payloads: Sequence[bytes | memoryview]) -> None:
        """Write the payloads and keep their rows, whose `offset` is counted from the first payload.

        The rows are in order of `chunk_no`. The first payload lands on a multiple of 4 KiB if any of them is stored as
        it is; these come first.

        Raises:
            RepositoryError: no space, or the disk failed. The layer is then useless.
        """
        length = sum(len(p) for p in payloads)
        data = rows["codec"] != codec.ZERO
        aligned = bool(np.any(rows["codec"] == codec.NONE))
        with self._lock:
            start = self._reserve(length, aligned=aligned)
            spooled = self._spooled
            self._spooled += len(rows)
            self._stored += length
            self._data_chunks += int(np.count_nonzero(data))
            self._batches.append((int(rows["chunk_no"][0]), spooled, len(rows)))
            begun, due = self._begun, self._end - self._begun >= _WRITEBACK
            if due:
                self._begun = self._end
        rows["offset"][data] += np.uint64(start)
        try:
            for i in range(0, len(payloads), _IOV_MAX):
                part = payloads[i : i + _IOV_MAX]
                self._pwrite(part, start)
                start += sum(len(p) for p in part)
            _pwrite_all(self._spool, [memoryview(rows.tobytes())], spooled * ROW.itemsize)
            if due:
                _start_writeback(self._fd, begun, self._end - begun)
        except OSError as e:
            raise _write_error(self.path, e) from e

    def _reserve(self, length: int, *, aligned: bool) -> int:
        """Return where payloads go. What an alignment leaves free is filled with compressed ones that fit into it."""
        gap, end = self._gap
        if not aligned and length <= end - gap:
            self._gap = gap + length, end
            return gap
        start = round_up(self._end, ALIGNMENT) if aligned else self._end
        if start - self._end > end - gap:
            self._gap = self._end, start
        self._end = start + length
        return start

    def finish(self) -> LayerFacts:
        """Write the table and the trailer, and put all of it on the disk. Once, after every append has returned.

        Raises:
            RepositoryError: no space, or the disk failed. The file is never to be published then: after a failed
                fsync nobody knows what is on the disk.
        """
        try:
            return self._finish()
        except OSError as e:
            raise _write_error(self.path, e) from e

    def _finish(self) -> LayerFacts:
        digest = blake3.blake3(self._encoded)
        table_offset = position = round_up(self._end, ALIGNMENT)
        fences: list[Words] = []
        written, last = 0, -1
        for rows in self._sorted_rows():
            if int(rows["chunk_no"][0]) <= last or np.any(rows["chunk_no"][1:] <= rows["chunk_no"][:-1]):
                raise RepositoryError(f"{self.path}: a chunk was given twice; nothing was published")
            last = int(rows["chunk_no"][-1])
            rows["check"] = checks(rows, self._seed)
            fences.append(rows["chunk_no"][-written % FENCE_ROWS :: FENCE_ROWS])
            encoded = rows.tobytes()
            self._pwrite([encoded], position)
            digest.update(encoded)
            position += len(encoded)
            written += len(rows)
        fence_bytes = np.concatenate(fences).astype("<u8").tobytes() if fences else b""
        trailer = LayerTrailer(
            table_offset, written, self._data_chunks, xxhash.xxh3_64_intdigest(fence_bytes), self.header.layer_id
        )
        tail = fence_bytes + trailer.encode()
        self._pwrite([tail], position)
        digest.update(tail)
        os.ftruncate(self._fd, trailer.length)
        os.fchmod(self._fd, LAYER_MODE)
        os.fsync(self._fd)
        self.close()
        return LayerFacts(trailer.length, digest.hexdigest(), self._data_chunks, self._stored)

    def _sorted_rows(self) -> Iterator[Rows]:
        """Yield all rows in order of chunk_no, many at a time, from the spool."""
        held: list[Rows] = []
        count = 0
        for _, first, length in sorted(self._batches):
            data = os.pread(self._spool, length * ROW.itemsize, first * ROW.itemsize)
            held.append(np.frombuffer(data, ROW))
            count += length
            if count >= _COPY_ROWS:
                yield np.concatenate(held)
                held, count = [], 0
        if held:
            yield np.concatenate(held)

    def _pwrite(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        _pwrite_all(self._fd, buffers, offset)

    def close(self) -> None:
        """Close the files; the temporary layer stays for whoever publishes or removes it."""
        for fd in (self._fd, self._spool):
            if fd >= 0:
                os.close(fd)
        self._fd = self._spool = -1


def _pwrite_all(fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
    """Write every byte; a short write goes on where it ended."""
    views = [memoryview(b) for b in buffers]
    while views:
        done = os.pwritev(fd, views, offset)
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if views and done:
            views[0] = views[0][done:]


def _start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin to write this range now, so that the fsync at the end has little left to wait for.

    A hint: whether it helped is fsync's to say. Source: sync_file_range(2).
    """
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def _write_error(path: str, error: OSError) -> RepositoryError:
    return RepositoryError(f"writing {path}: {error.strerror}; nothing was published, and older points are untouched")
