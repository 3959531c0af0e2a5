"""The read lane: a few threads at the FUSE device that answer READ and LSEEK of stored points themselves.

    kernel --- /dev/fuse --- lane threads -- READ, LSEEK of a file it was told of --> Image, answered at once
                                |    |------ READ, LSEEK of any other --> a trio task (`Others`), which answers here
                                |    `------ everything else --> SOCK_SEQPACKET pair --> libfuse, pyfuse3
                                `--- relay thread <-- their answers --'

libfuse takes its end of the pair for the device (session.py). So a READ never goes through the pair, whose messages
are bounded, and costs no switch to trio.

Every request is answered once: in full up to the end of the file, or with an errno. The kernel fills a short answer up
with zeroes. A thread of the lane ends when the mount does, and by nothing else.

A read that hangs holds its thread. When none is free and too few go on, another one is started; the last of
MAX_THREADS never reads itself but hands READs over to trio, so that nothing but that image's readers waits.

Which images there are is told by `add` and `remove`, on the trio thread; all else here runs in the lane's threads.
"""

import contextlib
import errno
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from backupfs.errors import BackupfsError
from backupfs.fuse import kernel
from backupfs.fuse.kernel import ANSWER, ANSWER_SIZE, LSEEK_ANSWER, REQUEST
from backupfs.image import Buffer, Gatherer, Image, seek

log = logging.getLogger(__name__)

THREADS = 2
"""That stay. More of them only wait for the interpreter's lock."""
MAX_THREADS = 16
_STALL_S = 0.02  # without a free thread and without an answer: then one more is started
_LARGEST_LISTING = 128 << 10  # bytes of a READDIR's answer: it has to fit into a message
_MESSAGES = 4 << 20  # bytes that the pair holds, if that is allowed
_GONE = (errno.ENOENT, errno.ENODEV)  # nobody waits for the answer any more; unmounted
_NOT_A_REQUEST = (errno.ENOENT, errno.EINTR, errno.EAGAIN)  # interrupted before it was read


class Held(Protocol):
    """An image that is open, and whether it can be trusted (images.py)."""

    image: Image | None
    condemned: Exception | None


class Others(Protocol):
    """Who answers what the lane does not. Called on the trio thread; each call leads to one answer or refusal."""

    def start_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        """Begin to answer a READ."""

    def start_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        """Begin to answer an LSEEK."""

    def complain(self, inode: int, doing: str, error: Exception) -> None:
        """Log an error. From any thread."""


class _File:
    """A file handle that the lane answers for."""

    __slots__ = ("data", "gather", "held", "image", "inode", "readers", "size")

    def __init__(self, inode: int, held: Held) -> None:
        assert held.image is not None, "open"
        self.inode = inode
        self.held = held
        self.image = image = held.image
        self.size = image.size
        self.readers: list[int] = []  # requests that are in the image: append and pop need no lock
        self.data = 0, 0  # offset and end of data that is known: programs ask for its end from everywhere in it
        self.gather: Callable[[int, int], Sequence[Buffer | bytes]]
        self.gather = image.gather if isinstance(image, Gatherer) else self._read

    def seek(self, offset: int, whence: int) -> int:
        """Return where data or a hole begins. Raises as `image.seek`."""
        first, end = self.data
        if first <= offset < end:
            return end if whence == os.SEEK_HOLE else offset
        found = seek(self.image, offset, whence)
        if whence == os.SEEK_HOLE:
            self.data = offset, found
        return found

    def _read(self, offset: int, length: int) -> list[Buffer | bytes]:
        buffer = bytearray(length)
        self.image.readinto(offset, buffer)
        return [buffer]


class Lane:
    """Stands between the device and libfuse.

    Args:
        device: the FUSE device, mounted. The lane closes it, in `close`, if none of its threads can be in it any more.

    Attributes:
        session: the descriptor that libfuse is to take for the device; it closes it.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._pair, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._pair, theirs):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGES)
        self._largest_answer = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.session = theirs.detach()
        self._files: dict[int, _File] = {}
        self._free = [False] * MAX_THREADS  # which threads wait for a request; each sets its own
        self._turns = [0] * MAX_THREADS  # requests that each has taken
        self._threads: dict[int, threading.Thread] = {}
        self._relayers: list[threading.Thread] = []  # one, when started
        self._crowded = threading.Event()  # no thread was free
        self._ending = False
        self._on_answering: Callable[[], None] = lambda: None

    def start(self, others: Others, on_answering: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Begin to answer. On the trio thread.

        Args:
            others: answers what the lane does not.
            on_answering: called once, in a thread, when the kernel has the answer of the handshake.
            on_end: called on the trio thread when the mount is gone, maybe several times, but not after `finish`.
        """
        self._others = others
        self._token = trio.lowlevel.current_trio_token()
        self._on_answering, self._on_end = on_answering, on_end
        for slot in range(THREADS):
            self._start_thread(slot)
        self._relayers = [threading.Thread(target=self._relay, name="lane-relay", daemon=True)]
        self._relayers[0].start()
        threading.Thread(target=self._watch, name="lane-watch", daemon=True).start()

    def add(self, handle: int, inode: int, held: Held) -> None:
        """Answer for a file handle from now on."""
        self._files[handle] = _File(inode, held)

    async def remove(self, handle: int) -> None:
        """Forget a handle; no thread is in its image any more when this returns."""
        file = self._files.pop(handle, None)
        # The kernel releases a handle after its last READ is answered, so this hardly ever waits.
        while file is not None and file.readers:
            await trio.sleep(0.005)

    def drop_pages(self, inode: int) -> None:
        """Make the kernel forget what it has cached of an inode. May block: in a thread of its own, not the relay's."""
        size = kernel.INVALIDATE_INODE.size
        notice = kernel.INVALIDATE_INODE.pack(size, kernel.NOTIFY_INVAL_INODE, 0, inode, 0, 0)
        with contextlib.suppress(OSError):  # ENOENT: the kernel does not know the inode any more
            os.write(self._device, notice)

    # Answers. Each request gets one of them.

    def answer(self, unique: int, pieces: Sequence[Buffer | bytes], length: int) -> OSError | None:
        """Answer a READ with pieces that are `length` bytes together. Returns why that was an EIO."""
        return self._write(unique, [ANSWER.pack(ANSWER_SIZE + length, 0, unique), *pieces])

    def answer_seek(self, unique: int, offset: int) -> None:
        """Answer an LSEEK."""
        self._write(unique, [LSEEK_ANSWER.pack(LSEEK_ANSWER.size, 0, unique, offset)])

    def refuse(self, unique: int, code: int) -> None:
        """Answer with an errno."""
        self._write(unique, [ANSWER.pack(ANSWER_SIZE, -code, unique)])

    def _write(self, unique: int, buffers: Sequence[Buffer | bytes]) -> OSError | None:
        try:
            os.writev(self._device, buffers)
        except OSError as e:
            if e.errno in _GONE:
                return None
            # Mostly the kernel has ended the request with EIO already.
            with contextlib.suppress(OSError):
                os.write(self._device, ANSWER.pack(ANSWER_SIZE, -errno.EIO, unique))
            return e
        return None

    # The threads.

    def _start_thread(self, slot: int) -> None:
        name = f"lane-{slot}"
        self._threads[slot] = thread = threading.Thread(target=self._serve, args=(slot,), name=name, daemon=True)
        thread.start()

    def _serve(self, slot: int) -> None:
        """Answer requests until the mount ends; a thread that was started in need, until there is none."""
        request = bytearray(kernel.REQUEST_BUFFER)
        buffers, view = [request], memoryview(request)
        readv, unpack, free, turns = os.readv, REQUEST.unpack_from, self._free, self._turns
        while not (self._ending or (slot >= THREADS and free.count(True) >= THREADS)):
            free[slot] = True
            try:
                length = readv(self._device, buffers)
            except OSError as e:
                if e.errno in _NOT_A_REQUEST:
                    continue
                if e.errno != errno.ENODEV:
                    log.error("%s: %s", kernel.DEVICE, e)
                self._tell(lambda: None if self._ending else self._on_end())
                break
            finally:
                free[slot] = False
            turns[slot] += 1
            opcode, unique, handle, offset, size = unpack(request)
            try:
                if opcode == kernel.READ:
                    self._read(unique, handle, offset, size)
                elif opcode == kernel.LSEEK:
                    self._seek(unique, handle, offset, size)
                elif opcode not in kernel.UNANSWERED:
                    if opcode in (kernel.READDIR, kernel.READDIRPLUS):
                        kernel.SIZE.pack_into(request, kernel.SIZE_AT, min(size, _LARGEST_LISTING))
                    self._pair.send(view[:length])
            except Exception as e:  # noqa: BLE001, nothing may end a thread
                # Nothing above raises after an answer was written.
                if not self._ending:
                    log.error("request %d of type %d failed: %r", unique, opcode, e)
                self.refuse(unique, errno.ENOTCONN if self._ending else errno.EIO)
        del self._threads[slot]

    def _read(self, unique: int, handle: int, offset: int, size: int) -> None:
        file = self._enter(unique, handle)
        if file is None:
            self._hand_over(lambda: self._others.start_read(unique, handle, offset, size), unique)
            return
        try:
            length = max(0, min(size, file.size - offset))
            pieces = file.gather(offset, length) if length else ()
            if file.held.condemned is None and sum(map(len, pieces)) == length:
                code = 0
            else:
                code = errno.EIO
                self._complain(file, f"read of {size} bytes at {offset}", _reason(file))
        except Exception as e:  # noqa: BLE001, whatever an Image raises
            code = errno.EIO
            self._complain(file, f"read of {size} bytes at {offset}", e)
        finally:
            file.readers.pop()
        if code:
            self.refuse(unique, code)
            return
        error = self.answer(unique, pieces, length)
        if error is not None:  # EFAULT: a mapped file can't be read there
            self._complain(file, f"read of {size} bytes at {offset}", error)

    def _seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        file = self._enter(unique, handle)
        if file is None:
            self._hand_over(lambda: self._others.start_seek(unique, handle, offset, whence), unique)
            return
        found, code = 0, 0
        try:
            if file.held.condemned is not None:
                raise _reason(file)
            found = file.seek(offset, whence)
        except OSError as e:
            code = e.errno or errno.EIO
        except Exception as e:  # noqa: BLE001, as above
            code = errno.EIO
            self._complain(file, f"seek at {offset}", e)
        finally:
            file.readers.pop()
        if code:
            self.refuse(unique, code)
        else:
            self.answer_seek(unique, found)

    def _enter(self, unique: int, handle: int) -> _File | None:
        """Return the handle's file, and be among its readers, or None when somebody else has to answer."""
        file = self._files.get(handle)
        if file is None:
            return None
        if True not in self._free:
            if len(self._threads) == MAX_THREADS:
                return None
            self._crowded.set()
        file.readers.append(unique)
        # In this order: `remove` looks at the readers after it took the handle away, `close` after it set the flag.
        if self._ending or handle not in self._files:
            file.readers.pop()
            return None
        return file

    def _hand_over(self, call: Callable[[], None], unique: int) -> None:
        if self._ending or not self._tell(call):
            self.refuse(unique, errno.ENOTCONN)

    def _tell(self, call: Callable[[], None]) -> bool:
        """Have something called on the trio thread; return whether there is one."""
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            return False
        return True

    def _complain(self, file: _File, doing: str, error: Exception) -> None:
        self._others.complain(file.inode, doing, error)

    def _relay(self) -> None:
        """Carry libfuse's answers to the kernel, until it closes its end."""
        buffer = bytearray(self._largest_answer)
        view = memoryview(buffer)
        for number in itertools.count():
            try:
                length = self._pair.recv_into(buffer)
                if not length:
                    return
                os.write(self._device, view[:length])
            except OSError as e:
                if e.errno not in _GONE:
                    log.error("an answer of libfuse's was refused: %s", e)
            if not number:
                self._on_answering()

    def _watch(self) -> None:
        """Start another thread whenever too few are left that do not hang."""
        while not self._ending:
            self._crowded.wait()
            before = self._turns.copy()
            time.sleep(_STALL_S)
            self._crowded.clear()
            if True in self._free or self._ending:
                continue
            hung = sum(before[slot] == self._turns[slot] for slot in list(self._threads))
            if hung > len(self._threads) - THREADS and len(self._threads) < MAX_THREADS:
                self._start_thread(next(slot for slot in range(MAX_THREADS) if slot not in self._threads))
            self._crowded.set()

    # The end.

    async def finish(self) -> None:
        """Take no more reads, and return when those that are being answered are."""
        self._ending = True
        self._crowded.set()
        while self.reading:
            await trio.sleep(0.005)

    @property
    def reading(self) -> bool:
        """Whether a thread is in an image."""
        return any(file.readers for file in self._files.values())

    def close(self) -> None:
        """Let libfuse's end go; it is closed already. Close the device, if no thread is left at it.

        A lazily unmounted file that is still open keeps threads waiting there. Nobody can wake them; the process' end
        closes the device, and its readers get ENOTCONN.
        """
        self._ending = True
        self._crowded.set()
        with contextlib.suppress(OSError):
            self._pair.shutdown(socket.SHUT_RDWR)
        threads = [*self._threads.values(), *self._relayers]
        for thread in threads:
            thread.join(0.1)
        if not any(thread.is_alive() for thread in threads):
            os.close(self._device)


def _reason(file: _File) -> Exception:
    if file.held.condemned is not None:
        return BackupfsError(f"the image can't be trusted: {file.held.condemned}")
    return AssertionError("the image gave another number of bytes than was asked for")
