"""What stands behind the inode numbers of a mount: nodes, their numbers, and what stat(2) tells of them.

An inode number stands for one Node for as long as the mount lives. A File's node holds the version of its content, so
an edited `point.json`, or a point that was deleted and made again under the same id, gets another number: the kernel's
page cache of the old number can't show through. The same holds for a live disk that came back: as it may be another
moment, it is another file, and who has the old one open gets errors, not a mixture. Nothing of a point's content is
kept here. All of it may be used from any thread.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from backupfs.errors import NotFound
from backupfs.filesystem import Stat

ROOT_INODE = 1

FILE_TIMEOUT_S = 300.0
"""How long the kernel may believe a disk's attributes and name: its content never changes."""
GUEST_TIMEOUT_S = 3600.0
"""The same for a guest's files, of which there are many: the folder that they are in is looked up again much sooner."""
FRESH_TIMEOUT_S = 1.0
"""The same for what changes while mounted: folders grow, `latest` moves, `point.json` is edited."""
LATEST_TIMEOUT_S = 0.1
"""The same for `latest`, which every path below it goes through: who makes a point and looks at once finds it."""
LIVE_TIMEOUT_S = 0.0
"""The same for live disks. The kernel looks a name up again once, not twice, when it is told that its number is stale:
that once is for a disk that comes back while it is opened."""

# A number below 2^53 survives programs that keep it in a double, JSON for one: one half of these is for guests' files.
_INODES = 1 << 52
_VOLUMES, _GUEST_INODES = 1 << 20, 1 << 32


class Stale(NotFound):
    """What an inode number stood for is gone, or has other content now: the name has to be looked up again."""


@dataclass(frozen=True, slots=True)
class Root:
    """The mount's own folder."""


@dataclass(frozen=True, slots=True)
class VmFolder:
    """The folder of a VM."""

    vm: str


@dataclass(frozen=True, slots=True)
class LatestLink:
    """The link to a VM's newest point. When there is a newer one it is another node: none ever changes."""

    vm: str
    target: str


@dataclass(frozen=True, slots=True)
class PointFolder:
    """The folder of a point."""

    vm: str
    point: str


@dataclass(frozen=True, slots=True)
class SubFolder:
    """A folder in a point's folder."""

    vm: str
    point: str
    name: str


@dataclass(frozen=True, slots=True)
class File:
    """A file in a point's folder, or in `folder` in that, with all that stat(2) tells of it.

    Of one that is writable `allocated` and `time_ns` are as if nobody had written to it.
    """

    vm: str
    point: str
    folder: str
    name: str
    version: str
    size: int
    allocated: int
    time_ns: int
    timeout_s: float
    writable: bool = field(default=False, repr=False)  # not in the inode number: its name says so already


@dataclass(frozen=True, slots=True)
class DiskFiles:
    """The folder, in a point's folder, of the file systems on a disk. `version` differs when the disk does."""

    vm: str
    point: str
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class VolumeFolder:
    """The first folder of a file system on a disk; or what stands for it when it can't be read."""

    disk: DiskFiles
    name: str


@dataclass(frozen=True, slots=True)
class GuestFile:
    """Anything in a guest's file system but its first folder, by its own inode number: hard links are one node."""

    volume: VolumeFolder
    inode: int


@dataclass(frozen=True, slots=True)
class Notice:
    """A text of ours about a file system, in the folder of the disk or, where there is no other file, the volume's."""

    folder: DiskFiles | VolumeFolder
    name: str
    content: bytes


GuestPart = DiskFiles | VolumeFolder
GuestNode = DiskFiles | VolumeFolder | GuestFile | Notice
Node = Root | VmFolder | LatestLink | PointFolder | SubFolder | File | GuestNode


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) answers. Owner, other times and a device's number only `guest` has, of a guest's file."""

    inode: int
    mode: int
    nlink: int
    size: int
    allocated: int
    time_ns: int
    timeout_s: float
    guest: Stat | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder."""

    name: bytes
    attributes: Attributes


def hash_node(node: Node) -> int:
    """Return the inode number that a node gets if no other has it: the same in every mount."""
    digest = hashlib.blake2b(repr(node).encode(errors="surrogatepass"), digest_size=8).digest()
    return ROOT_INODE + 1 + int.from_bytes(digest, "little") % (_INODES - ROOT_INODE - 1)


class Inodes:
    """Numbers for nodes. Given once, a number is never given again: the table only grows.

    It stays small: some 500 bytes for each name that was looked at, so FORGET can be dropped. A guest's file takes
    nothing, as its number consists of a number for its volume, which is in the table, and its own; unless that is
    above 2**32 (NTFS, btrfs and large XFS may have such).
    """

    def __init__(self, first_choice: Callable[[Node], int] = hash_node) -> None:
        self._first_choice = first_choice
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {ROOT_INODE: Root()}
        self._volumes: dict[int, VolumeFolder] = {}
        self._volume_numbers: dict[VolumeFolder, int] = {}

    def number(self, node: Node) -> int:
        """Return the node's number."""
        if isinstance(node, GuestFile) and 0 <= node.inode < _GUEST_INODES:
            volume = self._volume_number(node.volume)
            if volume is not None:
                return _INODES + volume * _GUEST_INODES + node.inode
        inode = ROOT_INODE if isinstance(node, Root) else self._first_choice(node)
        with self._lock:
            # Nothing is ever taken out, so the same steps lead to the same place again.
            while self._nodes.setdefault(inode, node) != node:
                inode = inode + 1 if inode + 1 < _INODES else ROOT_INODE + 1
        return inode

    def _volume_number(self, volume: VolumeFolder) -> int | None:
        number = self._volume_numbers.get(volume)
        if number is None:
            with self._lock:
                if len(self._volumes) >= _VOLUMES // 2:
                    return self._volume_numbers.get(volume)
                number = self._first_choice(volume) % _VOLUMES
                while self._volumes.setdefault(number, volume) != volume:
                    number = (number + 1) % _VOLUMES
                self._volume_numbers[volume] = number
        return number

    def node(self, inode: int) -> Node:
        """Return what a number stands for.

        Raises:
            Stale: nothing; the number is from an earlier mount, through NFS for example.
        """
        try:
            if inode < _INODES:
                return self._nodes[inode]
            volume, inside = divmod(inode - _INODES, _GUEST_INODES)
            return GuestFile(self._volumes[volume], inside)
        except KeyError:
            raise Stale(f"no inode {inode} in this mount") from None


def component(name: str) -> bytes | None:
    """Return a name as the kernel wants it, or None when it can't be a name in a folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return None
    try:
        return name.encode()
    except UnicodeEncodeError:
        return None
