"""Image: the one interface of everything that can be read as a disk.

A stored point, a live export, a partition inside a point: each is an Image. Who holds one needs to know nothing of
where the bytes come from. All methods may be called from any thread, and from several at once.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from backupfs.extents import Extent, clip
from backupfs.units import MiB

Buffer = bytearray | memoryview

_SEEK_STEP = 16 * MiB


class Image(Protocol):
    """A disk that can be read."""

    @property
    def size(self) -> int:
        """The disk's size in bytes."""

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """Fill all of `buffer` with the disk's bytes from `offset` on.

        Raises:
            ValueError: the range is not inside the disk.
            BackupfsError: the bytes can't be had. `buffer` then holds anything.
        """

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover the range exactly, in order, with extents whose flag means: reads as zeroes.

        An extent without the flag may hold zeroes too.
        """

    def close(self) -> None:
        """Give everything back. Twice does no harm."""


@runtime_checkable
class Gatherer(Image, Protocol):
    """An image that can tell where its bytes lie in memory, which saves a copy."""

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        """Return the bytes of a range, not empty, as pieces in order. Raises as `readinto`.

        They are not to be written to, and good until the same thread calls again.
        """

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        """Fill `into`, one piece of memory, if that does not wait for a disk or work for long; return whether it did.

        If not, the memory then holds anything.
        """


def seek(image: Image, offset: int, whence: int) -> int:
    """Return where the next data or hole begins, as lseek(2) with SEEK_DATA or SEEK_HOLE; the end counts as a hole.

    Raises:
        OSError: ENXIO: at or behind the end, or no more data; EINVAL: another `whence`.
        BackupfsError: the extents can't be had.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, "not a seek for data or a hole")
    if not 0 <= offset < image.size:
        raise OSError(errno.ENXIO, "not inside the disk")
    # A part of the disk at a time: an image may look at all of a long extent before it tells of it.
    length = _SEEK_STEP
    while offset < image.size:
        length = min(length, image.size - offset)
        for extent in image.extents(offset, length):
            if extent.flag == (whence == os.SEEK_HOLE):
                return extent.offset
        offset, length = offset + length, 2 * length
    if whence == os.SEEK_DATA:
        raise OSError(errno.ENXIO, "no more data")
    return image.size


def check_range(image: Image, offset: int, length: int) -> None:
    """Raise ValueError unless the range lies inside the image."""
    if offset < 0 or length < 0 or offset + length > image.size:
        raise ValueError(f"range {offset}+{length} is not inside a disk of {image.size} bytes")


def gather(image: Image, offset: int, length: int) -> Sequence[Buffer | bytes]:
    """Return the bytes of a range of any image as pieces, as a Gatherer does. Raises as `readinto`."""
    if isinstance(image, Gatherer):
        return image.gather(offset, length)
    buffer = bytearray(length)
    image.readinto(offset, buffer)
    return (buffer,)


class ZeroImage:
    """A disk of zeroes; a Gatherer."""

    def __init__(self, size: int) -> None:
        self.size = size

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = bytes(len(buffer))

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        (memory,) = into
        if not 0 <= offset <= self.size - len(memory):
            return False
        memory[:] = bytes(len(memory))
        return True

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        return (bytes(length),)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        if length:
            yield Extent(offset, length, True)

    def close(self) -> None:
        pass


class BytesImage:
    """Bytes in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        if length:
            yield Extent(offset, length, False)

    def close(self) -> None:
        pass


class SliceImage:
    """A range of another image, as an image of its own; a Gatherer. Closing it closes the other."""

    def __init__(self, image: Image, offset: int, size: int) -> None:
        check_range(image, offset, size)
        self.size = size
        self._image = image
        self._offset = offset
        self._at_once = image.at_once if isinstance(image, Gatherer) else None

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        self._image.readinto(self._offset + offset, buffer)

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        if self._at_once is None or not 0 <= offset <= self.size - len(into[0]):
            return False
        return self._at_once(self._offset + offset, into)

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        return gather(self._image, self._offset + offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        for e in clip(self._image.extents(self._offset + offset, length), self._offset + offset, length):
            yield Extent(e.offset - self._offset, e.length, e.flag)

    def close(self) -> None:
        self._image.close()
