"""Files that a copy is making, under names of their own until they are complete.

Whoever makes one holds a lock on it. What a copy that was killed left has none, and the next one removes it.
"""

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator

_NAME = b".backupfs-%s.part"
_LEFT = re.compile(rb"\.backupfs-[0-9a-f]{16}\.part")
_LOOKED_AT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def temporary_name(folder: int, name: bytes) -> Iterator[bytes]:
    """Give a name for what is being made; afterwards it is in its place, or gone."""
    temporary = _NAME % secrets.token_hex(8).encode()  # no name that a guest could have chosen
    try:
        yield temporary
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def hold(file: int) -> None:
    """Keep others from taking a file that is being made, as long as it is open, for what was left."""
    with contextlib.suppress(OSError):  # a file system may have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder: int) -> None:
    """Remove what was left in a folder, as far as that can be done."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            left = os.fsencode(name)
            if _LEFT.fullmatch(left) and not _is_held(folder, left):
                with contextlib.suppress(OSError):  # a folder of this name is nobody's part
                    os.unlink(left, dir_fd=folder)


def _is_held(folder: int, name: bytes) -> bool:
    """Whether somebody is making it. A link, and a file that can't be opened, are complete in the next moment."""
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return False
        file = os.open(name, _LOOKED_AT, dir_fd=folder)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False
