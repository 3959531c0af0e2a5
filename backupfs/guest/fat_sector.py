"""Whether a volume is FAT though nothing in it says so: what its first sector says of it has to fit, all of it.

Windows and Linux go by nothing else: the words `FAT16` and `FAT32` in it are for people, and mkfs.vfat -A writes none.
A partition table, or the first sector of NTFS or exFAT, has zeroes or code where the numbers are.

Source: Linux, fs/fat/inode.c (fat_read_bpb, fat_fill_super); Microsoft, FAT: General Overview of On-Disk Format.
"""

import struct

from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import KiB

_FIRST = struct.Struct("<HBHBHHBH8xIIHHI")
"""From byte 11 on: bytes of a sector, sectors of a cluster, reserved ones, tables, entries of the first folder;
sectors, medium, and those of a table; the two again if they are more; flags, version and first folder of FAT32."""
_SECTORS = (512, 1024, 2048, 4096)
_LARGEST_CLUSTER = 256 * KiB
_MOST_TABLES = 4
_MOST_12, _MOST_16, _MOST_32 = 0xFF4, 0xFFF4, 0x0FFFFFF6  # clusters


def is_fat(volume: Image) -> bool:
    """Return whether a volume is FAT. Raises BackupfsError."""
    head = read(volume, 0, 512)
    if head is None:
        return False
    sector, per_cluster, reserved, tables, entries, few, medium, table, many, wide, _, version, folder = (
        _FIRST.unpack_from(head, 11)
    )
    total, is_32 = few or many, not table
    if (
        sector not in _SECTORS
        or not per_cluster
        or per_cluster & (per_cluster - 1)
        or sector * per_cluster > _LARGEST_CLUSTER
        or not reserved
        or not 1 <= tables <= _MOST_TABLES
        or not (medium == 0xF0 or medium >= 0xF8)
        or total * sector > volume.size
        or (few and many)
        or entries * 32 % sector
    ):
        return False
    if (entries or few or not wide or version or folder < 2) if is_32 else not entries:
        return False
    table = table or wide
    clusters = (total - reserved - tables * table - entries * 32 // sector) // per_cluster
    bits = 32 if is_32 else 16 if clusters > _MOST_12 else 12
    most = _MOST_32 if is_32 else _MOST_16
    if not 1 <= clusters <= most or table * sector * 8 // bits < clusters + 2:
        return False
    return read(volume, reserved * sector, 2) == bytes([medium, 0xFF])  # a table begins with the medium, and ones
