"""Target: where a restored disk is written to. Raw files and block devices here; NBD exports in export_target.py."""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import Protocol

from backupfs.errors import TargetError
from backupfs.extents import Extent, coalesce
from backupfs.image import Buffer, Image, check_range
from backupfs.units import MiB

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # Source: linux/falloc.h
_BLKZEROOUT = 0x127F  # Source: linux/fs.h; its argument is two u64: offset and length
_BLKSSZGET = 0x1268
_SYNC_FILE_RANGE_WRITE = 2
_WRITEBACK = 8 * MiB
_NO_ZEROING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)
_ZEROES = bytes(MiB)
# QEMU's locks on an image: bytes 100 and on say what their holder does, 200 and on what it does not bear of others.
# Source: QEMU block/file-posix.c, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE; BLK_PERM_WRITE is bit 1
_LOCKS, _LOCKS_LENGTH, _WRITES, _NO_WRITERS = 100, 200, 101, 201
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # Source: linux/fcntl.h; Python has no names for them before 3.14
_FLOCK = "hhqqi4x"  # struct flock of 64-bit machines: type, whence, start, length, pid


class Target(Image, Protocol):
    """An Image that can be written to, too.

    `write`, `zero` and `flush` are called by one thread; what Image has by any, also meanwhile.
    """

    @property
    def description(self) -> str:
        """The path or the URI, for messages."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes there. It may come back before they are; `data` must not change any more.

        Raises:
            TargetError, SourceError: this, or something that was written before, failed.
        """

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, without writing them where that can be. As `write`."""

    def flush(self) -> None:
        """Wait until all that was written is on the disk. Raises as `write`."""


class FileTarget:
    """A raw file, or a block device. A Target.

    Args:
        fd: opened for reading and writing; it is closed with this.
        path: for messages.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.description = path
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._fd = fd
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        # Smaller pieces than a sector can't be zeroed in a device.
        self._unit = _sector_size(fd) if self._is_device else 1
        self._zeroing = True
        self._dirty_start = self._dirty_end = 0  # what was written since writing was begun last

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `Image.readinto`."""
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        while view:
            try:
                done = os.preadv(self._fd, [view], offset)
            except OSError as e:
                raise self._error("reading", e) from e
            if not done:
                raise TargetError(f"{self.description}: ends at offset {offset}: somebody else has made it shorter")
            view, offset = view[done:], offset + done

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Image.extents`: what the file system knows to be a hole is zero."""
        check_range(self, offset, length)
        if self._is_device:
            yield Extent(offset, length, False)
        else:
            yield from coalesce(self._holes(offset, offset + length))

    def _holes(self, position: int, end: int) -> Iterator[Extent]:
        while position < end:
            try:
                data = min(os.lseek(self._fd, position, os.SEEK_DATA), end)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise self._error("looking for holes in", e) from e
                data = end  # nothing but a hole to the file's end
            yield Extent(position, data - position, True)
            if data < end:
                try:
                    position = min(os.lseek(self._fd, data, os.SEEK_HOLE), end)
                except OSError as e:  # ENXIO: somebody else has made it shorter
                    raise self._error("looking for holes in", e) from e
                yield Extent(data, position - data, False)
            else:
                position = end

    def write(self, offset: int, data: memoryview) -> None:
        """See `Target.write`."""
        try:
            while data:
                done = os.pwrite(self._fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError as e:
            raise self._error("writing", e) from e
        self._dirty_end = offset
        if not self._dirty_start <= offset < self._dirty_start + _WRITEBACK:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Ask the kernel to begin to write now, so that the flush at the end has little left to wait for. A hint.

        Source: sync_file_range(2).
        """
        length = max(self._dirty_end - self._dirty_start, 0)
        _libc.sync_file_range(
            self._fd, ctypes.c_int64(self._dirty_start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE
        )
        self._dirty_start = self._dirty_end

    def zero(self, offset: int, length: int) -> None:
        """See `Target.zero`."""
        end = offset + length
        first, last = -(-offset // self._unit) * self._unit, end // self._unit * self._unit
        if first >= last or not self._zero_whole(first, last - first):
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, first)
        self._write_zeroes(last, end)

    def _zero_whole(self, offset: int, length: int) -> bool:
        """Let the kernel do it; say whether it could."""
        if not self._zeroing:
            return False
        try:
            if self._is_device:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
            else:
                _punch_hole(self._fd, offset, length)
        except OSError as e:
            if e.errno not in _NO_ZEROING:
                raise self._error("zeroing", e) from e
            self._zeroing = False
        return self._zeroing

    def _write_zeroes(self, offset: int, end: int) -> None:
        while offset < end:
            part = min(len(_ZEROES), end - offset)
            self.write(offset, memoryview(_ZEROES)[:part])
            offset += part

    def fileno(self) -> int:
        """Return the descriptor, which stays this target's."""
        return self._fd

    def flush(self) -> None:
        """See `Target.flush`."""
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise self._error("writing", e) from e

    def close(self) -> None:
        """See `Image.close`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _error(self, doing: str, e: OSError) -> TargetError:
        return TargetError(f"{doing} {self.description}: {e.strerror}")


def _sector_size(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def _punch_hole(fd: int, offset: int, length: int) -> None:
    mode = _PUNCH_HOLE | _KEEP_SIZE
    while _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def open_device(path: str) -> FileTarget:
    """Open a block device for writing, as the only one who uses it.

    Raises:
        TargetError: it is mounted or in use, or can't be opened.
    """
    try:
        # O_EXCL: the kernel refuses a device that is mounted, or part of a RAID or an LVM. Source: open(2)
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as e:
        words = "it is mounted, or something else uses it" if e.errno == errno.EBUSY else e.strerror
        raise TargetError(f"{path}: {words}") from e
    try:
        _lock_as_qemu(fd, path)  # which opens a device without O_EXCL. No flock: udev takes one for a moment
        return FileTarget(fd, path)
    except BaseException as e:
        os.close(fd)
        if isinstance(e, OSError):
            raise TargetError(f"{path}: {e.strerror}") from e
        raise


def open_file(path: str, size: int) -> FileTarget:
    """Open a raw file that is there, for writing in place, and make it `size` bytes long.

    Raises:
        TargetError: a virtual machine or another restore uses it, or it can't be opened.
    """
    return _sized(_open(path, os.O_RDWR), path, size)


def make_file(path: str, size: int) -> FileTarget:
    """Make a new raw file: a hole of `size` bytes. Raises TargetError."""
    return _sized(_open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), path, size)


def _open(path: str, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise TargetError(f"{path}: {e.strerror}") from e
    try:
        lock(fd, path)
        _check_name(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_name(fd: int, path: str) -> None:
    """Raise TargetError unless `path` is still the file that was locked: a restore that ended may have renamed it."""
    try:
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return
    except FileNotFoundError:
        pass
    raise TargetError(f"{path}: another process has just renamed or replaced it; nothing was written")


@contextlib.contextmanager
def held(path: str) -> Iterator[None]:
    """Keep other restores and QEMU away from a file that is to be replaced.

    Who has it open would go on with a file that has no name any more, and what it writes would be lost.

    Raises:
        TargetError: it is in use, or can't be opened.
    """
    fd = _open(path, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(fd)


def lock(fd: int, path: str) -> None:
    """Keep other restores and QEMU away from a file, as long as the descriptor is open.

    Raises:
        TargetError: it is in use.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        _judge(e, path)
    _lock_as_qemu(fd, path)


def _lock_as_qemu(fd: int, path: str) -> None:
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKS, _LOCKS_LENGTH, 0)
        if struct.unpack(_FLOCK, fcntl.fcntl(fd, _F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
            raise _in_use(path)
        for byte in (_WRITES, _NO_WRITERS):
            fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as e:
        _judge(e, path)


def _judge(error: OSError, path: str) -> None:
    """Raise what the refusal of a lock means, if it means anything."""
    if error.errno in (errno.EAGAIN, errno.EACCES):
        raise _in_use(path) from error
    # A file system without locks; NFS, where a flock needs a descriptor for writing (EBADF).
    if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
        raise TargetError(f"{path}: {error.strerror}") from error


def _in_use(path: str) -> TargetError:
    return TargetError(f"{path}: in use by another process: a running virtual machine, or another restore")


def _sized(fd: int, path: str, size: int) -> FileTarget:
    try:
        os.ftruncate(fd, size)
        return FileTarget(fd, path)
    except OSError as e:
        os.close(fd)
        raise TargetError(f"{path}: {e.strerror}") from e
