"""Paths in guests' file systems: `VM/POINT/DISK:[VOLUME]/path`, and what they lead to."""

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from backupfs.errors import BackupfsError, GuestError, NotFound, UsageError
from backupfs.filesystem import Entry, FileSystem, Stat, printable
from backupfs.fuse.catalogue import ManyFiles
from backupfs.guest.detect import FAT, NTFS
from backupfs.repository import names
from backupfs.repository.repository import Repository
from backupfs.services import points
from backupfs.services.guest_files import GuestFiles, GuestVolume, open_point

MOST_LINKS = 40
DEEPEST = 512  # folders in folders
"""Who wants more has a loop."""
_ANY_CASE = (NTFS, FAT)


@dataclass(frozen=True, slots=True)
class GuestPath:
    """A path in a disk: `volume` may be empty, `path` has no slashes at its ends."""

    vm: str
    point: str
    disk: str
    volume: str
    path: bytes


def parse_inside(text: str) -> tuple[str, str, bytes]:
    """Return (disk, volume, path) of `DISK:[VOLUME]/path`. Raises UsageError."""
    disk, colon, inside = text.partition(":")
    volume, _, path = inside.partition("/")
    if not colon:
        raise UsageError(f"{text!r} is not DISK:[VOLUME]/path")
    return names.check_name(disk, "disk"), volume, path.encode(errors="surrogateescape").strip(b"/")


def parse_path(repository: Repository, text: str) -> GuestPath:
    """Return what `VM/POINT/DISK:[VOLUME]/path` stands for; the path may be left out.

    Raises:
        UsageError, NotFound: as points.parse_disk.
    """
    parts = text.split("/", 2)
    if len(parts) != 3:
        raise UsageError(f"{text!r} is not VM/POINT/DISK:[VOLUME]/path")
    disk, volume, path = parse_inside(parts[2] if ":" in parts[2] else f"{parts[2]}:")
    vm, point = points.parse_point(repository, "/".join(parts[:2]))
    return GuestPath(vm, point, disk, volume, path)


def choose(files: GuestFiles, where: str, volume: str) -> GuestVolume:
    """Return the volume of this name, or the only readable one if there is no name.

    Raises:
        UsageError: there are several.
        NotFound: there is none of this name.
        GuestError: nothing on the disk can be read.
    """
    listed = ", ".join(f"{v.name} ({v.kind or 'unknown'})" for v in files.volumes.values()) or "none"
    if volume:
        if volume not in files.volumes and not files.complete:
            raise GuestError(
                f"{where}: whether there is a volume {volume!r} can't be read: {'; '.join(files.problems)}"
            )
        if volume not in files.volumes:
            raise NotFound(f"{where} has no volume {volume!r}; there are: {listed}")
        return files.volumes[volume]
    readable = [v for v in files.volumes.values() if v.problem is None]
    if len(readable) > 1:
        raise UsageError(f"{where} has several volumes; name one, as in DISK:VOLUME/path: {listed}")
    if not readable:
        problems = [f"{v.name}: {v.problem}" for v in files.volumes.values()] + list(files.problems)
        raise GuestError(f"{where}: nothing on it can be read: {'; '.join(problems) or 'there is no volume'}")
    return readable[0]


@contextmanager
def open_volume(repository: Repository, path: GuestPath) -> Iterator[tuple[GuestVolume, ManyFiles]]:
    """Give the volume that a path is in, and its file system. Raises as `open_point` and `choose`."""
    where = f"{path.vm}/{path.point}/{path.disk}"
    with open_point(repository, path.vm, path.point, path.disk) as files:
        volume = choose(files, where, path.volume)
        with closing(volume.open()) as system:
            yield volume, system


def look_up(system: FileSystem, path: bytes) -> Entry:
    """Return what a path stands for, from the root on, and its name in its folder, b"" for the root.

    Links on the way are followed inside; the last one is not. Where the guest's system goes by names without looking at
    their case, another case will do if it is the only one.

    Raises:
        NotFound: there is no such path.
        GuestError: it can't be read, or goes in circles.
    """
    trail = [Entry(b"", system.stat(system.root))]
    left = [part for part in reversed(path.split(b"/")) if part]
    links = 0
    while left:
        name = left.pop()
        if name == b".":
            continue
        if name == b"..":
            trail = trail[:-1] or trail
            continue
        if not stat.S_ISDIR(trail[-1].stat.mode):
            raise NotFound(f"{printable(path)}: what comes before {printable(name)} is no folder")
        found = _named(system.list(trail[-1].stat.inode), name, any_case=system.kind in _ANY_CASE)
        if found is None:
            raise NotFound(f"there is no {printable(path)}: {printable(name)} is not there")
        if not found.stat.mode:
            found = Entry(found.name, system.stat(found.stat.inode))  # says what is wrong
        if left and stat.S_ISLNK(found.stat.mode):
            links += 1
            if links > MOST_LINKS or len(left) > 10_000:
                raise GuestError(f"{printable(path)}: too many symbolic links")
            target = system.readlink(found.stat.inode)
            if target.startswith(b"/"):
                trail = trail[:1]
            left += [part for part in reversed(target.split(b"/")) if part]
            continue
        trail.append(found)
    return trail[-1]


def _named(entries: Sequence[Entry], name: bytes, *, any_case: bool) -> Entry | None:
    """Return the entry of a name. Raises NotFound: only several others differ from it in nothing but case."""
    for entry in entries:
        if entry.name == name:
            return entry
    wanted = _upper(name) if any_case else ""
    others = [entry for entry in entries if wanted and _upper(entry.name) == wanted]
    if len(others) > 1:
        names_there = ", ".join(printable(entry.name) for entry in others[:10])
        raise NotFound(f"there is no {printable(name)}, but in other cases: {names_there}")
    return others[0] if others else None


def _upper(name: bytes) -> str:
    """Return a name in upper case, letter by letter as Windows does it: no letter becomes two."""
    try:
        text = name.decode("utf-8", "surrogatepass")
    except UnicodeError:
        return ""  # such a name is in no NTFS or FAT
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in text)


def walk(
    system: FileSystem, root: Stat, complain: Callable[[bytes, BackupfsError], None]
) -> Iterator[tuple[bytes, Stat]]:
    """Yield (path, what it is) of everything below a folder, folders before what is in them.

    Args:
        complain: called with the path of what can't be read, itself or what is in it; the rest is yielded.
    """
    waiting: list[tuple[bytes, Stat, tuple[int, ...]]] = [(b"", root, (root.inode,))]
    while waiting:
        path, folder, above = waiting.pop()
        try:
            entries = system.list(folder.inode)
        except BackupfsError as e:
            complain(path, e)
            continue
        inner = []
        for entry in entries:
            inside, found = path + b"/" + entry.name, entry.stat
            if not found.mode:
                try:
                    found = system.stat(found.inode)
                except BackupfsError as e:
                    complain(inside, e)
                    continue
            yield inside, found
            if not stat.S_ISDIR(found.mode):
                continue
            if found.inode in above:
                complain(inside, GuestError("the folder is inside of itself"))
            elif len(above) >= DEEPEST:
                complain(inside, GuestError(f"more than {DEEPEST} folders in each other"))
            else:
                inner.append((inside, found, (*above, found.inode)))
        waiting += reversed(inner)
