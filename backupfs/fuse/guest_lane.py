"""What the lane answers of guests' files but READs: OPEN and RELEASE of small ones, attributes that there are none of.

A guest has many small files. Each is read whole when it is opened, and then needs no more than the reader thread. What
is not small, or not a guest's, is pyfuse3's.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from backupfs.errors import NotFound
from backupfs.fuse import kernel
from backupfs.fuse.images import AtHand
from backupfs.fuse.kernel import ANSWER_SIZE
from backupfs.fuse.nodes import Stale
from backupfs.fuse.workers import File, Workers

_BARE = 50_000  # inodes of which it is remembered that they have no extended attributes
_OURS, _LABEL = b"user.backupfs.", b"security.selinux\0"
_FIRST_HANDLE = 1 << 62  # pyfuse3's are counted from 1 on


class Guests(Protocol):
    """Who knows the files. From any thread."""

    def bare_label(self, inode: int) -> int:
        """Return the errno for its SELinux label if something is known to have no extended attributes at all, else 0.

        EOPNOTSUPP where nothing in the same file system has one: `ls -l` asks for no more of them then. Does not block.
        """

    def is_guests(self, inode: int) -> bool:
        """Whether something has other attributes than `user.backupfs.*`: a guest's. Does not block."""

    def volume_number(self, inode: int) -> int | None:
        """Return a number for the volume that a guest's file is on; None: it is none. Does not block."""

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


class GuestLane:
    """Answers.

    Args:
        guests: knows the files.
        files: gets each small file that is open, by its handle.
        write: gives the kernel an answer: its unique number and parts. Returns whether it was taken.
        pass_on: gives a request to pyfuse3.
    """

    def __init__(
        self,
        guests: Guests,
        files: dict[int, File],
        write: Callable[[int, list[bytes]], bool],
        pass_on: Callable[[bytes], None],
    ) -> None:
        self._guests = guests
        self._files = files
        self._write = write
        self._pass_on = pass_on
        self._handles = itertools.count(_FIRST_HANDLE)
        self._openers: Workers[_Volume, _Open] = Workers(self._open, "lane-opener")
        self._bare: dict[int, int] = {}  # inodes without extended attributes: the errno for an SELinux label

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
        if opcode == kernel.RELEASE and handle >= _FIRST_HANDLE:
            self._files.pop(handle, None)
            self._answer(unique, 0)
            return True
        return False

    def _take_xattr(self, opcode: int, unique: int, request: memoryview) -> bool:
        """`ls -l` asks for several attributes of each name, and the kernel for one before each write(2)."""
        inode, size = kernel.XATTR_REQUEST.unpack_from(request)
        is_list = opcode == kernel.LISTXATTR
        label = self._bare.get(inode) or self._note_bare(inode)
        ours = is_list or request[kernel.XATTR_AT :][: len(_OURS)] == _OURS
        if not label and (ours or self._guests.is_guests(inode)):
            return False
        if not is_list:
            is_label = label and request[kernel.XATTR_AT :][: len(_LABEL)] == _LABEL
            self._answer(unique, label if is_label else errno.ENODATA)
        elif size:
            self._answer(unique, 0)
        else:
            answer = kernel.XATTR_SIZE_ANSWER
            self._write(unique, [answer.pack(answer.size, 0, unique, 0)])
        return True

    def _note_bare(self, inode: int) -> int:
        label = self._guests.bare_label(inode)
        if label:
            if len(self._bare) >= _BARE:
                self._bare.clear()
            self._bare[inode] = label
        return label

    def _take_open(self, unique: int, request: memoryview) -> bool:
        inode, flags = kernel.OPEN_REQUEST.unpack_from(request)
        volume = self._guests.volume_number(inode)
        if volume is None or flags & os.O_ACCMODE != os.O_RDONLY:
            return False
        content, read_on = self._guests.small_at_hand(inode)
        if content is not None:
            self._opened(unique, inode, content)
        if content is None or read_on:
            self._openers.submit(_Volume(volume), _Open(unique, inode, None if content is not None else bytes(request)))
        return True

    def _answer(self, unique: int, code: int) -> None:
        self._write(unique, [kernel.ANSWER.pack(ANSWER_SIZE, -code, unique)])

    # In a thread.

    def _open(self, _volume: _Volume, job: _Open) -> None:
        if job.request is None:
            with contextlib.suppress(Exception):  # who opens one of them is told
                self._guests.read_on(job.inode)
            return
        try:
            content = self._guests.small_content(job.inode)
        except NotFound as e:
            self._answer(job.unique, errno.ESTALE if isinstance(e, Stale) else errno.ENOENT)
        except Exception as e:  # noqa: BLE001, nothing may end the thread
            self._guests.complain(job.inode, "open", e)
            self._answer(job.unique, errno.EIO)
        else:
            if content is None:
                self._pass_on(job.request)
                return
            self._opened(job.unique, job.inode, content)

    def _opened(self, unique: int, inode: int, content: bytes) -> None:
        handle, answer = next(self._handles), kernel.OPEN_ANSWER
        self._files[handle] = File(inode, AtHand(content))
        if not self._write(unique, [answer.pack(answer.size, 0, unique, handle, kernel.FOPEN_KEEP_CACHE, 0)]):
            self._files.pop(handle, None)  # nobody will release it
