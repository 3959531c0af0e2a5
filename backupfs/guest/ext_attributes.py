"""Extended attributes of ext inodes, ACLs among them.

Source: Linux, fs/ext4/xattr.h, xattr.c; acl.h, acl.c.
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError, NotFound
from backupfs.guest.crc32c import crc32c
from backupfs.guest.ext_inode import EA_INODE_FLAG, Inode, Inodes
from backupfs.guest.ext_map import Map

_MAGIC = struct.pack("<I", 0xEA020000)
_HEAD, _SUM_AT = 32, 16  # bytes: of a block, before its attributes; where its checksum is
_ENTRY = struct.Struct("<BBHIII")  # name_len, name_index, value_offs, value_inum, value_size, hash
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    10: b"gnu.",
}
_ACLS = (2, 3)
_INLINE_DATA = (7, b"data")  # where the kernel keeps small files; of what begins with 7 or 8 it shows nothing
_MOST, _LONGEST = 1000, 64 << 10  # attributes; bytes of a value


def may_have(inode: Inode) -> bool:
    """Whether an inode may have some."""
    return bool(inode.attributes) or inode.behind[:4] == _MAGIC


def inline(inode: Inode) -> bytes:
    """Return what is in the inode itself instead of in blocks. Raises GuestError."""
    for name, index, at, _, size in _entries(inode.behind[4:]) if inode.behind[:4] == _MAGIC else ():
        if (index, name) == _INLINE_DATA:
            return inode.block + _value(inode.behind[4:], at, size)
    return inode.block


def attributes(inodes: Inodes, places: Map, inode: Inode) -> dict[bytes, bytes]:
    """Return an inode's extended attributes as the kernel shows them. Raises GuestError."""
    found: dict[bytes, bytes] = {}
    if inode.attributes:
        block = inodes.read(inode.attributes * inodes.block, inodes.block)
        seed = inodes.attributes_seed(inode.attributes)
        (expected,) = struct.unpack_from("<I", block, _SUM_AT)
        unsummed = block[:_SUM_AT] + bytes(4) + block[_SUM_AT + 4 :]
        if block[:4] != _MAGIC or (seed is not None and crc32c(unsummed, seed) != expected):
            raise GuestError(f"inode {inode.number}: its block of extended attributes is damaged")
        found = dict(_shown(inodes, places, block[_HEAD:], block))
    if inode.behind[:4] == _MAGIC:
        found |= _shown(inodes, places, inode.behind[4:], inode.behind[4:])
    return found


def _shown(inodes: Inodes, places: Map, entries: bytes, values: bytes) -> Iterator[tuple[bytes, bytes]]:
    for name, index, at, number, size in _entries(entries):
        prefix = _PREFIXES.get(index)
        if prefix is None:
            continue
        value = _far_value(inodes, places, number, size) if number else _value(values, at, size)
        yield (prefix, _acl(value)) if index in _ACLS else (prefix + name, value)


def _entries(data: bytes) -> Iterator[tuple[bytes, int, int, int, int]]:
    """Yield names, their prefixes' numbers, and the values: where they are, or in which inode, and their sizes."""
    position = 0
    for _ in range(_MOST):
        if position + 4 > len(data) or data[position : position + 4] == bytes(4):
            return
        if position + _ENTRY.size > len(data):
            break
        name_length, index, at, number, size, _hash = _ENTRY.unpack_from(data, position)
        begin = position + _ENTRY.size
        yield data[begin : begin + name_length], index, at, number, size
        position = begin + (name_length + 3 & ~3)
    raise GuestError("its extended attributes are damaged")


def _value(values: bytes, at: int, size: int) -> bytes:
    if at + size > len(values):
        raise GuestError("its extended attributes are damaged")
    return values[at : at + size]


def _far_value(inodes: Inodes, places: Map, number: int, size: int) -> bytes:
    """Return a value that has an inode of its own."""
    try:
        holder = inodes.get(number)
    except NotFound as e:
        raise GuestError(f"the inode of an extended attribute is none: {e}") from e
    if not holder.flags & EA_INODE_FLAG or holder.size != size or size > _LONGEST:
        raise GuestError(f"the inode of an extended attribute ({number}) is damaged")
    return places.read(holder, 0, size)


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
