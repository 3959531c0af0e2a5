"""What goes wrong in a mount, told to the log, and not too often."""

import logging
import threading

from backupfs.errors import BackupfsError, Corrupt

log = logging.getLogger(__name__)

_COMPLAINTS = 20  # of one file


class Complaints:
    """Logs what went wrong: each error of a file once, and only the first 20. A damaged disk must not fill a log."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, set[object]] = {}

    def say(self, subject: str, doing: str, error: Exception) -> None:
        """Log that `doing` something to `subject` raised `error`. From any thread."""
        where = (error.file, error.offset) if isinstance(error, Corrupt) else (type(error), str(error))
        with self._lock:
            said = self._said.setdefault(subject, set())
            if where in said or len(said) >= _COMPLAINTS:
                return
            said.add(where)
            last = len(said) == _COMPLAINTS
        expected = isinstance(error, BackupfsError)
        log.error("%s: %s failed: %s", subject, doing, error or repr(error), exc_info=None if expected else error)
        if last:
            log.error("%s: nothing more is logged about it", subject)
