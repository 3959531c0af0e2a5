"""What a volume is a part or the outside of: RAID, LVM, encryption. To be asked for before any file system.

Whoever makes one of a volume need not wipe what was there, so a file system that was there before may still be found.
Source: libblkid, which asks in this order too; md_p.h of Linux.
"""

import contextlib
import struct

from backupfs.errors import BackupfsError
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
_WHOLE = 1, -4  # levels: mirrored, several ways to one disk


def container(volume: Image) -> str | None:
    """Return which one a volume is by what stands at its beginning, or None.

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
    return RAID if any(_md_level(volume, at, 1) is not None for at in (0, 4 * KiB)) else None


def is_striped(volume: Image) -> bool:
    """Say whether an MD superblock at a volume's end says that a file system at its beginning goes on elsewhere.

    A mirror begins with what is mirrored. What can't be read is taken for none: it is hardly ever used.
    """
    places = ((volume.size // _SECTOR - 16 & ~7) * _SECTOR, 1), ((volume.size & ~(64 * KiB - 1)) - 64 * KiB, 0)
    for at, major in places:
        with contextlib.suppress(BackupfsError):
            level = _md_level(volume, at, major)
            if level is not None and level not in _WHOLE:
                return True
    return False


def _md_level(volume: Image, at: int, major: int) -> int | None:
    """Return the level in an MD superblock; None: there is none of this major version."""
    found = read(volume, at, _SECTOR)
    if found is None or found[:4] != _MD or struct.unpack_from("<I", found, 4)[0] != major:
        return None
    if major and struct.unpack_from("<Q", found, 144)[0] != at // _SECTOR:
        return None
    return int(struct.unpack_from("<i", found, 72 if major else 28)[0])
