"""The chunks that lie in one open layer, checked against their hashes. From any thread.

A chunk that is stored as it is gets its check when it is first read; from then on only the bytes that are wanted are
read of it. So a layer that somebody changes while it is open is not found out by its hashes. Compressed chunks are
checked each time.
"""

import mmap
import threading

import xxhash

from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.format import CODEC_SHIFT, LENGTH_MASK
from backupfs.repository.layer import Layer


class Payloads:
    """What a layer stores.

    Attributes:
        whole: the `packed` of a chunk that is stored as it is.
    """

    def __init__(self, layer: Layer, chunk_size: int) -> None:
        self.layer = layer
        self.chunk_size = chunk_size
        self.whole = chunk_size | codec.NONE << CODEC_SHIFT
        # 31 bits of the hash that was found right, for each chunk_size bytes of the file: of chunks that do not overlap
        # only one can begin there. Of the hash, not only that it was: should the number of a layer ever stand for
        # another one, it is not taken for checked. Mapped: what nobody touches takes no memory.
        self._checked = memoryview(mmap.mmap(-1, 4 * (layer.length // chunk_size + 1))).cast("I")

    def is_checked(self, offset: int, xxh3: int) -> bool:
        """Whether the chunk that is stored as it is at `offset` was found to have this hash."""
        try:
            return self._checked[offset // self.chunk_size] == xxh3 & 0xFFFFFFFF | 1
        except IndexError:
            return False  # the file was cut off before it

    def check(self, chunk: bytes | memoryview, offset: int, xxh3: int) -> None:
        """Compare a decoded chunk with its hash. Raises Corrupt."""
        if xxhash.xxh3_64_intdigest(chunk) != xxh3:
            raise Corrupt(self.layer.path, offset, "the chunk's checksum does not match")

    def chunk(self, offset: int, xxh3: int, packed: int) -> bytes:
        """Return one decoded and checked chunk.

        Args:
            offset: of its payload in the layer.
            xxh3: of the decoded chunk.
            packed: payload length and codec, as in a record.

        Raises:
            Corrupt: the bytes are not those that were written.
        """
        chunk = read_chunk(self.layer, offset, packed, xxh3, self.chunk_size)
        if packed == self.whole:
            self.mark(offset, xxh3)
        return chunk

    def mark(self, offset: int, xxh3: int) -> None:
        """Remember that a chunk was found right."""
        self._checked[offset // self.chunk_size] = xxh3 & 0xFFFFFFFF | 1


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
        raise Corrupt(layer.path, offset, f"a chunk of {length} stored bytes can't be")
    chunk = layer.pread(offset, length)
    if codec_id == codec.ZSTD:
        try:
            chunk = codec.decompress(chunk, chunk_size)
        except ValueError as e:
            raise Corrupt(layer.path, offset, f"the chunk can't be decompressed: {e}") from e
    elif codec_id != codec.NONE:
        raise Corrupt(layer.path, offset, f"unknown codec {codec_id}")
    if xxhash.xxh3_64_intdigest(chunk) != xxh3:
        raise Corrupt(layer.path, offset, "the chunk's checksum does not match")
    return chunk


class Run:
    """Bytes of chunks that are stored as they are, side by side in one layer: read at once."""

    def __init__(self, payloads: Payloads, offset: int, length: int) -> None:
        self._payloads = payloads
        self._offset = offset
        self._length = length
        self._expected: list[tuple[int, int]] = []

    def extend(self, payloads: Payloads, offset: int, length: int) -> bool:
        """Take more bytes in, if they come next; return whether they do."""
        if payloads is not self._payloads or offset != self._offset + self._length:
            return False
        self._length += length
        return True

    def expect(self, offset: int, xxh3: int) -> None:
        """Have the chunk at `offset`, all of which is in the run, checked unless it was."""
        if not self._payloads.is_checked(offset, xxh3):
            self._expected.append((offset, xxh3))

    def read(self, buffer: memoryview) -> memoryview:
        """Read the bytes into the beginning of a buffer; return that part of it. Raises Corrupt."""
        payloads, view = self._payloads, buffer[: self._length]
        payloads.layer.pread_into(self._offset, view)
        for offset, xxh3 in self._expected:
            first = offset - self._offset
            payloads.check(view[first : first + payloads.chunk_size], offset, xxh3)
            payloads.mark(offset, xxh3)
        return view


class Scratch(threading.local):
    """Memory for runs, a piece for each thread: new memory costs as much as reading into it."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")

    def take(self, length: int) -> memoryview:
        """Return `length` bytes, which are the thread's until it takes some again."""
        if len(self._buffer) < length:
            self._buffer = memoryview(bytearray(length))
        return self._buffer[:length]
