"""Copy a guest's files into a folder of the host: contents, holes, modes, owners, times, extended attributes.

The guest chose the names, the links and the modes. So everything is done relative to descriptors of folders that were
opened without following links; no device is made, and nothing becomes setuid.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Self

from backupfs.errors import BackupfsError, GuestError, TargetError
from backupfs.filesystem import Stat, printable
from backupfs.fuse.catalogue import ManyFiles
from backupfs.fuse.guest_xattrs import GuestXattrs
from backupfs.fuse.read_ahead import ReadAhead, is_small
from backupfs.services.copy_content import write_all, write_content
from backupfs.services.copy_parts import hold, remove_leftovers, temporary_name
from backupfs.services.guest_path import DEEPEST

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_COPIED = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO)
_DANGEROUS = stat.S_ISUID | stat.S_ISGID
_ACLS = b"system.posix_acl_"
_CAPABILITIES = b"security.capability"
_ZEROES = bytes(512)  # in what is no hole, or a part of one
_FOR_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # the next file would meet the same


Name = bytes  # which is a field's name in Report


@dataclass
class Report:
    """What was done.

    Attributes:
        files, bytes: copied; `there`: files that were there already, with the same size and time.
        left_out: devices and sockets. `harmless`: what was setuid, setgid or had capabilities, and is not any more.
        attributes: files of which the target does not keep the owner or all extended attributes.
        streams: alternate streams of NTFS that no extended attribute holds: not copied.
        failed: paths, and what went wrong.
    """

    files: int = 0
    bytes: int = 0
    there: int = 0
    left_out: int = 0
    harmless: int = 0
    attributes: int = 0
    streams: list[Name] = field(default_factory=list)
    failed: list[tuple[Name, str]] = field(default_factory=list)


Progress = Callable[[Report], None]


class Copier:
    """Copies into one folder. A context manager; one thread.

    Args:
        target: the folder; it exists.
        force: replace files that are there and differ.
        report: is added to. `progress` is called with it from time to time.

    Raises:
        TargetError: the target can't be written to at all, or is full. So does `copy`.
    """

    def __init__(self, target: str, *, force: bool, report: Report, progress: Progress) -> None:
        try:
            self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise TargetError(f"{target}: {e.strerror}") from e
        self._force = force
        self._report = report
        self._progress = progress
        # Of what has several names, by inode: one of them, from the root, and its inode here.
        self._names: dict[tuple[Hashable, int], tuple[bytes, int]] = {}
        self._tidied = set[tuple[int, int]]()  # folders
        self._is_root = os.geteuid() == 0
        # Four calls a folder: `_inside`, `_one`, `_copy`, `_copy_folder`.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * DEEPEST + 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def copy(self, system: ManyFiles, volume: Hashable, source: Stat, name: str) -> None:
        """Copy a file or folder.

        Args:
            volume: which one `system` is: of the same, what are hard links in it become hard links.
            name: what it is to be called; "": what is in the folder `source`, without itself.
        """
        self._system, self._volume = system, volume
        # Many small files of a folder, and many attributes, are asked for at once: a question takes 0.1 ms.
        self._ahead, self._xattrs = (
            ReadAhead(system.contents),
            GuestXattrs(system.xattrs, system.xattrs_of, errno.ENODATA),
        )
        self._tidy(self._root)
        if name:
            self._one(self._root, b"", os.fsencode(name), source, (source.inode,))
        else:
            self._inside(self._root, b"", source, (source.inode,))

    def _tidy(self, folder: int, *, is_new: bool = False) -> None:
        """Remove what a copy that was killed left in a folder, once: later it may be a guest's file of such a name."""
        status = os.fstat(folder)
        key = status.st_dev, status.st_ino
        if key not in self._tidied and not is_new:
            remove_leftovers(folder)
        self._tidied.add(key)

    def _inside(self, folder: int, path: bytes, source: Stat, above: tuple[int, ...]) -> None:
        """Copy what is in a folder."""
        entries = self._system.list(source.inode)
        found = {entry.name: entry.stat for entry in entries}
        self._ahead.note(found)
        self._xattrs.note(found)
        for entry in entries:
            self._one(folder, path, entry.name, entry.stat, (*above, entry.stat.inode))

    def _one(self, folder: int, path: bytes, name: bytes, source: Stat, above: tuple[int, ...]) -> None:
        """Copy one thing, and go on if it fails. `path`: of the folder, from the root, with a slash at its end."""
        try:
            self._copy(folder, path, name, source, above)
        except BackupfsError as e:
            self._report.failed.append((path + name, str(e)))
        except OSError as e:
            if e.errno in _FOR_ALL:
                raise TargetError(f"{printable(path + name)}: {e.strerror}; the same command goes on from here") from e
            self._report.failed.append((path + name, e.strerror or str(e)))
        self._progress(self._report)

    def _copy(self, folder: int, path: bytes, name: bytes, source: Stat, above: tuple[int, ...]) -> None:
        if not source.mode:
            source = self._system.stat(source.inode)  # says what is wrong
        kind = stat.S_IFMT(source.mode)
        if kind == stat.S_IFDIR:
            self._copy_folder(folder, path, name, source, above)
            return
        there = _status(folder, name)
        if kind not in _COPIED:
            self._report.left_out += 1
        elif there is not None and self._is_same(folder, name, source, there):
            self._report.there += 1
        elif there is not None and stat.S_ISDIR(there.st_mode):
            raise TargetError("a folder of that name is there, and is not replaced")
        elif there is not None and not self._force:
            raise TargetError("is there already, and differs; --force replaces it")
        else:
            with temporary_name(folder, name) as temporary:
                self._make(folder, temporary, source, path + name)
            self._report.files += 1
        if source.nlink > 1 and kind in _COPIED:
            made = os.stat(name, dir_fd=folder, follow_symlinks=False)
            self._names[self._volume, source.inode] = path + name, made.st_ino

    def _is_same(self, folder: int, name: bytes, source: Stat, there: os.stat_result) -> bool:
        if stat.S_IFMT(there.st_mode) != stat.S_IFMT(source.mode):
            return False
        if stat.S_ISLNK(source.mode):
            return os.readlink(name, dir_fd=folder) == self._system.readlink(source.inode)
        # Some file systems keep whole seconds, or less.
        near = abs(there.st_mtime_ns - source.mtime_ns) < 10**9 if there.st_mtime_ns % 10**9 == 0 else False
        return there.st_size == source.size and (near or there.st_mtime_ns == source.mtime_ns)

    def _make(self, folder: int, name: bytes, source: Stat, path: bytes) -> None:
        if source.nlink > 1 and self._link(folder, name, source):
            return
        if stat.S_ISLNK(source.mode):
            os.symlink(self._system.readlink(source.inode), name, dir_fd=folder)
            if self._is_root:
                os.chown(name, source.uid, source.gid, dir_fd=folder, follow_symlinks=False)
            if source.has_xattrs:
                place = os.fsencode(f"/proc/self/fd/{folder}/") + name  # no call takes a folder
                xattrs = self._xattrs.read(source.inode).values
                self._report.attributes += not _set_xattrs(place, xattrs, follow_symlinks=False)
            os.utime(name, ns=(source.atime_ns, source.mtime_ns), dir_fd=folder, follow_symlinks=False)
            return
        if stat.S_ISFIFO(source.mode):
            os.mkfifo(name, 0o600, dir_fd=folder)
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        else:
            file = os.open(name, _NEW, 0o600, dir_fd=folder)
            hold(file)
        try:
            if stat.S_ISREG(source.mode):
                content = self._small_content(source)
                if content is None:
                    write_content(self._system, source, file, self._note)
                else:
                    write_all(file, memoryview(content), 0)
                    self._note(len(content))
            self._finish(file, source, path)
        finally:
            os.close(file)

    def _small_content(self, source: Stat) -> bytes | None:
        """Return the content of a file; None: it is large, may have a hole, or has to be read alone."""
        if not source.size or not is_small(source):
            return None
        content = self._ahead.take(source.inode)
        if content is None:
            content = self._ahead.read(source.inode)
        return None if content is None or len(content) != source.size or _ZEROES in content else content

    def _link(self, folder: int, name: bytes, source: Stat) -> bool:
        """Make a hard link to what was copied already; return False if that is not there."""
        other, inode = self._names.get((self._volume, source.inode), (b"", 0))
        if not other:
            return False
        os.link(other, name, src_dir_fd=self._root, dst_dir_fd=folder, follow_symlinks=False)
        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino == inode:
            return True
        os.unlink(name, dir_fd=folder)  # another source has replaced it
        return False

    def _note(self, written: int) -> None:
        self._report.bytes += written
        self._progress(self._report)

    def _copy_folder(self, parent: int, path: bytes, name: bytes, source: Stat, above: tuple[int, ...]) -> None:
        if source.inode in above[:-1]:
            raise GuestError("the folder is inside of itself")
        if len(above) > DEEPEST:
            raise GuestError(f"more than {DEEPEST} folders are in each other; what is in this one is not copied")
        is_new = True
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            is_new = False
        folder = _open_folder(parent, name)
        try:
            self._tidy(folder, is_new=is_new)
            self._inside(folder, path + name + b"/", source, above)
            self._finish(folder, source, path + name)
        finally:
            os.close(folder)

    def _finish(self, file: int, source: Stat, path: bytes) -> None:
        """Set what is known of a file or folder; times last."""
        kept = True
        if self._is_root:
            try:
                os.fchown(file, source.uid, source.gid)
            except OSError:
                kept = False
        mode = stat.S_IMODE(source.mode)
        dangerous = bool(mode & _DANGEROUS) and not stat.S_ISDIR(source.mode)
        xattrs = dict(self._xattrs.read(source.inode).values) if source.has_xattrs else {}
        left_out = self._system.left_out(source.inode) if source.has_xattrs else ()
        dangerous |= xattrs.pop(_CAPABILITIES, None) is not None
        # An owner who may not write the file can't set xattrs either, so the mode comes after them; an ACL after that.
        kept &= _set_xattrs(file, {k: v for k, v in xattrs.items() if not k.startswith(_ACLS)})
        kept &= _remove_acls(file, xattrs)
        os.fchmod(file, mode if stat.S_ISDIR(source.mode) else mode & ~_DANGEROUS)
        kept &= _set_xattrs(file, {k: v for k, v in xattrs.items() if k.startswith(_ACLS)})
        os.utime(file, ns=(source.atime_ns, source.mtime_ns))
        self._report.harmless += dangerous
        self._report.attributes += not kept
        self._report.streams += [path + b":" + stream for stream in left_out]


def _status(folder: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _open_folder(parent: int, name: bytes) -> int:
    """Open a folder that is to be written into. What was copied already may have modes that its owner can't, either.

    Raises:
        TargetError: it is none.
    """
    try:
        place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as e:
        if e.errno in {errno.ENOTDIR, errno.ELOOP}:
            raise TargetError(f"is there already, and is no folder ({e.strerror})") from e
        raise
    try:
        status = os.fstat(place)
        if status.st_uid == os.geteuid() != 0 and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            # By its descriptor: its name may be another's by now.
            os.chmod(f"/proc/self/fd/{place}", stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
        return os.open(b".", _FOLDER, dir_fd=place)
    finally:
        os.close(place)


def _remove_acls(file: int, wanted: Container[bytes]) -> bool:
    """Remove the ACLs that are not the guest's but come from the folder above; return whether that could be done.

    Before the mode is set: as long as there is an ACL its group is the ACL's mask.
    """
    try:
        for name in map(os.fsencode, os.listxattr(file)):
            if name.startswith(_ACLS) and name not in wanted:
                os.removexattr(file, name)
    except OSError as e:
        return e.errno == errno.EOPNOTSUPP
    return True


def _set_xattrs(file: int | bytes, xattrs: Mapping[bytes, bytes], *, follow_symlinks: bool = True) -> bool:
    """Set extended attributes; return whether all of them could be."""
    kept = True
    for key, value in xattrs.items():
        try:
            os.setxattr(file, key, value, follow_symlinks=follow_symlinks)
        except OSError:
            kept = False
    return kept
