"""The tree that a mount shows: names, inode numbers, attributes. No pyfuse3, no trio; testable without a mount.
What the numbers stand for is in nodes.py.

    /                          Root
    /VM/                       VmFolder
    /VM/latest -> POINT        LatestLink
    /VM/POINT/                 PointFolder
    /VM/POINT/DISK.raw         File
    /VM/POINT/DISK.rw          File, and the only kind that can be written to
    /VM/POINT/DISK.parts/      SubFolder
    /VM/POINT/DISK.parts/1.raw File
    /VM/POINT/point.json       File
    /VM/POINT/DISK.files/…     what guests have stored: guest_tree.py
    /VM/live/                  PointFolder, in name only: its files come and go with the exports that they show
    /VM/live/DISK.raw          File

Every method of Tree may be called from any thread, from several at once, and may block, because the Catalogue does.
"""

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from backupfs.errors import NotFound
from backupfs.fuse.catalogue import LIVE, Catalogue, DiskFile, GuestFolder, PointEntry, TextFile
from backupfs.fuse.guest_tree import NO_XATTRS, GuestTree
from backupfs.fuse.guest_xattrs import Xattrs
from backupfs.fuse.nodes import (
    FILE_TIMEOUT_S,
    FRESH_TIMEOUT_S,
    LATEST_TIMEOUT_S,
    LIVE_TIMEOUT_S,
    Attributes,
    DiskFiles,
    Entry,
    File,
    GuestFile,
    GuestNode,
    GuestPart,
    Inodes,
    LatestLink,
    Node,
    Notice,
    PointFolder,
    Root,
    Stale,
    SubFolder,
    VmFolder,
    VolumeFolder,
    component,
)

LATEST = b"latest"


class Tree:
    """The tree over a catalogue.

    Args:
        catalogue: what there is.
        readable_by_all: whether others than the owner may read.
        inodes: gives the numbers.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        readable_by_all: bool = False,
        inodes: Inodes | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.inodes = inodes or Inodes()
        self._folder_mode = stat.S_IFDIR | (0o555 if readable_by_all else 0o500)
        self._file_mode = stat.S_IFREG | (0o444 if readable_by_all else 0o400)
        self._writable_mode = stat.S_IFREG | 0o600
        self.guests = GuestTree(self.inodes, self._guest_folder, (self._folder_mode, self._file_mode))

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Return the attributes of `name` in the folder `parent`.

        Raises:
            NotFound: there is no such name.
        """
        folder = self.inodes.node(parent)
        if isinstance(folder, GuestNode) and not (isinstance(folder, DiskFiles) and name == b".."):
            return self.guests.lookup(folder, name)
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
                return self._attributes(self._latest(vm) if name == LATEST else PointFolder(vm, text))
            case PointFolder(vm, point):
                entry = self.catalogue.point(vm, point)
                for node in (*_files(vm, point, "", entry), *_folders(vm, point, entry)):
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

    def entries(self, inode: int) -> Sequence[Entry]:
        """Return everything in a folder, as it is now, `.` and `..` first. Raises NotFound.

        Of `.` and `..` only number and type are right: the kernel takes no more from a listing, and the true attributes
        of `..` would have 10,000 points list their VM 10,000 times.
        """
        folder = self.inodes.node(inode)
        if isinstance(folder, GuestNode):
            return self.guests.entries(folder)
        found = [Entry(b".", self._folder(folder, 0, 0)), Entry(b"..", self._folder(_parent(folder), 0, 0))]
        match folder:
            case Root():
                found += (self._entry(vm, VmFolder(vm)) for vm in self._vms())
            case VmFolder(vm):
                points = self._points(vm)
                if points:
                    found.append(Entry(LATEST, self._link(LatestLink(vm, _newest(vm, points)), points)))
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
        if isinstance(link, GuestNode):
            return self.guests.target(link)
        if not isinstance(link, LatestLink):
            raise NotFound(f"{self.describe(inode)} is no link")
        return link.target.encode()

    def file(self, inode: int) -> DiskFile | TextFile | None:
        """Return a file's content; None: a guest's, and it has to be asked for with `guests.read` and `guests.seek`.

        Raises:
            Stale: the point is gone, or the file's content is another now.
        """
        node = self.inodes.node(inode)
        if isinstance(node, Notice):
            return TextFile(node.name, node.content)
        if isinstance(node, GuestFile):
            return self.guests.file(node)
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

    def guest_part(self, inode: int) -> GuestPart | None:
        """Return the volume or, above it, the disk of what stands for something of a guest. Cheap. Raises Stale."""
        match self.inodes.node(inode):
            case DiskFiles() | VolumeFolder() as part:
                return part
            case GuestFile(part) | Notice(part):
                return part
        return None

    def volume_number(self, inode: int) -> int | None:
        """Return a number for the volume that a guest's file or first folder is on; None: it is neither."""
        try:
            node = self.inodes.node(inode)
        except Stale:
            return None
        match node:
            case GuestFile(volume) | (VolumeFolder() as volume):
                return hash(volume)
        return None

    def small_content(self, inode: int) -> bytes | None:
        """Return the content of a guest's file, None: it is too large for that. Raises Stale, BackupfsError."""
        node = self.inodes.node(inode)
        return self.guests.small_content(node) if isinstance(node, GuestFile) else None

    def small_at_hand(self, inode: int) -> tuple[bytes | None, bool]:
        """Return the same if it was read already, and whether it is time to `read_on`. Does not block."""
        node = self.inodes.node(inode)
        return self.guests.small_at_hand(node) if isinstance(node, GuestFile) else (None, False)

    def read_on(self, inode: int) -> None:
        """Read the small files behind one that was at hand. Raises BackupfsError."""
        node = self.inodes.node(inode)
        if isinstance(node, GuestFile):
            self.guests.read_on(node)

    def xattrs_at_hand(self, inode: int) -> Xattrs | None:
        """Return the extended attributes of something, unless they have to be asked for. Does not block."""
        try:
            node = self.inodes.node(inode)
        except Stale:
            return None
        match node:
            case GuestFile() | VolumeFolder():
                return self.guests.xattrs_at_hand(node)
            case File():
                return None
        return NO_XATTRS

    def is_constant(self, inode: int) -> bool:
        """Whether what is in a folder never changes: in a guest's, below the first. Does not block."""
        try:
            return isinstance(self.inodes.node(inode), GuestFile)
        except Stale:
            return False

    def guest_xattrs(self, inode: int) -> Xattrs:
        """Return the extended attributes of something of a guest. Raises NotFound, BackupfsError."""
        node = self.inodes.node(inode)
        return self.guests.xattrs(node) if isinstance(node, GuestNode) else NO_XATTRS

    def describe(self, inode: int) -> str:
        """Return the path in the tree, for messages."""
        match self.inodes.node(inode):
            case VmFolder(vm):
                return vm
            case LatestLink(vm):
                return f"{vm}/{LATEST.decode()}"
            case PointFolder(vm, point):
                return f"{vm}/{point}"
            case SubFolder(vm, point, name) | File(vm, point, "", name) | DiskFiles(vm, point, name):
                return f"{vm}/{point}/{name}"
            case File(vm, point, folder, name):
                return f"{vm}/{point}/{folder}/{name}"
            case VolumeFolder(disk, name) | GuestFile(VolumeFolder(disk, name)) | Notice(DiskFiles() as disk, name):
                return f"{disk.vm}/{disk.point}/{disk.name}/{name}"
            case Notice(VolumeFolder(disk, name)):
                return f"{disk.vm}/{disk.point}/{disk.name}/{name}/"
        return "/"

    def _vms(self) -> list[str]:
        return [vm for vm in self.catalogue.vms() if component(vm)]

    def _points(self, vm: str) -> dict[str, int]:
        """Return the stored points that can be shown."""
        points = self.catalogue.points(vm).items()
        return {point: time_ns for point, time_ns in points if component(point) and point != LIVE}

    def _entry(self, name: str, node: Node) -> Entry:
        return Entry(name.encode(), self._attributes(node))

    def _guest_folder(self, node: DiskFiles) -> tuple[GuestFolder, int]:
        """Return what a folder of guests' files stands for, and its point's time. Raises Stale: it is gone."""
        try:
            entry = self.catalogue.point(node.vm, node.point)
        except NotFound as e:
            raise Stale(str(e)) from e
        for folder in entry.guests:
            if (folder.name, folder.version) == (node.name, node.version):
                return folder, entry.time_ns
        raise Stale(f"{node.vm}/{node.point}/{node.name} is not what it was")

    def _attributes(self, node: Node) -> Attributes:
        match node:
            case DiskFiles() | VolumeFolder() | GuestFile() | Notice():
                return self.guests.attributes(node)
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

    def _latest(self, vm: str) -> LatestLink:
        return LatestLink(vm, _newest(vm, self._points(vm)))

    def _link(self, node: LatestLink, points: Mapping[str, int]) -> Attributes:
        if node.target not in points:
            raise Stale(f"{node.vm}/{node.target} is gone")
        number, mode, size = self.inodes.number(node), stat.S_IFLNK | 0o777, len(node.target.encode())
        return Attributes(number, mode, 1, size, 0, points[node.target], LATEST_TIMEOUT_S)


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


def _folders(vm: str, point: str, entry: PointEntry) -> Iterator[SubFolder | DiskFiles]:
    yield from (SubFolder(vm, point, folder.name) for folder in entry.folders if component(folder.name))
    yield from (DiskFiles(vm, point, folder.name, folder.version) for folder in entry.guests if component(folder.name))


def _parent(node: Node) -> Node:
    match node:
        case File(vm, point, folder) if folder:
            return SubFolder(vm, point, folder)
        case SubFolder(vm, point) | File(vm, point) | DiskFiles(vm, point):
            return PointFolder(vm, point)
        case PointFolder(vm) | LatestLink(vm):
            return VmFolder(vm)
    return Root()


def _newest(vm: str, points: Mapping[str, int]) -> str:
    try:
        return next(reversed(list(points)))
    except StopIteration:
        raise NotFound(f"VM {vm!r} has no points") from None
