"""Images for tests."""

import os
from collections.abc import Iterator
from pathlib import Path

from backupfs.extents import Extent
from backupfs.image import Buffer, check_range


class BytesImage:
    """An Image of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        if length:
            yield Extent(offset, length, False)

    def close(self) -> None:
        pass


class FileImage:
    """A file as an Image."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = os.pread(self._file.fileno(), len(buffer), offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        yield Extent(offset, length, False)

    def close(self) -> None:
        self._file.close()
