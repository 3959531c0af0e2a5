"""The folder that a mount's writable disks are written to: whose it is, what is in it, and what stays.

Without `keep` it holds files without a name, one for each disk that was written to: they are gone when the mount is,
however it ends. With `keep`:

    FOLDER/                              locked (flock) by the mount
      backupfs-scratch/                  0700, as all below
        about.json                       the repository's id
        VM/POINT/DISK/                   names escaped as in the repository
          about.json                     of which disk; written last: what lies here without it was never used
          data                           sparse, as long as the disk
          map                            one byte for each 4 KiB of it (blockmap.py), its space reserved

It is the user's own folder, and nobody else may write to it. All is opened from its descriptor on, and no link is
followed. What is kept is used for the very disk that it was begun on, or refused. From any thread.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from backupfs.errors import BackupfsError, MountError
from backupfs.repository import names
from backupfs.services.blockmap import PAGE, BlockMap
from backupfs.services.folders import is_inside
from backupfs.services.overlay import Changes, Files
from backupfs.units import KiB

log = logging.getLogger(__name__)

KEPT = "backupfs-scratch"
_FORMAT = 1
_ABOUT, _DATA, _MAP = "about.json", "data", "map"
_NEW = _ABOUT + ".new"
_LARGEST_ABOUT = 64 * KiB
_LAST_FLUSH_S = 30.0
_LOCK_S = 6.0  # a mount that was taken away may be about to end: session.py gives its checks 5
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a point. `version` differs when its content does; `size` in bytes."""

    vm: str
    point: str
    name: str
    version: str
    size: int

    @property
    def folders(self) -> tuple[str, str, str]:
        """The names of its folder and of those above."""
        return names.escape(self.vm), names.escape(self.point), names.escape(self.name)


class Refused(BackupfsError):
    """What is kept for a disk is another's, or damaged."""


class ScratchFolder:
    """The folder, locked for this mount.

    Args:
        path: of the folder, which is there.
        repository: the folder of the repository.
        repository_id: its id.
        mountpoint: where it is to be mounted.
        keep: keep what is written, and go on with what was kept.

    Raises:
        MountError: the folder can't be used, or what is kept in it must not be.
    """

    def __init__(self, path: str, repository: str, repository_id: str, mountpoint: str, *, keep: bool) -> None:
        self.path = os.path.realpath(path)
        self._keep = keep
        self._changes: dict[Disk, Changes] = {}
        self._lock = threading.Lock()
        for other, what in ((repository, "the repository"), (mountpoint, "the mount point")):
            if is_inside(self.path, other):
                raise MountError(f"--scratch {path}: it lies in {what}; name a folder of its own")
        try:
            self._fd = os.open(self.path, _FOLDER)
        except OSError as e:
            raise MountError(f"--scratch {path}: {e.strerror}; make it first: mkdir -m 700 {path}") from e
        try:
            self._check_private(path)
            self._take_lock(path)
            self._check_kept(repository_id)
        except OSError as e:
            os.close(self._fd)
            raise MountError(f"--scratch {path}: {e.strerror}") from e
        except BaseException:
            os.close(self._fd)
            raise

    def _check_private(self, path: str) -> None:
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid():
            raise MountError(f"--scratch {path} belongs to another user ({status.st_uid}); name a folder of your own")
        if status.st_mode & 0o022:
            raise MountError(f"--scratch {path}: others can write there; name a private folder, or chmod go-w {path}")
        os.close(self._new_file())  # can it be written to at all?

    def _take_lock(self, path: str) -> None:
        end = time.monotonic() + _LOCK_S
        while not self._locked():
            if time.monotonic() > end:
                raise MountError(f"--scratch {path}: another mount uses it; name another folder, or unmount that")
            time.sleep(0.05)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _check_kept(self, repository_id: str) -> None:
        about = {"format": _FORMAT, "repository": repository_id}
        with _opened(KEPT, self._fd) as kept:
            found = None if kept is None else _read_about(kept)
            if found is None and self._keep:
                with _made(KEPT, self._fd) as fd:
                    _write_about(fd, about)
            elif found is not None and not self._keep:
                raise MountError(
                    f"{self.path}/{KEPT} holds what a mount with --keep-scratch wrote; go on with it (--keep-scratch), "
                    "name another folder, or remove it"
                )
            elif found is not None and found != about:
                raise MountError(
                    f"{self.path}/{KEPT} belongs to another repository (or format): {json.dumps(found)[:200]}; "
                    "name another folder, or remove it"
                )

    def changes(self, disk: Disk) -> Changes:
        """Return the changes of a disk, the same each time.

        Raises:
            Refused: what is kept is of another disk, or damaged.
        """
        with self._lock:
            changes = self._changes.get(disk)
            if changes is None:
                changes = self._changes[disk] = self._load(disk) if self._keep else self._none(disk)
        return changes

    def written(self, disk: Disk) -> tuple[int, int | None]:
        """Return how many bytes the disk's changes take, and when it was last written to (ns), if it was."""
        changes = self._changes.get(disk)
        if changes is None and self._keep:
            with suppress(OSError, BackupfsError), self._folder_of(disk) as fd:
                if fd is not None:
                    status = os.stat(_DATA, dir_fd=fd, follow_symlinks=False)
                    return status.st_blocks * 512, status.st_mtime_ns
        return (changes.allocated, changes.written_ns) if changes else (0, None)

    def close(self, *, all_returned: bool) -> None:
        """Put what is kept on the disk; let everything else go.

        Args:
            all_returned: nobody is in any of the changes. If not, files stay open until the process ends.
        """
        flushing = threading.Thread(target=self._flush, daemon=True)
        flushing.start()
        flushing.join(None if all_returned else _LAST_FLUSH_S)
        if all_returned:
            for changes in self._changes.values():
                changes.close()
            os.close(self._fd)

    def _flush(self) -> None:
        for disk, changes in list(self._changes.items()):
            try:
                changes.flush()
            except (OSError, BackupfsError) as e:
                log.error("%s: what was written last could not be kept: %s", "/".join(disk.folders), e)

    # One disk.

    def _none(self, disk: Disk) -> Changes:
        return Changes(disk.size, BlockMap(disk.size), None, partial(self._make, disk))

    def _make(self, disk: Disk) -> Files:
        """Make the files of a disk that was not written to. Raises OSError."""
        if not self._keep:
            data = self._new_file()
            os.ftruncate(data, disk.size)
            return Files(data, None, f"{self.path} ({'/'.join(disk.folders)})")
        vm, point, name = disk.folders
        with _made(KEPT, self._fd) as kept, _made(vm, kept) as a, _made(point, a) as b, _made(name, b) as fd:
            for left in (_DATA, _MAP, _NEW):  # by a mount that was killed here
                with suppress(FileNotFoundError):
                    os.unlink(left, dir_fd=fd)
            data = map_ = -1
            try:
                data = os.open(_DATA, _FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd)
                map_ = os.open(_MAP, _FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd)
                os.ftruncate(data, disk.size)
                _reserve(map_, BlockMap(disk.size).pages * PAGE)
                os.fsync(data)
                os.fsync(map_)
                _write_about(fd, _about(disk))
            except BaseException:
                for file, what in ((data, _DATA), (map_, _MAP)):
                    if file >= 0:
                        os.close(file)
                        with suppress(OSError):
                            os.unlink(what, dir_fd=fd)
                raise
        return Files(data, map_, self._name(disk))

    def _load(self, disk: Disk) -> Changes:
        """Go on with what is kept of a disk. Raises Refused."""
        name, opened = self._name(disk), list[int]()
        try:
            with self._folder_of(disk) as fd:
                about = None if fd is None else _read_about(fd)
                if fd is None or about is None:
                    return self._none(disk)
                if about != _about(disk):
                    raise Refused(f"{name} was written over another disk ({json.dumps(about)[:300]}); remove it")
                for file, size in ((_DATA, disk.size), (_MAP, BlockMap(disk.size).pages * PAGE)):
                    opened.append(os.open(file, _FILE, dir_fd=fd))
                    status = os.fstat(opened[-1])
                    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                        raise Refused(f"{name}/{file} is damaged: {status.st_size} bytes, not {size}; remove {name}")
            block_map = _read_map(opened[1], disk.size, f"{name}/{_MAP}")
            files = Files(opened[0], opened[1], name)
            return Changes(disk.size, block_map, files, partial(self._make, disk))
        except OSError as e:
            _close(opened)
            raise Refused(f"{name}: what is kept can't be used: {e.strerror}") from e
        except BaseException:
            _close(opened)
            raise

    @contextmanager
    def _folder_of(self, disk: Disk) -> Iterator[int | None]:
        """Open a disk's folder; None: there is none."""
        vm, point, name = disk.folders
        with _opened(KEPT, self._fd) as kept, _opened(vm, kept) as a, _opened(point, a) as b, _opened(name, b) as fd:
            yield fd

    def _name(self, disk: Disk) -> str:
        return "/".join((self.path, KEPT, *disk.folders))

    def _new_file(self) -> int:
        """Make a file without a name."""
        with suppress(OSError):  # not every file system can
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        name = f".{KEPT}-{secrets.token_hex(8)}"
        fd = os.open(name, _FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._fd)
        os.unlink(name, dir_fd=self._fd)
        return fd


@contextmanager
def _opened(name: str, above: int | None) -> Iterator[int | None]:
    """Open a folder in another; None: it is not there. Raises OSError, Refused."""
    fd = None
    if above is not None:
        with suppress(FileNotFoundError):
            fd = os.open(name, _FOLDER, dir_fd=above)
    try:
        if fd is not None:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise MountError(f"{name} in the scratch folder is not private: it must be yours, with mode 0700")
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


@contextmanager
def _made(name: str, above: int) -> Iterator[int]:
    """Open a folder in another, made if it is not there, and on the disk. Raises OSError, MountError."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
        os.fsync(above)
    with _opened(name, above) as fd:
        if fd is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        yield fd


def _about(disk: Disk) -> dict[str, Any]:
    facts = {"vm": disk.vm, "point": disk.point, "disk": disk.name, "version": disk.version, "size": disk.size}
    return {"format": _FORMAT, **facts}


def _read_about(folder: int) -> Any:
    """Return what a folder is of; None: nothing says. Raises OSError; Refused: that can't be read."""
    try:
        fd = os.open(_ABOUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        content = file.read(_LARGEST_ABOUT)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return "not JSON"


def _write_about(folder: int, about: dict[str, Any]) -> None:
    """Say what a folder is of; on the disk when this returns, with all names in it."""
    with suppress(FileNotFoundError):
        os.unlink(_NEW, dir_fd=folder)
    fd = os.open(_NEW, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with open(fd, "wb") as file:
        file.write(json.dumps(about).encode())
        file.flush()
        os.fsync(file.fileno())
    os.rename(_NEW, _ABOUT, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _reserve(fd: int, size: int) -> None:
    """Make a file so long, with its space: what was taken into a full file system must be told to be there, too."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        os.ftruncate(fd, size)


def _read_map(fd: int, size: int, name: str) -> BlockMap:
    """Read a map that was kept; of its holes, nothing. Raises OSError, Refused."""
    block_map = BlockMap(size)
    position, end = 0, block_map.pages * PAGE
    while position < end:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA) // PAGE * PAGE
        except OSError as e:
            if e.errno == errno.ENXIO:  # no more data
                break
            raise
        if not block_map.load(position // PAGE, os.pread(fd, PAGE, position)):
            raise Refused(f"{name} is damaged at {position}; remove what is kept of this disk")
        position += PAGE
    return block_map


def _close(files: list[int]) -> None:
    for fd in files:
        os.close(fd)
