"""The guests' disks whose files somebody looks at: opened with the first look, closed when nobody looks any more.

From any thread, several at once; all of it may block.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from backupfs.errors import BackupfsError, NotFound
from backupfs.filesystem import FileSystem
from backupfs.fuse.catalogue import GuestFolder, GuestVolume
from backupfs.fuse.guest_volume import Volume
from backupfs.fuse.nodes import DiskFiles, VolumeFolder

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""How long a disk stays open that nobody looks at."""
_RETRY_S = 10.0  # after a volume could not be opened
_OPEN_DISKS = 16  # if more are in use, more are open


class Unreadable(BackupfsError):
    """The files of a volume can't be read."""


@dataclass(slots=True)
class Disk:
    """A disk, open, and those of its volumes that were looked into."""

    folder: GuestFolder
    users: int = 0
    used_s: float = 0.0
    opening: threading.Lock = field(default_factory=threading.Lock)
    _opening_volume: dict[str, threading.Lock] = field(default_factory=dict)
    context: contextlib.ExitStack | None = None
    volumes: Mapping[str, GuestVolume] = field(default_factory=dict)
    opened: dict[str, Volume] = field(default_factory=dict)
    _failed: dict[str, tuple[float, Unreadable]] = field(default_factory=dict)

    def look(self) -> None:
        """Find out which volumes there are, if nobody did. Raises BackupfsError."""
        if self.context is not None:
            return
        with self.opening:
            if self.context is None:
                context = contextlib.ExitStack()
                self.volumes = context.enter_context(self.folder.volumes())
                self.context = context

    def open(self, name: str) -> Volume:
        """Return a volume's files. Raises Unreadable; NotFound."""
        known = self.opened.get(name)
        if known:
            return known
        volume = self.volumes.get(name)
        if volume is None:
            raise NotFound(f"no volume {name!r}")
        # One that hangs while it is opened holds up nobody who looks at another.
        with self._opening_volume.setdefault(name, threading.Lock()):
            if name not in self.opened:
                failed = self._failed.get(name)
                if failed and time.monotonic() < failed[0]:
                    raise failed[1]
                if volume.problem is not None:
                    raise Unreadable(volume.problem)
                self.opened[name] = self._open(name, volume)
            return self.opened[name]

    def _open(self, name: str, volume: GuestVolume) -> Volume:
        try:
            fs = volume.open()
        except BackupfsError as e:
            log.error("%s/%s: its files can't be read: %s", self.folder.name, name, e)
            unreadable = Unreadable(str(e))
            self._failed[name] = time.monotonic() + _RETRY_S, unreadable
            raise unreadable from e
        assert self.context is not None, "in use"
        self.context.callback(fs.close)
        for note in fs.notes:
            log.warning("%s/%s: %s", self.folder.name, name, note)
        return Volume(fs, volume.file, has_labels=_has_labels(fs))


def _has_labels(fs: FileSystem) -> bool:
    """Whether SELinux has been here: its first folder has a label then."""
    try:
        return b"security.selinux" in fs.xattrs(fs.root)
    except BackupfsError:
        return True


class Disks:
    """All of them.

    Args:
        find: returns what a folder stands for. Raises NotFound if its point is gone, or is another now.
    """

    def __init__(self, find: Callable[[DiskFiles], GuestFolder]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._disks: dict[DiskFiles, Disk] = {}

    @contextlib.contextmanager
    def use(self, node: DiskFiles) -> Iterator[Disk]:
        """Give a disk, which stays open meanwhile. Raises BackupfsError."""
        with self._lock:
            disk = self._disks.get(node)
            if disk is None:
                disk = self._disks[node] = Disk(self._find(node))
            disk.users += 1
        try:
            disk.look()
            yield disk
        finally:
            with self._lock:
                disk.users -= 1
                disk.used_s = time.monotonic()
            if len(self._disks) > _OPEN_DISKS:
                self.close_idle(0)

    @contextlib.contextmanager
    def volume(self, node: VolumeFolder) -> Iterator[Volume]:
        """Give a volume's files; see `use`. Raises Unreadable; NotFound: there is no such volume."""
        with self.use(node.disk) as disk:
            yield disk.open(node.name)

    def at_hand(self, node: VolumeFolder) -> Volume | None:
        """Return a volume if it is open, for a look at what is remembered of it. Does not block."""
        disk = self._disks.get(node.disk)
        return disk.opened.get(node.name) if disk else None

    @property
    def busy(self) -> bool:
        """Whether a thread is in one of them."""
        return any(disk.users for disk in list(self._disks.values()))

    def close_idle(self, idle_s: float = IDLE_S) -> None:
        """Close the disks that nobody has used for so long."""
        before = time.monotonic() - idle_s
        with self._lock:
            idle = [node for node, disk in self._disks.items() if not disk.users and disk.used_s <= before]
            closing = [self._disks.pop(node) for node in idle]
        for disk in closing:
            if disk.context is not None:
                try:
                    disk.context.close()
                except Exception:
                    log.exception("%s: closing failed", disk.folder.name)
