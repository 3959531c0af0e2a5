"""The parsers of file systems. Imported by the child alone: they are C, or slow to import."""

from collections.abc import Iterator
from typing import Protocol

from backupfs.errors import GuestError
from backupfs.filesystem import Entry, FileSystem
from backupfs.guest.btrfs import BtrfsFileSystem
from backupfs.guest.detect import BTRFS, EXT, FAT, NTFS, XFS
from backupfs.guest.ext import ExtFileSystem
from backupfs.guest.ext_journal import replayed
from backupfs.guest.fat import FatFileSystem
from backupfs.guest.ntfs import NtfsFileSystem
from backupfs.guest.xfs import XfsFileSystem
from backupfs.image import Image


class Parser(FileSystem, Protocol):
    """A FileSystem that tells what is in a folder as it finds it."""

    def entries(self, inode: int) -> Iterator[Entry]:
        """Yield what `list` returns."""


def open_family(volume: Image, family: str, kind: str) -> Parser:
    """Return a volume's file system.

    Raises:
        GuestError: it can't be opened.
    """
    if family == EXT:
        image, notes = replayed(volume)
        return ExtFileSystem(image, kind, notes)
    if family == NTFS:
        return NtfsFileSystem(volume)
    if family == FAT:
        return FatFileSystem(volume)
    if family == BTRFS:
        return BtrfsFileSystem(volume)
    if family == XFS:
        return XfsFileSystem(volume)
    raise GuestError(f"{kind}: backupfs does not read it")
