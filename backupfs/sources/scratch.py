"""The folder of one backup of a running machine: where QEMU keeps the old content of what the guest overwrites.

    backupfs-<repository>-<session>/     0700, of QEMU's user
        lock                             held (flock) by the backup as long as it lives; says which QEMU it belongs to
        paused                           there while the guest is stopped by us
        0.qcow2, 1.qcow2, ...            by disk
        empty.qcow2                      nobody reads or writes it: what is backed by a filter holds it in its place
        nbd                              QEMU's NBD server; in a folder of the same name in /tmp if the path is too long

QEMU's user can write here, and a hostile QEMU can say that the folder is anywhere. So of another's folder nothing is
read but the lock, and nothing removed but these names, in a folder of that form.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping

from backupfs.errors import ConnectError, SourceError
from backupfs.sources.machine import PREFIX
from backupfs.sources.monitor import owner, started
from backupfs.units import KiB, MiB

log = logging.getLogger(__name__)

_PATH_LIMIT = 107  # bytes in the path of a UNIX socket. Source: unix(7)
_SHORT = "/tmp"  # noqa: S108, the folder made in it is private and has a name that nobody can guess
_FLOOR = 256 * MiB
_GOODBYE_S = 10.0  # for a server to let go of a client
_NAME = re.compile(PREFIX + r"(?P<repository>[0-9a-f]{8})-(?P<session>[0-9a-f]{8})")
_FILE = re.compile(r"lock|paused|nbd|(empty|\d+)\.qcow2")


def session_of(name: str) -> str | None:
    """Return the name of the session (its folder's, too) that a node, job or export of ours belongs to."""
    found = re.match(_NAME.pattern + "-", name)
    return found[0][:-1] if found else None


class Scratch:
    """A folder that was just made, and its lock. Made by `make` or `take`.

    Attributes:
        name: the session's; every node, job and export of it begins with this and a dash.
        path: of the folder.
    """

    def __init__(self, path: str, lock: int | None) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self._lock = lock

    @property
    def sockets(self) -> list[str]:
        """Where the NBD server's socket may be: the first whose path is not too long is."""
        return [os.path.join(self.path, "nbd"), os.path.join(_SHORT, self.name, "nbd")]

    @property
    def socket(self) -> str:
        """Where the NBD server listens."""
        return next(s for s in self.sockets if len(os.fsencode(s)) <= _PATH_LIMIT)

    def image(self, number: int) -> str:
        """Return the path of a disk's scratch."""
        return os.path.join(self.path, f"{number}.qcow2")

    @property
    def empty(self) -> str:
        """The path of an image that nothing is ever in."""
        return os.path.join(self.path, "empty.qcow2")

    def create_images(self, sizes: Mapping[int, int], uid: int | None, timeout_s: float) -> None:
        """Make each disk's scratch and the empty image, before `hand_over`. They take up what the guest overwrites.

        Args:
            sizes: bytes, by number.

        Raises:
            ConnectError: one can't be made.
        """
        for number, size in sizes.items():
            _create_image(self.image(number), size, uid, timeout_s)
        _create_image(self.empty, 0, uid, timeout_s, "-o", "cluster_size=512")  # a small file

    def hand_over(self, uid: int | None) -> None:
        """Give the folder to QEMU's user. Nothing is made in it by name after that: a link could lie in wait there.

        Raises:
            ConnectError: it can't be given.
        """
        try:
            _give(self.path, uid)
        except OSError as e:
            raise ConnectError(f"{self.path}: can't be given to QEMU's user {uid}: {e.strerror}") from e

    def free(self) -> int:
        """Return how many bytes the scratch may still grow by before the backup has to end."""
        try:
            space = os.statvfs(self.path)
        except OSError as e:
            raise ConnectError(f"{self.path}: {e.strerror}") from e
        floor = min(_FLOOR, space.f_blocks * space.f_frsize // 10)
        return space.f_bavail * space.f_frsize - floor

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a note for whoever takes over that the guest was stopped by us, as long as the block lasts."""
        try:
            with open(os.path.join(self.path, "paused"), "xb"):
                pass
        except OSError as e:
            raise ConnectError(f"{self.path}: {e.strerror}") from e
        yield
        self.resumed()  # not after an error: the undo looks whether the note is there

    def resumed(self) -> None:
        """Take that note away, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.path, "paused"))

    @property
    def was_paused(self) -> bool:
        """Whether there is such a note."""
        return os.path.lexists(os.path.join(self.path, "paused"))

    def serves(self) -> str | None:
        """Return the path of the socket that a server of this session listens on, or None.

        Raises:
            SourceError: what listens there hangs.
        """
        return self.socket if _listened_on(self.socket) else None

    def belongs(self, pid: int) -> bool:
        """Say whether the session's QEMU is the process `pid`."""
        return self._lock is not None and os.pread(self._lock, 100, 0).split()[:1] == [b"%d" % pid]

    @property
    def orphaned(self) -> bool:
        """Whether the session's QEMU has ended. A folder without a lock does not say."""
        if self._lock is None:
            return False
        try:
            pid, began = map(int, os.pread(self._lock, 100, 0).split())
        except ValueError:
            return False
        return started(pid) != began

    def remove(self) -> None:
        """Remove the folder and what we put there; let go of the lock. Raises OSError when something is left."""
        try:
            for folder in (self.path, os.path.join(_SHORT, self.name)):
                with contextlib.suppress(FileNotFoundError):
                    _empty(folder)
        finally:
            self.release()

    def discard(self) -> None:
        """Remove the folder as far as it can be; what can't is logged."""
        try:
            self.remove()
        except OSError as e:
            log.warning("%s: can't be removed: %s", self.path, e.strerror)
        self.release()

    def release(self) -> None:
        """Let go of the lock, and leave the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def make(scratch: str, repository: str, pid: int) -> Scratch:
    """Make a folder for a session with the QEMU whose process is `pid`.

    Args:
        scratch: the folder that it is made in.
        repository: the repository's id.

    Raises:
        ConnectError: it can't be made.
    """
    path = os.path.join(os.path.abspath(scratch), f"{PREFIX}{repository[:8]}-{secrets.token_hex(4)}")
    folder = Scratch(path, None)
    uid = owner(pid)
    try:
        os.mkdir(path, 0o700)
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        folder = Scratch(path, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, f"{pid} {started(pid)}\n".encode())
        if folder.socket != folder.sockets[0]:
            os.mkdir(os.path.dirname(folder.socket), 0o700)
            _give(os.path.dirname(folder.socket), uid)
    except OSError as e:
        with contextlib.suppress(OSError):
            folder.remove()
        raise ConnectError(f"can't make a folder for the backup's scratch in {scratch}: {e.strerror}") from e
    return folder


def _create_image(path: str, size: int, uid: int | None, timeout_s: float, *options: str) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "--", path, str(size)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError as e:
        raise ConnectError("qemu-img is not installed: install the package qemu-utils") from e
    except subprocess.TimeoutExpired as e:
        raise ConnectError(f"{path}: qemu-img did not make it within {timeout_s:g} s") from e
    if done.returncode:
        raise ConnectError(f"{path}: {done.stderr.decode(errors='replace').strip().removeprefix('qemu-img: ')}")
    _give(path, uid)


def _give(path: str, uid: int | None) -> None:
    if uid is not None and os.geteuid() == 0:
        os.chown(path, uid, -1, follow_symlinks=False)


class Alive(SourceError):
    """The session's backup still runs."""


def take(path: str) -> Scratch | None:
    """Take over the folder of a session whose backup is dead. None when it is gone, or when it is not one of ours.

    Raises:
        Alive: the backup lives.
    """
    if not _NAME.fullmatch(os.path.basename(path)) or not os.path.isabs(path):
        return None
    try:
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return Scratch(path, None)  # removed by hand, or killed before it was there
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(lock)  # anybody can make such a folder in /var/tmp, and QEMU's user such a lock in ours
        return Scratch(path, None)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise Alive("another backup of this machine is running") from e
    return Scratch(path, lock)


def forgotten(scratch: str, pid: int, used: set[str]) -> Iterator[Scratch]:
    """Take over the folders in `scratch` whose backup is dead and whose QEMU is, too, or does not use them any more.

    Args:
        pid: of this machine's QEMU.
        used: the sessions that this QEMU knows.
    """
    try:
        names = [n for n in os.listdir(scratch) if _NAME.fullmatch(n) and n not in used]
    except OSError:
        return
    for name in names:
        try:
            folder = take(os.path.join(os.path.abspath(scratch), name))
        except Alive:
            continue
        if folder is None:
            continue
        if folder.belongs(pid) or folder.orphaned:
            yield folder
        else:
            folder.release()


def _listened_on(path: str) -> bool:
    """Connect, and wait until the server has let go of us: it is going to be stopped.

    QEMU (7.2) waits for ever, and its guest with it, when its server is stopped while it shakes hands with a client,
    even one that has hung up. Raises SourceError.
    """
    deadline = time.monotonic() + _GOODBYE_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(_GOODBYE_S)
        try:
            s.connect(path)
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return any(line.endswith(" " + path) for line in _listening())
        try:
            s.shutdown(socket.SHUT_WR)
            while s.recv(KiB):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                s.settimeout(left_s)
        except TimeoutError as e:
            raise SourceError(f"{path}: the server there did not end a connection within {_GOODBYE_S:g} s") from e
        except OSError:
            pass  # it hung up first
        return True


def _listening() -> list[str]:
    """Return the lines of listening sockets, which name a removed path as well. Source: proc(5), /proc/net/unix"""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as sockets:
        return [line.rstrip("\n") for line in sockets if " 00010000 " in line]


def _empty(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(fd):
            if _FILE.fullmatch(name):
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(folder)
