"""What is on a partition or volume, by its signatures: the kind of file system, or why there is none to be read."""

import struct
from dataclasses import dataclass

from backupfs.guest.containers import LVM, RAID, container, is_striped
from backupfs.guest.fat_sector import is_fat
from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import KiB

EXT, NTFS, FAT, XFS, BTRFS = "ext", "ntfs", "vfat", "xfs", "btrfs"

# Kinds that nothing here reads, and whose volumes can't simply be mounted either.
SWAP, JOURNAL, REFS, APFS, F2FS = "swap space", "journal of ext", "ReFS", "APFS", "F2FS"

# Offset, magic, what it is: none of these is read. Source: libblkid's probes.
_OTHERS = (
    (3, b"EXFAT   ", "exFAT"),
    (3, b"ReFS\0\0\0\0", REFS),
    (0, b"hsqs", "squashfs"),
    (1024, b"\x10\x20\xf5\xf2", F2FS),
    (1024, b"H+", "HFS+"),
    (1024, b"HX", "HFS+"),
    (32, b"NXSB", APFS),
    (512, b"LABELONE", LVM),  # a damaged one
    (4086, b"SWAPSPACE2", SWAP),
    (4086, b"SWAP-SPACE", SWAP),
    (32769, b"CD001", "ISO 9660"),
)
_EXT_MAGIC = b"\x53\xef"
_JOURNAL_DEVICE, _RECOVER, _COMPRESSION = 0x8, 0x4, 0x1
_KNOWN_INCOMPAT = (
    0x2 | _RECOVER | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found.

    Args:
        family: EXT, NTFS, …: what reads it; None: nothing does.
        kind: for people: `ext4`; "" when nothing was found.
        problem: why it can't be read; None when it can.
    """

    family: str | None
    kind: str
    problem: str | None = None


def detect(volume: Image) -> Found:
    """Say what is on a volume.

    Raises:
        BackupfsError: it can't be read.
    """
    outside = container(volume)
    found = Found(None, "") if outside else _look(volume)
    # Not asked of the others: Windows makes them over such a superblock, and leaves it.
    if found.family in (EXT, XFS, BTRFS) and is_striped(volume):
        outside = RAID
    if outside is not None:
        return Found(None, outside, f"{outside}: not a file system that backupfs reads")
    return found


def _look(volume: Image) -> Found:
    head = read(volume, 0, min(volume.size, 68 * KiB)) or b""
    if head[1080:1082] == _EXT_MAGIC:
        return _ext(head)
    if head[:4] == b"XFSB":
        return Found(XFS, "xfs")
    for offset, magic, what in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return Found(None, what, f"{what}: not a file system that backupfs reads")
    if head[3:11] == b"NTFS    ":
        return Found(NTFS, "ntfs")
    if head[510:512] == b"\x55\xaa" and (head[54:57] == b"FAT" or head[82:87] == b"FAT32"):
        return Found(FAT, "vfat")
    # After those above: they leave what a btrfs was there before, which clears its first 2 MiB when it is made.
    if head[0x10040:0x10048] == b"_BHRfS_M":
        return Found(BTRFS, "btrfs")
    if is_fat(volume):
        return Found(FAT, "vfat")
    return Found(None, "", "no file system was found" if any(head) else "nothing is on it, or nothing that is known")


def _ext(head: bytes) -> Found:
    """Source: fs/ext4/ext4.h, struct ext4_super_block."""
    compat, incompat, ro_compat = struct.unpack_from("<3I", head, 1024 + 0x5C)
    kind = "ext4" if incompat & ~0x7 or ro_compat & ~0x7 else "ext3" if compat & 0x4 else "ext2"
    if incompat & _JOURNAL_DEVICE:
        return Found(None, JOURNAL, "the journal of an ext file system: there are no files in it")
    if incompat & _COMPRESSION:
        return Found(None, kind, f"{kind} with compression, which backupfs does not read")
    if incompat & ~_KNOWN_INCOMPAT:
        return Found(None, kind, f"{kind} with features that backupfs does not know ({incompat & ~_KNOWN_INCOMPAT:#x})")
    return Found(EXT, kind)
