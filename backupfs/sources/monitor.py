"""A connection to QEMU's monitor (QMP). The only importer of qemu.qmp.

The client runs on an asyncio loop in a thread of its own; `execute` may be called from any thread, and always comes
back in time. A command that was not answered in time may still be carried out later: the connection is given up then,
every later command fails at once, and what QEMU really did is to be asked over a new one (`reconnect`). QEMU handles
what came over the old one before it accepts the new one.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from backupfs.errors import ConnectError, ProtocolError

_T = TypeVar("_T")
_GOODBYE_S = 2.0
_UCRED = "3i"  # struct ucred: pid, uid, gid. Source: unix(7)

# What it logs (an error for each connection that is refused) is in the errors that are raised here.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class Refused(ProtocolError):
    """QEMU carried out nothing, and said why.

    Attributes:
        reason: QEMU's words.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refused {command}: {reason}")
        self.reason = reason


class Monitor:
    """QEMU's monitor.

    Args:
        path: of the UNIX socket.
        timeout_s: for the greeting, and for each answer.

    Attributes:
        lost: why there is no connection any more; None while there is one.
        version: QEMU's: major, minor, micro.
        pid: QEMU's process, as the socket tells it; 0 when that is outside of this process' sight.

    Raises:
        ConnectError: nobody answers, or something that is no QMP monitor.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path = path
        self.pid = 0
        self.version = (0, 0, 0)
        self.lost: ConnectError | None = None
        self._timeout_s = timeout_s
        self._client = QMPClient()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._connect(timeout_s)
        except BaseException:
            self.close()
            raise

    def _connect(self, limit_s: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(limit_s)
            try:
                s.connect(self.path)
                peer = s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
                s.setblocking(False)
                self._run(asyncio.wait_for(self._client.connect(s.dup()), limit_s), limit_s)
            except (TimeoutError, BlockingIOError) as e:
                raise ConnectError(
                    f"{self.path}: no greeting: another program is connected to this monitor (QEMU serves one at a "
                    "time; a further -qmp option gives it a further socket), or QEMU hangs"
                ) from e
            except OSError as e:
                raise ConnectError(f"{self.path}: {_hint(e)}") from e
            except (QMPError, EOFError) as e:
                raise ConnectError(f"{self.path}: not a QMP monitor, or it hung up: {_root(e)}") from e
        self.pid = int(struct.unpack(_UCRED, peer)[0])
        self.version = _version(self._client)

    def _run(self, work: Coroutine[Any, Any, _T], limit_s: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit_s + _GOODBYE_S)
        except CancelledError as e:
            raise TimeoutError from e

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return what QEMU returns.

        Raises:
            Refused: QEMU says that it did not do it.
            ConnectError: the connection was lost, now or before; whether it was done is not known.
        """
        if self.lost is not None:
            raise ConnectError(str(self.lost))
        try:
            answer = asyncio.wait_for(self._client.execute(command, arguments), self._timeout_s)
            return self._run(answer, self._timeout_s)
        except ExecuteError as e:
            raise Refused(command, str(e)) from e
        except TimeoutError as e:
            self.lost = ConnectError(f"{self.path}: QEMU did not answer {command} within {self._timeout_s:g} s")
            raise self.lost from e
        except (QMPError, OSError, EOFError) as e:
            self.lost = ConnectError(f"{self.path}: QEMU hung up at {command}: it has ended, or its monitor was closed")
            raise self.lost from e

    def reconnect(self, limit_s: float) -> None:
        """Make a new connection after the old one was lost.

        Raises:
            ConnectError: there is none within `limit_s`.
        """
        self._disconnect()
        self._client = QMPClient()
        self._connect(limit_s)
        self.lost = None

    def _disconnect(self) -> None:
        # Raises what broke the connection, or what breaks now.
        with contextlib.suppress(Exception):
            self._run(asyncio.wait_for(self._client.disconnect(), _GOODBYE_S), _GOODBYE_S)

    def close(self) -> None:
        """Hang up. Twice does no harm."""
        if self._loop.is_closed():
            return
        self.lost = self.lost or ConnectError(f"{self.path}: closed")
        self._disconnect()
        with contextlib.suppress(Exception):
            self._run(_cancel_all(), _GOODBYE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _version(client: QMPClient) -> tuple[int, int, int]:
    """Return what QEMU said of itself in its greeting; zeroes if it said nothing."""
    said: Any = client.greeting.QMP.version if client.greeting is not None else {}
    numbers = said.get("qemu", {})
    return numbers.get("major", 0), numbers.get("minor", 0), numbers.get("micro", 0)


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _hint(e: OSError) -> str:
    if isinstance(e, FileNotFoundError):
        return "there is no such socket; is the virtual machine running, with -qmp unix:…,server=on,wait=off?"
    if isinstance(e, ConnectionRefusedError):
        return "nobody listens on this socket any more: QEMU has ended"
    return e.strerror or str(e)


def _root(e: BaseException) -> BaseException:
    while e.__cause__ is not None:
        e = e.__cause__
    return e


def owner(pid: int) -> int | None:
    """Return the user that a process touches files as; None when that can't be seen.

    Not the socket's SO_PEERCRED: that is who made the socket, root with QEMU's -runas.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = dict(line.split(b":", 1) for line in status)
        return int(lines[b"Uid"].split()[3])  # real, effective, saved, file system. Source: proc(5)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def started(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine booted; None when there is none, or it is dead."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
