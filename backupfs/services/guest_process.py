"""A guest's file system, read by a process of its own: backupfs/guest/child.py.

A parser that crashes, hangs or eats memory costs the call that it was at: that fails, and the next one has a new
process. It gets to see the volume's bytes and nothing else.
"""

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from backupfs.errors import BackupfsError, ConnectError, GuestError, NotFound
from backupfs.extents import Extent
from backupfs.filesystem import Entry, Run, Stat, shown, unreadable
from backupfs.guest import messages
from backupfs.guest.detect import NTFS
from backupfs.image import Image
from backupfs.sources.child import Child

# For the parser's own work on a call; what the disk takes is not counted. To open one may be to replay a journal.
_DEADLINE_S, _OPENING_S = 10.0, 120.0
_IDLE_S = 60.0
_FARTHEST_NS = 10**9 << 63  # of a time that the host can be told
_MOST_LISTED = 1_000_000  # entries of a folder
_MOST = 8  # processes at a time; the one that was idle for longest goes first
T = TypeVar("T")

_COMMAND = (sys.executable, "-P", "-m", "backupfs.guest.child")


class Crew:
    """The processes of all file systems: their number is bounded, and idle ones end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working: dict[GuestFileSystem, float] = {}  # when it was last used

    def note(self, system: "GuestFileSystem") -> None:
        """Say that a file system's process is used now; end others where there are too many."""
        with self._lock:
            self._working[system] = time.monotonic()
            others = sorted((at, id(s), s) for s, at in self._working.items() if s is not system)
        for _, _, other in others[: max(0, len(others) + 1 - _MOST)]:
            other.rest()

    def idle_for(self, system: "GuestFileSystem") -> float:
        """Return for how many seconds it was not used."""
        return time.monotonic() - self._working.get(system, 0.0)

    def leave(self, system: "GuestFileSystem") -> None:
        """Say that there is no process of it."""
        with self._lock:
            self._working.pop(system, None)


class GuestFileSystem:
    """A FileSystem (filesystem.py) that another process reads. From any thread; one call at a time.

    Args:
        name: of the volume, for messages.
        volume: its bytes; closed by `close`.
        family, kind: what `detect` found.
        crew: bounds how many processes there are.

    Raises:
        GuestError: it can't be read.
    """

    def __init__(self, name: str, volume: Image, family: str, kind: str, crew: Crew) -> None:
        self.kind = kind
        self.root = 0
        self.notes: tuple[str, ...] = ()
        self._name = name
        self._volume = volume
        self._order = messages.Order(family, kind, volume.size)
        self._crew = crew
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._line: socket.socket | None = None
        self._closed = False
        self._timer: threading.Timer | None = None
        try:
            with self._lock:
                self._start()
        except BaseException:
            volume.close()
            raise

    # What it answers.

    def stat(self, inode: int) -> Stat:
        return self._believed(self._ask(messages.StatAnswer, "stat", inode).stat)

    def list(self, inode: int) -> list[Entry]:
        entries = self._ask(messages.ListAnswer, "list", inode).entries
        found = {name: Entry(name, self._listed(row)) for name, row in entries if _is_name(name)}
        return list(found.values())

    def read(self, inode: int, offset: int, length: int) -> bytes:
        parts, end = [], offset + length
        while offset < end:
            size = min(messages.LARGEST_READ, end - offset)
            part = self._ask(messages.BytesAnswer, "read", inode, offset, size).data
            if len(part) > size:
                raise GuestError(f"{self._name}: inode {inode}: more was read than was asked for")
            parts.append(part)
            offset += size
            if len(part) < size:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def contents(self, inodes: Sequence[int], largest: int) -> Sequence[bytes | None]:
        found = self._ask(messages.ContentsAnswer, "contents", largest, *inodes).contents
        if len(found) != len(inodes):
            raise GuestError(f"{self._name}: {len(found)} contents were answered, not {len(inodes)}")
        return found

    def runs(self, inode: int) -> Sequence[Run] | None:
        rows = self._ask(messages.RunsAnswer, "runs", inode).runs
        if rows is None:
            return None
        for length, offset in rows:
            if length <= 0 or not (offset is None or 0 <= offset <= self._volume.size - length):
                raise GuestError(f"{self._name}: inode {inode} is damaged: parts of it lie nowhere")
        return [Run(length, offset) for length, offset in rows]

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        position, end = offset, offset + length
        for first, size, hole in self._ask(messages.ExtentsAnswer, "extents", inode, offset, length).extents:
            if first != position or size <= 0 or first + size > end:
                raise GuestError(f"{self._name}: inode {inode}: its extents make no sense")
            yield Extent(first, size, hole)
            position += size
        if position != end:
            raise GuestError(f"{self._name}: inode {inode}: its extents make no sense")

    def readlink(self, inode: int) -> bytes:
        target = self._ask(messages.BytesAnswer, "readlink", inode).data
        if not target or len(target) > 4096 or b"\0" in target:
            raise GuestError(f"{self._name}: symbolic link {inode} is damaged")
        return target

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        return _believed_xattrs(self._ask(messages.XattrsAnswer, "xattrs", inode).xattrs)

    def xattrs_of(self, inodes: Sequence[int]) -> Sequence[dict[bytes, bytes] | None]:
        answer = self._ask(messages.XattrsOfAnswer, "xattrs_of", *inodes)
        which, found = answer.which, [_believed_xattrs(pairs) for pairs in answer.xattrs]
        if not 0 < len(which) <= len(inodes) or not all(place is None or 0 <= place < len(found) for place in which):
            raise GuestError(f"{self._name}: the attributes of {len(inodes)} inodes make no sense")
        return [None if place is None else found[place] for place in which]

    def left_out(self, inode: int) -> Sequence[bytes]:
        if self._order.family != NTFS:
            return ()  # nobody else has any
        return self._ask(messages.NamesAnswer, "left_out", inode).names

    def _listed(self, row: messages.StatRow) -> Stat:
        """Return what a folder says of what is in it: one thing that makes no sense does not hide the others."""
        try:
            return self._believed(row)
        except GuestError:
            if not 0 <= row[0] < 1 << 63:
                raise
            return unreadable(row[0])

    def _believed(self, row: messages.StatRow) -> Stat:
        times = int(row[7]), int(row[8]), int(row[9])
        found = Stat(*row[:7], *times, *row[10:])
        numbers = (found.inode, found.size, found.allocated, found.rdev)
        small = (found.uid, found.gid, found.nlink)
        if min(times) < -_FARTHEST_NS or max(times) >= _FARTHEST_NS:
            raise GuestError(f"{self._name}: inode {found.inode} is damaged")
        if not (all(0 <= n < 1 << 63 for n in numbers) and all(0 <= n < 1 << 32 for n in small)) or found.mode >> 16:
            raise GuestError(f"{self._name}: inode {found.inode} is damaged")
        return found

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stop()
                self._volume.close()

    def rest(self) -> None:
        """End the process, if no call is at it. The next call starts another one."""
        if self._lock.acquire(blocking=False):
            try:
                self._stop()
            finally:
                self._lock.release()

    # The process.

    def _ask(self, kind: type[T], method: str, *arguments: int) -> T:
        with self._lock:
            if self._closed:
                raise GuestError(f"{self._name}: it was closed")
            if self._line is None:
                self._start()
            answer = self._call(messages.Ask(method, list(arguments)))
        if not isinstance(answer, kind):
            raise GuestError(f"{self._name}: nonsense was answered")
        return answer

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._child = Child(_COMMAND, theirs)
        except ConnectError as e:
            ours.close()
            raise GuestError(f"{self._name}: {e}") from e
        except BaseException:
            ours.close()
            raise
        self._line = ours
        try:
            opened = self._call(self._order)
            if not isinstance(opened, messages.Opened):
                raise GuestError(f"{self._name}: nonsense was answered")
        except BaseException:
            self._stop()
            raise
        self.root, self.notes = opened.root, tuple(shown(note[:1000]) for note in opened.notes[:100])
        self._wait_for_idleness()

    def _stop(self) -> str:
        """End the process; return what it said at the end."""
        child, line = self._child, self._line
        self._child = self._line = None
        if self._timer is not None:
            self._timer.cancel()
        self._crew.leave(self)
        if line is not None:
            line.close()
        return child.stop() if child is not None else ""

    def _wait_for_idleness(self) -> None:
        self._timer = threading.Timer(_IDLE_S / 4, self._end_if_idle)
        self._timer.daemon = True
        self._timer.start()

    def _end_if_idle(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._wait_for_idleness()
            return
        try:
            if self._line is not None and self._timer is threading.current_thread():
                if self._crew.idle_for(self) > _IDLE_S:
                    self._stop()
                else:
                    self._wait_for_idleness()
        finally:
            self._lock.release()

    def _call(self, question: messages.Order | messages.Ask) -> messages.Answer:
        """Return the answer to a question. With the lock.

        Raises:
            NotFound, GuestError: the file system has none; or the process died, took too long or talks nonsense.
        """
        line, volume = self._line, self._volume
        assert line is not None
        self._crew.note(self)
        entries: list[tuple[bytes, messages.StatRow]] = []
        allowed_s = _OPENING_S if isinstance(question, messages.Order) else _DEADLINE_S
        try:
            deadline = time.monotonic() + allowed_s
            line.settimeout(allowed_s)
            messages.send(line, question)
            while True:
                said: messages.FromChild = messages.from_child.decode(messages.receive(line, deadline))
                if isinstance(said, messages.ListAnswer):
                    entries += said.entries
                    if not said.more:
                        said.entries = entries
                        break
                    # A large folder takes long, and that it goes on can be seen.
                    if len(said.entries) != messages.LISTED or len(entries) > _MOST_LISTED:
                        raise ValueError(f"a folder of {len(entries)} entries, and more")
                    deadline = time.monotonic() + allowed_s
                    line.settimeout(allowed_s)
                    continue
                if not isinstance(said, messages.Need):
                    break
                begun = time.monotonic()
                part = _part(volume, said)
                deadline += time.monotonic() - begun
                line.settimeout(max(deadline - time.monotonic(), 0.001))
                messages.send(line, part)
        except TimeoutError as e:
            self._stop()
            raise GuestError(f"{self._name}: reading its {self.kind} took longer than {allowed_s:.0f} s") from e
        except (EOFError, OSError) as e:
            words = self._stop().splitlines()
            raise GuestError(
                f"{self._name}: what reads its {self.kind} died{': ' if words else ''}{shown(''.join(words[-1:]))}"
            ) from e
        except (ValueError, msgspec.MsgspecError) as e:
            self._stop()
            raise GuestError(f"{self._name}: what reads its {self.kind} talks nonsense: {e}") from e
        except BaseException:
            self._stop()  # its answer would come to the next question
            raise
        if isinstance(said, messages.Failed):
            raise (NotFound if said.not_found else GuestError)(f"{self._name}: {shown(said.message[:1000])}")
        return said


def _part(volume: Image, need: messages.Need) -> messages.Part:
    if not (0 < need.length <= messages.LARGEST_READ and 0 <= need.offset <= volume.size - need.length):
        return messages.Part(None)
    buffer = bytearray(need.length)
    try:
        volume.readinto(need.offset, buffer)
    except BackupfsError:
        return messages.Part(None)
    return messages.Part(bytes(buffer))


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= 255 * 4 and name not in {b".", b".."} and b"/" not in name and b"\0" not in name


def _believed_xattrs(pairs: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    return {
        name: value for name, value in pairs if 0 < len(name) <= 255 and b"\0" not in name and len(value) <= 64 << 10
    }
