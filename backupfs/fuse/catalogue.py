"""What a mount asks of the one who knows what there is to show: VMs, their points, the files of a point.

Implemented over a repository in services/mount.py. Called from worker threads, several at once; may block.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from backupfs.filesystem import FileSystem, Run
from backupfs.image import Buffer, Image

LIVE = "live"
"""Stands beside a VM's points for its disks as they are at this moment. No point's id."""


@runtime_checkable
class Lender(Image, Protocol):
    """An image that gives its memory away, which saves a copy, and that knows what is at hand."""

    def lend(self, offset: int, length: int) -> memoryview:
        """Return the bytes of a range. Their memory is the caller's until he lets go of it. Raises as `readinto`."""

    def lend_at_once(self, offset: int, length: int) -> memoryview | None:
        """Return the bytes of a range if they are at hand. Never waits, never raises BackupfsError."""


@runtime_checkable
class Writable(Image, Protocol):
    """An image that can be written to. A range given here lies inside of the image.

    What fails leaves each block of 4 KiB with its old bytes, or the new ones. Who began to read after a call returned
    gets what it wrote.

    Raises:
        OSError: it can't be done; the errno is for who writes.
        BackupfsError: the same; it is EIO.
    """

    def write(self, offset: int, data: Buffer | bytes) -> None:
        """Write bytes."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range zeroes, and a hole if that can be."""

    def flush(self) -> None:
        """Put everything that was written where a crash does not reach it, as far as it is kept at all."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk at a point, or live.

    Args:
        name: in the tree, with its suffix.
        size: bytes.
        allocated: bytes that are not holes, for st_blocks.
        version: differs when the content does.
        xattrs: extended attributes, full names.
        open: returns the disk as an Image; may block. Raises BackupfsError.
        check: what is too slow to be done in `open`: called once after it, in a thread, while reads are answered
            already. When it raises BackupfsError the image is condemned: all its reads fail from then on.
        raw: returns a descriptor of a raw file that holds exactly the disk and was verified, or None where there is
            none. Called in a thread before the disk is first opened, and while that waits: no time to verify anything.
            The kernel may read the disk there from then on, until it is closed; the descriptor is closed by the caller.
        time_ns: when it was as it is; None: the point's time.
        live: it may go away or hang at any time, and come back as another version; `open` returns a Lender.
        written: it can be written to, and `open` returns a Writable: returns how many bytes are allocated now, and when
            it was last written to, in ns; None: never. Does not block for long.
    """

    name: str
    size: int
    allocated: int
    version: str
    xattrs: Mapping[str, bytes]
    open: Callable[[], Image]
    check: Callable[[Image], None] | None = None
    raw: Callable[[], int | None] | None = None
    time_ns: int | None = None
    live: bool = False
    written: Callable[[], tuple[int, int | None]] | None = None


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file whose content is at hand."""

    name: str
    content: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)

    @property
    def allocated(self) -> int:
        """Bytes, in whole sectors."""
        return -(-self.size // 512) * 512

    @property
    def version(self) -> str:
        """Differs when the content does."""
        return hashlib.blake2b(self.content, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in a point's folder. What is in it is found out when somebody looks, not before.

    Args:
        name: in the tree.
        files: returns what is in it; may block, for as long as a few reads of a disk take. Raises BackupfsError.
    """

    name: str
    files: Callable[[], Sequence[DiskFile | TextFile]]


class ManyFiles(FileSystem, Protocol):
    """A FileSystem that can be asked for several files at once."""

    def contents(self, inodes: Sequence[int], largest: int) -> Sequence[bytes | None]:
        """Return files' contents; None: it is larger than `largest`, can't be read, or is not to be had with others."""

    def xattrs_of(self, inodes: Sequence[int]) -> Sequence[Mapping[bytes, bytes] | None]:
        """Return the extended attributes of inodes, of the first one at least; None as of `contents`.

        Those of several that have the same may be one object.
        """


class GuestVolume(Protocol):
    """A partition or a logical volume, or a disk without either, and what is known of the files on it."""

    @property
    def kind(self) -> str | None:
        """What is on it: `ext4`, `swap`, …; None: nothing that is known."""

    @property
    def problem(self) -> str | None:
        """Why its files can't be read, if that is known without trying."""

    def open(self) -> ManyFiles:
        """Return its files. May block, for as long as the calls of a FileSystem may. Raises BackupfsError."""

    def file(self, runs: Sequence[Run]) -> Image:
        """Return what lies there as an image, to be closed; also after the context's end. Raises BackupfsError."""


@dataclass(frozen=True, slots=True)
class GuestFolder:
    """A folder in a point's folder, for the file systems on a disk.

    Args:
        name: in the tree.
        version: differs when what is on the disk does.
        volumes: finds out what there is, by the folders' names, in order; may block. Raises BackupfsError. Leaving the
            context closes it all: the file systems are not used any more then.
        by_hand: says how a volume that has no files here can be read otherwise, in lines, of its name, what kind it is
            of, and the names of the others.
    """

    name: str
    version: str
    volumes: Callable[[], AbstractContextManager[Mapping[str, GuestVolume]]]
    by_hand: Callable[[str, str | None, Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class PointEntry:
    """A point's folder."""

    time_ns: int
    files: Sequence[DiskFile | TextFile]
    folders: Sequence[Folder] = ()
    guests: Sequence[GuestFolder] = ()


class Catalogue(Protocol):
    """What there is to show. All calls may block, and come from several threads at once."""

    def vms(self) -> Sequence[str]:
        """Return the names of the VMs."""

    def points(self, vm: str) -> Mapping[str, int]:
        """Return the ids of a VM's points, oldest first, each with its time in ns; cheap, without reading points.

        LIVE is among them, anywhere, when the VM has live disks.
        """

    def point(self, vm: str, point: str) -> PointEntry:
        """Return a point, or what LIVE stands for. Does not wait for a live disk. Raises NotFound."""

    def usage(self) -> os.statvfs_result:
        """Return the use of the file system that everything is stored on."""
