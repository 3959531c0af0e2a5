"""The chunks that lie in one open layer, checked against their hashes. From any thread.

Whatever comes from the disk is read as a whole chunk and checked. Of a chunk that is stored as it is, and was checked
before, a part may be read without that as long as the kernel still has it in memory, where the checked read left it
(at_hand.py): once it has to come from the disk again, it is checked again. What is not found out is
another program that changes the layer, or that brings a chunk, gone bad on the disk since, back into memory by reading
it.
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence

import xxhash

from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.format import CODEC_SHIFT, LENGTH_MASK
from backupfs.repository.layer import Layer

_HUGE_PAGE = 2 << 20  # bytes


class Payloads:
    """What a layer stores.

    Args:
        other: what was opened for the layer before and may still be in use. If it is the same file both have the same
            `marks`: what one of them reads from the disk, the other one finds in the kernel's memory.

    Attributes:
        fd: of the file with the payloads.
        whole: the `packed` of a chunk that is stored as it is.
        marks: which chunks were found right; see `mark`. The last one changes whenever another goes.
    """

    def __init__(self, layer: Layer, chunk_size: int, other: "Payloads | None" = None) -> None:
        self.layer = layer
        self.fd = layer.data.fd
        self.chunk_size = chunk_size
        self.whole = chunk_size | codec.NONE << CODEC_SHIFT
        self._remembers = False
        # 31 bits of the hash that was found right and of the offset, for each chunk_size bytes of the file: of chunks
        # that do not overlap only one can begin there. Not only that it was: gc may have written the layer again, and
        # who asks have another chunk in mind, or this one some blocks away. Mapped: what nobody touches takes no room.
        self.marks: memoryview
        if other is not None and os.path.samestat(os.fstat(self.fd), os.fstat(other.fd)):
            self.marks = other.marks
            self._read_nothing_ahead()
        else:
            self.marks = memoryview(mmap.mmap(-1, 4 * (layer.data.length // chunk_size + 2))).cast("I")

    def mark(self, offset: int, xxh3: int) -> tuple[int, int]:
        """Return the place in `marks` of the chunk that is stored as it is at `offset`, and what is there once it was
        found to have this hash. To be looked at after a part of it was read out of the kernel's memory, not before.

        Raises:
            IndexError: the file was cut off before it.
        """
        place = offset // self.chunk_size
        _ = self.marks[place]
        return place, _mark(offset, xxh3)

    def read_again(self, offset: int, hashes: Sequence[int], buffer: memoryview) -> bool:
        """Fill `buffer` with chunks that are stored as they are, side by side from `offset` on, if all of them were
        found to have these hashes and the kernel has them in memory. Returns whether it did; else it may hold anything.
        """
        first = offset // self.chunk_size
        places = slice(first, first + len(hashes))
        wanted = [_mark(offset + i * self.chunk_size, xxh3) for i, xxh3 in enumerate(hashes)]
        marks = self.marks
        forgotten = marks[-1]
        if marks[places].tolist() != wanted:
            return False
        try:
            got = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN; EOPNOTSUPP of file systems that can't tell
            return False
        # As in at_hand.py: the marks count when they are looked at afterwards.
        return got == len(buffer) and marks[places].tolist() == wanted and marks[-1] == forgotten

    def check(self, chunk: memoryview, offset: int, xxh3: int) -> None:
        """Compare a chunk that is stored as it is with its hash, and remember it. Raises Corrupt."""
        if xxhash.xxh3_64_intdigest(chunk) != xxh3:
            raise Corrupt(self.layer.data.path, offset, "the chunk's checksum does not match")
        self._remember(offset, xxh3)

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
            self.forget(offset, 1)
        chunk = read_chunk(self.layer, offset, packed, xxh3, self.chunk_size)
        if packed == self.whole:
            self._remember(offset, xxh3)
        return chunk

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

    def forget(self, offset: int, count: int) -> None:
        """Take chunks side by side for unchecked. Before they are read: what that brings into memory may be bad."""
        first = offset // self.chunk_size
        marks = self.marks[first : min(first + count, len(self.marks) - 1)]  # less of them where the file was cut off
        marks[:] = memoryview(bytes(4 * len(marks))).cast("I")
        self.marks[-1] = self.marks[-1] + 1 & 0xFFFFFFFF

    def _remember(self, offset: int, xxh3: int) -> None:
        if not self._remembers:
            self._read_nothing_ahead()
        place, mark = self.mark(offset, xxh3)
        self.marks[place] = mark

    def _read_nothing_ahead(self) -> None:
        self.layer.data.read_nothing_ahead()  # else the kernel brings chunks into memory that nobody checks
        self._remembers = True


def _mark(offset: int, xxh3: int) -> int:
    return (xxh3 + (offset >> 11)) & 0xFFFFFFFF | 1


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
        payloads, size = self._payloads, self._payloads.chunk_size
        view = buffer[: len(self._hashes) * size]
        if payloads.read_again(self._offset, self._hashes, view):
            return view
        payloads.forget(self._offset, len(self._hashes))
        payloads.layer.data.pread_into(self._offset, view)
        for i, xxh3 in enumerate(self._hashes):
            payloads.check(view[i * size : (i + 1) * size], self._offset + i * size, xxh3)
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
