"""Who excludes whom. All locks are flocks: the kernel drops them when their holder dies, however it dies.

| lock | shared by | held alone by |
|---|---|---|
| `lock` | – | who changes what the repository holds: backup, delete, prune, gc, reindex |
| a layer | the open images of the point that brought it (`Pin`) | gc, for the moment of asking (`is_pinned`) |
| a raw image | the kernel, while it reads that by itself | gc, as above |
| `index.lock` | – | who opens the index or puts another in its place, meanwhile |

Reading takes no part in the first: what is published does not change, and gc takes nothing away that an open image
sees. An image pins its point first and then looks whether the point is still there; delete takes the point away and gc
asks for pins afterwards. So one of the two meets the other. From any thread.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from backupfs.errors import Corrupt, Locked, Missing, RepositoryError
from backupfs.repository.files import is_damage, open_regular


@contextlib.contextmanager
def writer_lock(root: str, waiting: Callable[[str], None] | None, *, looking: bool = False) -> Iterator[None]:
    """Hold the repository's writer lock for the `with` block.

    Args:
        root: the repository's folder.
        waiting: called with a message when another process has it, before waiting for that; None: do not wait.
        looking: nothing is going to be written, so it may be a file system that can't be written to.

    Raises:
        Locked: another process has it, and it is not waited for.
    """
    path = os.path.join(root, "lock")
    # flock(2) does not mind how a file was opened; NFS does, which is why it is not always for reading.
    for_reading = looking and os.path.exists(path) and not os.access(path, os.W_OK)
    fd = _open(path, os.O_RDONLY if for_reading else os.O_RDWR | os.O_CREAT)
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
        with contextlib.suppress(OSError):  # the name is for messages only; a full disk must not keep gc out
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
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Pin:
    """Keeps everything that one point of a chain sees, for as long as this object lives.

    Args:
        path: the layer that the point brought.

    Raises:
        Missing: there is no such layer.
        Corrupt: the disk can't read it, or it is no file.
        RepositoryError: it can't be opened.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        try:
            self._fd = open_regular(path)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise Missing(path, "the layer file is missing") from e
        except OSError as e:
            if is_damage(e):
                raise Corrupt(path, 0, f"can't be opened: {e.strerror}") from e
            raise RepositoryError(f"{path}: {e.strerror}") from e
        # Where no lock can be had there is no gc either, for it needs the writer's; a restore must not fail for that.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def is_pinned(path: str) -> bool:
    """Return whether an image of the point that brought this layer is open, in this process or in another.

    Raises:
        RepositoryError: that can't be told.
    """
    try:
        fd = open_regular(path)
    except OSError as e:
        raise RepositoryError(f"{path}: {e.strerror}") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as e:
        raise RepositoryError(f"{path}: can't be locked: {e.strerror}") from e
    finally:
        os.close(fd)
    return False


def _open(path: str, flags: int) -> int:
    try:
        return open_regular(path, flags | os.O_NOFOLLOW)  # what a link leads to would be written into
    except OSError as e:
        raise RepositoryError(f"{path}: {e.strerror}") from e
