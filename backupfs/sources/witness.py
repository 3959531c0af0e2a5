"""Whether a moment still holds, asked of QEMU by NBD."""

import threading
from collections import deque

from backupfs.errors import ConnectError, ProtocolError
from backupfs.sources.nbd import Request, Wire

_ALLOCATION = "base:allocation"


class Witness:
    """An export that tells its block status for exactly as long as a disk's moment holds: see fleecing.py.

    What was read before `check` began is of the moment when it returns. It is asked after a sector's status, not read:
    that has no part in what the disk can't read. From any thread, and from several.

    Args:
        uri: of the export.
        name: what messages call the disk.
        timeout_s: how long QEMU may be silent.

    Raises:
        ConnectError: no connection.
    """

    def __init__(self, uri: str, name: str, timeout_s: float) -> None:
        self.uri = uri
        self._name = name
        self._timeout_s = timeout_s
        self._checking = threading.Lock()
        self._closed = False
        self.wire = self._connect()

    def _connect(self) -> Wire:
        return Wire(self.uri, [_ALLOCATION], self._name, self._timeout_s)

    def ask(self, done: "deque[Request]") -> None:
        """Send the question, for `judge` to be called with what comes into `done`. Raises SourceError."""
        self.wire.ask_status(Request(0, min(self.wire.unit, self.wire.size), done))

    def judge(self, answer: Request) -> None:
        """Raise ProtocolError when the moment was lost."""
        if answer.error is not None or not answer.answers.get(_ALLOCATION):
            raise ProtocolError(
                f"{self._name}: the moment is lost: the scratch was full, or too slow, for what the guest overwrote"
            )

    def check(self) -> None:
        """Ask, and wait for the answer; over a new connection if there was none, which can tell as well.

        Raises:
            ProtocolError: the moment was lost.
            ConnectError: QEMU does not answer.
        """
        with self._checking:
            try:
                self._check()
            except ConnectError:
                if self._closed:
                    raise
                self.wire = self._connect()
                if self._closed:  # in the meantime
                    self.wire.close()
                self._check()

    def _check(self) -> None:
        done: deque[Request] = deque()
        self.ask(done)
        self.wire.wait(done)
        self.judge(done.popleft())

    def close(self) -> None:
        """Let the connection go. Waits for nothing."""
        self._closed = True
        self.wire.close()
