"""Hydrate: put disks of a point together as plain raw files, from which a mount has the kernel read them by itself.

The bytes come through the checked reading of a restore; or the file system shares a layer's blocks with the file, where
chunks are stored as they are (codec none) and the cache is on the layers' own file system (XFS, Btrfs). Then all of
the file is read back, past the page cache where that can be, and compared with the BLAKE3 of every chunk, zeroes with
zeroes. Only after that it gets its name and its record (hydrated.py). A crash or Ctrl-C leaves nothing that counts.
A point that brought a plain layer has its raw image already: that is compared in the same way, and nothing is written.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backupfs.errors import BackupfsError, NotFound, TargetError, UsageError
from backupfs.extents import Extent
from backupfs.image import Buffer
from backupfs.repository.bulk import clone_chunks
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository
from backupfs.services import hydrated
from backupfs.services.diskcopy import DiskCopy, Progress, Restored
from backupfs.services.hydrated import Hydrated
from backupfs.sources.target import FileTarget, make_file
from backupfs.units import MiB, format_size

log = logging.getLogger(__name__)

_RESERVE = 64 * MiB  # left free on the cache's file system


@dataclass(frozen=True, slots=True, kw_only=True)
class HydratedDisk:
    """A hydrated disk. Sizes in bytes.

    Attributes:
        allocated: what the file takes beside the repository; what it shares with a layer counts, too.
        in_place: the file is a plain layer's, in the repository.
        shared: of that, what it shared with layers when it was made; None: it was there already.
    """

    vm: str
    point: str
    disk: str
    path: str
    size: int
    allocated: int
    in_place: bool
    shared: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HydrateRequest:
    """What the user asked for.

    Attributes:
        disks: only these; none: all.
        limit: bytes that all hydrated disks of the repository may take: the points that no mount has opened for longest
            go for it. None: as it may be.
    """

    vm: str
    point: str
    disks: Sequence[str] = ()
    limit: int | None = None


def hydrate(repository: Repository, request: HydrateRequest, progress: Progress) -> list[HydratedDisk]:
    """Hydrate a point's disks, those that are not yet. What is returned is on the disk.

    Raises:
        NotFound, Corrupt: no such point or disk, or it is damaged. Disks that were done before are hydrated.
        UsageError: the disks alone are larger than the limit.
        Locked: another process hydrates.
        TargetError: the cache can't be written, or gave back other bytes than were written.
    """
    entries = _entries(repository, request)
    needed = sum(entry.allocated_bytes for entry in entries if not entry.raw)
    if request.limit is not None and needed > request.limit:
        raise UsageError(
            f"{request.vm}/{request.point} takes {format_size(needed)}, more than the limit of "
            f"{format_size(request.limit)}"
        )
    with _told(), hydrated.lock(repository):
        return [_one(repository, request, entry, progress) for entry in entries]


def _entries(repository: Repository, request: HydrateRequest) -> list[DiskEntry]:
    manifest = repository.manifest(request.vm, request.point)
    for name in request.disks:
        if manifest.disk(name) is None:
            raise NotFound(f"point {request.vm}/{request.point} has no disk {name!r}")
    return [entry for entry in manifest.disks if not request.disks or entry.name in request.disks]


def _one(repository: Repository, request: HydrateRequest, entry: DiskEntry, progress: Progress) -> HydratedDisk:
    began, repository_id = time.monotonic(), repository.settings.id
    shared = None
    path = hydrated.image_path(repository, request.vm, entry)
    fd = hydrated.open_verified(repository, request.vm, entry)
    if fd is not None:
        os.close(fd)
        _make_room(repository_id, request, 0)
    else:
        with contextlib.closing(repository.open_image(request.vm, request.point, entry.name)) as image:
            image.check_map()
            if path is not None:
                shared = 0
                _verify_in_place(repository_id, request, entry, image, progress)
            else:
                _make_room(repository_id, request, entry.allocated_bytes)
                shared = _make(repository_id, request, entry, image, progress)
    path = path or hydrated.raw_path(repository_id, entry.layer_id)
    return HydratedDisk(
        vm=request.vm,
        point=request.point,
        disk=entry.name,
        path=path,
        size=entry.size,
        allocated=0 if entry.raw else os.stat(path).st_blocks * 512,
        in_place=bool(entry.raw),
        shared=shared,
        seconds=round(time.monotonic() - began, 3),
    )


def _make_room(repository_id: str, request: HydrateRequest, needed: int) -> None:
    """Take other points away until all are within the limit with `needed` bytes more."""
    if request.limit is None:
        return
    found = [(record, at) for record, at in hydrated.records(repository_id) if not record.in_place]
    sizes = {record.layer_id: hydrated.allocated(repository_id, record) for record, _ in found}
    used = needed + sum(sizes.values())
    last_used: dict[tuple[str, str], int] = {}
    for record, at in found:
        last_used[record.vm, record.point] = at  # the latest of its disks, as they come in that order
    for point in sorted(last_used, key=last_used.__getitem__):
        if used > request.limit and point != (request.vm, request.point):
            for record, _ in found:
                if (record.vm, record.point) == point:
                    hydrated.remove(repository_id, record)
                    used -= sizes[record.layer_id]


def _make(repository_id: str, request: HydrateRequest, entry: DiskEntry, image: PointImage, progress: Progress) -> int:
    """Make and verify a disk's file; return the bytes of it that are shared with layers."""
    part = hydrated.part_path(repository_id, entry.layer_id)
    target = make_file(part, entry.size)
    try:
        shared = clone_chunks(image, target.fileno())
        _check_space(part, entry.allocated_bytes - shared)
        os.fchmod(target.fileno(), 0o400)
        state = hydrated.state_of(target.fileno())
        done = _account(request, entry, entry.name)
        # What was cloned is compared with its hashes here; what could not be is written.
        DiskCopy(image, target, done, progress, compare=bool(shared), blank=not shared).run()
        if not shared or done.written or done.zeroed:
            state = hydrated.state_of(target.fileno())
            os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it comes from the disk
            again = _account(request, entry, f"{entry.name}, read back")
            DiskCopy(image, _ReadBack(target), again, progress, compare=True).run()
        hydrated.publish(repository_id, _record(request, entry, state, in_place=False), part)
    finally:
        target.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    return shared


def _verify_in_place(
    repository_id: str, request: HydrateRequest, entry: DiskEntry, image: PointImage, progress: Progress
) -> None:
    """Compare a plain layer's raw image with the BLAKE3 of every chunk, and where it has none with zeroes."""
    path = image.layer(0).data.path
    target = FileTarget(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), path)
    try:
        state = hydrated.state_of(target.fileno())
        os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it comes from the disk
        what = "the raw image is not what the layer's table says: backupfs verify --repair"
        DiskCopy(image, _ReadBack(target, what), _account(request, entry, entry.name), progress, compare=True).run()
        if hydrated.state_of(target.fileno()) != state:
            raise TargetError(f"{path}: somebody has changed it meanwhile")
        hydrated.publish_in_place(repository_id, _record(request, entry, state, in_place=True))
    finally:
        target.close()


def _record(request: HydrateRequest, entry: DiskEntry, state: hydrated.FileState, *, in_place: bool) -> Hydrated:
    return Hydrated(
        vm=request.vm,
        point=request.point,
        disk=entry.name,
        layer_id=entry.layer_id,
        digest=entry.digest,
        size=entry.size,
        file=state,
        in_place=in_place,
    )


def _account(request: HydrateRequest, entry: DiskEntry, name: str) -> Restored:
    return Restored(vm=request.vm, point=request.point, disk=name, target="", format="raw", size=entry.size)


def _check_space(part: str, needed: int) -> None:
    space = os.statvfs(os.path.dirname(part))
    free = space.f_bavail * space.f_frsize - _RESERVE
    if needed > free:
        raise TargetError(
            f"{os.path.dirname(part)}: {format_size(needed)} needed, {format_size(max(free, 0))} free; "
            "`backupfs dehydrate` takes points away, XDG_CACHE_HOME names another folder"
        )


class _ReadBack:
    """A target that has what is to be written already: a write is an error. A Target."""

    def __init__(self, target: FileTarget, what: str = "other bytes came back than were written: a bad disk") -> None:
        self.size = target.size
        self.description = target.description
        self._target = target
        self._what = what

    def readinto(self, offset: int, buffer: Buffer) -> None:
        self._target.readinto(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._target.extents(offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        self._refuse(offset)

    def zero(self, offset: int, length: int) -> None:
        self._refuse(offset)

    def _refuse(self, offset: int) -> None:
        raise TargetError(f"{self.description}: damaged at offset {offset}: {self._what}")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def dehydrate(repository: Repository, points: Sequence[tuple[str, str]] | None) -> list[HydratedDisk]:
    """Take hydrated disks away; who has one open reads on. Returns what went.

    Args:
        points: (VM, point); None: all.

    Raises:
        NotFound: a point has no hydrated disk; the others went.
        Locked, TargetError: as `hydrate`.
    """
    with _told(), hydrated.lock(repository):
        found = list_hydrated(repository)
        gone = [disk for disk in found if points is None or (disk.vm, disk.point) in points]
        for record, _ in hydrated.records(repository.settings.id):
            if points is None or (record.vm, record.point) in points:
                hydrated.remove(repository.settings.id, record)
    missing = set(points or ()) - {(disk.vm, disk.point) for disk in gone}
    for vm, point in sorted(missing):
        raise NotFound(f"{vm}/{point} is not hydrated; `backupfs hydrate --list` lists what is")
    return gone


def list_hydrated(repository: Repository) -> list[HydratedDisk]:
    """Return the hydrated disks of a repository, by VM, point and disk."""
    repository_id = repository.settings.id
    found = [
        HydratedDisk(
            vm=record.vm,
            point=record.point,
            disk=record.disk,
            path=hydrated.path_of(repository, record) or "",
            size=record.size,
            allocated=hydrated.allocated(repository_id, record),
            in_place=record.in_place,
        )
        for record, _ in hydrated.records(repository_id)
    ]
    return sorted(found, key=lambda disk: (disk.vm, disk.point, disk.disk))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the cache folder's file system says into an error of ours."""
    try:
        yield
    except BackupfsError:
        raise
    except OSError as e:
        raise TargetError(f"{e.filename or 'the cache folder'}: {e.strerror}") from e
