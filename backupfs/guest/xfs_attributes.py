"""Extended attributes of an XFS. Source: fs/xfs/libxfs/xfs_da_format.h, fs/xfs/xfs_acl.c, fs/xfs/xfs_xattr.c."""

import struct
from collections.abc import Iterator, Sequence

from backupfs.errors import GuestError
from backupfs.guest.xfs_disk import EXTENTS, LOCAL, NODE, REMOTE, Disk, Inode, Mapped

_IN_LEAF, _ROOT, _SECURE, _PARENT, _INCOMPLETE = 0x1, 0x2, 0x4, 0x8, 0x80
_ACLS = {b"SGI_ACL_FILE": b"system.posix_acl_access", b"SGI_ACL_DEFAULT": b"system.posix_acl_default"}
_LEAF_MAGIC, _NODE_MAGIC = (b"\xfb\xee", b"\x3b\xee"), (b"\xfe\xbe", b"\x3e\xbe")
_LARGEST, _MOST_BLOCKS = 64 << 10, 100_000


def may_have(inode: Inode) -> bool:
    """Whether an inode may have some. Linux keeps room for them where it may get a label, with nothing in it."""
    if inode.attribute_form == LOCAL:
        return inode.attributes[2:3] != b"\0" and inode.attributes != b""
    return bool(inode.attributes) and (inode.attribute_form != EXTENTS or inode.attribute_extents > 0)


def attributes(disk: Disk, inode: Inode) -> dict[bytes, bytes]:
    """Return an inode's extended attributes as the kernel lists them to root. Raises GuestError."""
    if not inode.attributes:
        return {}
    found: dict[bytes, bytes] = {}
    pairs = _short(inode) if inode.attribute_form == LOCAL else _leaves(disk, inode)
    for flags, name, value in pairs:
        if flags & (_INCOMPLETE | _PARENT):
            continue
        if flags & _ROOT and name in _ACLS:
            found[_ACLS[name]] = _acl(inode.number, value)
        prefix = b"trusted." if flags & _ROOT else b"security." if flags & _SECURE else b"user."
        found[prefix + name] = value
    return found


def _damaged(number: int) -> GuestError:
    return GuestError(f"inode {number}: its extended attributes are damaged")


def _short(inode: Inode) -> Iterator[tuple[int, bytes, bytes]]:
    size, count = struct.unpack_from(">HB", inode.attributes)
    data, position = inode.attributes[:size], 4
    for _ in range(count):
        length, value, flags = struct.unpack_from("BBB", data, position)
        end = position + 3 + length + value
        if end > len(data):
            raise _damaged(inode.number)
        yield flags, data[position + 3 : position + 3 + length], data[position + 3 + length : end]
        position = end


def _leaves(disk: Disk, inode: Inode) -> Iterator[tuple[int, bytes, bytes]]:
    pieces = disk.mapped(inode, attributes=True)
    if not pieces:
        return
    is_new = disk.version == 5
    leaf, node, seen = _LEAF_MAGIC[is_new], _NODE_MAGIC[is_new], set[int]()
    number, block = 0, _block(disk, inode, pieces, 0, leaf, node)
    while block[8:10] == node:
        seen.add(number)
        (number,) = struct.unpack_from(">I", block, (64 if is_new else 16) + 4)
        if number in seen:
            raise _damaged(inode.number)
        block = _block(disk, inode, pieces, number, leaf, node)
    while True:
        if block[8:10] != leaf or number in seen or len(seen) > _MOST_BLOCKS:
            raise _damaged(inode.number)
        seen.add(number)
        yield from _leaf(disk, inode, pieces, block)
        (number,) = struct.unpack_from(">I", block)
        if not number:
            return
        block = _block(disk, inode, pieces, number, leaf)


def _leaf(disk: Disk, inode: Inode, pieces: Sequence[Mapped], block: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    begin, first = (56, 80) if disk.version == 5 else (12, 32)
    (count,) = struct.unpack_from(">H", block, begin)
    for i in range(count):
        _, at, flags = struct.unpack_from(">IHB", block, first + 8 * i)
        if flags & _IN_LEAF:
            size, length = struct.unpack_from(">HB", block, at)
            name = block[at + 3 : at + 3 + length]
            value = block[at + 3 + length : at + 3 + length + size]
        else:
            where, size, length = struct.unpack_from(">IIB", block, at)
            name = block[at + 9 : at + 9 + length]
            value = b"" if flags & (_INCOMPLETE | _PARENT) else _remote(disk, inode, pieces, where, size)
        if len(name) != length or (len(value) != size and not flags & (_INCOMPLETE | _PARENT)):
            raise _damaged(inode.number)
        yield flags, name, value


def _remote(disk: Disk, inode: Inode, pieces: Sequence[Mapped], number: int, size: int) -> bytes:
    """Return a value that has blocks of its own; of version 5 each has a header."""
    if size > _LARGEST:
        raise _damaged(inode.number)
    value, header = b"", 56 if disk.version == 5 else 0
    while len(value) < size:
        at = _place(disk, inode, pieces, number)
        block = disk.read(at, disk.block)
        if header:
            disk.check(block, at, inode.number, REMOTE, b"XARM")
            offset, length = struct.unpack_from(">II", block, 4)
            if offset != len(value) or length != min(size - offset, disk.block - header):
                raise _damaged(inode.number)
        value += block[header : header + size - len(value)]
        number += 1
    return value


def _block(disk: Disk, inode: Inode, pieces: Sequence[Mapped], number: int, *magics: bytes) -> bytes:
    at = _place(disk, inode, pieces, number)
    block = disk.read(at, disk.block)
    disk.check(block, at, inode.number, NODE, *magics)
    return block


def _place(disk: Disk, inode: Inode, pieces: Sequence[Mapped], number: int) -> int:
    offset: int = number * disk.block
    for piece in pieces:
        if piece.offset <= offset < piece.offset + piece.length:
            return piece.at + offset - piece.offset
    raise _damaged(inode.number)


def _acl(number: int, value: bytes) -> bytes:
    """Return an ACL as in an xattr's value on Linux."""
    (count,) = struct.unpack_from(">I", value)
    if len(value) != 4 + 12 * count:
        raise _damaged(number)
    out = [struct.pack("<I", 2)]
    for tag, who, permissions in struct.iter_unpack(">IIH2x", value[4:]):
        named = tag in (0x02, 0x08)  # a user or group
        out.append(struct.pack("<HHI", tag, permissions, who if named else 0xFFFFFFFF))
    return b"".join(out)
