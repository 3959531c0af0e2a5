"""Show a repository as a tree of files, and take that away again.

`mount` answers requests in this process (foreground), or in a child that it starts (background.py). A crash, or a
kill -9, leaves a dead mount (ENOTCONN), which the next `mount` or `unmount` there takes away. On the main thread.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from backupfs.errors import BackupfsError, MountError, NotFound, UsageError
from backupfs.fuse import mountpoint as places
from backupfs.fuse import session
from backupfs.fuse.catalogue import LIVE, DiskFile, PointEntry, TextFile
from backupfs.image import Image
from backupfs.repository.catalog import cache_folder
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository
from backupfs.services import background, hydrated
from backupfs.services.folders import is_inside
from backupfs.services.guest_folders import GuestFolders
from backupfs.services.live import Exports, LiveCatalogue, LiveDisks, check_exports
from backupfs.services.overlay import OverlayImage
from backupfs.services.scratch import Disk, ScratchFolder
from backupfs.services.volumes import Volumes
from backupfs.sources.live_link import Export
from backupfs.units import MiB, parse_time

log = logging.getLogger(__name__)

_PR_SET_IO_FLUSHER = 57  # Source: <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # Source: <malloc.h>


class RepositoryCatalogue:
    """What a repository has to show, and the live disks beside it. From any thread."""

    def __init__(self, repository: Repository, live: LiveDisks, scratch: ScratchFolder | None = None) -> None:
        self._repository = repository
        self._live = live
        self._scratch = scratch
        self._volumes = Volumes()
        self._guests = GuestFolders()

    def vms(self) -> Sequence[str]:
        """Return the names of the VMs."""
        return sorted({*self._repository.vms(), *self._live.vms()})

    def points(self, vm: str) -> Mapping[str, int]:
        """Return a VM's points, oldest first, with their times; and LIVE."""
        points = {point: time_of(point) for point in self._repository.points(vm)}
        return points | ({LIVE: self._live.begun_ns} if vm in self._live.vms() else {})

    def point(self, vm: str, point: str) -> PointEntry:
        """Return the files of a point, or of LIVE. Raises NotFound, Corrupt."""
        if point == LIVE:
            return self._live.entry(vm)
        manifest = self._repository.manifest(vm, point)
        disks = [self._disk(vm, point, disk) for disk in manifest.disks]
        files: list[DiskFile | TextFile] = [*disks]
        if self._scratch:
            raws = zip(manifest.disks, disks, strict=True)
            files += [_writable(self._scratch, vm, point, disk.name, raw) for disk, raw in raws]
        files.append(TextFile("point.json", self._repository.manifest_json(vm, point)))
        if manifest.domain_xml is not None:
            files.append(TextFile("domain.xml", manifest.domain_xml.encode()))
        folders, guests = self._volumes.folders(vm, point, disks), self._guests.folders(vm, point, disks)
        return PointEntry(time_of(point), files, folders, guests)

    def usage(self) -> os.statvfs_result:
        """Return the use of the file system that the repository is on."""
        return os.statvfs(self._repository.path)

    def _disk(self, vm: str, point: str, disk: DiskEntry) -> DiskFile:
        facts = {"vm": vm, "point": point, "disk": disk.name, "kind": disk.kind, "chain": disk.chain}
        facts |= {"data_bytes": str(disk.data_bytes), "digest": disk.digest}

        def open_image() -> Image:
            image = self._repository.open_image(vm, point, disk.name)
            # The point may have been deleted, and another made under its id, since `disk` was read.
            if _version(self._repository.manifest(vm, point).disk(disk.name)) != _version(disk):
                image.close()
                raise NotFound(f"{vm}/{point}/{disk.name} is another now")
            return image

        return DiskFile(
            name=f"{disk.name}.raw",
            size=disk.size,
            allocated=disk.allocated_bytes,
            version=_version(disk),
            xattrs={f"user.backupfs.{name}": value.encode() for name, value in facts.items()},
            open=open_image,
            check=_check_map,
            raw=partial(hydrated.open_verified, self._repository, vm, disk),
        )


def _writable(scratch: ScratchFolder, vm: str, point: str, name: str, raw: DiskFile) -> DiskFile:
    """Return the writable view of a disk that is shown as `raw`."""
    key = Disk(vm, point, name, raw.version, raw.size)

    def open_image() -> Image:
        base = raw.open()
        try:
            return OverlayImage(base, scratch.changes(key), _check_map)
        except BaseException:
            base.close()
            raise

    def written() -> tuple[int, int | None]:
        own, time_ns = scratch.written(key)
        return min(raw.allocated + own, -(-raw.size // 512) * 512), time_ns

    def check(image: Image) -> None:
        if isinstance(image, OverlayImage):
            image.check_base()

    return DiskFile(
        name=f"{name}.rw",
        size=raw.size,
        allocated=raw.allocated,
        version=raw.version,
        xattrs={name: raw.xattrs[name] for name in ("user.backupfs.vm", "user.backupfs.point", "user.backupfs.disk")},
        open=open_image,
        check=check,
        written=written,
    )


def _version(disk: DiskEntry | None) -> str:
    return f"{disk.layer_id} {disk.digest} {disk.size}" if disk else ""


def _check_map(image: Image) -> None:
    if isinstance(image, PointImage):
        image.check_map()


def time_of(point: str) -> int:
    """Return the moment that a point's id names, in ns; the id is the UTC time, `-2` and on in a crowded second.

    The manifest has it too, but listing 10,000 points must not read 10,000 manifests.
    """
    return int(parse_time(point.partition("-")[0]).timestamp()) * 10**9


def mount(
    repository: str,
    mountpoint: str,
    *,
    foreground: bool,
    allow_other: bool,
    options: Sequence[str],
    live: Mapping[tuple[str, str], str] = MappingProxyType({}),
    passthrough: bool = True,
    scratch: str | None = None,
    keep_scratch: bool = False,
) -> None:
    """Show a repository at a folder.

    Args:
        repository: its path.
        mountpoint: a folder.
        foreground: answer requests in this process, until the mount is taken away; otherwise in another one, and
            return as soon as it answers.
        allow_other: let other users read it too.
        options: as mount(8) gives them with `-o`; checked, and dropped if they say what is so anyway.
        live: NBD exports to show beside the points: by VM and disk, their URIs. They need not be there.
        passthrough: have the kernel read hydrated disks by itself, if it can.
        scratch: a folder; every disk can then be written to as well, and what is written goes there.
        keep_scratch: keep that when the mount ends, and go on with what is there.

    Raises:
        UsageError: `live` has a name or a URI that is none; `keep_scratch` without `scratch`.
        NotFound, UnsupportedFormat, Corrupt: the repository can't be opened.
        MountError: it can't be mounted, the scratch can't be used, or the mount has crashed.
    """
    repository, mountpoint = os.path.abspath(repository), os.path.abspath(mountpoint)
    chosen = session.check_options(options)
    scratches = {o.removeprefix(session.SCRATCH) for o in chosen if o.startswith(session.SCRATCH)} | {scratch or ""}
    scratches = {os.path.abspath(folder) for folder in scratches if folder}
    keep_scratch = keep_scratch or "keep_scratch" in chosen
    if len(scratches) > 1:
        raise UsageError("--scratch and -o scratch= name different folders")
    if keep_scratch and not scratches:
        raise UsageError("--keep-scratch needs --scratch FOLDER")
    how = _How(
        allow_other or "allow_other" in chosen,
        passthrough and "no_passthrough" not in chosen,
        {place: Export(uri) for place, uri in live.items()},
        scratches.pop() if scratches else None,
        keep_scratch,
    )
    check_exports(how.live)
    if foreground:
        _run(repository, mountpoint, how)
    else:
        _start(repository, mountpoint, how)


def show_exports(exports: Exports, mountpoint: str, *, allow_other: bool, on_ready: Callable[[], None]) -> None:
    """Show live disks alone, without a repository; in this process, until the mount is taken away.

    Raises:
        UsageError: a name or a URI that is none.
        MountError: it can't be mounted, or the mount has crashed.
    """
    check_exports(exports)
    disks = LiveDisks(exports)
    disks.begin()
    try:
        catalogue = LiveCatalogue(disks)
        session.run(catalogue, mountpoint, source="backupfs:live", allow_other=allow_other, on_ready=on_ready)
    finally:
        disks.close()


def unmount(mountpoint: str) -> None:
    """Take a mount away, a dead one too; it is gone when this returns.

    Raises:
        MountError: nothing of ours is mounted there, or it is in use.
    """
    places.take_away(mountpoint)


@dataclass(frozen=True, slots=True)
class _How:
    allow_other: bool
    passthrough: bool
    live: Exports
    scratch: str | None
    keep_scratch: bool


def _start(repository: str, path: str, how: _How) -> None:
    arguments = ["-r", repository, "mount", "--foreground", *(["--allow-other"] if how.allow_other else [])]
    arguments += [] if how.passthrough else ["--no-passthrough"]
    arguments += [f"--live={vm}/{disk}={export.uri}" for (vm, disk), export in how.live.items()]
    arguments += [f"--scratch={how.scratch}"] if how.scratch else []
    arguments += ["--keep-scratch"] if how.keep_scratch else []
    arguments.append(path)
    try:
        background.start(arguments)
    except background.Died as e:
        path = places.resolve(path)
        mounted = places.find(path)
        if mounted and mounted.file_system == places.FILE_SYSTEM and places.is_dead(path):
            places.detach(path)
        raise MountError(f"{path}: {e}") from e


def _run(repository: str, path: str, how: _How) -> None:
    parent = background.waiting_parent()
    if parent:
        background.log_to_file(path)
        os.chdir("/")  # so that no file system is kept busy
    else:
        logging.basicConfig(format="backupfs: %(levelname)s: %(message)s", level=logging.INFO)
    try:
        _answer(repository, path, how, parent.ready if parent else lambda: None)
    except BackupfsError as e:
        if parent:
            log.error("%s", e)
            parent.failed(e)
        raise


def _answer(repository: str, path: str, how: _How, on_ready: Callable[[], None]) -> None:
    _bound_the_heap()
    opened = Repository.open(repository, chunk_cache=_chunk_cache())
    _check_apart(repository, path)
    scratch = None
    if how.scratch:
        scratch = ScratchFolder(how.scratch, repository, opened.settings.id, path, keep=how.keep_scratch)
        _serve_writes()

    def ready() -> None:
        log.info("%s is mounted at %s", repository, path)
        on_ready()

    source = f"backupfs:{repository}"
    disks = LiveDisks(how.live)
    disks.begin()
    catalogue = RepositoryCatalogue(opened, disks, scratch)
    all_returned = False
    try:
        # When this raises, the process is about to end, and a thread may still be in the repository: it stays open.
        all_returned = session.run(
            catalogue,
            path,
            source=source,
            allow_other=how.allow_other,
            on_ready=ready,
            passthrough=how.passthrough,
            writable=scratch is not None,
        )
    finally:
        disks.close()
        if scratch:
            scratch.close(all_returned=all_returned)
    log.info("%s: unmounted", path)
    if not all_returned:
        # A thread hangs in a read. Closing LMDB under it would crash; waiting for it might be for ever.
        logging.shutdown()
        os._exit(0)
    opened.close()


def _check_apart(repository: str, path: str) -> None:
    """Raise MountError if the mount would cover what answers for it, or lie in it: it would wait for itself."""
    mounted = places.find(places.resolve(path))
    if mounted and mounted.file_system == places.FILE_SYSTEM:
        return  # the session says what is wrong, and does not wait for who is there
    if is_inside(path, repository):
        raise MountError(f"{path} lies in the repository ({repository}): mount it elsewhere")
    needed = (repository, "the repository"), (cache_folder(), "the cache"), (background.log_path(path), "the log")
    for other, what in needed:
        if is_inside(other, path):
            raise MountError(f"{path}: {what} ({other}) lies in it, and would be covered: mount it elsewhere")


def _chunk_cache() -> int:
    """Return how much of decoded chunks to keep: a sixteenth of the memory, 32 MiB to 1 GiB.

    Without it a 4 KiB read of a compressed chunk costs 65 us of decompression, and of another one 12 us; with it 4.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // 16, 32 * MiB), 1024 * MiB)


def _serve_writes() -> None:
    """Tell the kernel that writes of its own may wait for us, those of a loop device on a disk.

    No allocation of our memory waits for such writes then, and none of our writes is held back until they are done.
    Only root may say so; else nothing changes. For the threads that are started later. Source: prctl(2).
    """
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def _bound_the_heap() -> None:
    """Make glibc give memory back: one heap a thread, and large arrays kept after use, would double what it takes.

    Source: mallopt(3).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # another C library has other habits
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, MiB // 4)  # fixed: by itself it grows to 32 MiB
        libc.mallopt(_M_TRIM_THRESHOLD, MiB)
