"""What a volume is a part or the outside of: RAID, LVM, encryption. To be asked for before any file system.

Whoever makes one of a volume need not wipe what was there, so a file system that was there before may still be found.
Source: libblkid, which asks in this order too; md_p.h of Linux.
"""

import struct
from collections.abc import Iterator

from backupfs.guest.lvm import find_label
from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import KiB

LUKS, BITLOCKER, LVM, RAID = (
    "encrypted by LUKS",
    "encrypted by BitLocker",
    "a physical volume of LVM2",
    "a member of a Linux RAID",
)

_MD = b"\xfc\x4e\x2b\xa9"
_SECTOR = 512
_MIRROR = 1  # level


def container(volume: Image) -> str | None:
    """Return which one a volume is, or None.

    Raises:
        BackupfsError: it can't be read.
    """
    head = read(volume, 0, min(volume.size, 4 * KiB)) or b""
    if head[:6] == b"LUKS\xba\xbe":
        return LUKS
    if head[3:11] == b"-FVE-FS-":
        return BITLOCKER
    if find_label(volume) is not None:
        return LVM
    return RAID if any(_hides(volume, *place) for place in _places(volume.size)) else None


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Yield where an MD superblock may be, and the major version of those there."""
    yield 0, 1
    yield 4 * KiB, 1
    yield (size // _SECTOR - 16 & ~7) * _SECTOR, 1
    yield (size & ~(64 * KiB - 1)) - 64 * KiB, 0


def _hides(volume: Image, at: int, major: int) -> bool:
    """Say whether there is an MD superblock that a file system at the volume's beginning does not go with.

    A mirror whose superblock is at the end does: it begins with what is mirrored.
    """
    found = read(volume, at, _SECTOR)
    if found is None or found[:4] != _MD or struct.unpack_from("<I", found, 4)[0] != major:
        return False
    if not major:
        return bool(struct.unpack_from("<I", found, 28)[0] != _MIRROR)
    if struct.unpack_from("<Q", found, 144)[0] != at // _SECTOR:
        return False
    return at <= 4 * KiB or struct.unpack_from("<I", found, 72)[0] != _MIRROR
