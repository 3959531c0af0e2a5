"""Commands for who wants a file back: the guests' own files, without a mount and without root."""

import base64
import os
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import click

from backupfs.cli.options import json_option, open_repository, repository_option
from backupfs.cli.output import print_json, print_json_list, print_table, tell
from backupfs.errors import BackupfsError, GuestError, NotFound, TargetError, UsageError
from backupfs.filesystem import FileSystem, Stat, printable, shown
from backupfs.repository import names
from backupfs.repository.repository import Repository
from backupfs.services.guest_path import GuestPath, look_up, open_volume, parse_inside, parse_path
from backupfs.units import format_size

_WHERE = "VM/POINT/DISK:[VOLUME]/PATH"


def _exactly(key: str, name: bytes) -> dict[str, str]:
    """Return a guest's name, path or target for JSON; what is not UTF-8 also as it is."""
    shown = {key: name.decode(errors="backslashreplace")}
    exact = name.decode(errors="ignore").encode() == name
    return shown if exact else {**shown, f"{key}_base64": base64.b64encode(name).decode()}


def _facts(s: Stat) -> dict[str, Any]:
    kinds = {"-": "file", "d": "folder", "l": "link", "p": "fifo", "s": "socket", "c": "device", "b": "device"}
    return {
        "type": kinds.get(stat.filemode(s.mode)[0], "unknown"),
        "mode": f"{stat.S_IMODE(s.mode):04o}",
        "nlink": s.nlink,
        "uid": s.uid,
        "gid": s.gid,
        "size": s.size,
        "mtime": _time(s.mtime_ns),
        "mtime_ns": s.mtime_ns,
        "inode": s.inode,
    }


def _time(ns: int) -> str:
    try:
        return datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{ns // 10**9} s"


@click.command(epilog="Example: backupfs ls web01/latest/vda:/etc")
@repository_option
@click.argument("path", metavar=_WHERE)
@json_option
def ls(path: str, as_json: bool) -> None:
    """List a guest's files; without a path, the volumes of a disk.

    VOLUME is a partition's number or a logical volume's name, as in DISK.parts of the mount. It may be left out where
    only one volume of the disk can be read. No mount, no root, and nothing of the host's kernel is needed.
    """
    with open_repository() as repository:
        where = parse_path(repository, path)
        if ":" not in path.split("/", 2)[2]:
            _list_volumes(repository, where, as_json)
            return
        with open_volume(repository, where) as (_, system):
            _say_notes(system)
            found = look_up(system, where.path)
            entries = system.list(found.stat.inode) if stat.S_ISDIR(found.stat.mode) else [found]
            listed = sorted((entry.name, entry.stat) for entry in entries)
            links = {s.inode: _target(system, s) for _, s in listed if stat.S_ISLNK(s.mode)}
            damaged = [f"{printable(name)}: {_why(system, s.inode)}" for name, s in listed if not s.mode]
    _print_entries(listed, links, as_json)
    for words in damaged:
        tell(words)
    if damaged:
        raise GuestError(f"{len(damaged)} of {len(listed)} names stand for what can't be read")


def _print_entries(listed: Sequence[tuple[bytes, Stat]], links: Mapping[int, bytes], as_json: bool) -> None:
    if as_json:
        more = [_exactly("target", links[s.inode]) if s.inode in links else {} for _, s in listed]
        print_json([{**_exactly("name", n), **_facts(s), **extra} for (n, s), extra in zip(listed, more, strict=True)])
        return
    rows: list[tuple[str, ...]] = []
    for entry, s in listed:
        arrow = f" -> {printable(links[s.inode])}" if s.inode in links else ""
        size = f"{os.major(s.rdev)},{os.minor(s.rdev)}" if s.rdev else str(s.size)
        owner = (str(s.nlink), str(s.uid), str(s.gid))
        rows.append((stat.filemode(s.mode), *owner, size, _time(s.mtime_ns), printable(entry) + arrow))
    if rows:
        print_table(rows)


def _why(system: FileSystem, inode: int) -> str:
    try:
        system.stat(inode)
    except BackupfsError as e:
        return str(e)
    return "it can be read now"


def _target(system: FileSystem, link: Stat) -> bytes:
    try:
        return system.readlink(link.inode)
    except BackupfsError:
        return b"?"


def _list_volumes(repository: Repository, where: GuestPath, as_json: bool) -> None:
    from backupfs.services.guest_files import open_point  # noqa: PLC0415, as the other services

    with open_point(repository, where.vm, where.point, where.disk) as files:
        volumes, problems = list(files.volumes.values()), files.problems
    if as_json:
        print_json([{"volume": v.name, "size": v.size, "kind": v.kind, "problem": v.problem} for v in volumes])
    elif volumes:
        table: list[tuple[str, ...]] = [("VOLUME", "SIZE", "KIND", "PROBLEM")]
        for v in volumes:
            table.append((v.name, format_size(v.size), v.kind or "", shown(v.problem or "")))
        print_table(table)
    for problem in problems:
        tell(shown(problem))


def _say_notes(system: FileSystem) -> None:
    for note in system.notes:
        tell(f"{system.kind}: {note}")


@click.command(epilog="Example: backupfs cp web01/latest/vda:/etc/hosts web01/latest/vda:/root .")
@repository_option
@click.argument("sources", metavar=f"{_WHERE}...", nargs=-1, required=True)
@click.argument("target")
@click.option("--force", is_flag=True, help="Replace files that are there and differ.")
@json_option
def cp(sources: tuple[str, ...], target: str, force: bool, as_json: bool) -> None:
    """Copy a guest's files and folders out of a point, with all that they have.

    Folders with what is in them; contents, holes, modes, times, extended attributes and ACLs, hard links; owners as
    root. What is there already with the same size and time is not copied again, so the same command goes on with a
    copy that was interrupted. No device is made, and nothing becomes setuid. Exits with 50 when something could not be
    copied; the rest is.

    TARGET is a folder to copy into; with a slash at its end it is made if it is not there. Without one, what is not
    there yet is, as with cp(1), the new name of one source: then the same command again copies into that. All of a
    volume, DISK:VOLUME/, has no name, and its files are put into TARGET in either case. - is standard output.
    """
    from backupfs.services import copy_content  # noqa: PLC0415, as the other services
    from backupfs.services import guest_copy as service  # noqa: PLC0415, as the other services

    report = service.Report()
    with open_repository() as repository:
        paths = [parse_path(repository, source) for source in sources]
        if target == "-":
            if len(paths) != 1:
                raise UsageError("one file at a time can be written to standard output")
            with open_volume(repository, paths[0]) as (_, system):
                copy_content.write_out(system, look_up(system, paths[0].path).stat, sys.stdout.buffer)
            return
        with ExitStack() as stack:
            copier: service.Copier | None = None
            for source, path in zip(sources, paths, strict=True):
                try:
                    with open_volume(repository, path) as (volume, system):
                        _say_notes(system)
                        found = look_up(system, path.path)
                        folder, name = _place(path, found.name, target, only=len(paths) == 1)
                        if copier is None:
                            copier = stack.enter_context(
                                service.Copier(folder, force=force, report=report, progress=_Progress())
                            )
                        # A logical volume can be named by each of its disks.
                        copier.copy(system, (path.vm, path.point, volume.disks, volume.name), found.stat, name)
                except BackupfsError as e:
                    if len(paths) == 1 or isinstance(e, UsageError | TargetError):
                        raise
                    report.failed.append((os.fsencode(source), str(e)))
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    for stream in report.streams:
        tell(f"{printable(stream)}: this stream is too large to be kept as an extended attribute, and was not copied")
    for where, what in report.failed:
        tell(f"{printable(where)}: {shown(what)}")
    if as_json:
        failed = [{**_exactly("path", where), "error": what} for where, what in report.failed]
        streams = [stream.decode(errors="backslashreplace") for stream in report.streams]
        print_json({**vars(report), "streams": streams, "failed": failed})
    else:
        _say_report(report)
    if report.failed:
        raise GuestError(f"{len(report.failed)} of what was asked for could not be copied")


def _place(path: GuestPath, name: bytes, target: str, *, only: bool) -> tuple[str, str]:
    """Return the folder to copy into, made if need be, and the name in it; "" for what is in a folder.

    Args:
        name: as the guest has it.
        only: whether it is the only source.

    Raises:
        UsageError, TargetError: there is no such folder, and it can't be made.
    """
    if not target:
        raise UsageError("TARGET is empty; name a folder")
    last = os.fsdecode(path.path.rpartition(b"/")[2])
    if last in {".", ".."}:
        raise UsageError(f"{last!r} is no name; name what is to be copied")
    if os.path.isdir(target):
        return target, os.fsdecode(name)
    folder, new = os.path.split(target.rstrip("/"))
    folder = folder or "."
    is_folder = target.endswith("/")
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: there is no such folder; make it first: mkdir -p {folder}")
    if not (only or is_folder):
        raise UsageError(f"{target}: there is no such folder; with a slash at its end it is made")
    if name and not is_folder:
        return folder, new
    try:
        os.mkdir(target.rstrip("/"))
    except OSError as e:
        raise TargetError(f"{target}: {e.strerror}") from e
    return target, os.fsdecode(name)


class _Progress:
    """Tells a person, not more than a few times a second, how far a copy is."""

    def __init__(self) -> None:
        self._next = 0.0
        self._shown = sys.stderr.isatty()

    def __call__(self, report: Any) -> None:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            click.echo(f"\r{report.files} files, {format_size(report.bytes)}\x1b[K", nl=False, err=True)


def _say_report(report: Any) -> None:
    click.echo(f"{report.files} files copied, {format_size(report.bytes)}")
    for count, what in (
        (report.there, "were there already"),
        (report.left_out, "devices or sockets were left out"),
        (report.harmless, "are not setuid or setgid any more, or lost their capabilities"),
        (len(report.streams), "alternate streams were not copied"),
        (report.attributes, "lost their owner or extended attributes, which the target does not keep"),
    ):
        if count:
            click.echo(f"{count} {what}")


@click.command(epilog="Example: backupfs find web01 'report*.odt'")
@repository_option
@click.argument("vm")
@click.argument("pattern", metavar="NAME-OR-GLOB")
@click.option("--disk", metavar="NAME", help="Only this disk.")
@json_option
def find(vm: str, pattern: str, disk: str | None, as_json: bool) -> None:
    """Find files by name in all points of a VM: in which they are, and where they changed.

    NAME-OR-GLOB is compared with the last part of a path, or with the end of all of it if it has a slash. A disk that
    did not change between two points is not looked at again. Where nothing is found it says so, and exits with 1.
    """
    from backupfs.services import guest_find as service  # noqa: PLC0415, as the other services

    problems: list[service.Problem] = []
    with open_repository() as repository:
        checked = names.check_name(disk, "disk") if disk else None
        found = service.find(repository, names.check_name(vm, "VM"), pattern, checked, problems.append)
        count = 0
        if as_json:
            count = print_json_list(_as_document(item) for item in found)
        else:
            for item in found:
                count += 1
                click.echo(f"{item['disk']}:{item['volume']}{printable(item['path'])}")
                for p in item["points"]:
                    click.echo(f"  {_points(p['point'], p.get('last'))}  {p['change']}{_size_and_time(p.get('stat'))}")
    _complain(problems)
    if not count:
        raise BackupfsError("nothing found")


def _points(first: str, last: str | None) -> str:
    return f"{first} to {last}" if last and last != first else first


def _size_and_time(s: Stat | None) -> str:
    return "" if s is None else f"  {s.size}  {_time(s.mtime_ns)}"


def _as_document(item: dict[str, Any]) -> dict[str, Any]:
    path = _exactly("path", item["path"])
    points = [{k: v for k, v in p.items() if k != "stat"} | _short(p.get("stat")) for p in item["points"]]
    return {"disk": item["disk"], "volume": item["volume"], **path, "points": points}


def _short(s: Stat | None) -> dict[str, Any]:
    return {} if s is None else {key: _facts(s)[key] for key in ("type", "size", "mtime", "mtime_ns")}


def _complain(problems: list[Any]) -> None:
    for problem in problems:
        tell(f"{problem.where}: {shown(problem.what)}")
    if problems:
        raise GuestError(f"{len(problems)} of what was to be looked at could not be read")


@click.command(epilog="Example: backupfs history web01 vda:/etc/passwd")
@repository_option
@click.argument("vm")
@click.argument("path", metavar="DISK:[VOLUME]/PATH")
@json_option
def history(vm: str, path: str, as_json: bool) -> None:
    """Show the versions of a guest's file: from which point to which, size, time, SHA-256."""
    from backupfs.services import guest_find as service  # noqa: PLC0415, as the other services

    problems: list[service.Problem] = []
    with open_repository() as repository:
        disk, volume, inside = parse_inside(path)
        try:
            found = list(
                service.history(repository, names.check_name(vm, "VM"), disk, volume, inside, complain=problems.append)
            )
        except NotFound:
            _complain(problems)
            raise
    if as_json:
        print_json([{k: v for k, v in version.items() if k != "stat"} | _short(version["stat"]) for version in found])
    else:
        rows: list[tuple[str, ...]] = [("POINTS", "SIZE", "TIME", "SHA-256")]
        for version in found:
            s: Stat | None = version["stat"]
            facts = ("", "", "not there") if s is None else (str(s.size), _time(s.mtime_ns), version["sha256"] or "")
            rows.append((_points(version["first"], version["last"]), *facts))
        print_table(rows)
    _complain(problems)
