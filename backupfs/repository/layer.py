"""One layer file: the chunks that one disk got at one point, with the table that finds them.

`LayerWriter` is used by one backup, `write` from several threads at once; `Layer` reads, from any thread. A crash
leaves a temporary file that the next writer removes: a layer gets its name only when it is whole and on the disk.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import blake3
import numpy as np
import xxhash

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import codec, names
from backupfs.repository.datafile import DataFile
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
_GROUPS = 64  # of rows, read at a time: 900 KiB
_IOV_MAX = 512  # buffers per pwritev; Linux takes 1,024
_COPY_ROWS = 16 * 1024  # rows per write of the table
_SPOOL = ".rows"  # behind the layer's name, for the moment until it is open


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a finished layer file is, for the manifest."""

    length: int
    blake3: str  # of the header and of all from the footer table on; the table holds the chunks' own
    data_chunks: int
    stored_bytes: int  # payloads


class Layer:
    """A published layer, opened for reading.

    Attributes:
        path, length: of the layer's file, with header and table.
        data: the file with the payloads: the same, or in a plain layer the raw image beside it.

    Raises:
        Missing: there is no such file.
        Corrupt: it is not the layer that it should be.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = DataFile(path, "the layer file")
        self.length = self._file.length
        encoded = self.pread(0, HEADER_SIZE)
        self.header: LayerHeader = decode_header(encoded, path)
        self._seed = header_seed(encoded)
        self.data = self._file
        if self.header.plain:
            self.data = DataFile(raw_path(path), "the layer's raw image", filled_up=True)
            if self.data.length != self.header.virtual_size:
                what = f"the file should be {self.header.virtual_size} bytes long"
                raise Corrupt(self.data.path, self.data.length, what)
        self._lock = threading.Lock()
        self._trailer: LayerTrailer | None = None
        self._fences: Words = np.empty(0, np.uint64)

    @property
    def data_range(self) -> tuple[int, int]:
        """Where in `data` payloads may be: the first byte, and the one behind the last."""
        return (0, self.data.length) if self.header.plain else (HEADER_SIZE, self.trailer().table_offset)

    def is_current(self) -> bool:
        """Whether this file still has its name: gc may have put the layer, written again, in its place."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fd))
        except OSError:
            return False

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the layer's file, as `DataFile.pread`."""
        return self._file.pread(offset, length)

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
        if self.header.plain and not _is_plain(rows, self.header):
            raise Corrupt(self.path, offset, "the table of a plain layer has rows of chunks that lie elsewhere")
        return rows

    def next_chunk(self, first: int) -> int | None:
        """Return the first chunk at or after `first` that has a row, or None."""
        for rows in self.rows(first):
            return max(int(rows["chunk_no"][0]), first)
        return None


def raw_path(path: str) -> str:
    """Return the path of a plain layer's raw image."""
    return os.path.splitext(path)[0] + names.RAW


def _is_plain(rows: Rows, header: LayerHeader) -> bool:
    """Whether all chunks are stored as they are, each at its place on the disk."""
    offsets: Words = rows["chunk_no"] * np.uint64(header.chunk_size)
    place = (rows["offset"] == offsets) & (offsets < header.virtual_size)
    return bool(np.all(place & (rows["codec"] == codec.NONE) & (rows["length"] == header.chunk_size)))


class LayerWriter:
    """Writes a layer to a temporary file; the raw image of a plain one to another beside it.

    `append` may be called from several threads at once, with ranges of chunks that do not overlap. The rows wait in a
    second temporary file, so memory does not grow with the disk.
    """

    def __init__(self, path: str, header: LayerHeader) -> None:
        self.path = path
        self.header = header
        self.raw_path = raw_path(path) if header.plain else None
        self._encoded = header.encode()
        self._seed = header_seed(self._encoded)
        self._lock = threading.Lock()
        self._end = HEADER_SIZE  # where the next payload goes, or the table
        self._waiting = 0  # bytes that the kernel was not yet asked to write
        self._gap = (0, 0)  # a place before that where payloads may still go: begin and end
        self._stored = 0
        self._data_chunks = 0
        self._batches: list[tuple[int, int, int]] = []  # first chunk, first row in the spool, rows
        self._spooled = 0
        self._fd = self._spool = self._raw = -1
        try:
            self._fd, self._spool = _create(path), _create(path + _SPOOL)
            if self.raw_path:
                self._raw = _create(self.raw_path)
                os.ftruncate(self._raw, header.virtual_size)
            os.unlink(path + _SPOOL)
            _pwrite_all(self._fd, [self._encoded], 0)
        except OSError as e:
            self.remove()
            raise _write_error(path, e) from e

    def append(self, rows: Rows, payloads: Sequence[bytes | memoryview]) -> None:
        """Write the payloads and keep their rows, whose `offset` is counted from the first payload.

        The rows are in order of `chunk_no`. The first payload lands on a multiple of 4 KiB if any of them is stored as
        it is; these come first.

        Raises:
            RepositoryError: no space, or the disk failed. The layer is then useless.
        """
        length = sum(len(p) for p in payloads)
        data = rows["codec"] != codec.ZERO
        aligned, plain = bool(np.any(rows["codec"] == codec.NONE)), self.header.plain
        with self._lock:
            start = 0 if plain else self._reserve(length, aligned=aligned)
            spooled = self._spooled
            self._spooled += len(rows)
            self._stored += length
            self._data_chunks += int(np.count_nonzero(data))
            self._batches.append((int(rows["chunk_no"][0]), spooled, len(rows)))
            self._waiting += length
            due = self._waiting >= _WRITEBACK
            if due:
                self._waiting = 0
        try:
            if plain:
                rows["offset"] = rows["chunk_no"] * np.uint64(self.header.chunk_size)
                self._write_plain(rows["offset"].tolist(), payloads)
            else:
                rows["offset"][data] += np.uint64(start)
                _pwrite_all(self._fd, payloads, start)
            _pwrite_all(self._spool, [rows.tobytes()], spooled * ROW.itemsize)
            if due:
                _start_writeback(self._raw if plain else self._fd)
        except OSError as e:
            raise _write_error(self.path, e) from e

    def _write_plain(self, offsets: Sequence[int], payloads: Sequence[bytes | memoryview]) -> None:
        """Write chunks, each to its place on the disk: neighbours at once, the last one up to the disk's end."""
        size, first = self.header.chunk_size, 0
        for i in range(1, len(offsets) + 1):
            if i == len(offsets) or offsets[i] != offsets[i - 1] + size:
                run = [*payloads[first : i - 1], payloads[i - 1][: self.header.virtual_size - offsets[i - 1]]]
                _pwrite_all(self._raw, run, offsets[first])
                first = i

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
            _pwrite_all(self._fd, [encoded], position)
            digest.update(encoded)
            position += len(encoded)
            written += len(rows)
        fence_bytes = np.concatenate(fences).astype("<u8").tobytes() if fences else b""
        trailer = LayerTrailer(
            table_offset, written, self._data_chunks, xxhash.xxh3_64_intdigest(fence_bytes), self.header.layer_id
        )
        tail = fence_bytes + trailer.encode()
        _pwrite_all(self._fd, [tail], position)
        digest.update(tail)
        os.ftruncate(self._fd, trailer.length)
        for fd in (self._raw, self._fd):
            if fd >= 0:
                os.fchmod(fd, LAYER_MODE)
                os.fsync(fd)
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

    def close(self) -> None:
        """Close the files; the temporary layer stays for whoever publishes or removes it."""
        for fd in (self._fd, self._spool, self._raw):
            if fd >= 0:
                os.close(fd)
        self._fd = self._spool = self._raw = -1

    def remove(self) -> None:
        """Close and remove the temporary files, those that are there."""
        self.close()
        for path in filter(None, (self.path, self.path + _SPOOL, self.raw_path)):
            with contextlib.suppress(OSError):  # published; or the next writer removes it
                os.unlink(path)


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _pwrite_all(fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
    """Write every byte; a short write goes on where it ended."""
    for first in range(0, len(buffers), _IOV_MAX):
        views = [memoryview(b) for b in buffers[first : first + _IOV_MAX]]
        while views:
            done = os.pwritev(fd, views, offset)
            offset += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if views and done:
                views[0] = views[0][done:]


def _start_writeback(fd: int) -> None:
    """Ask the kernel to begin to write what it has of the file, so that the fsync at the end has little to wait for.

    A hint: whether it helped is fsync's to say. Source: sync_file_range(2).
    """
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def _write_error(path: str, error: OSError) -> RepositoryError:
    return RepositoryError(f"writing {path}: {error.strerror}; nothing was published, and older points are untouched")
