"""The chunks that lie in one open layer, checked against their hashes. From any thread.

Whatever is read from a layer is read as whole chunks and checked in our own memory, each time: what the kernel has in
its cache may have come from the disk a moment ago.
"""

import contextlib
import mmap
import os
import threading

import xxhash

from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.format import CODEC_SHIFT, LENGTH_MASK
from backupfs.repository.layer import Layer

_HUGE_PAGE = 2 << 20  # bytes


class Payloads:
    """What a layer stores.

    Attributes:
        whole: the `packed` of a chunk that is stored as it is.
    """

    def __init__(self, layer: Layer, chunk_size: int) -> None:
        self.layer = layer
        self.chunk_size = chunk_size
        self._fd = layer.data.fd
        self.whole = chunk_size | codec.NONE << CODEC_SHIFT
        self._reads_ahead = True

    def read_in_memory(self, offset: int, xxh3: int, into: list[memoryview]) -> bool:
        """Fill `into`, one buffer, with a chunk that is stored as it is if the kernel has all of it in memory.

        Does not wait for the disk, but the kernel may begin to read it. Source: preadv2(2), RWF_NOWAIT.

        Returns:
            Whether it did, and the chunk is right; else the buffer holds anything.
        """
        self._read_nothing_ahead()
        try:
            got = os.preadv(self._fd, into, offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN; EOPNOTSUPP of file systems that can't tell
            return False
        return got == self.chunk_size and xxhash.xxh3_64_intdigest(into[0]) == xxh3

    def chunk(self, offset: int, xxh3: int, packed: int) -> bytes:
        """Return one decoded and checked chunk.

        Args:
            offset: of its payload in the layer.
            xxh3: of the decoded chunk.
            packed: payload length and codec, as in a record.

        Raises:
            Corrupt: the bytes are not those that were written.
        """
        if packed == self.whole:
            self._read_nothing_ahead()
        return read_chunk(self.layer, offset, packed, xxh3, self.chunk_size)

    def read_run(self, offset: int, hashes: list[int], buffer: memoryview) -> None:
        """Fill `buffer` with chunks that are stored as they are, side by side from `offset` on, and check them.

        Raises:
            Corrupt: the bytes are not those that were written.
        """
        self._read_nothing_ahead()
        self.layer.data.pread_into(offset, buffer)
        size = self.chunk_size
        for i, xxh3 in enumerate(hashes):
            if xxhash.xxh3_64_intdigest(buffer[i * size : (i + 1) * size]) != xxh3:
                raise Corrupt(self.layer.data.path, offset + i * size, "the chunk's checksum does not match")

    def place(self, chunk_no: int, xxh3: int) -> tuple[int, int] | None:
        """Return where this file's own table has a chunk, offset and `packed`, if that is one with this hash.

        Raises:
            Corrupt: the table is damaged there.
        """
        for rows in self.layer.rows(chunk_no, chunk_no + 1):
            for row in rows:
                if row["codec"] != codec.ZERO and row["xxh3"] == xxh3:
                    return int(row["offset"]), int(row["length"]) | int(row["codec"]) << CODEC_SHIFT
        return None

    def _read_nothing_ahead(self) -> None:
        """Have the kernel read no more than it is asked for: that is a whole chunk at least."""
        if self._reads_ahead:
            self.layer.data.read_nothing_ahead()
            self._reads_ahead = False


def read_chunk(layer: Layer, offset: int, packed: int, xxh3: int, chunk_size: int) -> bytes:
    """Return one decoded and checked chunk.

    Args:
        layer: where it is stored.
        offset: of its payload in the layer.
        packed: payload length and codec, as in a record.
        xxh3: of the decoded chunk.
        chunk_size: bytes of the decoded chunk.

    Raises:
        Corrupt: the bytes are not those that were written.
    """
    length, codec_id = packed & LENGTH_MASK, packed >> CODEC_SHIFT
    if length > chunk_size or (codec_id == codec.NONE and length != chunk_size):
        raise Corrupt(layer.data.path, offset, f"a chunk of {length} stored bytes can't be")
    chunk = layer.data.pread(offset, length)
    if codec_id == codec.ZSTD:
        try:
            chunk = codec.decompress(chunk, chunk_size)
        except ValueError as e:
            raise Corrupt(layer.data.path, offset, f"the chunk can't be decompressed: {e}") from e
    elif codec_id != codec.NONE:
        raise Corrupt(layer.data.path, offset, f"unknown codec {codec_id}")
    if xxhash.xxh3_64_intdigest(chunk) != xxh3:
        raise Corrupt(layer.data.path, offset, "the chunk's checksum does not match")
    return chunk


class Run:
    """Whole chunks that are stored as they are, side by side in one layer: read at once."""

    def __init__(self, payloads: Payloads, offset: int, xxh3: int) -> None:
        self._payloads = payloads
        self._offset = offset
        self._hashes = [xxh3]

    def extend(self, payloads: Payloads, offset: int, xxh3: int) -> bool:
        """Take one more chunk in, if it comes next; return whether it does."""
        if payloads is not self._payloads or offset != self._offset + len(self._hashes) * payloads.chunk_size:
            return False
        self._hashes.append(xxh3)
        return True

    def read(self, buffer: memoryview) -> memoryview:
        """Read the chunks into the beginning of a buffer; return that part of it. Raises Corrupt."""
        view = buffer[: len(self._hashes) * self._payloads.chunk_size]
        self._payloads.read_run(self._offset, self._hashes, view)
        return view


class Scratch(threading.local):
    """Memory for runs, a piece for each thread: new memory costs as much as reading into it, and a kernel that writes
    it to the device looks up each of its pages.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(b"")

    def take(self, length: int) -> memoryview:
        """Return `length` bytes, which are the thread's until it takes some again."""
        if len(self._buffer) < length:
            memory = mmap.mmap(-1, -(-length // _HUGE_PAGE) * _HUGE_PAGE)
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._buffer = memoryview(memory)
        return self._buffer[:length]
