"""What backup, verify and gc came to the last time: a small file each in the repository's folder `status`.

For people and monitoring: nothing in the repository depends on them. A file is replaced by rename; two that finish at
the same moment leave either one.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from backupfs.errors import BackupfsError, Locked, UsageError
from backupfs.repository import names
from backupfs.repository.files import open_regular, write_new
from backupfs.repository.manifest import open_sealed, seal

log = logging.getLogger(__name__)

STATUS = "status"


class Result(msgspec.Struct, kw_only=True):
    """One command's last result.

    Attributes:
        what: backup, verify or gc.
        vm: of which VM; None where it is not about one.
        finished: ISO 8601, UTC.
        message: what went wrong, if it did.
        facts: what there is to tell, by the command's own names.
    """

    what: str
    vm: str | None = None
    ok: bool = True
    finished: str
    seconds: float = 0.0
    message: str = ""
    facts: dict[str, Any] = {}


def now() -> str:
    """Return this moment as results have it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def store(root: str, result: Result) -> None:
    """Keep a result. That it can't be kept is logged: what was done is done."""
    folder = os.path.join(root, STATUS)
    name = result.what if result.vm is None else f"{result.what}-{names.escape(result.vm)}"
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        try:
            write_new(temporary, seal(result))
            os.rename(temporary, os.path.join(folder, f"{name}.json"))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as e:
        log.warning("%s: the result can't be kept: %s", folder, e.strerror)


@contextlib.contextmanager
def recording(root: str, what: str, vm: str | None = None) -> Iterator[Result]:
    """Keep how the `with` block ends; what is put into the result's `facts` is kept with it."""
    began = datetime.now(UTC)
    result = Result(what=what, vm=vm, finished="")
    try:
        yield result
    except (UsageError, Locked):
        raise  # nothing was tried
    except BaseException as e:
        words = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e) or type(e).__name__
        result.ok, result.message = False, words
        _finish(root, result, began)
        raise
    _finish(root, result, began)


def _finish(root: str, result: Result, began: datetime) -> None:
    result.finished = now()
    result.seconds = round((datetime.now(UTC) - began).total_seconds(), 3)
    store(root, result)


def load(root: str) -> tuple[list[Result], list[str]]:
    """Return all results, in order of name, and what is wrong with files that can't be read."""
    folder = os.path.join(root, STATUS)
    found: list[Result] = []
    problems: list[str] = []
    try:
        files = sorted(os.listdir(folder))
    except FileNotFoundError:
        return found, problems
    except OSError as e:
        return found, [f"{folder}: {e.strerror}"]
    for name in files:
        if name.startswith(".") or not name.endswith(".json"):
            continue
        path = os.path.join(folder, name)
        try:
            with open(open_regular(path), "rb") as file:
                found.append(open_sealed(file.read(), path, Result))
        except (OSError, BackupfsError) as e:
            problems.append(f"{e}; the next {name.partition('-')[0].removesuffix('.json')} writes it anew")
    return found, problems
