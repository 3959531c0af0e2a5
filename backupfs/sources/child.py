"""A process of ours that is handed one socket, and that does not outlive us."""

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from backupfs.errors import ConnectError

# Run by sh, as `sh -c … sh PARENT command…`: takes the socket that is its stdin to descriptor 3, as systemd's socket
# activation wants it. A parent that died before setpriv asked for the signal is found out by its number.
_START = 'test "$PPID" = "$1" && shift && exec 3<&0 0</dev/null && LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'


class Child:
    """A process that is killed when this one ends.

    The kernel sends that signal when the *thread* ends that made the child: a thread is kept for it. Source: prctl(2),
    PR_SET_PDEATHSIG.

    Args:
        command: the program and its arguments.
        handed: a socket that it finds as descriptor 3. Closed here: when the child dies, whoever talks to it through
            the other end, or waits to be accepted, gets an error at once.

    Raises:
        ConnectError: it can't be started.
    """

    def __init__(self, command: Sequence[str], handed: socket.socket) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop
        self._stopping = threading.Lock()
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: OSError | None = None
        self._keeper = threading.Thread(target=self._keep, args=(command, handed), name=command[0], daemon=True)
        self._keeper.start()
        try:
            self._started.wait()
        except BaseException:
            self.stop()
            raise
        handed.close()
        if self._problem is not None:
            self._stderr.close()
            raise ConnectError(f"can't start {command[0]}: {self._problem}") from self._problem

    def _keep(self, command: Sequence[str], handed: socket.socket) -> None:
        start = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", _START, "sh", str(os.getpid()), *command]
        try:
            self._process = subprocess.Popen(
                start, stdin=handed.fileno(), stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True
            )
        except OSError as e:
            self._problem = e
        self._started.set()
        if self._process is not None:
            self._process.wait()

    def stop(self) -> str:
        """Kill it and wait until it is gone; return the end of what it wrote to stderr. Twice does no harm."""
        with self._stopping:
            if self._stderr.closed:
                return ""
            self._started.wait()
            if self._process is not None:
                self._process.kill()
            self._keeper.join()
            self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 4096))
            words = self._stderr.read().decode(errors="replace").strip()
            self._stderr.close()
            return words
