"""What The Sleuth Kit does not tell of an ext inode: exact times, owners, xattrs, ACLs, device numbers.

Source of all layouts: Linux, fs/ext4/ext4.h, fs/ext4/xattr.h, fs/ext4/acl.h.
"""

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from backupfs.errors import GuestError, NotFound
from backupfs.guest.crc32c import crc32c
from backupfs.guest.reading import read
from backupfs.image import Image

_SUPER = 1024
_INODE = struct.Struct("<HHIIII4xHHII4x60s")  # mode, uid, size, atime, ctime, mtime, gid, nlink, blocks, flags, block
_INODE_REST = struct.Struct("<II4xHHHH")  # acl; size, blocks, acl, uid, gid _high
_EXTRA = struct.Struct("<HHIII")  # extra_isize, checksum_hi; ctime, mtime, atime _extra
_EA_MAGIC = 0xEA020000
_EA_MAGIC_BYTES = struct.pack("<I", _EA_MAGIC)
_ENTRY = struct.Struct("<BBHIII")  # name_len, name_index, value_offs, value_inum, value_size, hash
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}
_ACLS = (2, 3)
_INLINE_DATA = b"system.data"  # where the kernel keeps small files, which it does not show
_MOST_XATTRS = 1000
EXTENTS_FLAG, INLINE_FLAG, EA_INODE_FLAG, ENCRYPT_FLAG, HUGE_FLAG = 0x80000, 0x10000000, 0x200000, 0x800, 0x40000
INDEX_FLAG = 0x1000
_CHECKSUMS, _SEED = 0x400, 0x2000  # ro_compat, incompat


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
    has_xattrs: bool  # there may be some


class Inodes:
    """The inode tables of an ext file system.

    Raises:
        GuestError: the superblock makes no sense.
    """

    def __init__(self, volume: Image) -> None:
        self._volume = volume
        head = self._read(_SUPER, 1024)
        self.count, self._first_data, log_size = struct.unpack_from("<I", head)[0], *struct.unpack_from("<2I", head, 20)
        self._per_group, revision = struct.unpack_from("<I", head, 40)[0], struct.unpack_from("<I", head, 76)[0]
        self.compat, self.incompat, self.ro_compat = struct.unpack_from("<3I", head, 92)
        self._inode_size = struct.unpack_from("<H", head, 88)[0] if revision else 128
        wide = struct.unpack_from("<H", head, 254)[0] if self.incompat & 0x80 else 0
        self._descriptor = max(wide, 64) if self.incompat & 0x80 else 32
        if log_size > 6 or not self._per_group or self._inode_size < 128 or self._inode_size > (1024 << log_size):
            raise GuestError("the superblock is damaged")
        if self._descriptor > 1024 or self._descriptor & (self._descriptor - 1):
            raise GuestError("the superblock is damaged")
        self.block = 1024 << log_size
        self._seed: int | None = None
        if self.ro_compat & _CHECKSUMS:
            given = struct.unpack_from("<I", head, 0x270)[0]
            self._seed = given if self.incompat & _SEED else crc32c(head[0x68:0x78])
        self._tables: dict[int, int] = {}

    def _read(self, offset: int, length: int) -> bytes:
        data = read(self._volume, offset, length)
        if data is None:
            raise GuestError(f"the file system is damaged: it wants {length} bytes at {offset}, behind its end")
        return data

    def get(self, number: int) -> Inode:
        """Return an inode. Raises NotFound: there can be none; GuestError."""
        if not 1 <= number <= self.count:
            raise NotFound(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        raw = self._read(self._table(group) + index * self._inode_size, self._inode_size)
        mode, uid, size, atime, ctime, mtime, gid, nlink, blocks, flags, block = _INODE.unpack_from(raw)
        acl, size_high, blocks_high, acl_high, uid_high, gid_high = _INODE_REST.unpack_from(raw, 104)
        end, more_ctime, more_mtime, more_atime = 0, 0, 0, 0  # of the fields that there are
        if len(raw) >= 128 + _EXTRA.size:
            end, _, more_ctime, more_mtime, more_atime = _EXTRA.unpack_from(raw, 128)
        sectors, unit = blocks, 512
        if self.ro_compat & 0x8:
            sectors |= blocks_high << 32
            unit = self.block if flags & HUGE_FLAG else 512
        return Inode(
            number=number,
            mode=mode,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            size=size | size_high << 32,
            nlink=nlink,
            allocated=sectors * unit,
            flags=flags,
            atime_ns=_time(atime, more_atime if end >= 16 else 0),
            mtime_ns=_time(mtime, more_mtime if end >= 12 else 0),
            ctime_ns=_time(ctime, more_ctime if end >= 8 else 0),
            rdev=_device(block[:8]) if mode & 0xF000 in (0x2000, 0x6000) else 0,
            block=block,
            raw=raw,
            has_xattrs=bool(acl or acl_high) or raw[128 + end : 132 + end] == _EA_MAGIC_BYTES,
        )

    def seed(self, inode: Inode) -> int | None:
        """Return the state of the CRC-32C that an inode's checksums begin with; None: it has none.

        Source: fs/ext4/inode.c, i_csum_seed in __ext4_iget.
        """
        if self._seed is None:
            return None
        return crc32c(inode.raw[100:104], crc32c(struct.pack("<I", inode.number), self._seed))

    def inline(self, inode: Inode) -> bytes:
        """Return what is in the inode itself instead of in blocks. Raises GuestError."""
        begin = 128 + struct.unpack_from("<H", inode.raw, 128)[0] if len(inode.raw) > 132 else len(inode.raw)
        area = inode.raw[begin:]
        if area[:4] == _EA_MAGIC_BYTES:
            for name, index, value in self._pairs(area[4:], area[4:]):
                if index == 7 and _PREFIXES[index] + name == _INLINE_DATA:
                    return inode.block + value
        return inode.block

    def _table(self, group: int) -> int:
        """Return where a group's inode table begins, in bytes."""
        if group not in self._tables:
            if len(self._tables) > 100_000:
                self._tables.clear()
            first = (self._first_data + 1) * self.block + group * self._descriptor
            descriptor = self._read(first, self._descriptor)
            low = struct.unpack_from("<I", descriptor, 8)[0]
            high = struct.unpack_from("<I", descriptor, 40)[0] if self._descriptor >= 64 else 0
            self._tables[group] = (low | high << 32) * self.block
        return self._tables[group]

    # Extended attributes.

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Return an inode's extended attributes as the kernel shows them. Raises GuestError."""
        found: dict[bytes, bytes] = {}
        if len(inode.raw) > 128 + 4:
            start = 128 + struct.unpack_from("<H", inode.raw, 128)[0]
            area = inode.raw[start:]
            if len(area) >= 8 and struct.unpack_from("<I", area)[0] == _EA_MAGIC:
                found |= self._entries(area[4:], area[4:])
        low, high = struct.unpack_from("<I", inode.raw, 104)[0], struct.unpack_from("<H", inode.raw, 118)[0]
        acl_block = low | (high << 32 if self.incompat & 0x80 else 0)
        if acl_block:
            block = self._read(acl_block * self.block, self.block)
            if struct.unpack_from("<I", block)[0] != _EA_MAGIC:
                raise GuestError(f"inode {inode.number}: its block of extended attributes is damaged")
            found = self._entries(block[32:], block) | found
        return found

    def _entries(self, entries: bytes, values: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for name, index, value in self._pairs(entries, values):
            prefix = _PREFIXES.get(index)
            if prefix is None or (index == 7 and prefix + name == _INLINE_DATA):
                continue
            found[prefix + (b"" if index in (*_ACLS, 8) else name)] = _acl(value) if index in _ACLS else value
        return found

    def _pairs(self, entries: bytes, values: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        position = 0
        for _ in range(_MOST_XATTRS):
            if position + 4 > len(entries) or entries[position : position + 4] == bytes(4):
                return
            if position + _ENTRY.size > len(entries):
                break
            name_length, index, offset, inode, size, _hash = _ENTRY.unpack_from(entries, position)
            name = entries[position + _ENTRY.size : position + _ENTRY.size + name_length]
            if inode:
                value = self._value_inode(inode, size)
            elif offset + size > len(values):
                break
            else:
                value = values[offset : offset + size]
            yield name, index, value
            position += _ENTRY.size + (name_length + 3 & ~3)
        raise GuestError("its extended attributes are damaged")

    def _value_inode(self, number: int, size: int) -> bytes:
        raise GuestError(
            f"an extended attribute of {size} bytes is in an inode of its own ({number}), which is not read"
        )


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


def _acl(value: bytes) -> bytes:
    """Return an ACL as in an xattr's value on Linux. Source: fs/ext4/acl.c, ext4_acl_from_disk."""
    if len(value) < 4 or struct.unpack_from("<I", value)[0] != 1:
        raise GuestError("an access control list is damaged")
    out, position = [struct.pack("<I", 2)], 4
    while position < len(value):
        if position + 4 > len(value):
            raise GuestError("an access control list is damaged")
        tag, permissions = struct.unpack_from("<2H", value, position)
        position += 4
        who = 0xFFFFFFFF
        if tag in (0x02, 0x08):  # a named user or group
            if position + 4 > len(value):
                raise GuestError("an access control list is damaged")
            (who,) = struct.unpack_from("<I", value, position)
            position += 4
        out.append(struct.pack("<2HI", tag, permissions, who))
    return b"".join(out)
