"""Who excludes whom. All locks are flocks: the kernel drops them when their holder dies, however it dies.

| lock | held alone by |
|---|---|
| `lock` | who changes what the repository holds |
| `index.lock` | who opens the index or puts another in its place, meanwhile |

Reading takes no part in the first: what is published does not change. From any thread.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from backupfs.errors import Locked, RepositoryError


@contextlib.contextmanager
def writer_lock(root: str, waiting: Callable[[str], None] | None) -> Iterator[None]:
    """Hold the repository's writer lock for the `with` block.

    Args:
        root: the repository's folder.
        waiting: called with a message when another process has it, before waiting for that; None: do not wait.

    Raises:
        Locked: another process has it, and it is not waited for.
    """
    fd = _open(os.path.join(root, "lock"))
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "another process"
            if waiting is None:
                message = f"{root}: {holder} is writing to this repository; try again when it is done"
                raise Locked(message) from e
            waiting(f"{root}: {holder} is writing to this repository; waiting until it is done")
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # the name is for messages only
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def index_lock(folder: str) -> Iterator[None]:
    """One process at a time opens the index in `folder` or puts another there: it is two files, and they must match.

    Who waits for a rebuild finds it done.
    """
    path = f"{folder}.lock"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except OSError as e:
        raise RepositoryError(f"{path}: {e.strerror}") from e
    fd = _open(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise RepositoryError(f"{path}: {e.strerror}") from e
