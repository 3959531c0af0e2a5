"""Hydrated disks: disks of points as plain raw files in the cache folder, which the kernel may read by itself.

    ~/.cache/backupfs/hydrated/REPOSITORY/LAYER.raw    the disk, sparse; mode 0400
                                          LAYER.json   what it is, and what the file was like when it was found right
                                          lock         flock by who adds or removes

LAYER is the id of the layer that the disk got at its point. The file counts only with its record, and only as long as
its inode, size and times are those in the record: the kernel checks no hashes, so what was verified must be what is
read. A crash leaves files without a record, which count for nothing; the next `lock` removes them. From any thread.

The raw image of a plain layer is such a file already: there is a record of it, and no other file.
"""

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Iterator

import msgspec

from backupfs.errors import BackupfsError, Corrupt, Locked, NotFound
from backupfs.repository import catalog, layer
from backupfs.repository.files import fsync_folder, write_new
from backupfs.repository.manifest import DiskEntry, open_sealed, seal
from backupfs.repository.point import layer_path
from backupfs.repository.repository import Repository

log = logging.getLogger(__name__)

_PART = ".part"


class FileState(msgspec.Struct, frozen=True, kw_only=True):
    """What changes when a file does. The device's number is not among it: it may be another after a restart."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Hydrated(msgspec.Struct, frozen=True, kw_only=True):
    """A record: whose disk a file holds, and what the file was like when all of it had been verified.

    Attributes:
        in_place: the file is a plain layer's, in the repository.
    """

    vm: str
    point: str
    disk: str
    layer_id: str
    digest: str
    size: int
    file: FileState
    in_place: bool = False

    def is_of(self, entry: DiskEntry) -> bool:
        """Whether it holds this disk at this point."""
        return (self.layer_id, self.digest, self.size) == (entry.layer_id, entry.digest, entry.size)

    def fits(self, fd: int) -> bool:
        """Whether an open file is as it was."""
        return state_of(fd) == self.file and self.file.size == self.size


def folder(repository_id: str) -> str:
    """Return where a repository's hydrated disks are."""
    return os.path.join(catalog.cache_folder(), "hydrated", repository_id)


def raw_path(repository_id: str, layer_id: str) -> str:
    """Return the path of a hydrated disk."""
    return os.path.join(folder(repository_id), f"{layer_id}.raw")


def part_path(repository_id: str, layer_id: str) -> str:
    """Return the path of one in the making."""
    return raw_path(repository_id, layer_id) + _PART


def image_path(repository: Repository, vm: str, entry: DiskEntry) -> str | None:
    """Return the path of the raw image of a disk whose point brought a plain layer; None of others."""
    return layer.raw_path(layer_path(repository.path, vm, entry.name, entry.chain, entry.seq)) if entry.raw else None


def _record_path(repository_id: str, layer_id: str) -> str:
    return os.path.join(folder(repository_id), f"{layer_id}.json")


def state_of(fd: int) -> FileState:
    """Return what an open file is like now."""
    found = os.fstat(fd)
    return FileState(inode=found.st_ino, size=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns)


def open_verified(repository: Repository, vm: str, entry: DiskEntry) -> int | None:
    """Return a descriptor of the disk's file, or None where there is none that is as it was when it was verified.

    Reads no data. That it is used is remembered, for `hydrate --limit`. A plain layer's image is pinned by the
    descriptor: the kernel holds that for as long as it reads the file; when the mount's process has died, until the
    mount is taken away.
    """
    repository_id = repository.settings.id
    try:
        record = _read(_record_path(repository_id, entry.layer_id))
        fd = _open_file(repository, record, image_path(repository, vm, entry))
    except (OSError, BackupfsError):
        return None
    if (not record.in_place or _share(fd)) and record.is_of(entry) and record.fits(fd):
        with contextlib.suppress(OSError):
            os.utime(_record_path(repository_id, entry.layer_id))
        return fd
    os.close(fd)
    return None


def _share(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # gc asks just now; or there are no locks here
        return False
    return True


def _open_file(repository: Repository, record: Hydrated, image: str | None) -> int:
    """Open the file that a record is of; `image`: of a plain layer. Raises OSError."""
    if record.in_place:
        # Who owns the repository can make any point of his own; so he may own the image.
        return _open(image or "", os.stat(repository.path).st_uid)
    return _open(raw_path(repository.settings.id, record.layer_id))


def _open(path: str, owner: int = -1) -> int:
    """Open a regular file of ours, or of another owner's. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(fd)
    if found.st_uid in (os.geteuid(), owner) and stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022:
        return fd
    os.close(fd)
    raise PermissionError(path)


def _read(path: str) -> Hydrated:
    with open(_open(path), "rb") as file:
        return open_sealed(file.read(), path, Hydrated)


@contextlib.contextmanager
def lock(repository: Repository) -> Iterator[None]:
    """Be the only one who adds and removes. What crashes left goes, and what is of points that are gone.

    Raises:
        Locked: another process is at it.
        OSError: the folder can't be made or written.
    """
    repository_id = repository.settings.id
    place = folder(repository_id)
    os.makedirs(place, mode=0o700, exist_ok=True)
    fd = os.open(os.path.join(place, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Locked(f"{place}: another hydrate or dehydrate is at work; run it again when that is done") from e
        _clean(repository)
        yield
    finally:
        os.close(fd)


def _clean(repository: Repository) -> None:
    known = {f"{r.layer_id}.{suffix}" for r, _ in records(repository.settings.id) for suffix in ("raw", "json")}
    place = folder(repository.settings.id)
    for name in os.listdir(place):
        if name != "lock" and name not in known:
            os.unlink(os.path.join(place, name))
    for record, _ in records(repository.settings.id):
        if not _is_current(repository, record):
            remove(repository.settings.id, record)


def _is_current(repository: Repository, record: Hydrated) -> bool:
    """Whether the point is still there, and the file as it was."""
    try:
        entry = repository.manifest(record.vm, record.point).disk(record.disk)
        if entry is None or not record.is_of(entry):
            return False
    except NotFound:
        return False
    except Corrupt:
        pass  # nobody knows
    try:
        with open(_open_file(repository, record, path_of(repository, record)), "rb") as file:
            return record.fits(file.fileno())
    except OSError:
        return False


def path_of(repository: Repository, record: Hydrated) -> str | None:
    """Return the path of the file that a record is of; None: of a plain layer whose point can't be read."""
    if not record.in_place:
        return raw_path(repository.settings.id, record.layer_id)
    with contextlib.suppress(BackupfsError):
        entry = repository.manifest(record.vm, record.point).disk(record.disk)
        return image_path(repository, record.vm, entry) if entry else None
    return None


def records(repository_id: str) -> list[tuple[Hydrated, int]]:
    """Return what is hydrated and when each was last opened by a mount, or made, in ns; the longest unused first."""
    found = []
    place = folder(repository_id)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place):
            if name.endswith(".json"):
                path = os.path.join(place, name)
                with contextlib.suppress(OSError, BackupfsError):
                    record = _read(path)
                    if name == f"{record.layer_id}.json":
                        found.append((record, os.stat(path).st_mtime_ns))
    return sorted(found, key=lambda one: (one[1], one[0].layer_id))


def allocated(repository_id: str, record: Hydrated) -> int:
    """Return the bytes that a hydrated disk takes beside the repository; those that it shares with a layer too."""
    if record.in_place:
        return 0
    try:
        return os.stat(raw_path(repository_id, record.layer_id)).st_blocks * 512
    except FileNotFoundError:
        return 0


def publish_in_place(repository_id: str, record: Hydrated) -> None:
    """Write the record of a plain layer's image that was verified. Under `lock`. Raises OSError."""
    remove(repository_id, record)
    _write_record(repository_id, record)


def _write_record(repository_id: str, record: Hydrated) -> None:
    temporary = _record_path(repository_id, record.layer_id) + _PART
    try:
        write_new(temporary, seal(record))
        os.rename(temporary, _record_path(repository_id, record.layer_id))
        fsync_folder(folder(repository_id))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        remove(repository_id, record)  # a large file without a record would lie there until the next hydrate
        raise


def publish(repository_id: str, record: Hydrated, part: str) -> None:
    """Give a verified file its name and then its record. Under `lock`.

    Args:
        record: its `file` is what the file was like when its verification began.

    Raises:
        Corrupt: it has changed since.
        OSError: it can't be written.
    """
    path = raw_path(repository_id, record.layer_id)
    remove(repository_id, record)
    try:
        os.rename(part, path)
        with open(_open(path), "rb") as file:
            now = state_of(file.fileno())
        # A rename is a change of the inode: of all times that one alone is taken as it is now.
        if msgspec.structs.replace(now, ctime_ns=record.file.ctime_ns) != record.file:
            raise Corrupt(path, 0, "somebody else has changed it meanwhile")
        fsync_folder(folder(repository_id))
    except BaseException:
        remove(repository_id, record)
        raise
    _write_record(repository_id, msgspec.structs.replace(record, file=now))


def remove(repository_id: str, record: Hydrated) -> None:
    """Take a hydrated disk away. Who has it open reads on. Under `lock`."""
    for path in (_record_path(repository_id, record.layer_id), raw_path(repository_id, record.layer_id)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
