"""Writing a disk of a point back: to a new file, or into one, a block device or an NBD export that is there.

A new file grows as TARGET.backupfs-partial and gets its name when it is complete and on the disk, so a crash at any
moment leaves no half of a disk under that name. The same command goes on from what is there: each chunk of it is
compared with the point before it counts.
"""

import contextlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from backupfs.errors import BackupfsError, TargetError, UsageError
from backupfs.extents import Extent
from backupfs.repository import catalog
from backupfs.repository.files import fsync_folder, rename_new
from backupfs.repository.point import PointImage
from backupfs.repository.repository import SETTINGS, Repository
from backupfs.services.diskcopy import DiskCopy, Progress, Restored
from backupfs.sources import target as files
from backupfs.sources.target import Target
from backupfs.units import GiB, MiB, format_size

if TYPE_CHECKING:
    from backupfs.sources.export_target import NbdTarget

log = logging.getLogger(__name__)

PARTIAL = ".backupfs-partial"
_PART = 2 * MiB  # looked at at a time
_QCOW2 = b"QFI\xfb"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What the user asked for.

    Attributes:
        target: a path, or an NBD URI.
        format: of a file; None: not said, so raw.
        force: overwrite what is there.
        differential: the target is there, and much of it is right already: write only what differs.
    """

    vm: str
    point: str
    disk: str
    target: str
    format: Literal["raw", "qcow2"] | None = None
    force: bool = False
    differential: bool = False


def restore(repository: Repository, request: RestoreRequest, progress: Progress) -> Restored:
    """Write a disk of a point to where the user wants it. It is on the disk there when this returns.

    Raises:
        NotFound, Corrupt: the point can't be read.
        UsageError: the request makes no sense.
        TargetError: the target must not be overwritten, is too small, or can't be written.
        SourceError: the NBD server failed.
    """
    began = time.monotonic()
    with contextlib.closing(repository.open_image(request.vm, request.point, request.disk)) as image:
        image.check_map()
        done = Restored(
            vm=request.vm,
            point=request.point,
            disk=request.disk,
            target=request.target,
            format=request.format or "raw",
            size=image.size,
        )
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", request.target):
            _to_export(request, image, done, progress)
        else:
            _to_path(request, image, done, progress)
    done.seconds = round(time.monotonic() - began, 3)
    return done


def _to_export(request: RestoreRequest, image: PointImage, done: Restored, progress: Progress) -> None:
    from backupfs.sources.export_target import NbdTarget  # noqa: PLC0415, libnbd is not needed for files

    if not re.match(r"nbds?(\+unix|\+vsock)?://", request.target):
        raise UsageError(f"{request.target}: not a target; write a path or an NBD URI")
    if request.format == "qcow2":
        raise UsageError(f"{request.target}: what a server keeps its export in is its own: leave --format out")
    done.format = "nbd"
    with contextlib.closing(NbdTarget(request.target)) as target:
        _in_place(request, image, target, done, progress)


def _to_path(request: RestoreRequest, image: PointImage, done: Restored, progress: Progress) -> None:
    if request.target == "-":
        raise UsageError("a disk is not written to standard output; to a pipe, read DISK.raw of the mount")
    if not request.target or request.target.endswith("/"):
        raise UsageError(f"{request.target!r} names no file; write the file's own name")
    path = os.path.realpath(request.target)  # what a link leads to is meant: a rename would replace the link
    _refuse_ours(request, path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if request.differential:
            raise UsageError(f"{request.target} is not there: --differential is for a target that is") from None
        if path.startswith("/dev/") and not path.startswith("/dev/shm/"):  # noqa: S108
            # A new file there would fill the memory, and the device is what was meant.
            raise UsageError(f"{request.target}: there is no such device") from None
        _to_new_file(request, path, image, done, progress)
        return
    except OSError as e:
        raise TargetError(f"{request.target}: {e.strerror}") from e
    if stat.S_ISBLK(mode):
        if request.format == "qcow2":
            raise UsageError(f"{request.target} is a block device: it gets the raw disk; leave --format out")
        with contextlib.closing(files.open_device(path)) as target:
            _in_place(request, image, target, done, progress)
    elif not stat.S_ISREG(mode):
        raise TargetError(f"{request.target}: is neither a file nor a block device")
    elif request.differential:
        _into_file(request, path, image, done, progress)
    elif request.force:
        with files.held(path):
            _to_new_file(request, path, image, done, progress)
    else:
        raise TargetError(f"{request.target} is there: --force replaces it, --differential writes into it what differs")


def _refuse_ours(request: RestoreRequest, path: str) -> None:
    """Raise UsageError if the target lies where backups or hydrated disks are kept: --force would destroy them."""
    cache = os.path.realpath(catalog.cache_folder())
    folder = os.path.dirname(path)
    while True:
        if folder == cache or os.path.lexists(os.path.join(folder, SETTINGS)):
            what = "the cache" if folder == cache else "a repository"
            raise UsageError(f"{request.target} is inside {folder}, which is {what}; restore to another place")
        if folder == os.path.dirname(folder):
            return
        folder = os.path.dirname(folder)


def _in_place(request: RestoreRequest, image: PointImage, target: Target, done: Restored, progress: Progress) -> None:
    """Write to what is there and keeps its size."""
    _check_size(request, image, target)
    done.rest = target.size - image.size
    if request.differential:
        work = DiskCopy(image, target, done, progress, compare=True)
    else:
        blank = not request.force and _is_blank(request, target)
        work = DiskCopy(image, target, done, progress, blank=blank)
    with _telling_mixture(request, done):
        work.run()


@contextlib.contextmanager
def _telling_mixture(request: RestoreRequest, done: Restored) -> Iterator[None]:
    """Say what the target is when writing into it is broken off."""
    how = "the same command" if request.force or request.differential else "the same command with --differential"
    words = f"{request.target} is a mixture of what was there and the disk now; {how} makes it right"
    try:
        yield
    except BackupfsError:
        if done.written or done.zeroed:
            log.warning("%s", words)
        raise
    except KeyboardInterrupt as e:
        if done.written or done.zeroed:
            raise KeyboardInterrupt(words) from e
        raise


def _check_size(request: RestoreRequest, image: PointImage, target: Target) -> None:
    if target.size < image.size:
        raise TargetError(
            f"{request.target} has {target.size} bytes ({format_size(target.size)}), disk {request.disk} needs "
            f"{image.size} ({format_size(image.size)}); nothing was written"
        )


def _is_blank(request: RestoreRequest, target: Target) -> bool:
    """Return True; raise TargetError when the target has anything but zeroes."""
    buffer = memoryview(bytearray(_PART))
    zeroes = bytes(_PART)
    for extent in _data(target):
        for offset in range(extent.offset, extent.end, _PART):
            part = buffer[: min(_PART, extent.end - offset)]
            target.readinto(offset, part)
            if bytes(part) != zeroes[: len(part)]:
                raise TargetError(
                    f"{request.target} is not empty: there is data near offset {offset}; --force overwrites all of "
                    "it, --differential what differs"
                )
    return True


def _data(target: Target) -> Iterator[Extent]:
    for start in range(0, target.size, GiB):
        yield from (e for e in target.extents(start, min(GiB, target.size - start)) if not e.flag)


def _into_file(request: RestoreRequest, path: str, image: PointImage, done: Restored, progress: Progress) -> None:
    if request.format is None and _looks_like_qcow2(path):
        raise UsageError(f"{request.target} looks like qcow2: say --format qcow2, or --format raw if it is not")
    if request.format == "qcow2":
        from backupfs.sources.export_target import open_qcow2  # noqa: PLC0415, libnbd is not needed for raw

        with contextlib.closing(open_qcow2(path)) as image_file:
            _in_place(request, image, image_file, done, progress)
        return
    with contextlib.closing(files.open_file(path, image.size)) as target, _telling_mixture(request, done):
        DiskCopy(image, target, done, progress, compare=True).run()


def _looks_like_qcow2(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_QCOW2)) == _QCOW2
    except OSError as e:
        raise TargetError(f"{path}: {e.strerror}") from e


def _to_new_file(request: RestoreRequest, path: str, image: PointImage, done: Restored, progress: Progress) -> None:
    partial = path + PARTIAL
    with contextlib.ExitStack() as stack:
        stack.enter_context(_telling(partial))
        target: Target
        if request.format == "qcow2":
            target, done.resumed = _open_new_qcow2(partial, image.size)
            stack.callback(target.close)
            stack.enter_context(target.kept())
        else:
            target, done.resumed = _open_new_raw(partial, image.size)
            stack.callback(target.close)
        DiskCopy(image, target, done, progress, compare=done.resumed, blank=not done.resumed).run()
        _check_partial(partial)
        try:
            if request.force:
                os.rename(partial, path)
            else:
                rename_new(partial, path)
        except FileExistsError as e:
            raise TargetError(f"{path} has appeared meanwhile; the restored disk is {partial}") from e
        except OSError as e:
            raise TargetError(f"{path}: {e.strerror}; the restored disk is {partial}") from e
    try:
        fsync_folder(os.path.dirname(path))
    except OSError as e:
        raise TargetError(f"{path}: is there, but may not outlive a power cut: {e.strerror}") from e


@contextlib.contextmanager
def _telling(partial: str) -> Iterator[None]:
    """Say what is left when a restore is broken off."""
    try:
        yield
    except (BackupfsError, KeyboardInterrupt):
        if os.path.lexists(partial):
            log.warning("%s holds what was written so far; the same command goes on from there", partial)
        raise


def _open_new_raw(partial: str, size: int) -> tuple[Target, bool]:
    """Return the target, and whether an earlier restore left something there."""
    _drop_strange(partial)
    if os.path.lexists(partial):
        return files.open_file(partial, size), True
    return files.make_file(partial, size), False


def _open_new_qcow2(partial: str, size: int) -> "tuple[NbdTarget, bool]":
    from backupfs.sources import export_target as exports  # noqa: PLC0415, libnbd is not needed for raw

    _drop_strange(partial)
    if os.path.lexists(partial):
        # What a power cut left may have tables that give the same cluster away twice.
        if _looks_like_qcow2(partial) and exports.is_sound_qcow2(partial):
            target = exports.open_qcow2(partial)
            if size <= target.size < size + 512:
                return target, True
            target.close()
        os.unlink(partial)
    # Made here and not by qemu-img, whose files anybody may read.
    files.make_file(partial, 0).close()
    exports.make_qcow2(partial, size)
    return exports.open_qcow2(partial), False


def _drop_strange(partial: str) -> None:
    """Give the name up if the file is not what a restore leaves.

    One that was killed as it named its file leaves two names, and going on in it would be writing into the complete
    disk. In a folder like /tmp somebody else may have made it, to read the disk, or to change it afterwards.
    """
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(partial)
        private = found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if stat.S_ISREG(found.st_mode) and (found.st_nlink > 1 or not private):
            try:
                os.unlink(partial)
            except PermissionError as e:
                raise TargetError(f"{partial}: somebody else's file is in the way: {e.strerror}") from e


def _check_partial(partial: str) -> None:
    if not os.path.lexists(partial):
        raise TargetError(f"{partial}: somebody else took it away")
