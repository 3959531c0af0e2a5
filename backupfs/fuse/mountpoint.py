"""A mount point and the kernel: who is mounted there, mounting a FUSE device, taking it away. No trio, no pyfuse3.

Everything but `open_device` may be called from any process. Nothing here looks into a mount that answers, except
`is_dead`, which the mount's own process must not call while it is mounted.

Root mounts and unmounts by system call, anybody else through fusermount3, which is setuid root.
"""

import ctypes
import errno
import logging
import os
import re
import socket
import subprocess
import threading
from dataclasses import dataclass

from backupfs.errors import MountError

log = logging.getLogger(__name__)

FILE_SYSTEM = "fuse.backupfs"

# Source: <linux/mount.h>
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH = 2
_READAHEAD_KB = 4096  # some READs of the largest size, which are done side by side
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # the second: it was cut off through /sys/fs/fuse/connections
_ANSWER_S = 5.0  # a mount that does not answer by then hangs, but it is not dead

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mounted:
    """What is mounted at a place: the topmost, if there are several."""

    mount_id: int
    path: str
    file_system: str
    source: str
    device: str  # MAJOR:MINOR


def resolve(path: str) -> str:
    """Return the mount point's path as the kernel knows it, without a look at what is mounted there.

    Only a symbolic link at its end is followed by a look at it.
    """
    path = os.path.abspath(path)
    plain = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return plain if find(plain) else os.path.realpath(path)


def find(path: str) -> Mounted | None:
    """Return what is mounted exactly at `path`, a resolved one. Source: proc(5), /proc/PID/mountinfo."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, (file_system, source, *_) = left.split(" "), right.split(" ")
            if _unescape(fields[4]) == path:
                found = Mounted(int(fields[0]), path, file_system, _unescape(source), fields[2])
    return found


def _unescape(field: str) -> str:
    """Undo the kernel's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def is_dead(path: str) -> bool:
    """Whether what is mounted at `path` has lost its process; one that hangs is not dead."""
    return _answer_of(path) in _DEAD


def _answer_of(path: str) -> int | None:
    """Ask the process of a mount. Return the errno, 0 if it answers; None if it does not within some seconds.

    statvfs asks it each time. What stat says may be out of the kernel's cache, and then of a dead one, too.
    """
    outcome: list[int] = []

    def look() -> None:
        try:
            os.statvfs(path)
            outcome.append(0)
        except OSError as e:
            outcome.append(e.errno or 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return outcome[0] if outcome else None


def prepare(path: str) -> None:
    """Make sure that something can be mounted at `path`, a resolved one; take a dead mount of ours away first.

    Raises:
        MountError: it can't.
    """
    mounted = find(path)
    while mounted is not None and mounted.file_system == FILE_SYSTEM:
        if not is_dead(path):
            raise MountError(
                f"{path}: {mounted.source} is mounted here already; `backupfs umount {path}` takes it away"
            )
        log.warning("%s: a dead mount of %s was left here; taking it away", path, mounted.source)
        detach(path)
        mounted = find(path)
    try:
        with os.scandir(path) as entries:
            if next(entries, None) is not None:
                log.warning("%s is not empty: what is in it is hidden while the mount lasts", path)
    except FileNotFoundError as e:
        raise MountError(f"{path}: no such folder; make it first: mkdir -p {path}") from e
    except NotADirectoryError as e:
        raise MountError(f"{path} is not a folder") from e
    except PermissionError:
        pass  # mount(2) and fusermount3 know what is allowed
    except OSError as e:
        raise MountError(f"{path}: {e.strerror}") from e


def open_device(path: str, source: str, *, allow_other: bool, writable: bool = False) -> int:
    """Mount a new FUSE device at `path` and return it; the kernel's requests can be read from it.

    Until somebody answers there, whoever looks at `path` waits. Who is let in may read everything, whatever the modes
    say (no default_permissions): those of guests' files are for the guests' users, and all of it is in the raw disk.

    Args:
        path: a folder that `prepare` found right.
        source: what `mount` and `df` show as the device.
        allow_other: let other users in.
        writable: let requests come that change something.

    Raises:
        MountError: it can't be mounted.
    """
    if os.geteuid() == 0:
        return _mount_as_root(path, source, allow_other, writable)
    return _mount_as_user(path, source, allow_other, writable)


def _mount_as_root(path: str, source: str, allow_other: bool, writable: bool) -> int:
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise MountError(f"/dev/fuse: {e.strerror}; load the kernel's module: modprobe fuse") from e
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    if allow_other:
        options += ",allow_other"
    flags = ctypes.c_ulong((0 if writable else _MS_RDONLY) | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if _libc.mount(os.fsencode(source), os.fsencode(path), FILE_SYSTEM.encode(), flags, options.encode()):
        os.close(device)
        raise MountError(f"{path}: can't be mounted: {os.strerror(ctypes.get_errno())}")
    return device


def _mount_as_user(path: str, source: str, allow_other: bool, writable: bool) -> int:
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    kind = FILE_SYSTEM.partition(".")[2]
    options = f"{'rw' if writable else 'ro'},nosuid,nodev,noexec,fsname={name},subtype={kind}"
    if allow_other:
        options += ",allow_other"
    here, there = socket.socketpair()  # fusermount3 hands the device over through it. Source: libfuse, lib/mount.c
    with here, there:
        command = ["fusermount3", "-o", options, "--", path]
        _fusermount(command, path, "mounted", pass_fds=[there.fileno()], comm_fd=there.fileno())
        there.close()
        _, devices, _, _ = socket.recv_fds(here, 1, 1)
    if not devices:
        raise MountError(f"{path}: fusermount3 gave no device back")
    os.set_inheritable(devices[0], False)
    return devices[0]


def raise_readahead(mounted: Mounted | None) -> None:
    """Have the kernel read further ahead: its own 128 KiB make small requests. Only root may; otherwise it stays.

    Called when the mount answers: the handshake sets it. Source: Documentation/ABI/testing/sysfs-class-bdi.
    """
    if mounted is None:
        return
    try:
        with open(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(_READAHEAD_KB))
    except OSError as e:
        log.debug("%s: the readahead stays as it is: %s", mounted.path, e)


def detach(path: str) -> None:
    """Take the topmost mount at `path` away at once: who still uses it keeps what is open, until the process ends.

    Raises:
        MountError: it can't be.
    """
    if os.geteuid() == 0:
        _umount_as_root(path, _MNT_DETACH)
    else:
        _fusermount(["fusermount3", "-u", "-z", "--", path], path, "unmounted")


def take_away(path: str) -> None:
    """Unmount the backupfs that is mounted at `path`; it is gone when this returns. A dead one goes too.

    Raises:
        MountError: there is none, or it is in use.
    """
    path = resolve(path)
    mounted = find(path)
    if mounted is None or mounted.file_system != FILE_SYSTEM:
        what = "nothing is mounted here" if mounted is None else f"a {mounted.file_system} is mounted here"
        raise MountError(f"{path}: {what}, not a backupfs; `findmnt -t {FILE_SYSTEM}` lists those")
    answer = _answer_of(path)
    if answer is None:
        raise MountError(f"{path}: its process does not answer; `umount --lazy {path}` takes it away all the same")
    if answer in _DEAD:
        detach(path)
    elif os.geteuid() == 0:
        _umount_as_root(path, 0)
    else:
        _fusermount(["fusermount3", "-u", "--", path], path, "unmounted")
    still = find(path)
    if still is not None and still.mount_id == mounted.mount_id:
        raise MountError(f"{path} is still mounted")


def _umount_as_root(path: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(path), flags):
        raise _not_unmounted(path, ctypes.get_errno())


def _not_unmounted(path: str, code: int) -> MountError:
    if code == errno.EBUSY:
        return MountError(f"{path} is in use; `fuser -vm {path}` says by whom, loop devices: `losetup -a`")
    return MountError(f"{path}: can't be unmounted: {os.strerror(code)}")


def _fusermount(
    command: list[str], path: str, what: str, *, pass_fds: list[int] | None = None, comm_fd: int = -1
) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    if comm_fd >= 0:
        environment["_FUSE_COMMFD"] = str(comm_fd)
    try:
        done = subprocess.run(
            command,
            env=environment,
            pass_fds=pass_fds or [],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as e:
        raise MountError("fusermount3 is not there; install the package fuse3") from e
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        if os.strerror(errno.EBUSY) in said and what == "unmounted":
            raise _not_unmounted(path, errno.EBUSY)
        raise MountError(f"{path}: can't be {what}: {said or 'fusermount3 failed'}")
