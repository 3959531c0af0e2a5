"""In which points is a file, and where did it change? All points of a VM, oldest first."""

import fnmatch
import hashlib
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from backupfs.errors import BackupfsError, GuestError, NotFound, UsageError
from backupfs.filesystem import FileSystem, Stat, printable
from backupfs.repository.repository import Repository
from backupfs.services.diff import differences
from backupfs.services.guest_files import GuestVolume, open_point
from backupfs.services.guest_path import GuestPath, choose, look_up, walk
from backupfs.units import MiB

_Found = dict[tuple[str, bytes], Stat]  # (volume, path)


@dataclass(frozen=True, slots=True)
class Problem:
    """What could not be looked at."""

    where: str
    what: str


def find(
    repository: Repository, vm: str, pattern: str, disk: str | None, complain: Callable[[Problem], None]
) -> Iterator[dict[str, Any]]:
    """Yield, for each path, where it is: `disk`, `volume`, `path` (bytes), and `points`: of each point in which it is
    other than in the one before `point`, `change` ("new", "changed", "gone"), and unless gone `stat`; with `last`, the
    last point that has it so.

    Args:
        pattern: a name or glob, compared with the last part of a path; with a slash in it with all of it.
        disk: only this one.
        complain: called with what can't be read; its paths are not told to be gone.

    Raises:
        NotFound: there is no such VM, or no point of it has such a disk.
    """
    repository.resolve(vm, "latest")
    if disk is not None:
        _refuse_unknown(repository, vm, disk)
    matches = _matcher(pattern)
    # disk -> the point it was last looked at, what was found there, and the disks that it lies on
    seen: dict[str, tuple[str, _Found, frozenset[str]]] = {}
    paths: dict[tuple[str, str, bytes], list[dict[str, Any]]] = {}
    for point in repository.points(vm):
        for name in _disks(repository, vm, point, disk, complain):
            try:
                before_point, before, below = seen.get(name, ("", _Found(), frozenset()))
                if before_point and not _differ(repository, vm, (before_point, point), below):
                    found = before
                else:
                    found, below = _look(repository, vm, point, name, matches, before=before, complain=complain)
            except BackupfsError as e:
                complain(Problem(f"{vm}/{point}/{name}", str(e)))
                continue
            seen[name] = point, found, below
            for key in sorted(before.keys() | found.keys()):
                _note(paths.setdefault((name, *key), []), point, before.get(key), found.get(key))
    for (name, volume, path), points in sorted(paths.items()):
        yield {"disk": name, "volume": volume, "path": path, "points": points}


def _refuse_unknown(repository: Repository, vm: str, disk: str) -> None:
    """Raise NotFound where no point has a disk of this name, as far as all of them can be read."""
    for point in repository.points(vm):
        try:
            if repository.manifest(vm, point).disk(disk) is not None:
                return
        except BackupfsError:
            return
    raise NotFound(f"no point of {vm} has a disk {disk!r}")


def _disks(
    repository: Repository, vm: str, point: str, disk: str | None, complain: Callable[[Problem], None]
) -> list[str]:
    try:
        return [d.name for d in repository.manifest(vm, point).disks if disk in {None, d.name}]
    except BackupfsError as e:
        complain(Problem(f"{vm}/{point}", str(e)))
        return []


def _look(
    repository: Repository,
    vm: str,
    point: str,
    disk: str,
    matches: Callable[[bytes], bool],
    *,
    before: _Found,
    complain: Callable[[Problem], None],
) -> tuple[_Found, frozenset[str]]:
    """Return what matches on a disk, and the disks that its volumes lie on. What can't be read is as it was before."""
    found: _Found = {}
    unread: list[tuple[str, bytes]] = []
    with open_point(repository, vm, point, disk) as files:
        unknown = set[str]()
        if not files.complete:
            complain(Problem(f"{vm}/{point}/{disk}", "; ".join(files.problems) or "a disk can't be read"))
            unknown |= {volume for volume, _ in before} - files.volumes.keys()
        for volume in files.volumes.values():
            where = f"{vm}/{point}/{disk}:{volume.name}"
            try:
                if volume.unreadable:
                    raise GuestError(str(volume.problem))
                if volume.problem is None:
                    with closing(volume.open()) as system:
                        root = system.stat(system.root)

                        def note(path: bytes, e: BackupfsError, volume: GuestVolume = volume) -> None:
                            complain(Problem(f"{vm}/{point}/{disk}:{volume.name}{printable(path)}", str(e)))
                            unread.append((volume.name, path))

                        found |= {(volume.name, path): s for path, s in walk(system, root, note) if matches(path)}
            except BackupfsError as e:
                complain(Problem(where, str(e)))
                unknown.add(volume.name)
        below = frozenset[str]({disk}).union(*(volume.disks for volume in files.volumes.values()))
    kept = {key: s for key, s in before.items() if key[0] in unknown or any(_is_in(key, place) for place in unread)}
    return kept | found, below


def _is_in(key: tuple[str, bytes], place: tuple[str, bytes]) -> bool:
    return key[0] == place[0] and (key[1] == place[1] or key[1].startswith(place[1] + b"/"))


def _differ(repository: Repository, vm: str, points: tuple[str, str], disks: Iterable[str]) -> bool:
    """Whether one of these disks is another in the second point."""
    return any(any(differences(repository, (vm, points[0]), (vm, points[1]), disk)) for disk in disks)


def _note(points: list[dict[str, Any]], point: str, before: Stat | None, now: Stat | None) -> None:
    if now is None:
        points.append({"point": point, "change": "gone"})
    elif before is None:
        points.append({"point": point, "last": point, "change": "new", "stat": now})
    elif _identity(before) != _identity(now):
        points.append({"point": point, "last": point, "change": "changed", "stat": now})
    else:
        points[-1]["last"] = point


def _identity(s: Stat) -> tuple[int, ...]:
    """What differs when a file was changed: who sets its mtime back does not set its ctime back."""
    return s.mode, s.size, s.mtime_ns, s.ctime_ns, s.inode


def _matcher(pattern: str) -> Callable[[bytes], bool]:
    encoded = pattern.encode(errors="surrogateescape")
    if b"/" in encoded:
        whole = encoded if encoded.startswith(b"/") else b"*/" + encoded
        compiled = re.compile(fnmatch.translate(whole.decode("latin-1")).encode("latin-1"), re.DOTALL)
        return lambda path: compiled.match(path) is not None
    compiled = re.compile(fnmatch.translate(encoded.decode("latin-1")).encode("latin-1"), re.DOTALL)
    return lambda path: compiled.match(path.rpartition(b"/")[2]) is not None


def history(
    repository: Repository, vm: str, disk: str, volume: str, path: bytes, *, complain: Callable[[Problem], None]
) -> Iterator[dict[str, Any]]:
    """Yield the versions of a file: `first` and `last` point that have it so, and `stat` and `sha256` (of a file, else
    None), or None for both where it is not there. Raises NotFound: no point has it; UsageError: no volume is named, and
    no point has it where that is not needed."""
    repository.resolve(vm, "latest")
    held: dict[str, Any] | None = None
    there = False
    before_point, below = "", frozenset[str]()
    unnamed: UsageError | None = None
    for point in repository.points(vm):
        try:
            unchanged = held is not None and before_point and not _differ(repository, vm, (before_point, point), below)
            if not unchanged:
                found, digest, below = _version(repository, GuestPath(vm, point, disk, volume, path))
        except UsageError as e:
            if unnamed is None:  # no volume is named, of several: the other points have them too
                complain(Problem(vm, str(e)))
            unnamed = unnamed or e
            continue
        except BackupfsError as e:
            complain(Problem(f"{vm}/{point}/{disk}", str(e)))
            continue
        before_point = point
        if held is not None and (unchanged or _same(held, found, digest)):
            held["last"] = point
            continue
        if held is not None and (there or held["stat"]):
            yield held
        there = there or found is not None
        held = {"first": point, "last": point, "stat": found, "sha256": digest}
    if held is not None and there:
        yield held
    elif not there:
        raise unnamed or NotFound(f"no point of {vm} has it")


def _same(held: dict[str, Any], found: Stat | None, digest: str | None) -> bool:
    before: Stat | None = held["stat"]
    if before is None or found is None:
        return before is found
    return (before.mode, before.size, before.mtime_ns, held["sha256"]) == (
        found.mode,
        found.size,
        found.mtime_ns,
        digest,
    )


def _version(repository: Repository, path: GuestPath) -> tuple[Stat | None, str | None, frozenset[str]]:
    """Return what a path stands for, its SHA-256, and the disks that it lies on."""
    below = frozenset({path.disk})
    if repository.manifest(path.vm, path.point).disk(path.disk) is None:
        return None, None, below
    where = f"{path.vm}/{path.point}/{path.disk}"
    with open_point(repository, path.vm, path.point, path.disk) as files:
        try:
            volume = choose(files, where, path.volume)
        except NotFound:
            return None, None, below
        below |= frozenset(volume.disks)
        with closing(volume.open()) as system:
            try:
                found = look_up(system, path.path).stat
            except NotFound:
                return None, None, below
            return found, _digest(system, found) if stat.S_ISREG(found.mode) else None, below


def _digest(system: FileSystem, file: Stat) -> str:
    digest, offset = hashlib.sha256(), 0
    while offset < file.size:
        piece = system.read(file.inode, offset, MiB)
        if not piece:
            raise GuestError(f"the file ends at {offset}, not at {file.size}")
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()
