"""The read lane: answers READ and LSEEK of stored points at the FUSE device, without pyfuse3 and trio.

    kernel --- /dev/fuse --- reader thread -- READ of what is at hand ---> answered at once
                                |    |------- other READ, LSEEK ---------> workers (workers.py)
                                |    |------- WRITE, FALLOCATE ----------> workers
                                |    |------- of files it does not know -> a trio task (`Others`)
                                |    `------- everything else -----------> SOCK_SEQPACKET pair --> libfuse, pyfuse3
                                `--- relay thread <-- their answers ------'

One thread reads the device: two that contend for the interpreter's lock answer less than half as many reads. It never
waits, neither for a disk nor for pyfuse3: what the pair has no room for goes through a thread. libfuse takes its end of
the pair for the device (session.py). A READ or a WRITE never goes through the pair, whose messages are bounded; and
pyfuse3 has no FALLOCATE.

Every request is answered once: in full up to the end of the file, or with an errno. The kernel fills a short answer up
with zeroes. The reader ends when the mount does, and by nothing else.

Which images there are is told by `add` and `remove`, on the trio thread; all else here runs in the lane's threads.
"""

import contextlib
import errno
import itertools
import logging
import mmap
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from backupfs.errors import BackupfsError
from backupfs.fuse import kernel
from backupfs.fuse.amend import Amender
from backupfs.fuse.guest_lane import GuestLane, Guests
from backupfs.fuse.kernel import ANSWER, ANSWER_SIZE, LSEEK_ANSWER, REQUEST, WRITE_ANSWER
from backupfs.fuse.passthrough import Passthrough
from backupfs.fuse.polling import AdaptivePolling
from backupfs.fuse.workers import File, Held, Job, Workers
from backupfs.image import Buffer

log = logging.getLogger(__name__)

_SECTOR = 512  # READs of other sizes are rare
_LARGEST_LISTING = 128 << 10  # bytes of a READDIR's answer: it has to fit into a message
_MESSAGES = 4 << 20  # bytes that the pair holds, if that is allowed
_GONE = (errno.ENOENT, errno.ENODEV)  # nobody waits for the answer any more; unmounted
_NOT_A_REQUEST = (errno.ENOENT, errno.EINTR)  # interrupted before it was read


class Others(Guests, Protocol):
    """Who answers what the lane does not. Called on the trio thread; each call leads to one answer or refusal."""

    def start_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        """Begin to answer a READ."""

    def start_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        """Begin to answer an LSEEK."""

    def is_constant(self, inode: int) -> bool:
        """Whether what is in a folder never changes. From any thread; does not block."""

    def complain(self, inode: int, doing: str, error: Exception) -> None:
        """Log an error. From any thread."""


class _Answer:
    """Memory for the answer of a READ of so many bytes: the content begins where a page does, the header before it."""

    __slots__ = ("content", "head", "whole")

    def __init__(self, memory: memoryview, size: int) -> None:
        begin, end = mmap.PAGESIZE - ANSWER_SIZE, mmap.PAGESIZE + size
        self.head = memory[begin : mmap.PAGESIZE]
        self.content = [memory[mmap.PAGESIZE : end]]
        self.whole = memory[begin:end]


class Lane:
    """Stands between the device and libfuse.

    Args:
        device: the FUSE device, mounted. The lane closes it, in `close`, if none of its threads can be in it any more.
        passthrough: have the kernel read raw files by itself, if it can.
        keep_acls: have it keep ACLs (acls.py).

    Attributes:
        session: the descriptor that libfuse is to take for the device; it closes it.
        passthrough: what the kernel reads by itself.

    Raises:
        OSError: the system has no pair, or none that holds libfuse's largest answer.
    """

    def __init__(self, device: int, *, passthrough: bool = True, keep_acls: bool = False) -> None:
        self._device = device
        self._keep_acls = keep_acls
        self.passthrough = Passthrough(device, wanted=passthrough)
        self._pair, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._pair, theirs):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGES)
        self._largest_answer = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        if self._largest_answer < 2 * _LARGEST_LISTING:
            self._pair.close()
            theirs.close()
            raise OSError(errno.ENOBUFS, f"net.core.wmem_max allows sockets only {self._largest_answer} bytes")
        self.session = theirs.detach()
        self._late: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._files: dict[int, File] = {}
        self._workers: Workers[File, Job] = Workers(self._work)
        self._in_image: File | None = None  # that the reader thread looks at
        self._memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE + kernel.MAX_READ))  # for the reader thread's answers
        self._prepared: dict[int, _Answer] = {}  # by the size of the READ
        self._threads: list[threading.Thread] = []
        self._ending = False

    def start(self, others: Others, on_answering: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Begin to answer. On the trio thread.

        Args:
            others: answers what the lane does not.
            on_answering: called once, in a thread, when the kernel has the answer of the handshake.
            on_end: called on the trio thread when the mount is gone, maybe several times, but not after `finish`.
        """
        self._others = others
        self._guests = GuestLane(others, self._files, self._give, self._store, self._pass_on, keep_acls=self._keep_acls)
        self._amender = Amender(self.passthrough, self._backing_of, others.is_constant, keep_acls=self._keep_acls)
        self._token = trio.lowlevel.current_trio_token()
        self._on_answering, self._on_end = on_answering, on_end
        for target in (self._serve, self._relay, self._post):
            thread = threading.Thread(target=target, name=f"lane-{target.__name__[1:]}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def add(self, handle: int, inode: int, held: Held) -> None:
        """Answer for a file handle from now on."""
        self._files[handle] = File(inode, held)

    async def remove(self, handle: int) -> None:
        """Forget a handle; no thread is in its image any more when this returns."""
        file = self._files.pop(handle, None)
        if file is not None:
            file.closed = True
        # The kernel releases a handle after its last READ is answered, so this hardly ever waits.
        while file is not None and (file is self._in_image or file.jobs):
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
        try:
            os.write(self._device, ANSWER.pack(ANSWER_SIZE, -code, unique))
        except OSError as e:
            self._not_taken(unique, e)

    def _write(self, unique: int, buffers: Sequence[Buffer | bytes]) -> OSError | None:
        try:
            os.writev(self._device, buffers)
        except OSError as e:
            return self._not_taken(unique, e)
        return None

    def _give(self, unique: int, buffers: Sequence[Buffer | bytes]) -> bool:
        """Give the kernel an answer; return whether it took it."""
        try:
            os.writev(self._device, buffers)
        except OSError as e:
            self._not_taken(unique, e)
            return False
        return True

    def _store(self, inode: int, content: bytes) -> None:
        """Give the kernel a file for its cache. Waits for READs of the same file."""
        size = kernel.STORE.size + len(content)
        notice = kernel.STORE.pack(size, kernel.NOTIFY_STORE, 0, inode, 0, len(content))
        with contextlib.suppress(OSError):  # ENOENT: the kernel does not know the inode any more
            os.writev(self._device, [notice, content])

    def _not_taken(self, unique: int, error: OSError) -> OSError | None:
        """Make sure that a request is answered whose answer failed. Returns the error if it is one."""
        if error.errno in _GONE:
            return None
        # Mostly the kernel has ended the request with EIO already.
        with contextlib.suppress(OSError):
            os.write(self._device, ANSWER.pack(ANSWER_SIZE, -errno.EIO, unique))
        return error

    # The reader thread.

    def _serve(self) -> None:
        """Read requests until the mount ends."""
        request = bytearray(kernel.REQUEST_BUFFER)
        buffers, view = [request], memoryview(request)
        readv, unpack, device = os.readv, REQUEST.unpack_from, self._device
        os.set_blocking(self._device, False)
        requests = AdaptivePolling(self._device)
        while not self._ending:
            try:
                length = readv(device, buffers)
            except OSError as e:
                if self._no_request(e, requests):
                    continue
                self._tell(lambda: None if self._ending else self._on_end())
                return
            opcode, unique, handle, offset, size = unpack(request)
            try:
                if opcode == kernel.READ:
                    self._take_read(unique, handle, offset, size)
                elif opcode == kernel.LSEEK:
                    self._take_seek(unique, handle, offset, size)
                elif opcode == kernel.WRITE:
                    self._take_write(unique, handle, offset, view[kernel.DATA_AT : length], size)
                elif opcode == kernel.FALLOCATE:
                    self._take_fallocate(unique, handle, offset, request)
                elif self._guests.take(opcode, unique, handle, view[:length]) or opcode in kernel.UNANSWERED:
                    continue
                else:
                    self._amend(opcode, unique, request, size)
                    self._pass_on(view[:length])
            except Exception as e:  # noqa: BLE001, nothing may end the thread
                # Nothing above raises after it answered, or after it gave the request to another one.
                if not self._ending:
                    log.error("request %d of type %d failed: %r", unique, opcode, e)
                self.refuse(unique, errno.ENOTCONN if self._ending else errno.EIO)

    def _no_request(self, error: OSError, requests: AdaptivePolling) -> bool:
        """Wait for a request, as there was none; return False when there will be none: the mount is gone."""
        if error.errno == errno.EAGAIN:
            requests.wait()
        elif error.errno not in _NOT_A_REQUEST:
            if error.errno != errno.ENODEV:
                log.error("%s: %s", kernel.DEVICE, error)
            return False
        return True

    def _amend(self, opcode: int, unique: int, request: bytearray, size: int) -> None:
        if opcode in (kernel.READDIR, kernel.READDIRPLUS):
            kernel.SIZE.pack_into(request, kernel.SIZE_AT, min(size, _LARGEST_LISTING))
        elif opcode in (kernel.OPEN, kernel.OPENDIR, kernel.INIT):
            self._amender.note(opcode, unique, request)

    def _pass_on(self, request: memoryview | bytes) -> None:
        try:
            self._pair.send(request, socket.MSG_DONTWAIT)
        except BlockingIOError:  # thousands wait for pyfuse3; those who read need not
            self._late.put(bytes(request))

    def _take_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        file = self._files.get(handle)
        if file is None:
            self._hand_over(lambda: self._others.start_read(unique, handle, offset, size), unique)
            return
        if file.content is not None:
            content = file.content[offset : offset + size]
            self.answer(unique, [content], len(content))
            return
        answer, done = self._prepared.get(size) or self._prepare(size), False
        self._in_image = file
        # In this order: `remove` takes the handle away and then waits for us, `finish` sets the flag and then waits.
        if answer is not None and handle in self._files and not self._ending and offset + size <= file.size:
            try:
                done = file.at_once(offset, answer.content)
            except Exception:  # noqa: BLE001, whatever it is, a worker meets it too, and tells
                done = False
        self._in_image = None
        if done and answer is not None and file.held.condemned is None:
            ANSWER.pack_into(answer.head, 0, ANSWER_SIZE + size, 0, unique)
            try:
                os.write(self._device, answer.whole)
            except OSError as e:
                self._not_taken(unique, e)
        else:
            self._workers.submit(file, Job(unique, kernel.READ, offset, size))

    def _prepare(self, size: int) -> "_Answer | None":
        if size % _SECTOR or not 0 < size <= kernel.MAX_READ:
            return None
        answer = self._prepared[size] = _Answer(self._memory, size)
        return answer

    def _take_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        file = self._files.get(handle)
        if file is None:
            self._hand_over(lambda: self._others.start_seek(unique, handle, offset, whence), unique)
            return
        found = file.seek_at_once(offset, whence)
        if found is not None and file.held.condemned is None and not self._ending:
            self.answer_seek(unique, found)
        else:
            self._workers.submit(file, Job(unique, kernel.LSEEK, offset, whence))

    def _take_write(self, unique: int, handle: int, offset: int, data: memoryview, size: int) -> None:
        file = self._files.get(handle)
        if file is None or file.writable is None or len(data) != size:
            self.refuse(unique, errno.EBADF)
        elif offset + size > file.size and offset >= file.size:
            self.refuse(unique, errno.ENOSPC)  # as a device says it
        else:
            # A copy: the next request comes to the same memory.
            self._workers.submit(file, Job(unique, kernel.WRITE, offset, 0, bytes(data[: file.size - offset])))

    def _take_fallocate(self, unique: int, handle: int, offset: int, request: bytearray) -> None:
        length, mode = kernel.FALLOCATE_REQUEST.unpack_from(request)
        file = self._files.get(handle)
        if file is None or file.writable is None:
            self.refuse(unique, errno.EBADF)
        elif mode & ~kernel.FALLOC_KEEP_SIZE not in (kernel.FALLOC_PUNCH_HOLE, kernel.FALLOC_ZERO_RANGE):
            self.refuse(unique, errno.EOPNOTSUPP)  # space for what is there already can't be promised
        elif offset + length > file.size and not mode & kernel.FALLOC_KEEP_SIZE:
            self.refuse(unique, errno.ENOSPC)
        else:
            length = max(min(length, file.size - offset), 0)
            self._workers.submit(file, Job(unique, kernel.FALLOCATE, offset, length))

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

    # In the workers.

    def _work(self, file: File, job: Job) -> None:
        match job.opcode:
            case kernel.READ:
                self._read(file, job.unique, job.offset, job.size)
            case kernel.LSEEK:
                self._seek(file, job.unique, job.offset, job.size)
            case _:
                self._change(file, job)

    def _change(self, file: File, job: Job) -> None:
        doing = f"write of {len(job.data) or job.size} bytes at {job.offset}"
        try:
            if self._ending:
                raise BackupfsError("the mount ends")
            file.check()
            assert file.writable is not None, "taken for one"
            if job.opcode == kernel.WRITE:
                file.writable.write(job.offset, job.data)
            elif job.size:
                file.writable.zero(job.offset, job.size)
        except OSError as e:
            # The writer is told; the log once, and without a traceback: a full disk is nothing unexpected.
            self._others.complain(file.inode, "write", BackupfsError(e.strerror or str(e)))
            self.refuse(job.unique, e.errno or errno.EIO)
        except Exception as e:  # noqa: BLE001, as above
            self._fail(file, job.unique, doing, e)
        else:
            if job.opcode == kernel.WRITE:
                self._write(job.unique, [WRITE_ANSWER.pack(WRITE_ANSWER.size, 0, job.unique, len(job.data))])
            else:
                self._write(job.unique, [ANSWER.pack(ANSWER_SIZE, 0, job.unique)])

    def _read(self, file: File, unique: int, offset: int, size: int) -> None:
        length = max(0, min(size, file.size - offset))
        try:
            self._refuse_if_ending()
            file.check()
            pieces = file.gather(offset, length) if length else ()
            file.check()  # it may have been condemned in the meantime
            if sum(map(len, pieces)) != length:
                raise ValueError("the image gave another number of bytes than was asked for")
        except Exception as e:  # noqa: BLE001, whatever an Image raises
            self._fail(file, unique, f"read of {size} bytes at {offset}", e)
            return
        error = self.answer(unique, pieces, length)
        if error is not None:
            self._others.complain(file.inode, f"read of {size} bytes at {offset}", error)

    def _seek(self, file: File, unique: int, offset: int, whence: int) -> None:
        try:
            self._refuse_if_ending()
            file.check()
            found = file.seek(offset, whence)
        except OSError as e:
            self.refuse(unique, e.errno or errno.EIO)
        except Exception as e:  # noqa: BLE001, as above
            self._fail(file, unique, f"seek at {offset}", e)
        else:
            self.answer_seek(unique, found)

    def _refuse_if_ending(self) -> None:
        if self._ending:
            raise OSError(errno.ENOTCONN, "the mount ends")

    def _fail(self, file: File, unique: int, doing: str, error: Exception) -> None:
        if self._ending:
            self.refuse(unique, errno.ENOTCONN)
        else:
            self._others.complain(file.inode, doing, error)  # first: who sees the error looks into the log
            self.refuse(unique, errno.EIO)

    # The posting thread.

    def _post(self) -> None:
        """Pass on what the pair had no room for, as it gets room."""
        while (request := self._late.get()) is not None:
            try:
                self._pair.send(request)
            except OSError:
                self.refuse(REQUEST.unpack_from(request)[1], errno.ENOTCONN)

    # The relay thread.

    def _relay(self) -> None:
        """Carry libfuse's answers to the kernel, until it closes its end."""
        buffer = bytearray(self._largest_answer)
        view = memoryview(buffer)
        for number in itertools.count():
            try:
                length = self._pair.recv_into(buffer)
                if not length:
                    return
                self._amender.amend(buffer)
                os.write(self._device, view[:length])
                if not number:
                    self._on_answering()
            except Exception as e:  # noqa: BLE001, nothing may end the thread
                if not (isinstance(e, OSError) and e.errno in _GONE):
                    log.error("an answer of libfuse's was refused: %r", e)

    def _backing_of(self, handle: int) -> int:
        file = self._files.get(handle)
        return (file and file.held.backing) or 0

    # The end.

    async def finish(self) -> None:
        """Take no more reads, and return when those that are being answered are."""
        self._ending = True
        while self.reading:
            await trio.sleep(0.005)

    @property
    def reading(self) -> bool:
        """Whether a thread is in an image."""
        return self._in_image is not None or self._workers.busy or self._guests.busy

    def give_up(self) -> None:
        """Leave the device to libfuse, which did not take its end of the pair for it. Instead of `start`."""
        self._pair.close()
        os.close(self.session)

    def close(self) -> None:
        """Let libfuse's end go; it is closed already. Close the device, if no thread is left at it.

        A lazily unmounted file that is still open keeps threads waiting there. Nobody can wake them; the process' end
        closes the device, and its readers get ENOTCONN.
        """
        self._ending = True
        with contextlib.suppress(OSError):
            self._pair.shutdown(socket.SHUT_RDWR)
        self._late.put(None)
        for threads in (self._workers, self._guests):
            if not threads.busy:
                threads.end()
        for thread in self._threads:
            thread.join(1)
        if not self._workers.busy and not any(thread.is_alive() for thread in self._threads):
            self._pair.close()
            os.close(self._device)
