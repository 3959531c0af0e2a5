"""An offline image in a file or a block device, of any format that qemu-img knows, served by a qemu-nbd child.

The child lives as long as the source. It goes away with close(), with its last connection, and with this process,
however that ends. The socket's folder is removed as soon as the connections are made.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote

from backupfs.errors import ConnectError, SourceError, UsageError
from backupfs.sources.child import Child
from backupfs.sources.export import NbdSource

_PATH_LIMIT = 107  # bytes in the path of a UNIX socket. Source: unix(7)
# QEMU's locks on an image: a read lock on a byte says what its holder does, or what it does not bear of others.
# Source: QEMU block/file-posix.c, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE; BLK_PERM_WRITE is bit 1
_WRITER, _NO_WRITERS = 101, 201
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # Source: linux/fcntl.h; Python has no names for them before 3.14
_FLOCK = "hhqqi4x"  # struct flock of 64-bit machines: type, whence, start, length, pid
_LOCKED = "Is another process using the image"  # QEMU's words, since 2.10


class FileSource(NbdSource):
    """An image file. Made by `open_image` only."""

    def __init__(self, uri: str, bitmap: str | None, timeout_s: float, path: str) -> None:
        super().__init__(uri, bitmap, timeout_s, description=path)
        self.undo = ExitStack()  # what close gives back: the child, the lock

    def close(self) -> None:
        """See `Image.close`."""
        super().close()
        self.undo.close()


def open_image(path: str, bitmap: str | None, timeout_s: float) -> FileSource:
    """Open an image that no virtual machine uses at the moment; backing files are read through.

    Args:
        path: a file or a block device. Never a protocol of QEMU's, whatever it looks like.
        bitmap: a persistent bitmap of a qcow2 file. It is not used, and `bitmap_problem` says why, if there is none of
            that name, if it was not saved, or if it does not record.
        timeout_s: for qemu-img, for qemu-nbd to be ready, and for each answer.

    Raises:
        ConnectError: it can't be opened: the message says why.
    """
    full = path if path.startswith("/") else os.path.join(os.getcwd(), path)
    size = _file_size(path, full)
    with ExitStack() as undo:
        undo.callback(os.close, _keep_writers_out(path, full))
        info = _image_info(path, full, timeout_s)
        problem = None if bitmap is None else _bitmap_problem(info, bitmap)
        used = None if problem else bitmap
        with listening() as (listener, address):
            child = Child(_command(full, info["format"], used), listener)
            undo.callback(child.stop)
            try:
                source = FileSource(f"nbd+unix:///?socket={quote(address)}", used, timeout_s, path)
            except SourceError as e:
                words = child.stop().removeprefix("qemu-nbd: ")
                raise ConnectError(f"{path}: qemu-nbd does not serve it: {words or e}") from e
        source.undo = undo.pop_all()
    source.format = info["format"]
    source.bitmap_problem = problem or source.bitmap_problem
    if source.format == "raw" and size is not None:
        source.size = min(source.size, size)  # QEMU rounds up to whole sectors of 512 bytes
    return source


def _file_size(path: str, full: str) -> int | None:
    """Return a file's length, None for a block device. Raises ConnectError for anything else."""
    try:
        status = os.stat(full)
    except OSError as e:
        raise ConnectError(f"{path}: {e.strerror}") from e
    except ValueError as e:  # a NUL in it
        raise UsageError(f"{path!r} is not a path: {e}") from e
    if stat.S_ISDIR(status.st_mode):
        raise ConnectError(f"{path}: is a folder, not a disk image")
    if stat.S_ISBLK(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ConnectError(f"{path}: is neither a file nor a block device")
    if status.st_size == 0:
        raise ConnectError(f"{path}: is empty")
    return status.st_size


def _in_use(path: str) -> str:
    return (
        f"{path}: in use by another process, likely a running virtual machine; back that up through QMP, libvirt or "
        "its NBD export, or shut it down"
    )


def _keep_writers_out(path: str, full: str) -> int:
    """Refuse an image that is written to. As long as the descriptor that comes back is open, QEMU refuses to write.

    qemu-nbd does neither for a raw image: it would read from the disk of a running machine.
    """
    try:
        fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ConnectError(f"{path}: {e.strerror}") from e
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITERS, 1, 0))
        found = fcntl.fcntl(fd, _F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _WRITER, 1, 0))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(fd)
            raise ConnectError(_in_use(path)) from e
        return fd  # a file system without locks: QEMU does without, too
    if struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK:
        os.close(fd)
        raise ConnectError(_in_use(path))
    return fd


def _image_info(path: str, full: str, timeout_s: float) -> dict[str, Any]:
    """Return what qemu-img says about an image. Not with --force-share: an image in use is refused here."""
    try:
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "--", full], capture_output=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as e:
        raise ConnectError("qemu-img is not installed: install the package qemu-utils") from e
    except subprocess.TimeoutExpired as e:
        raise ConnectError(f"{path}: qemu-img did not look at it within {timeout_s:g} s") from e
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        if _LOCKED in words:
            raise ConnectError(_in_use(path))
        raise ConnectError(f"{path}: {words.removeprefix('qemu-img: ')}")
    info: dict[str, Any] = json.loads(done.stdout.decode(errors="replace"))
    return info


def _bitmap_problem(info: dict[str, Any], bitmap: str) -> str | None:
    """Say why a bitmap can't be trusted, or None. Source: qapi/block-core.json, Qcow2BitmapInfo."""
    if info["format"] != "qcow2":
        return f"a {info['format']} image has no dirty bitmaps"
    found = info.get("format-specific", {}).get("data", {}).get("bitmaps", [])
    flags = next((b["flags"] for b in found if b["name"] == bitmap), None)
    if flags is None:
        return f"the image has no dirty bitmap {bitmap!r}"
    if "in-use" in flags:
        return f"the dirty bitmap {bitmap!r} is inconsistent: QEMU did not end well, and did not save it"
    if "auto" not in flags:
        return f"the dirty bitmap {bitmap!r} is disabled: it does not know of later changes"
    return None


def _command(full: str, image_format: str, bitmap: str | None) -> list[str]:
    # Without --persistent qemu-nbd ends with its last connection.
    command = ["qemu-nbd", "--read-only", f"--format={image_format}", "--shared=8", "--cache=writeback"]
    return [*command, *([] if bitmap is None else [f"--bitmap={bitmap}"]), "--", full]


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """Yield a listening UNIX socket that only this user can connect to, and its path; remove the path at the end."""
    folder = tempfile.mkdtemp(prefix="backupfs-")
    if len(os.fsencode(folder)) + 5 > _PATH_LIMIT:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="backupfs-", dir="/tmp")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            address = os.path.join(folder, "nbd")
            listener.bind(address)
            listener.listen(16)
            yield listener, address
    finally:
        shutil.rmtree(folder, ignore_errors=True)
