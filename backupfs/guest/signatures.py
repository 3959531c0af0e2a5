"""What a range of a disk begins with, where that helps to tell a partition table from what only looks like one.

Source: util-linux, libblkid/src/superblocks.
"""

from backupfs.guest.reading import read
from backupfs.image import Image

_SIGNATURES = (
    (0, b"XFSB"),
    (0, b"LUKS\xba\xbe"),
    (0, b"hsqs"),
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (54, b"FAT1"),
    (54, b"FAT  "),
    (82, b"FAT32"),
    (1080, b"\x53\xef"),  # ext2, 3, 4
    (4086, b"SWAPSPACE2"),
    (32769, b"CD001"),  # ISO 9660
    (65600, b"_BHRfS_M"),  # btrfs
    *((sector * 512, b"LABELONE") for sector in range(4)),  # LVM
)
_LENGTHS = (512, 4096, 66 * 1024)


def is_known(image: Image, offset: int) -> bool:
    """Return whether a file system, swap, LUKS or a physical volume of LVM begins at `offset`. Raises BackupfsError."""
    head = b""
    for length in _LENGTHS:
        longer = read(image, offset, length)
        if longer is None:
            break
        head = longer
    return any(head[at : at + len(magic)] == magic for at, magic in _SIGNATURES)


def is_boot_sector(sector: bytes) -> bool:
    """Return whether a first sector is that of FAT, exFAT or NTFS: it ends as a partition table does."""
    jumps = sector[0] in (0xEB, 0xE9)
    return jumps and any(sector[at : at + len(magic)] == magic for at, magic in _SIGNATURES if 0 < at < 512)
