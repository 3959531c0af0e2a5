"""The tree that a mount shows: names, inode numbers, attributes. No pyfuse3, no trio; testable without a mount.

    /                          Root
    /VM/                       VmFolder
    /VM/latest -> POINT        LatestLink
    /VM/POINT/                 PointFolder
    /VM/POINT/DISK.raw         File
    /VM/POINT/DISK.rw          File, and the only kind that can be written to
    /VM/POINT/DISK.parts/      SubFolder
    /VM/POINT/DISK.parts/1.raw File
    /VM/POINT/point.json       File
    /VM/live/                  PointFolder, in name only: its files come and go with the exports that they show
    /VM/live/DISK.raw          File

Every method of Tree may be called from any thread, from several at once, and may block, because the Catalogue does.

An inode number stands for one Node for as long as the mount lives. A File's node holds the version of its content, so
an edited `point.json`, or a point that was deleted and made again under the same id, gets another number: the kernel's
page cache of the old number can't show through. The same holds for a live disk that came back: as it may be another
moment, it is another file, and who has the old one open gets errors, not a mixture. Nothing of a point's content is
kept here.
"""

import hashlib
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from backupfs.errors import NotFound
from backupfs.fuse.catalogue import LIVE, Catalogue, DiskFile, PointEntry, TextFile

ROOT_INODE = 1
LATEST = b"latest"

FILE_TIMEOUT_S = 300.0
"""How long the kernel may believe a disk's attributes and name: its content never changes."""
FRESH_TIMEOUT_S = 1.0
"""The same for what changes while mounted: folders grow, `latest` moves, `point.json` is edited."""
LIVE_TIMEOUT_S = 0.0
"""The same for live disks. The kernel looks a name up again once, not twice, when it is told that its number is stale:
that once is for a disk that comes back while it is opened."""

_INODES = 1 << 52  # a number below 2^53 survives programs that keep it in a double, JSON for one


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
    """The link to a VM's newest point."""

    vm: str


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


Node = Root | VmFolder | LatestLink | PointFolder | SubFolder | File


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) answers, but for the owner."""

    inode: int
    mode: int
    nlink: int
    size: int
    allocated: int
    time_ns: int
    timeout_s: float


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

    It stays small: some 500 bytes for each name that was looked at, so FORGET can be dropped.
    """

    def __init__(self, first_choice: Callable[[Node], int] = hash_node) -> None:
        self._first_choice = first_choice
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {ROOT_INODE: Root()}

    def number(self, node: Node) -> int:
        """Return the node's number."""
        inode = ROOT_INODE if isinstance(node, Root) else self._first_choice(node)
        with self._lock:
            # Nothing is ever taken out, so the same steps lead to the same place again.
            while self._nodes.setdefault(inode, node) != node:
                inode = inode + 1 if inode + 1 < _INODES else ROOT_INODE + 1
        return inode

    def node(self, inode: int) -> Node:
        """Return what a number stands for.

        Raises:
            Stale: nothing; the number is from an earlier mount, through NFS for example.
        """
        try:
            return self._nodes[inode]
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


class Tree:
    """The tree over a catalogue.

    Args:
        catalogue: what there is.
        readable_by_all: whether others than the owner may read.
    """

    def __init__(self, catalogue: Catalogue, *, readable_by_all: bool = False, inodes: Inodes | None = None) -> None:
        self.catalogue = catalogue
        self.inodes = inodes or Inodes()
        self._folder_mode = stat.S_IFDIR | (0o555 if readable_by_all else 0o500)
        self._file_mode = stat.S_IFREG | (0o444 if readable_by_all else 0o400)
        self._writable_mode = stat.S_IFREG | 0o600

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Return the attributes of `name` in the folder `parent`.

        Raises:
            NotFound: there is no such name.
        """
        folder = self.inodes.node(parent)
        if name in (b".", b".."):  # asked by the kernel's NFS server
            return self._attributes(folder if name == b"." else _parent(folder))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise NotFound(f"no name {name!r} here") from None
        match folder:
            case Root():
                if text in self.catalogue.vms():
                    return self._attributes(VmFolder(text))
            case VmFolder(vm):
                return self._attributes(LatestLink(vm) if name == LATEST else PointFolder(vm, text))
            case PointFolder(vm, point):
                entry = self.catalogue.point(vm, point)
                inside: list[File | SubFolder] = [*_files(vm, point, "", entry), *_folders(vm, point, entry)]
                for node in inside:
                    if node.name == text:
                        return self._attributes(node)
            case SubFolder(vm, point, folder_name):
                for file in _files(vm, point, folder_name, self.catalogue.point(vm, point)):
                    if file.name == text:
                        return self._attributes(file)
        raise NotFound(f"no name {text!r} here")

    def attributes(self, inode: int) -> Attributes:
        """Return the attributes of what an inode number stands for. Raises NotFound."""
        return self._attributes(self.inodes.node(inode))

    def entries(self, inode: int) -> list[Entry]:
        """Return everything in a folder, as it is now, `.` and `..` first. Raises NotFound.

        Of `.` and `..` only number and type are right: the kernel takes no more from a listing, and the true attributes
        of `..` would have 10,000 points list their VM 10,000 times.
        """
        folder = self.inodes.node(inode)
        found = [Entry(b".", self._folder(folder, 0, 0)), Entry(b"..", self._folder(_parent(folder), 0, 0))]
        match folder:
            case Root():
                found += (self._entry(vm, VmFolder(vm)) for vm in self._vms())
            case VmFolder(vm):
                points = self._points(vm)
                if points:
                    found.append(Entry(LATEST, self._link(LatestLink(vm), points)))
                if LIVE in self.catalogue.points(vm):
                    found.append(self._entry(LIVE, PointFolder(vm, LIVE)))
                found += (Entry(p.encode(), self._point_folder(PointFolder(vm, p), t)) for p, t in points.items())
            case PointFolder(vm, point):
                entry = self.catalogue.point(vm, point)
                found += (self._entry(file.name, file) for file in _files(vm, point, "", entry))
                found += (Entry(f.name.encode(), self._folder(f, 0, entry.time_ns)) for f in _folders(vm, point, entry))
            case SubFolder(vm, point, inside):
                entry = self.catalogue.point(vm, point)
                found += (self._entry(file.name, file) for file in _files(vm, point, inside, entry))
        return found

    def target(self, inode: int) -> bytes:
        """Return what a link points to. Raises NotFound."""
        link = self.inodes.node(inode)
        if not isinstance(link, LatestLink):
            raise NotFound(f"{self.describe(inode)} is no link")
        return _newest(link.vm, self._points(link.vm)).encode()

    def file(self, inode: int) -> DiskFile | TextFile:
        """Return a file's content.

        Raises:
            Stale: the point is gone, or the file's content is another now.
        """
        node = self.inodes.node(inode)
        if isinstance(node, File):
            return self._file(node)
        raise Stale(f"{self.describe(inode)} is not what it was")

    def _file(self, node: File) -> DiskFile | TextFile:
        try:
            entry = self.catalogue.point(node.vm, node.point)
        except NotFound as e:
            raise Stale(str(e)) from e
        for file in _inside(entry, node.folder):
            if file.name == node.name and file.version == node.version:
                return file
        raise Stale(f"{node.vm}/{node.point}/{node.name} is not what it was")

    def describe(self, inode: int) -> str:
        """Return the path in the tree, for messages."""
        match self.inodes.node(inode):
            case VmFolder(vm):
                return vm
            case LatestLink(vm):
                return f"{vm}/{LATEST.decode()}"
            case PointFolder(vm, point):
                return f"{vm}/{point}"
            case SubFolder(vm, point, name) | File(vm, point, "", name):
                return f"{vm}/{point}/{name}"
            case File(vm, point, folder, name):
                return f"{vm}/{point}/{folder}/{name}"
        return "/"

    def _vms(self) -> list[str]:
        return [vm for vm in self.catalogue.vms() if component(vm)]

    def _points(self, vm: str) -> dict[str, int]:
        """Return the stored points that can be shown."""
        points = self.catalogue.points(vm).items()
        return {point: time_ns for point, time_ns in points if component(point) and point != LIVE}

    def _entry(self, name: str, node: Node) -> Entry:
        return Entry(name.encode(), self._attributes(node))

    def _attributes(self, node: Node) -> Attributes:
        match node:
            case File():
                number = self.inodes.number(node)
                mode, allocated, time_ns = self._file_mode, node.allocated, node.time_ns
                if node.writable:
                    mode, (allocated, time_ns) = self._writable_mode, self._written(node)
                return Attributes(number, mode, 1, node.size, allocated, time_ns, node.timeout_s)
            case PointFolder(vm, point):
                # Not by listing the VM: `find` over 10,000 points would list 10,000 points 10,000 times.
                return self._point_folder(node, self.catalogue.point(vm, point).time_ns)
            case SubFolder(vm, point, name):
                entry = self.catalogue.point(vm, point)
                if node not in _folders(vm, point, entry):
                    raise NotFound(f"no folder {name!r} here")
                return self._folder(node, 0, entry.time_ns)
            case LatestLink(vm):
                return self._link(node, self._points(vm))
            case VmFolder(vm):
                times = self._points(vm).values()
                live = LIVE in self.catalogue.points(vm)
                return self._folder(node, len(times) + live, max(times, default=0))
            case Root():
                vms = self._vms()
                newest = max((t for vm in vms for t in self._points(vm).values()), default=0)
                return self._folder(node, len(vms), newest)

    def _written(self, node: File) -> tuple[int, int]:
        """Return how much of a writable file is allocated, and its time."""
        try:
            file = self._file(node)
        except Stale:  # somebody has it open
            return node.allocated, node.time_ns
        allocated, time_ns = file.written() if isinstance(file, DiskFile) and file.written else (node.allocated, None)
        return allocated, node.time_ns if time_ns is None else time_ns

    def _point_folder(self, node: PointFolder, time_ns: int) -> Attributes:
        # One link, as Btrfs has it, means that nobody counted the folders inside: that would take reading the point.
        return replace(self._folder(node, 0, time_ns), nlink=1)

    def _folder(self, node: Node, folders_inside: int, time_ns: int) -> Attributes:
        number = self.inodes.number(node)
        return Attributes(number, self._folder_mode, 2 + folders_inside, 0, 0, time_ns, FRESH_TIMEOUT_S)

    def _link(self, node: LatestLink, points: Mapping[str, int]) -> Attributes:
        newest = _newest(node.vm, points)
        mode = stat.S_IFLNK | 0o777
        return Attributes(self.inodes.number(node), mode, 1, len(newest.encode()), 0, points[newest], FRESH_TIMEOUT_S)


def _inside(entry: PointEntry, folder: str) -> Sequence[DiskFile | TextFile]:
    """Return the files of a point's folder, or of one in it. Raises NotFound."""
    if not folder:
        return entry.files
    for inner in entry.folders:
        if inner.name == folder:
            return inner.files()
    raise NotFound(f"no folder {folder!r} here")


def _files(vm: str, point: str, folder: str, entry: PointEntry) -> Iterator[File]:
    for f in _inside(entry, folder):
        if component(f.name):
            time_ns, timeout_s, writable = entry.time_ns, FRESH_TIMEOUT_S, False
            if isinstance(f, DiskFile):
                time_ns, writable = time_ns if f.time_ns is None else f.time_ns, f.written is not None
                if not writable:
                    timeout_s = LIVE_TIMEOUT_S if f.live else FILE_TIMEOUT_S
            yield File(vm, point, folder, f.name, f.version, f.size, f.allocated, time_ns, timeout_s, writable)


def _folders(vm: str, point: str, entry: PointEntry) -> Iterator[SubFolder]:
    return (SubFolder(vm, point, folder.name) for folder in entry.folders if component(folder.name))


def _parent(node: Node) -> Node:
    match node:
        case File(vm, point, folder) if folder:
            return SubFolder(vm, point, folder)
        case SubFolder(vm, point) | File(vm, point):
            return PointFolder(vm, point)
        case PointFolder(vm) | LatestLink(vm):
            return VmFolder(vm)
    return Root()


def _newest(vm: str, points: Mapping[str, int]) -> str:
    try:
        return next(reversed(list(points)))
    except StopIteration:
        raise NotFound(f"VM {vm!r} has no points") from None
