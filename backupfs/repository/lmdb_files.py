"""What LMDB's own files need that LMDB does not do: blocks for the lock file, and memory that is given back."""

import ctypes
import errno
import os

from backupfs.repository.files import open_regular

READERS = 1024
"""That may have an index open at once."""
_LOCK_FILE = 64 * READERS + 4096  # bytes, a few more than LMDB needs; it takes the length that is there
_MADV_DONTNEED = 4  # Source: <sys/mman.h>
_libc = ctypes.CDLL(None, use_errno=True)


def allocate_lock(path: str) -> None:
    """Give LMDB's lock file its blocks. LMDB makes it a hole and writes into it through a mapping: on a full file
    system that would be a SIGBUS.

    Raises:
        OSError: no space, or it is no file that may be written.
    """
    fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        length = os.fstat(fd).st_size or _LOCK_FILE
        # Not posix_fallocate, which would write where the file system can't do it, beside processes that use the file.
        if _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)):
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)


def address_of(path: str) -> int:
    """Return where this process has mapped a file, 0 when that can't be told. Source: proc(5), /proc/PID/maps."""
    try:
        inode = str(os.stat(path).st_ino)
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                span, _, offset, _, mapped, *_ = line.split()
                if mapped == inode and int(offset, 16) == 0 and line.rstrip().endswith("data.mdb"):
                    return int(span.partition("-")[0], 16)
    except OSError:
        pass
    return 0


def unmap(address: int, length: int) -> None:
    """Unmap pages of a mapping; the next access maps them again from the page cache."""
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTNEED)
