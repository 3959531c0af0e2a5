"""The superblock and the inodes of an ext file system, with their checksums.

Source of all layouts: Linux, fs/ext4/ext4.h; super.c (descriptor_loc, ext4_bg_has_super); inode.c (ext4_inode_csum).
"""

import os
import struct
from typing import NamedTuple

from backupfs.errors import GuestError, NotFound
from backupfs.guest.crc32c import crc32c
from backupfs.guest.reading import read
from backupfs.image import Image

_SUPER = 1024
_INODE = struct.Struct("<HHIIII4xHHII4x60s")  # mode, uid, size, atime, ctime, mtime, gid, nlink, blocks, flags, block
_INODE_REST = struct.Struct("<II4xHHHH")  # acl; size, blocks, acl, uid, gid _high
_EXTRA = struct.Struct("<HHIII")  # extra_isize, checksum_hi; ctime, mtime, atime _extra
ROOT = 2
EXTENTS_FLAG, INLINE_FLAG, EA_INODE_FLAG, ENCRYPT_FLAG, HUGE_FLAG = 0x80000, 0x10000000, 0x200000, 0x800, 0x40000
INDEX_FLAG = 0x1000
_SPARSE, _HUGE_FILES, _GROUP_CHECKSUMS, _CHECKSUMS = 0x1, 0x8, 0x10, 0x400  # ro_compat
_META_GROUPS, _WIDE, _SEED, _LARGE_FOLDERS = 0x10, 0x80, 0x2000, 0x4000  # incompat
_SPARSE_2 = 0x200  # compat
_SHORT_OWNERS = 0x10  # of the mount options in the superblock: EXT4_DEFM_UID16


class Inode(NamedTuple):
    """An inode as it is on the disk; times in ns since 1970."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    allocated: int
    flags: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    block: bytes  # i_block: 60 bytes
    raw: bytes
    attributes: int  # the block with more of its extended attributes, 0: none

    @property
    def behind(self) -> bytes:
        """What is behind the fields of the inode: extended attributes."""
        return self.raw[128 + struct.unpack_from("<H", self.raw, 128)[0] :] if len(self.raw) > 132 else b""


class Inodes:
    """The inode tables of an ext file system.

    Raises:
        GuestError: the superblock makes no sense.
    """

    def __init__(self, volume: Image) -> None:
        self._volume = volume
        head = self.read(_SUPER, 1024)

        def number(at: int) -> int:
            return int.from_bytes(head[at : at + 4], "little")

        self.count, low, self.first_data, log_size = number(0), number(4), number(20), number(24)
        self._group_blocks, self._per_group = number(32), number(40)
        self._compat, self._incompat, self._ro_compat = number(92), number(96), number(100)
        wide, revised = self._incompat & _WIDE, number(76)
        self._short_owners = bool(number(0x100) & _SHORT_OWNERS)
        self.blocks = low | (number(0x150) << 32 if wide else 0)
        self._first, self._inode_size = struct.unpack_from("<IH", head, 84) if revised else (11, 128)
        self._descriptor = max(struct.unpack_from("<H", head, 254)[0], 64) if wide else 32
        self._first_meta_group = number(260) if self._incompat & _META_GROUPS else 1 << 32
        self._backups = number(0x24C), number(0x250)
        if log_size > 6 or not self._per_group or not 128 <= self._inode_size <= 1024 << log_size:
            raise GuestError("the superblock is damaged")
        if self._descriptor > 1024 or self._descriptor & (self._descriptor - 1):
            raise GuestError("the superblock is damaged")
        self.block = 1024 << log_size
        self._uuid = head[0x68:0x78]
        self._seed: int | None = None
        if self._ro_compat & _CHECKSUMS:
            if crc32c(head[:1020]) != number(1020):
                raise GuestError("the superblock is damaged: its checksum is wrong")
            self._seed = number(0x270) if self._incompat & _SEED else crc32c(self._uuid)
        self._tables: dict[int, int] = {}

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the volume. Raises GuestError; BackupfsError: it can't be read."""
        data = read(self._volume, offset, length)
        if data is None:
            raise GuestError(f"the file system is damaged: it wants {length} bytes at {offset}, behind its end")
        return data

    def get(self, number: int) -> Inode:
        """Return an inode. Raises NotFound: there can be none; GuestError."""
        if not 1 <= number <= self.count:
            raise NotFound(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        raw = self.read(self._table(group) + index * self._inode_size, self._inode_size)
        self._verify(number, raw)
        mode, uid, size, atime, ctime, mtime, gid, nlink, blocks, flags, block = _INODE.unpack_from(raw)
        acl, size_high, blocks_high, acl_high, uid_high, gid_high = _INODE_REST.unpack_from(raw, 104)
        end, more_ctime, more_mtime, more_atime = 0, 0, 0, 0  # of the fields that there are
        if len(raw) >= 128 + _EXTRA.size:
            end, _, more_ctime, more_mtime, more_atime = _EXTRA.unpack_from(raw, 128)
        if self._short_owners:
            uid_high = gid_high = 0
        sectors, unit = blocks, 512
        if self._ro_compat & _HUGE_FILES:
            sectors |= blocks_high << 32
            unit = self.block if flags & HUGE_FLAG else 512
        if mode & 0xF000 == 0x8000 or self._incompat & _LARGE_FOLDERS:
            size |= size_high << 32
        return Inode(
            number=number,
            mode=mode,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            size=size,
            nlink=nlink,
            allocated=sectors * unit,
            flags=flags,
            atime_ns=_time(atime, more_atime if end >= 16 else 0),
            mtime_ns=_time(mtime, more_mtime if end >= 12 else 0),
            ctime_ns=_time(ctime, more_ctime if end >= 8 else 0),
            rdev=_device(block[:8]) if mode & 0xF000 in (0x2000, 0x6000) else 0,
            block=block,
            raw=raw,
            attributes=acl | (acl_high << 32 if self._incompat & _WIDE else 0),
        )

    def is_special(self, number: int) -> bool:
        """Whether an inode is the file system's own: no name may stand for it."""
        return number < self._first and number != ROOT

    def seed(self, inode: Inode) -> int | None:
        """Return the state of the CRC-32C that an inode's checksums begin with; None: it has none.

        Source: fs/ext4/inode.c, i_csum_seed in __ext4_iget.
        """
        return self._seed_of(inode.number, inode.raw)

    def attributes_seed(self, at: int) -> int | None:
        """Return the same for a block of extended attributes. Source: fs/ext4/xattr.c, ext4_xattr_block_csum."""
        return None if self._seed is None else crc32c(struct.pack("<Q", at), self._seed)

    def _seed_of(self, number: int, raw: bytes) -> int | None:
        if self._seed is None:
            return None
        return crc32c(raw[100:104], crc32c(struct.pack("<I", number), self._seed))

    def _verify(self, number: int, raw: bytes) -> None:
        seed = self._seed_of(number, raw)
        if seed is None:
            return
        low, high = struct.unpack_from("<H", raw, 124)[0], 0
        blank, mask = bytearray(raw), 0xFFFF
        blank[124:126] = bytes(2)
        if len(raw) > 132 and struct.unpack_from("<H", raw, 128)[0] >= 4:
            high, mask = struct.unpack_from("<H", raw, 130)[0], 0xFFFFFFFF
            blank[130:132] = bytes(2)
        if crc32c(bytes(blank), seed) & mask != low | high << 16:
            raise GuestError(f"inode {number} is damaged: its checksum is wrong")

    def _table(self, group: int) -> int:
        """Return where a group's inode table begins, in bytes."""
        if group not in self._tables:
            if len(self._tables) > 100_000:
                self._tables.clear()
            each = self.block // self._descriptor
            at = self._descriptors(group // each) * self.block + group % each * self._descriptor
            descriptor = self.read(at, self._descriptor)
            self._verify_group(group, descriptor)
            low = struct.unpack_from("<I", descriptor, 8)[0]
            high = struct.unpack_from("<I", descriptor, 40)[0] if self._descriptor >= 64 else 0
            self._tables[group] = (low | high << 32) * self.block
        return self._tables[group]

    def _verify_group(self, group: int, descriptor: bytes) -> None:
        """Check a group's descriptor where inodes have no checksums, which would tell that the table is elsewhere.

        Source: fs/ext4/super.c, ext4_group_desc_csum.
        """
        if self._seed is not None or not self._ro_compat & _GROUP_CHECKSUMS:
            return
        expected = _crc16(self._uuid + struct.pack("<I", group) + descriptor[:30] + descriptor[32:])
        if expected != struct.unpack_from("<H", descriptor, 30)[0]:
            raise GuestError(f"the description of group {group} is damaged: its checksum is wrong")

    def _descriptors(self, number: int) -> int:
        """Return where a block of group descriptors is, in blocks. Source: fs/ext4/super.c, descriptor_loc."""
        if number < self._first_meta_group:
            return _SUPER // self.block + 1 + number
        group = number * (self.block // self._descriptor)
        behind = self._has_super(group) + (self.block == 1024 and not number and not self.first_data)
        return self.first_data + group * self._group_blocks + behind

    def _has_super(self, group: int) -> bool:
        if group == 0:
            return True
        if self._compat & _SPARSE_2:
            return group in self._backups
        sparse = bool(self._ro_compat & _SPARSE)
        return group <= 1 or not sparse or any(_is_power(group, base) for base in (3, 5, 7))


def _is_power(number: int, base: int) -> bool:
    while number > 1 and number % base == 0:
        number //= base
    return number == 1


def _crc16(data: bytes) -> int:
    """Return the CRC-16 that Linux's lib/crc16.c counts, from all bits set on."""
    state = 0xFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0xA001 if state & 1 else 0)
    return state


def _time(seconds: int, extra: int) -> int:
    """Source: fs/ext4/ext4.h, ext4_decode_extra_time: 2 bits of epoch, 30 of nanoseconds."""
    signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
    return (signed + ((extra & 3) << 32)) * 10**9 + min(extra >> 2, 10**9 - 1)


def _device(block: bytes) -> int:
    """Source: include/linux/kdev_t.h, old_decode_dev and new_decode_dev; os.makedev's form."""
    old, new = struct.unpack("<2I", block)
    if old:
        return os.makedev(old >> 8 & 0xFF, old & 0xFF)
    return os.makedev((new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00))
