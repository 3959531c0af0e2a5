"""One file of the repository, opened for reading. From any thread."""

import contextlib
import fcntl
import os
import struct

from backupfs.errors import Corrupt, Missing, RepositoryError
from backupfs.repository.files import is_damage, open_regular

_FICLONERANGE = 0x4020940D  # Source: linux/fs.h
_CLONE_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range: source, its offset, length, the target's offset


class DataFile:
    """An open file.

    The descriptor is closed when the last reference goes, so a thread that still reads never meets another file
    under the same number.

    Args:
        path: of the file.
        what: it is, for messages.
        filled_up: behind its end the file reads as zeroes: the last chunk of a disk.

    Attributes:
        fd: not to be closed.
        length: bytes.

    Raises:
        Missing: there is no such file.
        Corrupt: the disk can't read it, or it is no file.
        RepositoryError: it can't be opened.
    """

    def __init__(self, path: str, what: str, *, filled_up: bool = False) -> None:
        self.path = path
        self.fd = -1
        self._filled_up = filled_up
        try:
            self.fd = open_regular(path)
            self.length = os.fstat(self.fd).st_size
        except (FileNotFoundError, NotADirectoryError) as e:
            raise Missing(path, f"{what} is missing") from e
        except OSError as e:
            if is_damage(e):
                raise Corrupt(path, 0, f"can't be opened: {e.strerror}") from e
            raise RepositoryError(f"{path}: {e.strerror}") from e

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file from `offset` on.

        Raises:
            Corrupt: the file ends before, or the disk below can't read it.
        """
        try:
            data = os.pread(self.fd, length, offset)
            while len(data) < length:
                more = os.pread(self.fd, length - len(data), offset + len(data))
                if not more:
                    if self._filled_up and offset + len(data) >= self.length:
                        return data.ljust(length, b"\0")
                    raise Corrupt(self.path, offset + len(data), "the file ends here, too early")
                data += more
        except (OSError, OverflowError) as e:
            raise Corrupt(self.path, offset, f"can't be read: {e}") from e
        return data

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset` on. Raises as `pread`."""
        try:
            done = os.preadv(self.fd, [buffer], offset)
        except (OSError, OverflowError) as e:
            raise Corrupt(self.path, offset, f"can't be read: {e}") from e
        if done < len(buffer):
            buffer[done:] = self.pread(offset + done, len(buffer) - done)

    def read_nothing_ahead(self) -> None:
        """Let the kernel read what is asked for and no more. Source: posix_fadvise(2)."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def forget_cached(self) -> None:
        """Let what is read next come from the disk. Source: posix_fadvise(2)."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def clone(self, offset: int, length: int, target: int, target_offset: int) -> None:
        """Have another file share the blocks of a range; all of it in multiples of the file system's block size.

        Raises:
            OSError: the file system can't, or they are on two. Source: ioctl_ficlonerange(2).
        """
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(self.fd, offset, length, target_offset))
