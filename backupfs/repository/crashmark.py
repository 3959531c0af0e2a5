"""Word of a process that died by a fault while it had the index open. Who opens it next builds it again.

LMDB reads the index through a mapping and has no checksums, so a flipped bit can lead it out of the file: SIGBUS, or
an assertion of its own. No wrong byte comes of that, but the process ends, and would again. So each process that has
the index open keeps a file beside it, locked, into which faulthandler writes when such a signal comes. A file with
something in it that nobody has locked is of one that died so; an empty one is of one that was killed.
"""

import contextlib
import faulthandler
import fcntl
import os
import secrets

from backupfs.repository.files import open_regular

_PREFIX = "open-"
_MOST = 200  # bytes that are told


class CrashMark:
    """Held while a process has the index in `folder` open. Under the index's lock when it is made.

    If somebody else uses faulthandler in this process, or the folder can't be written, there is no word.
    """

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, _PREFIX + secrets.token_hex(8))
        self._fd = -1
        if faulthandler.is_enabled():
            return
        with contextlib.suppress(OSError):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            faulthandler.enable(self._fd, all_threads=False)

    def close(self) -> None:
        """Take it away."""
        if self._fd >= 0:
            faulthandler.disable()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


def fault_of(folder: str) -> str | None:
    """Return what the end of a process that had the index open was, if it was a fault. Under the index's lock.

    Files of processes that were only killed are taken away.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(_PREFIX):
                fault = _fault_in(os.path.join(folder, name))
                if fault:
                    return fault
    return None


def _fault_in(path: str) -> str | None:
    with contextlib.suppress(OSError):
        fd = open_regular(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said = os.read(fd, _MOST).decode(errors="replace").splitlines()
            if said:
                return said[0]
            os.unlink(path)
        finally:
            os.close(fd)
    return None
