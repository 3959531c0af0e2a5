"""Start one of our commands in the background, and learn whether it works before going on.

The child is a new program, not a fork: no open LMDB environment may cross a fork. It finds the number of a pipe in its
environment and sends one JSON document through it: `{"ready": true}` or its error. What a kill -9 leaves:

    of the child before its word   the pipe closes; `start` fails with what the child said on stderr
    of the child after it          whatever it was doing; nobody waits for it any more
    of the parent before the word  the child's `ready` raises BrokenPipeError: nobody would know that it runs

`start` is for the parent; `waiting_parent` and `log_to_file` are for the child. On the main thread, but `ready`.
"""

import hashlib
import json
import logging
import logging.handlers
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any
from urllib.parse import quote

from backupfs import errors
from backupfs.errors import BackupfsError
from backupfs.units import MiB

log = logging.getLogger(__name__)

READY_FD = "BACKUPFS_READY_FD"
_LOG_BYTES = 1 * MiB  # and as much again in the one before
_LONGEST_NAME = 200
_TAIL = 2000  # bytes of stderr that an error quotes


class Died(BackupfsError):
    """The child ended without a word."""


def start(arguments: Sequence[str]) -> None:
    """Start `backupfs ARGUMENTS` in a session of its own; return when it says that it is ready.

    Raises:
        BackupfsError: what the child failed with, of the same class.
        Died: it ended and did not say why; the message holds the end of its stderr.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as stderr, open(reader, "rb") as pipe:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "backupfs", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[writer],
                start_new_session=True,
                env={**os.environ, READY_FD: str(writer)},
            )
        finally:
            os.close(writer)
        try:
            word = pipe.read()
        except BaseException:  # Ctrl-C does not reach the child: it is in another session
            child.terminate()
            child.wait()
            raise
        document = _parse(word)
        if document.get("ready"):
            child.returncode = 0  # not ours to wait for; without this, Popen complains about a forgotten child
            return
        child.wait()
        if "error" in document:
            raise _decode_error(document)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL))
        said = stderr.read().decode(errors="replace").strip()
        raise Died(f"the background process died (status {child.returncode}): {said or 'it said nothing'}")


def _parse(word: bytes) -> dict[str, Any]:
    try:
        document = json.loads(word)
    except ValueError:  # nothing, or the half of it
        return {}
    return document if isinstance(document, dict) else {}


def _encode_error(error: BackupfsError) -> bytes:
    document = {"error": type(error).__name__, "message": str(error), "facts": vars(error)}
    return json.dumps(document, default=str).encode()


def _decode_error(document: dict[str, Any]) -> BackupfsError:
    kind = getattr(errors, document["error"], BackupfsError)
    error: BackupfsError = kind.__new__(kind, document["message"])  # past __init__: the message is made already
    vars(error).update(document["facts"])
    return error


class Parent:
    """The process that started this one, and waits for word of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self) -> None:
        """Say that this process is ready; give stdin, stdout and stderr up. From any thread.

        Raises:
            OSError: the parent is gone.
        """
        self._send(b'{"ready": true}')
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.close(nowhere)

    def failed(self, error: BackupfsError) -> None:
        """Say what went wrong, unless `ready` was said. It does no harm if the parent is gone."""
        if self._fd >= 0:
            try:
                self._send(_encode_error(error))
            except OSError as e:
                log.warning("who started this process is gone: %s", e)

    def _send(self, word: bytes) -> None:
        fd, self._fd = self._fd, -1
        with open(fd, "wb", buffering=0) as pipe:
            pipe.write(word)  # below PIPE_BUF or cut by nobody: the pipe is empty


def waiting_parent() -> Parent | None:
    """Return the parent that waits, if this process was begun by `start`. Asked a second time: None."""
    fd = os.environ.pop(READY_FD, "")
    if not fd.isdecimal():
        return None
    os.set_inheritable(int(fd), False)
    return Parent(int(fd))


class _PrivateLog(logging.handlers.RotatingFileHandler):
    """A log file of bounded size that nobody else reads."""

    def _open(self) -> TextIOWrapper:
        return open(
            self.baseFilename, "a", encoding="utf-8", errors="replace", opener=lambda p, f: os.open(p, f, 0o600)
        )


def log_path(subject: str) -> str:
    """Return the path of the log file of what runs for `subject`, a path."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    name = quote(subject, safe="", errors="surrogateescape")
    if len(name) > _LONGEST_NAME:
        name = f"{name[-_LONGEST_NAME:]}-{hashlib.blake2b(os.fsencode(subject), digest_size=8).hexdigest()}"
    return os.path.join(state, "backupfs", f"{name}.log")


def log_to_file(subject: str) -> None:
    """Send the log to a file from here on. Where none can be written, it stays on stderr."""
    path = log_path(subject)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        target = _PrivateLog(path, maxBytes=_LOG_BYTES, backupCount=1)
    except OSError as e:
        log.warning("%s: no log can be written: %s", path, e.strerror)
        return
    form = f"%(asctime)s [{os.getpid()}] %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, handlers=[target], force=True)
