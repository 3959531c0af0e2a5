"""The connections to one NBD export, and the requests in flight on them. The only `import nbd`.

All methods of a Wire may be called from any thread and from several; the thread that waits for something drives all
connections, and finishes the others' requests on its way. libnbd never blocks here: it is only asked to do what poll(2)
says it can. A connection that is cut, or silent for `timeout_s`, ends the wire: every later call raises.
"""

import contextlib
import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import nbd

from backupfs import interrupts
from backupfs.errors import ConnectError, ProtocolError, SourceError
from backupfs.units import MiB

_CONNECTIONS = 4  # as nbdcopy; more gain nothing
_MAX_REQUEST = 32 * MiB  # what every server takes that does not say. Source: NBD proto.md, block size constraints
_NONSENSE = (0, errno.EINVAL, errno.EPROTO)  # libnbd's errno for replies that are none; a socket's are others
# ... and what it says, with EINVAL, of a connection that was cut, and when a call comes after that.
_HUNG_UP = ("disconnected", "invalid state", "not in a connected state", "no longer connected")
_JOIN_S = 1.0  # for all connections but the first: a server may promise them and let them wait for ever
_SLICE_S = 0.1  # how long the lock is held while waiting, so that close() from another thread gets it
_NOTHING = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # at hand when descriptors have run out


@dataclass(slots=True, eq=False)
class Request:
    """A range that was asked for. When it is answered, or has failed, it is put into `done`.

    Attributes:
        offset, length: in bytes, aligned to `Wire.unit` or ending where the export does.
        data: the memory that a read goes to; the answer is not looked at, so it holds anything when there is `error`.
        answers: what block status was answered: for each context length, flags, length, flags, ...
        error: the errno of what the server answered, or None.
        apart: has a callback, see `_Connection.notify`.
    """

    offset: int
    length: int
    done: "deque[Request]"
    data: memoryview | None = None
    answers: dict[str, list[int]] = field(default_factory=dict)
    error: int | None = None
    apart: bool = False


class _Connection:
    """One libnbd handle, and what is in flight on it by libnbd's cookie."""

    def __init__(self, uri: str, contexts: Iterable[str]) -> None:
        self.handle = nbd.NBD()
        self.requests: dict[int, Request] = {}
        self.load = 0  # bytes
        self.apart = 0  # requests in flight that have a callback
        self.handle.set_uri_allow_local_file(True)  # the URI of a TLS server names certificates or a key file
        for context in contexts:
            self.handle.add_meta_context(context)
        # Requests are aligned here; whether the last bytes of a disk that is no multiple can be read the server says.
        self.handle.set_strict_mode(self.handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        # Every completion's error is looked at (CVE-2022-0485), so clearing each buffer first gains nothing.
        self.handle.set_pread_initialize(False)
        try:
            self.handle.aio_connect_uri(uri)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket now: a traceback may hold the handle, which does that at its end, for long.

        Shut down it would not be enough. QEMU waits, and its guest with it, when an export goes while what was sent to
        a client is neither read nor thrown away; so the descriptor becomes one of nothing.
        """
        with contextlib.suppress(nbd.Error, OSError):
            os.dup2(_NOTHING, self.handle.aio_get_fd(), inheritable=False)

    def notify(self, events: int) -> None:
        """Let libnbd do what the socket is ready for. Raises nbd.Error when the connection is lost."""
        if self.apart:
            with interrupts.deferred():  # what is raised in a callback libnbd prints and forgets
                self._notify(events)
        else:
            self._notify(events)
        if self.handle.aio_is_dead() or self.handle.aio_is_closed():
            raise nbd.Error("the server closed the connection", errno.ENOTCONN)

    def _notify(self, events: int) -> None:
        direction = self.handle.aio_get_direction()
        if events & ~select.POLLOUT and direction & nbd.AIO_DIRECTION_READ:
            self.handle.aio_notify_read()
        elif events & ~select.POLLIN and direction & nbd.AIO_DIRECTION_WRITE:
            self.handle.aio_notify_write()

    def add(self, cookie: int, request: Request, *, apart: bool = False) -> None:
        """Remember a request in flight; `apart`: it has a callback."""
        self.requests[cookie] = request
        self.apart += apart
        request.apart = apart
        self.load += request.length

    def collect(self) -> None:
        """Put finished requests into their `done`.

        By cookie, not by completion callbacks: libnbd prints and forgets an exception in a callback, Ctrl-C too.
        """
        while self.requests:
            cookie = self.handle.aio_peek_command_completed()
            if cookie <= 0:
                return
            request = self.requests.pop(cookie)
            self.load -= request.length
            self.apart -= request.apart
            try:
                self.handle.aio_command_completed(cookie)
            except nbd.Error as e:
                request.error = e.errnum
            request.done.append(request)


class Wire:
    """All connections to one export.

    The first is made at once, the others at the first read.

    Args:
        uri: where to.
        contexts: the metadata contexts to ask for.
        name: what messages call the export.
        timeout_s: how long the server may be silent. libnbd asks a name server before, and waits for that one.

    Attributes:
        size: of the export, bytes.
        unit: what offsets and lengths have to be multiples of.
        maximum: bytes in a request.

    Raises:
        ConnectError: no connection.
        ProtocolError: the size is none.
    """

    def __init__(self, uri: str, contexts: Iterable[str], name: str, timeout_s: float) -> None:
        self._uri = uri
        self._name = name
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._failure: SourceError | None = None
        self._progress = 0.0  # when something came last, on time.monotonic's clock; whichever thread saw it
        self._ready: list[_Connection] = []
        self._wide = False
        first = None
        try:
            with interrupts.deferred():
                first = _Connection(uri, contexts)
            self._handshake(first, time.monotonic() + timeout_s)
            self.size = _export_size(first.handle, name)
        except nbd.Error as e:
            raise ConnectError(f"{name}: can't connect: {_reason(e)}") from e
        except BaseException:
            if first is not None:
                first.close()
            raise
        self._ready.append(first)
        self.unit = int(first.handle.get_block_size(nbd.SIZE_MINIMUM)) or 1
        self.maximum = int(first.handle.get_block_size(nbd.SIZE_MAXIMUM)) or _MAX_REQUEST

    def can(self, what: Literal["write", "zero", "flush"]) -> bool:
        """Say whether the server lets its clients do that."""
        handle = self._ready[0].handle
        if what == "write":
            return not handle.is_read_only()
        return bool(handle.can_zero() if what == "zero" else handle.can_flush())

    def offers(self, context: str) -> bool:
        """Say whether the server answers block status for a metadata context that was asked for."""
        return bool(self._ready[0].handle.can_meta_context(context))

    def _handshake(self, connection: _Connection, deadline: float) -> None:
        """Wait until a connection is ready; when that fails it is closed."""
        try:
            self._shake_hands(connection, deadline)
        except BaseException:
            connection.close()
            raise

    def _shake_hands(self, connection: _Connection, deadline: float) -> None:
        poller = select.poll()
        handle = connection.handle
        while not handle.aio_is_ready():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ConnectError(f"no answer from {self._name} for {self._timeout_s:g} s")
            try:
                fd = handle.aio_get_fd()
                poller.register(fd, _events(handle))
                for _, events in poller.poll(left_s * 1000):
                    connection.notify(events)
                poller.unregister(fd)
            except nbd.Error as e:
                raise ConnectError(f"{self._name}: can't connect: {_reason(e)}") from e

    def _widen(self) -> None:
        """Connect more often, if the server promises that this works (multi-conn), at the first read.

        Only those that get ready soon count. None is left half-way: QEMU (7.2) hangs, and its guest with it, when its
        server is stopped while a client has not finished its handshake.
        """
        self._wide = True
        if not self._ready[0].handle.can_multi_conn():
            return
        deadline = time.monotonic() + _JOIN_S
        for _ in range(_CONNECTIONS - 1):
            try:
                connection = _Connection(self._uri, ())
                self._handshake(connection, deadline)
                if connection.handle.get_size() != self.size:
                    connection.close()
                    return
            except (nbd.Error, ConnectError):
                return
            self._ready.append(connection)

    def ask_read(self, request: Request) -> None:
        """Send a read of `request.data`'s length to the connection that has least to do."""
        with self._lock:
            self._check()
            if not self._wide:
                self._widen()
            connection = min(self._ready, key=lambda c: c.load)
            try:
                # The memory itself: libnbd 1.14 never lets go of what it is given inside an nbd.Buffer.
                cookie = connection.handle.aio_pread(request.data, request.offset)
            except nbd.Error as e:
                raise self._fail(e) from e
            connection.add(cookie, request)

    def ask_write(self, request: Request) -> None:
        """Send a write of `request.data`, which must not change until it is done."""
        self._ask(request, lambda handle: handle.aio_pwrite(request.data, request.offset))

    def ask_zero(self, request: Request) -> None:
        """Send a request to make a range zero. Only where `can_zero` says so."""
        self._ask(request, lambda handle: handle.aio_zero(request.length, request.offset))

    def ask_flush(self, request: Request) -> None:
        """Send a request to put all writes that are done on the disk; one connection's flush is for all of them.

        Source: NBD proto.md, NBD_FLAG_CAN_MULTI_CONN.
        """
        self._ask(request, lambda handle: handle.aio_flush())

    def _ask(self, request: Request, send: Callable[[nbd.NBD], int]) -> None:
        with interrupts.deferred(), self._lock:  # what was sent and is not remembered would be answered to nobody
            self._check()
            connection = min(self._ready, key=lambda c: c.load)
            try:
                cookie = send(connection.handle)
            except nbd.Error as e:
                raise self._fail(e) from e
            connection.add(cookie, request)

    def ask_status(self, request: Request) -> None:
        """Send a block-status request, on the first connection: the only one with metadata contexts."""

        def note(context: str, offset: int, numbers: list[int], error: object) -> None:
            request.answers[context] = numbers

        with interrupts.deferred(), self._lock:
            self._check()
            try:
                cookie = self._ready[0].handle.aio_block_status(request.length, request.offset, note)
            except nbd.Error as e:
                raise self._fail(e) from e
            self._ready[0].add(cookie, request, apart=True)

    def wait(self, done: "deque[Request]") -> None:
        """Drive all connections until a request is in `done`.

        Raises:
            ConnectError: nothing at all came for `timeout_s`, or a connection was cut.
            ProtocolError: the server broke the protocol.
        """
        began = time.monotonic()
        while not done:
            with self._lock:
                self._check()
                if self._step():
                    self._progress = time.monotonic()
                elif time.monotonic() > max(began, self._progress) + self._timeout_s:
                    silent = ConnectError(f"no answer from {self._name} for {self._timeout_s:g} s")
                    self._drop(silent)
                    raise silent

    def events(self) -> dict[int, int]:
        """Return the descriptors that are waited for, and poll's events: to wait for other things, too.

        Raises:
            SourceError: a connection is lost.
        """
        with self._lock:
            self._check()
            if any(c.handle.aio_is_dead() or c.handle.aio_is_closed() for c in self._ready):
                self._step()
            return {c.handle.aio_get_fd(): _events(c.handle) for c in self._ready}

    def turn(self) -> None:
        """Do what there is to do on a descriptor of `events`. Raises SourceError when a connection is lost."""
        with self._lock:
            self._check()
            self._step()

    def _step(self) -> bool:
        """Poll once. Returns whether a connection with something in flight got on."""
        try:
            connections = {c.handle.aio_get_fd(): c for c in self._ready}
        except nbd.Error as e:  # a connection died while a request was sent
            raise self._fail(e) from e
        poller = select.poll()
        for fd, connection in connections.items():
            poller.register(fd, _events(connection.handle))
        progress = False
        for fd, events in poller.poll(_SLICE_S * 1000):
            connection = connections[fd]
            try:
                connection.notify(events)
                progress = progress or bool(connection.requests)
                connection.collect()
            except nbd.Error as e:
                raise self._fail(e) from e
        return progress

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))  # a new one: threads must not share a traceback

    def _fail(self, e: nbd.Error) -> SourceError:
        """Give up all connections because of `e`; return what to raise."""
        hung_up = any(words in str(e.string) for words in _HUNG_UP)
        kind = ConnectError if hung_up or e.errnum not in _NONSENSE else ProtocolError
        failure = kind(f"{self._name}: connection lost: {_reason(e)}")
        self._drop(failure)
        return failure

    def _drop(self, failure: SourceError) -> None:
        self._failure = self._failure or failure
        for connection in self._ready:
            connection.close()
        self._ready = []

    def close(self) -> None:
        """Say good-bye without waiting for an answer."""
        # Another thread that waits holds the lock again and again; it stops at this.
        self._failure = self._failure or ConnectError(f"{self._name}: closed")
        with self._lock:
            for connection in self._ready:
                if not connection.requests and connection.handle.aio_is_ready():
                    try:
                        connection.handle.aio_disconnect()
                    except nbd.Error:
                        continue  # the server went first
            self._drop(self._failure)


def _export_size(handle: nbd.NBD, name: str) -> int:
    """Return the export's size. libnbd 1.14 makes a negative number of what is 2^63 or more."""
    try:
        size = int(handle.get_size())
    except nbd.Error:  # for 2^64 - 1; the message is then one of before
        size = -1
    if size <= 0:
        raise ProtocolError(f"{name}: the server says that the disk has {size % (1 << 64)} bytes")
    return size


def _events(handle: nbd.NBD) -> int:
    direction = handle.aio_get_direction()
    reading = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
    return reading | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)


def _reason(e: nbd.Error) -> str:
    """Return what libnbd says without the name of its function."""
    return str(e.string).partition(": ")[2] or str(e.string)
