"""The process that reads one file system of a guest: `python -m backupfs.guest.child`, see services/guest_process.py.

It parses what a guest wrote, in C, so it is allowed next to nothing: it is nobody where root started it, has no network
then, opens no file, makes no process, and its memory is limited. Descriptor 3 is a socket to its parent; messages.py
says what goes over it. It has no deadlines: its parent has them, and kills it.
"""

import contextlib
import ctypes
import os
import resource
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from backupfs.errors import BackupfsError, GuestError, NotFound
from backupfs.extents import Extent
from backupfs.filesystem import FileSystem, Stat, unreadable
from backupfs.guest import messages
from backupfs.guest.families import Parser, open_family
from backupfs.units import KiB, MiB

_LINE = 3
_BLOCK, _KEPT, _AHEAD = 64 * KiB, 256, 8
_TOGETHER_S = 0.5  # that attributes of several inodes may take: far less than the parent's patience
_MEMORY = 1024 * MiB  # of address space
_NOBODY = 65534
_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT, _NEW_NETWORK = 38, 1, 0x40000000  # source: linux/prctl.h, linux/sched.h
_SIGKILL = 9
_DAMAGE = (
    ValueError,
    struct.error,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    UnicodeError,
)  # what a parser makes of it
_METHODS = ("stat", "read", "extents", "runs", "readlink", "xattrs", "left_out")


class _Volume:
    """The volume, as the parent reads it.

    Blocks in which little was read are kept: inodes lie side by side, and so do small files. Behind a block that is
    there some more are read at once.
    """

    def __init__(self, line: socket.socket, size: int) -> None:
        self._line = line
        self.size = size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()  # what was wanted last comes last

    def readinto(self, offset: int, buffer: Any) -> None:
        view = memoryview(buffer)
        if len(view) <= _BLOCK:
            with contextlib.suppress(GuestError):  # another part of the block may be to blame
                number, within = divmod(offset, _BLOCK)
                head = self._block(number)[within : within + len(view)]
                view[: len(head)] = head
                if len(head) < len(view):
                    view[len(head) :] = self._block(number + 1)[: len(view) - len(head)]
                return
        for position in range(0, len(view), messages.LARGEST_READ):
            piece = view[position : position + messages.LARGEST_READ]
            piece[:] = self._read(offset + position, len(piece))

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            if number - 1 in self._blocks:
                with contextlib.suppress(GuestError):  # the block itself may be all right
                    return self._read_blocks(number, _AHEAD)
            return self._read_blocks(number, 1)
        self._blocks.move_to_end(number)
        return block

    def _read_blocks(self, number: int, count: int) -> bytes:
        offset = number * _BLOCK
        data = self._read(offset, min(count * _BLOCK, self.size - offset))
        for i in range(0, len(data), _BLOCK):
            self._blocks[number + i // _BLOCK] = data[i : i + _BLOCK]
        while len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)
        return data[:_BLOCK]

    def _read(self, offset: int, length: int) -> bytes:
        messages.send(self._line, messages.Need(offset, length))
        part = messages.from_parent.decode(messages.receive(self._line))
        if not isinstance(part, messages.Part) or part.data is None or len(part.data) != length:
            raise GuestError(f"the disk can't be read at {offset} of the volume")
        return part.data

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, False)  # parsers read what they need

    def close(self) -> None:
        pass


def _contents(system: FileSystem, largest: int, inodes: Sequence[int]) -> messages.ContentsAnswer:
    """Return the contents of small files; of what is not to be had, None: who wants it asks for it by itself."""
    found: list[bytes | None] = []
    left = messages.LARGEST_CONTENTS
    for inode in inodes:
        content: bytes | None = None
        if left > largest:
            with contextlib.suppress(*_DAMAGE, BackupfsError):
                content = system.read(inode, 0, largest + 1)
                left -= len(content)
        found.append(content if content is not None and len(content) <= largest else None)
    return messages.ContentsAnswer(found)


def _xattrs_of(system: FileSystem, inodes: Sequence[int]) -> messages.XattrsOfAnswer:
    """Return the extended attributes of the inodes, or of the first ones, if they are many or take long."""
    found: dict[tuple[tuple[bytes, bytes], ...], int] = {}  # where it comes in the answer: most have what others have
    which: list[int | None] = []
    left, until = messages.LARGEST_XATTRS, time.monotonic() + _TOGETHER_S
    for inode in inodes:
        if which and (left <= 0 or time.monotonic() > until):
            break
        place: int | None = None
        with contextlib.suppress(*_DAMAGE, BackupfsError):
            pairs = tuple(system.xattrs(inode).items())
            place = found.get(pairs)
            if place is None:
                size = sum(len(name) + len(value) for name, value in pairs)
                left -= size
                if size <= messages.LARGEST_XATTRS:
                    place = found[pairs] = len(found)
        which.append(place)
    return messages.XattrsOfAnswer([list(pairs) for pairs in found], which)


def _list(line: socket.socket, system: Parser, inode: int) -> messages.ListAnswer:
    """Send what is in a folder, as it is found, but the last of it: that is returned."""
    rows: list[tuple[bytes, messages.StatRow]] = []
    for entry in system.entries(inode):
        if len(rows) == messages.LISTED:
            messages.send(line, messages.ListAnswer(rows, more=True))
            rows = []
        rows.append((entry.name, _listed_row(entry.stat)))
    return messages.ListAnswer(rows)


def _answer(line: socket.socket, system: Parser, ask: messages.Ask) -> messages.Answer:
    if ask.method == "list":
        return _list(line, system, *ask.arguments)
    if ask.method == "contents":
        return _contents(system, ask.arguments[0], ask.arguments[1:])
    if ask.method == "xattrs_of":
        return _xattrs_of(system, ask.arguments)
    assert ask.method in _METHODS
    found: Any = getattr(system, ask.method)(*ask.arguments)
    match ask.method:
        case "stat":
            return messages.StatAnswer(_row(found))
        case "extents":
            return messages.ExtentsAnswer([(e.offset, e.length, e.flag) for e in found])
        case "runs":
            return messages.RunsAnswer(None if found is None else [(run.length, run.offset) for run in found])
        case "xattrs":
            return messages.XattrsAnswer(list(found.items()))
        case "left_out":
            return messages.NamesAnswer(list(found))
        case _:
            return messages.BytesAnswer(found)


def _row(s: Stat) -> messages.StatRow:
    if (s.inode | s.size | s.allocated | s.rdev) >> 63:  # what a damaged inode can add up to
        raise GuestError(f"inode {s.inode} is damaged: it says of itself what can't be")
    atime, mtime, ctime = s.atime_ns, s.mtime_ns, s.ctime_ns
    times: tuple[messages.Time, messages.Time, messages.Time] = atime, mtime, ctime
    if min(atime, mtime, ctime) < -(1 << 63) or max(atime, mtime, ctime) >= 1 << 63:
        times = str(atime), str(mtime), str(ctime)
    return (s.inode, s.mode, s.nlink, s.uid, s.gid, s.size, s.allocated, *times, s.rdev, s.has_xattrs)


def _listed_row(s: Stat) -> messages.StatRow:
    try:
        return _row(s)
    except GuestError:
        return _row(unreadable(s.inode))


def _give_up_rights() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        libc.unshare(_NEW_NETWORK)  # a container may refuse
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc.prctl(_DIE_WITH_PARENT, _SIGKILL, 0, 0, 0)  # another user's process was asked for it before
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_NOFILE, _LINE + 1),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _serve(line: socket.socket) -> None:
    order = messages.from_parent.decode(messages.receive(line))
    if not isinstance(order, messages.Order):
        raise ValueError("no order")
    volume = _Volume(line, order.size)
    system: Parser | None = None
    ask: Any = order
    while True:
        answer: messages.Answer
        try:
            if system is None:
                system = open_family(volume, order.family, order.kind)
                answer = messages.Opened(system.root, list(system.notes))
            else:
                answer = _answer(line, system, ask)
        except NotFound as e:
            answer = messages.Failed(True, str(e))
        except BackupfsError as e:
            answer = messages.Failed(False, str(e))
        except _DAMAGE as e:
            # A socket that broke raises here again at once.
            answer = messages.Failed(False, f"damaged: {e!r}"[:500])
        messages.send(line, answer)
        ask = messages.from_parent.decode(messages.receive(line))


def main() -> None:
    """Answer until the parent is gone."""
    line = socket.socket(fileno=_LINE)
    os.chdir("/")
    _give_up_rights()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(line)


if __name__ == "__main__":
    main()
