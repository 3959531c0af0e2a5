"""What the lane answers of guests' files but READs: OPEN and RELEASE of small ones, and their extended attributes.

A guest has many small files. Each is read whole when it is opened, and then needs no more than the reader thread; nor
do attributes that are known. What is not small, or not a guest's, is pyfuse3's.
"""

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from backupfs.errors import GuestError, NotFound
from backupfs.fuse import acls, kernel
from backupfs.fuse.guest_xattrs import Xattrs
from backupfs.fuse.images import AtHand
from backupfs.fuse.kernel import ANSWER_SIZE
from backupfs.fuse.nodes import Stale
from backupfs.fuse.workers import File, Workers

_REMEMBERED = 50_000  # inodes whose extended attributes are remembered here, too
_SMALL = 200  # bytes of these; so it is some 30 MB at most, and next to nothing where many have the same
_OURS = b"user.backupfs."
_FIRST_HANDLE = 1 << 62  # pyfuse3's are counted from 1 on


class Guests(Protocol):
    """Who knows the files. From any thread."""

    def xattrs_at_hand(self, inode: int) -> Xattrs | None:
        """Return something's extended attributes if they are known. Does not block."""

    def xattrs(self, inode: int) -> Xattrs:
        """Return those of a guest's file. May block. Raises BackupfsError."""

    def is_guests(self, inode: int) -> bool:
        """Whether something has other attributes than `user.backupfs.*`: a guest's. Does not block."""

    def volume_number(self, inode: int) -> int | None:
        """Return a number for the volume that a guest's file or first folder is on; None: it is neither. Does not
        block.
        """

    def small_content(self, inode: int) -> bytes | None:
        """Return the content of a guest's file; None: it is too large for that. May block. Raises BackupfsError."""

    def small_at_hand(self, inode: int) -> tuple[bytes | None, bool]:
        """Return the same if it was read already, and whether it is time to `read_on`. Does not block."""

    def read_on(self, inode: int) -> None:
        """Read more, behind a file that was at hand. May block. Raises BackupfsError."""

    def complain(self, inode: int, doing: str, error: Exception) -> None:
        """Log an error."""


@dataclass(slots=True)
class _Volume:
    """A volume with guests' files, as what jobs are about: a parser that hangs has eight threads, not all."""

    inode: int
    jobs: int = 0


@dataclass(frozen=True, slots=True)
class _Open:
    """An OPEN that waits for an answer; or None as its request: it was answered, and more is to be read."""

    unique: int
    inode: int
    request: bytes | None


@dataclass(frozen=True, slots=True)
class _Ask:
    """A GETXATTR that waits for an answer; without a name, a LISTXATTR."""

    unique: int
    inode: int
    name: bytes | None
    size: int


class Opens:
    """How often guests' files are open, or being opened. From any thread.

    The reader thread must not give the kernel the content of a file that somebody may be reading: that waits for the
    READ to be answered, by the reader thread. Without a handle there is no READ.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}

    def more(self, inode: int) -> None:
        """Count an OPEN."""
        with self._lock:
            self._counts[inode] = self._counts.get(inode, 0) + 1

    def less(self, inode: int) -> None:
        """Count a RELEASE, or an OPEN that came to nothing."""
        with self._lock:
            count = self._counts.pop(inode, 0)
            if count > 1:
                self._counts[inode] = count - 1

    def only_one(self, inode: int) -> bool:
        """Whether there is no more than one."""
        return self._counts.get(inode) == 1


class GuestLane:
    """Answers.

    Args:
        guests: knows the files.
        files: gets each small file that is open, by its handle.
        write: gives the kernel an answer: its unique number and parts. Returns whether it was taken.
        store: gives the kernel a file's content for its cache, by its inode. Waits for READs of the same file.
        pass_on: gives a request to pyfuse3.
        keep_acls: the kernel keeps ACLs (acls.py).
    """

    def __init__(
        self,
        guests: Guests,
        files: dict[int, File],
        write: Callable[[int, list[bytes]], bool],
        store: Callable[[int, bytes], None],
        pass_on: Callable[[bytes], None],
        *,
        keep_acls: bool,
    ) -> None:
        self._guests = guests
        self._files = files
        self._write = write
        self._store = store
        self._pass_on = pass_on
        self._acls = acls.NAMES if keep_acls else ()
        self._handles = itertools.count(_FIRST_HANDLE)
        self._openers: Workers[_Volume, _Open | _Ask] = Workers(self._do, "lane-opener")
        self._known: dict[int, Xattrs] = {}
        self._opens = Opens()

    @property
    def busy(self) -> bool:
        """Whether a thread is in a file system."""
        return self._openers.busy

    def end(self) -> None:
        """Let the threads end that have nothing to do."""
        self._openers.end()

    # In the reader thread: each returns whether the request is, or will be, answered.

    def take(self, opcode: int, unique: int, handle: int, request: memoryview) -> bool:
        """Take a request if it can be answered here. In the reader thread; does not block."""
        if opcode in (kernel.GETXATTR, kernel.LISTXATTR):
            return self._take_xattr(opcode, unique, request)
        if opcode == kernel.OPEN:
            return self._take_open(unique, request)
        if opcode == kernel.RELEASE:
            self._opens.less(kernel.INODE.unpack_from(request)[0])
            if handle >= _FIRST_HANDLE:
                self._files.pop(handle, None)
                self._answer(unique, 0)
                return True
        return False

    def _take_xattr(self, opcode: int, unique: int, request: memoryview) -> bool:
        """`ls -l` asks for several attributes of each name, and the kernel for one before each write(2)."""
        inode, size = kernel.XATTR_REQUEST.unpack_from(request)
        name = None
        if opcode == kernel.GETXATTR:
            name = bytes(request[kernel.XATTR_AT :]).partition(b"\0")[0]
        known = self._known.get(inode) or self._at_hand(inode)
        if known is not None:
            self._answer_xattr(unique, inode, name, size, known)
            return True
        volume = self._guests.volume_number(inode)
        if volume is not None:
            self._openers.submit(_Volume(volume), _Ask(unique, inode, name, size))
        elif name is None or name.startswith(_OURS) or self._guests.is_guests(inode):
            return False
        else:
            self._answer(unique, errno.ENODATA)
        return True

    def _at_hand(self, inode: int) -> Xattrs | None:
        known = self._guests.xattrs_at_hand(inode)
        if known is not None and sum(len(name) + len(value) for name, value in known.values.items()) <= _SMALL:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[inode] = known
        return known

    def _take_open(self, unique: int, request: memoryview) -> bool:
        inode, flags = kernel.OPEN_REQUEST.unpack_from(request)
        volume = self._guests.volume_number(inode)
        if volume is None or flags & os.O_ACCMODE != os.O_RDONLY:
            return False
        self._opens.more(inode)
        content, read_on = self._guests.small_at_hand(inode)
        if content is not None:
            self._opened(unique, inode, content)
        if content is None or read_on:
            self._openers.submit(_Volume(volume), _Open(unique, inode, None if content is not None else bytes(request)))
        return True

    def _answer(self, unique: int, code: int) -> None:
        self._write(unique, [kernel.ANSWER.pack(ANSWER_SIZE, -code, unique)])

    def _answer_xattr(self, unique: int, inode: int, name: bytes | None, size: int, known: Xattrs) -> None:
        """Answer with a value, or with the names, as much room as there is for it; 0: how much does it take?"""
        value = b"".join(n + b"\0" for n in known.values) if name is None else known.values.get(name)
        if value is None:
            self._answer(unique, known.missing(name or b""))
        elif name in self._acls and not acls.is_sound(value):
            self._guests.complain(inode, "getxattr", GuestError(f"{name!r} is no ACL"))
            self._answer(unique, errno.EACCES)
        elif not size:
            answer = kernel.XATTR_SIZE_ANSWER
            self._write(unique, [answer.pack(answer.size, 0, unique, len(value))])
        elif len(value) > size:
            self._answer(unique, errno.ERANGE)
        else:
            self._write(unique, [kernel.ANSWER.pack(ANSWER_SIZE + len(value), 0, unique), value])

    # In a thread.

    def _do(self, _volume: _Volume, job: _Open | _Ask) -> None:
        if isinstance(job, _Ask):
            with self._refusing(job, "listxattr" if job.name is None else "getxattr"):
                known = self._guests.xattrs(job.inode)
                self._answer_xattr(job.unique, job.inode, job.name, job.size, known)
        elif job.request is None:
            with contextlib.suppress(Exception):  # who opens one of them is told
                self._guests.read_on(job.inode)
        else:
            with self._refusing(job, "open"):
                content = self._guests.small_content(job.inode)
                if content is None:
                    self._pass_on(job.request)
                else:
                    self._opened(job.unique, job.inode, content)

    @contextlib.contextmanager
    def _refusing(self, job: _Open | _Ask, doing: str) -> Iterator[None]:
        """Answer with an errno what raises. What answers otherwise does not."""
        is_acl = isinstance(job, _Ask) and job.name in self._acls
        try:
            yield
        except Stale:
            self._refuse(job, errno.ESTALE)
        except NotFound:
            self._refuse(job, errno.EACCES if is_acl else errno.ENOENT)
        except Exception as e:  # noqa: BLE001, nothing may end the thread
            self._guests.complain(job.inode, doing, e)
            self._refuse(job, errno.EACCES if is_acl else errno.EIO)

    def _refuse(self, job: _Open | _Ask, code: int) -> None:
        if isinstance(job, _Open):
            self._opens.less(job.inode)
        self._answer(job.unique, code)

    def _opened(self, unique: int, inode: int, content: bytes) -> None:
        """Answer an OPEN. Before that the kernel gets the content, unless somebody may be READing it."""
        if content and self._opens.only_one(inode):
            self._store(inode, content)
        handle, answer = next(self._handles), kernel.OPEN_ANSWER
        self._files[handle] = File(inode, AtHand(content))
        if not self._write(unique, [answer.pack(answer.size, 0, unique, handle, kernel.FOPEN_KEEP_CACHE, 0)]):
            self._files.pop(handle, None)  # nobody will release it
            self._opens.less(inode)
