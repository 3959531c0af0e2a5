"""The folder of one backup of a running domain: QEMU's socket, its scratch files, and the proof that the owner lives.

    backupfs-vm-DOMAIN-XXXXXXXX/  mode 0711: QEMU goes through, nobody lists
        lock                      locked (flock) for as long as the backup's process lives
        frozen                    there while the guest's file systems may be frozen
        qemu/                     mode 0700, QEMU's user's
            nbd  vda  vdb  ...

After a kill the folder stays, and says to the next backup: the job that is served there, and the freeze, are nobody's.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator

from backupfs.errors import ConnectError, UsageError
from backupfs.units import MiB

_FLOOR = 256 * MiB  # free space below which the backup ends: QEMU stops a guest whose old blocks it can't keep
_PATH_LIMIT = 107  # bytes in the path of a UNIX socket. Source: unix(7)
_NAME = re.compile(r"backupfs-vm-[0-9a-f]{8}-[A-Za-z0-9_]{8}")


class Folder:
    """A folder whose lock this process has.

    Attributes:
        path: its path, absolute.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, scratch: str, domain: str, user: tuple[int, int] | None) -> "Folder":
        """Make one for a backup.

        Args:
            scratch: where; the folder is made when it is not there.
            domain: the domain's UUID.
            user: QEMU's user and group, None: this process's.

        Raises:
            UsageError: the path is too long for a socket.
            ConnectError: it can't be made, can't be given to QEMU's user, or has no space.
        """
        prefix = _prefix(domain)
        full = os.path.abspath(scratch)
        if len(os.fsencode(full)) + len(f"/{prefix}xxxxxxxx/qemu/nbd") > _PATH_LIMIT:
            raise UsageError(f"--scratch {scratch}: the path is too long for a socket in it; name a shorter one")
        try:
            os.makedirs(full, exist_ok=True)
            path = tempfile.mkdtemp(prefix=prefix, dir=full)
        except OSError as e:
            raise ConnectError(f"{scratch}: can't make a folder for the backup in it: {e.strerror}") from e
        try:
            lock = os.open(f"{path}/lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(f"{path}/lock.new", f"{path}/lock")
            folder = cls(path, lock)
            os.mkdir(f"{path}/qemu", 0o700)
            if user is not None and user[0] != os.geteuid():
                os.chown(f"{path}/qemu", *user)
            os.chmod(path, 0o711)  # noqa: S103, QEMU's user has to go through
        except PermissionError as e:
            shutil.rmtree(path, ignore_errors=True)
            raise ConnectError(f"{path}: can't be given to QEMU's user {user}: run backupfs as root") from e
        except OSError as e:
            shutil.rmtree(path, ignore_errors=True)
            raise ConnectError(f"{path}: {e.strerror}") from e
        if folder.free() <= 0:
            folder.remove()
            raise ConnectError(f"--scratch {scratch}: its file system is almost full; name a folder on another one")
        return folder

    @property
    def socket(self) -> str:
        """Where QEMU is to listen."""
        return f"{self.path}/qemu/nbd"

    def scratch_file(self, disk: int) -> str:
        """Return the path of the scratch file of the `disk`th disk: a name from outside becomes no path."""
        return f"{self.path}/qemu/scratch{disk}"

    def free(self) -> int:
        """Return how many bytes the scratch files may still grow by before the backup has to end."""
        try:
            space = os.statvfs(self.path)
        except OSError:  # somebody removed it: QEMU has the files open
            return 1
        return space.f_bavail * space.f_frsize - min(_FLOOR, space.f_blocks * space.f_frsize // 10)

    @property
    def frozen(self) -> bool:
        """Whether the guest's file systems may be frozen. Kept in the folder."""
        return os.path.lexists(f"{self.path}/frozen")

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value:
            os.close(os.open(f"{self.path}/frozen", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        elif self.frozen:
            os.unlink(f"{self.path}/frozen")

    def remove(self) -> None:
        """Remove it with everything in it, and let the lock go. Twice does no harm."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.leave()

    def leave(self) -> None:
        """Let the lock go, and leave the rest for the next backup to find."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def abandoned(scratch: str, domain: str) -> Iterator[Folder]:
    """Yield this domain's folders in `scratch` whose owners are gone."""
    full = os.path.abspath(scratch)
    try:
        names = sorted(os.listdir(full))
    except OSError:
        return
    for name in names:
        if name.startswith(_prefix(domain)) and _NAME.fullmatch(name):
            folder = _take(os.path.join(full, name))
            if folder is not None:
                yield folder


def owner_is_gone(socket: str) -> bool | None:
    """Say of a backup job whether the backupfs that began it is gone; None: it is not backupfs's.

    Args:
        socket: what it is served at.
    """
    path, inside = os.path.split(os.path.dirname(socket))
    if inside != "qemu" or os.path.basename(socket) != "nbd" or not _NAME.fullmatch(os.path.basename(path)):
        return None
    if not os.path.lexists(path):
        return True
    folder = _take(path)
    if folder is None:
        return False
    folder.leave()
    return True


def place_of(socket: str) -> str:
    """Return the `--scratch` of a backupfs's backup job, given what it is served at."""
    return os.path.dirname(os.path.dirname(os.path.dirname(socket)))


def _take(path: str) -> Folder | None:
    """Return a folder whose owner is gone, locked by this process; None: its owner lives, or it can't be told."""
    try:
        lock = os.open(f"{path}/lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(lock)  # anybody can make such a folder in /var/tmp
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return Folder(path, lock)


def _prefix(domain: str) -> str:
    return f"backupfs-vm-{domain[:8]}-"
