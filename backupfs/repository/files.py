"""Files and names that are on the disk when a call returns."""

import contextlib
import errno
import os
import stat

# What a disk, or a file system that is damaged, says; EINVAL: `open_regular` found no file. Not what a person has to
# put right, as EACCES.
_DAMAGE = {errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ELOOP}


def is_damage(error: OSError) -> bool:
    """Whether a file that can't be opened or read is damaged, and it is not for want of rights, memory or the like."""
    return error.errno in _DAMAGE


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file that has to be a regular one: nothing may wait for who writes into a FIFO. Raises OSError.

    With O_CREAT it is the owner's only; with O_NOFOLLOW a symbolic link is refused, and the error says so. Reading it
    is not written down on its disk where it is ours. Source: open(2), O_NOATIME.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK  # of a regular file O_NONBLOCK changes nothing
    try:
        try:
            fd = os.open(path, flags | os.O_NOATIME, 0o600)
        except PermissionError:
            fd = os.open(path, flags, 0o600)
    except OSError as e:
        if e.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", path) from e
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "is not a regular file", path)


def write_new(path: str, data: bytes) -> None:
    """Write a new file and put it on the disk. What can't be written whole is not there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def rename_new(temporary: str, path: str) -> None:
    """Rename without replacing. A hard link does both at once; where there are none, the writer lock has to do."""
    try:
        os.link(temporary, path)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from e
        os.rename(temporary, path)
        return
    os.unlink(temporary)


def make_folders(root: str, folder: str) -> None:
    """Make `folder` and its parents below `root`, each on the disk before the next."""
    if folder == root or os.path.isdir(folder):
        return
    make_folders(root, os.path.dirname(folder))
    os.mkdir(folder, 0o700)
    fsync_folder(os.path.dirname(folder))


def fsync_folder(folder: str) -> None:
    """Put a folder's names on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
