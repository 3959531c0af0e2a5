"""The files of guests in the tree that a mount shows. No pyfuse3, no trio; any thread; may block.

    DISK.files/                           DiskFiles
    DISK.files/VOLUME/                    VolumeFolder: has the attributes of the file system's own first folder
    DISK.files/VOLUME/…                   GuestFile
    DISK.files/VOLUME/UNSUPPORTED.txt     Notice: why there is nothing else
    DISK.files/VOLUME.NOT-REPLAYED.txt    Notice: beside the volume, so that its folder is exactly what the guest has

What guests have is shown as it is: owners, modes, set-user-ID, devices. The mount is nosuid and nodev, and the kernel
does not look at modes in it (mountpoint.py).
"""

import contextlib
import errno
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import overload

from backupfs.errors import BackupfsError, NotFound
from backupfs.filesystem import Run, Stat
from backupfs.fuse.catalogue import DiskFile, GuestFolder, TextFile
from backupfs.fuse.guest_disks import Disk, Disks
from backupfs.fuse.guest_volume import Volume, sound
from backupfs.fuse.guest_xattrs import Xattrs
from backupfs.fuse.nodes import (
    FRESH_TIMEOUT_S,
    GUEST_TIMEOUT_S,
    Attributes,
    DiskFiles,
    Entry,
    GuestFile,
    GuestNode,
    Inodes,
    Notice,
    Stale,
    VolumeFolder,
    component,
)
from backupfs.image import Image

UNSUPPORTED = "UNSUPPORTED.txt"
NOT_REPLAYED = ".NOT-REPLAYED.txt"
NO_XATTRS = Xattrs({}, errno.EOPNOTSUPP)
"""Of folders and texts of our own."""


class GuestTree:
    """What is below DISK.files.

    Args:
        inodes: gives the numbers.
        find: returns what a DiskFiles stands for, and its point's time. Raises NotFound if it is gone, or another now.
        modes: of folders and files of our own.
    """

    def __init__(
        self,
        inodes: Inodes,
        find: Callable[[DiskFiles], tuple[GuestFolder, int]],
        modes: tuple[int, int],
    ) -> None:
        self.disks = Disks(lambda node: find(node)[0])
        self._inodes = inodes
        self._find = find
        self._folder_mode, self._file_mode = modes

    def lookup(self, folder: GuestNode, name: bytes) -> Attributes:
        """Return the attributes of `name` in a folder. Raises NotFound, BackupfsError."""
        if name == b".":
            return self.attributes(folder)
        if name == b"..":
            return self.attributes(self._parent(folder))
        match folder:
            case DiskFiles():
                with self.disks.use(folder) as disk:
                    return self.attributes(self._in_disk(folder, disk, name))
            case VolumeFolder() | GuestFile():
                problem = self._problem(folder) if isinstance(folder, VolumeFolder) else None
                if problem is not None:
                    if name == problem.name.encode():
                        return self.attributes(problem)
                    raise NotFound(f"no name {name!r} here")
                with self._volume(folder) as (volume, inode):
                    found = volume.folder(inode).get(name)
                    if found is not None:
                        node = self._node(folder, volume, found.inode)
                        return self._of(node, sound(found) if found.mode else volume.stat(found.inode))
        raise NotFound(f"no name {name!r} here")

    def attributes(self, node: GuestNode) -> Attributes:
        """Return the attributes of a node. Raises BackupfsError."""
        match node:
            case GuestFile(where, inode):
                with self.disks.volume(where) as volume:
                    return self._of(node, volume.stat(inode))
            case VolumeFolder(disk):
                try:
                    with self.disks.volume(node) as volume:
                        return self._of(node, volume.stat(volume.fs.root))
                except NotFound:
                    raise
                except BackupfsError:
                    return self._own(node, self._find(disk)[1])
            case Notice(folder, _, content):
                disk = folder.disk if isinstance(folder, VolumeFolder) else folder
                number, size = self._inodes.number(node), len(content)
                blocks = -(-size // 512) * 512
                return Attributes(number, self._file_mode, 1, size, blocks, self._find(disk)[1], FRESH_TIMEOUT_S)
        return self._own(node, self._find(node)[1])

    def entries(self, folder: GuestNode) -> Sequence[Entry]:
        """Return what is in a folder, `.` and `..` first; of these only the type is right. Raises BackupfsError."""
        dots = [Entry(b".", self._dot(folder)), Entry(b"..", self._dot(self._parent_if_known(folder)))]
        match folder:
            case DiskFiles():
                with self.disks.use(folder) as disk:
                    nodes: list[VolumeFolder | Notice] = []
                    for name in disk.volumes:
                        if component(name):
                            nodes += [VolumeFolder(folder, name), *self._notes(folder, disk, name)]
                    return [*dots, *(Entry(node.name.encode(), self.attributes(node)) for node in nodes)]
            case VolumeFolder() | GuestFile():
                problem = self._problem(folder) if isinstance(folder, VolumeFolder) else None
                if problem is not None:
                    return [*dots, Entry(problem.name.encode(), self.attributes(problem))]
                with self._volume(folder) as (volume, inode):
                    return _Listing(self, folder, volume, dots, volume.folder(inode))
        raise NotFound(f"{folder.name} is no folder")

    def target(self, link: GuestNode) -> bytes:
        """Return what a symbolic link points to. Raises BackupfsError."""
        with self._volume(link) as (volume, inode):
            return volume.target(inode)

    def file(self, node: GuestFile) -> DiskFile | TextFile | None:
        """Return a file's content; None: it has to be asked for with `read` and `seek`. Raises BackupfsError."""
        content = self.small_content(node)
        if content is not None:
            return TextFile("", content)
        with self.disks.volume(node.volume) as volume:
            found, runs = volume.stat(node.inode), volume.runs(node.inode)
        if runs is None:
            return None
        return DiskFile("", found.size, found.allocated, "", {}, open=partial(self._open, node, runs))

    def small_content(self, node: GuestFile) -> bytes | None:
        """Return a file's content; None: it is too large for that, or sparse. Raises BackupfsError."""
        with self.disks.volume(node.volume) as volume:
            return volume.small(node.inode)

    def read_on(self, node: GuestFile) -> None:
        """Read the small files behind one that was at hand."""
        with self.disks.volume(node.volume) as volume:
            volume.ahead.read_on(node.inode)

    def small_at_hand(self, node: GuestFile) -> tuple[bytes | None, bool]:
        """Return the same if it was read already, and whether it is time to `read_on`. Does not block."""
        volume = self.disks.at_hand(node.volume)
        if volume is None:
            return None, False
        content = volume.ahead.take(node.inode)
        return content, content is not None and volume.ahead.wants_more(node.inode)

    def _open(self, node: GuestFile, runs: Sequence[Run]) -> Image:
        with self.disks.volume(node.volume) as volume:
            return volume.image(runs)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return a range of a file, short only at its end. Raises BackupfsError."""
        node = self._file(number)
        with self.disks.volume(node.volume) as volume:
            return volume.read(node.inode, offset, length)

    def seek(self, number: int, offset: int, whence: int) -> int:
        """Return where data or a hole begins; see `image.seek`."""
        node = self._file(number)
        with self.disks.volume(node.volume) as volume:
            return volume.seek(node.inode, offset, whence)

    def xattrs(self, node: GuestNode) -> Xattrs:
        """Return extended attributes. Raises BackupfsError."""
        if isinstance(node, DiskFiles | Notice) or (isinstance(node, VolumeFolder) and self._problem(node)):
            return NO_XATTRS
        with self._volume(node) as (volume, inode):
            return volume.xattrs(inode)

    def xattrs_at_hand(self, node: GuestFile | VolumeFolder) -> Xattrs | None:
        """Return extended attributes if they are known. Does not block."""
        volume = self.disks.at_hand(node.volume if isinstance(node, GuestFile) else node)
        if volume is None:
            return None
        return volume.xattrs_at_hand(node.inode if isinstance(node, GuestFile) else volume.fs.root)

    def _file(self, number: int) -> GuestFile:
        node = self._inodes.node(number)
        if not isinstance(node, GuestFile):
            raise Stale(f"inode {number} is no guest's file")
        return node

    @contextlib.contextmanager
    def _volume(self, node: GuestNode) -> Iterator[tuple[Volume, int]]:
        """Give a node's volume and the inode in it."""
        match node:
            case GuestFile(where, inode):
                with self.disks.volume(where) as volume:
                    yield volume, inode
            case VolumeFolder():
                with self.disks.volume(node) as volume:
                    yield volume, volume.fs.root
            case _:
                raise NotFound(f"{node.name} is not in a volume")

    def _node(self, beside: VolumeFolder | GuestFile, volume: Volume, inode: int) -> VolumeFolder | GuestFile:
        where = beside.volume if isinstance(beside, GuestFile) else beside
        return where if inode == volume.fs.root else GuestFile(where, inode)

    def _parent(self, node: GuestNode) -> GuestNode:
        match node:
            case GuestFile(where, inode):
                with self.disks.volume(where) as volume:
                    try:
                        return self._node(node, volume, volume.parent(inode))
                    except NotFound as e:
                        raise Stale(str(e)) from e
            case VolumeFolder(disk):
                return disk
            case Notice(folder):
                return folder
        return node

    def _parent_if_known(self, folder: GuestNode) -> GuestNode:
        try:
            return self._parent(folder)
        except BackupfsError:
            return folder

    def _dot(self, folder: GuestNode) -> Attributes:
        return Attributes(self._inodes.number(folder), self._folder_mode, 1, 0, 0, 0, 0.0)

    def _in_disk(self, folder: DiskFiles, disk: Disk, name: bytes) -> GuestNode:
        text = name.decode(errors="replace")
        if text in disk.volumes and component(text):
            return VolumeFolder(folder, text)
        for note in self._notes(folder, disk, text.removesuffix(NOT_REPLAYED)):
            if note.name == text:
                return note
        raise NotFound(f"no name {text!r} here")

    def _notes(self, folder: DiskFiles, disk: Disk, name: str) -> list[Notice]:
        """Return what has to be known of a volume, which has to be opened for that."""
        try:
            notes = disk.open(name).fs.notes
        except BackupfsError:
            return []  # it is told in the volume's folder
        said = "".join(f"{note}\n" for note in notes).encode(errors="replace")
        return [Notice(folder, name + NOT_REPLAYED, said)] if said else []

    def _problem(self, node: VolumeFolder) -> Notice | None:
        """Return what stands in a volume's folder if its files can't be read."""
        with self.disks.use(node.disk) as disk:
            try:
                disk.open(node.name)
                return None
            except NotFound:
                raise
            except BackupfsError as e:
                others = [name for name in disk.volumes if name != node.name]
                how = disk.folder.by_hand(node.name, disk.volumes[node.name].kind, others)
                said = f"The files of this volume can't be shown: {e}\n\n{how}"
                return Notice(node, UNSUPPORTED, said.encode(errors="replace"))

    def _of(self, node: VolumeFolder | GuestFile, found: Stat) -> Attributes:
        mode = found.mode
        if isinstance(node, VolumeFolder) and not stat.S_ISDIR(mode):
            raise NotFound("the first folder is no folder")
        number, timeout = self._inodes.number(node), GUEST_TIMEOUT_S
        return Attributes(number, mode, found.nlink, found.size, found.allocated, found.mtime_ns, timeout, found)

    def _own(self, node: DiskFiles | VolumeFolder, time_ns: int) -> Attributes:
        return Attributes(self._inodes.number(node), self._folder_mode, 1, 0, 0, time_ns, FRESH_TIMEOUT_S)

    def entry(self, folder: VolumeFolder | GuestFile, volume: Volume, name: bytes, found: Stat) -> Entry:
        """Return a name in a folder as it is listed."""
        node = self._node(folder, volume, found.inode)
        try:
            return Entry(name, self._of(node, sound(found)))
        except BackupfsError:
            # Shown, but who asks for more than its name gets the error.
            return Entry(name, Attributes(self._inodes.number(node), stat.S_IFREG, 1, 0, 0, 0, 0.0))


class _Listing(Sequence[Entry]):
    """What is in a folder. Numbers and attributes are made as they are asked for: a folder may have a million names."""

    def __init__(
        self,
        tree: GuestTree,
        folder: VolumeFolder | GuestFile,
        volume: Volume,
        dots: list[Entry],
        found: Mapping[bytes, Stat],
    ) -> None:
        self._tree, self._folder, self._volume, self._dots = tree, folder, volume, dots
        self._found = list(found.items())

    def __len__(self) -> int:
        return len(self._dots) + len(self._found)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> list[Entry]: ...
    def __getitem__(self, place: int | slice) -> Entry | list[Entry]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if place < len(self._dots):
            return self._dots[place]
        return self._tree.entry(self._folder, self._volume, *self._found[place - len(self._dots)])
