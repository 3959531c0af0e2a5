"""XFS on the disk: superblock, inodes, and where their contents lie. Version 4 and 5; of 5 every checksum is checked.

Source of all layouts: Linux, fs/xfs/libxfs/xfs_format.h. All numbers are big-endian, but checksums are not.
"""

import functools
import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from crc32c import crc32c

from backupfs.errors import GuestError, NotFound
from backupfs.guest.reading import read
from backupfs.image import Image

DEVICE, LOCAL, EXTENTS, BTREE = range(4)
"""What a fork holds."""
_KNOWN = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_REFUSED = {0x10: "needs repair (xfs_repair)", 0x100: "has a metadata directory", 0x200: "is zoned"}
_META_UUID, _TYPES, _TYPES_OF_V4, _FOLDERS_OF_V4 = 0x4, 0x1, 0x200, 0x2000
_BIGTIME, _LARGE_COUNTS, _REALTIME = 0x8, 0x10, 0x1
_BIGTIME_EPOCH = 1 << 31  # seconds before 1970
_CORE_OF_V2, _CORE_OF_V3 = 100, 176
_DEEPEST, _MOST_EXTENTS = 9, 1_000_000


class Layout(NamedTuple):
    """Where in a block of version 5 there is what tells whose it is."""

    magic: int
    crc: int
    place: int  # in sectors
    uuid: int
    owner: int


_TREE = Layout(0, 64, 24, 40, 56)  # xfs_btree_block_lhdr
FOLDER = Layout(0, 4, 8, 24, 40)  # xfs_dir3_blk_hdr
NODE = Layout(8, 12, 16, 32, 48)  # xfs_da3_blkinfo
REMOTE = Layout(0, 12, 40, 16, 32)  # xfs_dsymlink_hdr, xfs_attr3_rmt_hdr


class Mapped(NamedTuple):
    """A range of a fork, and where it lies on the volume; all in bytes."""

    offset: int
    length: int
    at: int
    unwritten: bool


class Inode(NamedTuple):
    """An inode; times in ns since 1970."""

    number: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    form: int
    data: bytes  # the fork
    extents: int
    attribute_form: int
    attributes: bytes  # the other fork
    attribute_extents: int
    realtime: bool

    @property
    def rdev(self) -> int:
        """Of a device, its number. Source: include/linux/kdev_t.h, sysv_major."""
        (number,) = struct.unpack_from(">I", self.data)
        return os.makedev(number >> 18 & 0x3FFF, number & 0x3FFFF)


class Disk:
    """A volume with an XFS.

    Args:
        is_replayed: whether a range of it is as the log says: nobody has worked out the checksums of that.

    Raises:
        GuestError: it can't be read.
    """

    def __init__(self, volume: Image, is_replayed: Callable[[int, int], bool] = lambda _offset, _length: False) -> None:
        self._volume = volume
        self._is_replayed = is_replayed
        head = self.read(0, 512)
        self.log_uuid: bytes = head[32:48]
        self.lsn = int.from_bytes(head[240:248])  # of version 5: the log has been written that far
        self.block, blocks = struct.unpack_from(">IQ", head, 4)
        log, self.root = struct.unpack_from(">QQ", head, 48)
        self.group_blocks, groups, _, self.log_blocks, versions = struct.unpack_from(">IIIIH", head, 84)
        sector, self.inode_size, per_block = struct.unpack_from(">HHH", head, 102)
        block_log, _, _, self._per_block_log, self._group_log = struct.unpack_from("5B", head, 120)
        features2, _, _, _, incompat = struct.unpack_from(">5I", head, 200)
        self.version = versions & 0xF
        self.folder_block = self.block << min(head[192], 8)
        self.uuid: bytes = head[248:264] if self.version == 5 and incompat & _META_UUID else self.log_uuid
        self.has_types = bool(incompat & _TYPES if self.version == 5 else features2 & _TYPES_OF_V4)
        if self.version == 5 and not is_replayed(0, 512):
            self._check_sum(self.read(0, min(max(sector, 512), 32768)), 224, "its superblock")
        sane = (
            head[:4] == b"XFSB"
            and self.version in (4, 5)
            and (self.version == 5 or versions & _FOLDERS_OF_V4)
            and 512 <= self.block == 1 << min(block_log, 16)
            and 256 <= self.inode_size <= min(self.block, 2048)
            and per_block == 1 << min(self._per_block_log, 16) == self.block // self.inode_size
            and 0 < self.group_blocks <= 1 << min(self._group_log, 31)
            and self.block <= self.folder_block <= 65536
            and 0 < blocks <= min(volume.size // self.block, groups * self.group_blocks)
        )
        if not sane:
            raise GuestError("its superblock makes no sense, or the volume is too short")
        self._blocks: int = blocks
        self.stale: set[int] = set()  # sectors of metadata that the log changes, where it is not replayed
        for flag, what in _REFUSED.items():
            if self.version == 5 and incompat & flag:
                raise GuestError(f"it {what}: not read")
        if self.version == 5 and incompat & ~_KNOWN:
            raise GuestError(f"it has features that backupfs does not know ({incompat & ~_KNOWN:#x})")
        self.log_at = self.address(log) if log else None
        self.inode = functools.lru_cache(4096)(self._inode)

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of the volume. Raises GuestError."""
        data = read(self._volume, offset, length)
        if data is None:
            raise GuestError(f"it wants {length} bytes at {offset}, behind the end of the volume")
        return data

    @staticmethod
    def _check_sum(block: bytes, at: int, what: str) -> None:
        if struct.unpack_from("<I", block, at)[0] != crc32c(block[:at] + bytes(4) + block[at + 4 :]):
            raise GuestError(f"{what} is damaged: its checksum is wrong")

    def check(self, block: bytes, at: int, owner: int, layout: Layout, *magics: bytes) -> None:
        """Check that a block of metadata, which lies at `at`, is what it should be.

        Raises:
            GuestError: it is damaged, or another one's, or older than the log.
        """
        if self.stale and not self.stale.isdisjoint(range(at // 512, (at + len(block)) // 512)):
            raise GuestError(f"inode {owner}: a block of it was changed last in the log, which is not replayed")
        if not block.startswith(magics, layout.magic):
            raise GuestError(f"inode {owner}: a block of it is damaged")
        if self.version == 5:
            if not self._is_replayed(at, len(block)):
                self._check_sum(block, layout.crc, f"inode {owner}: a block of it")
            place, told = (struct.unpack_from(">Q", block, where)[0] for where in (layout.place, layout.owner))
            if (place, told) != (at // 512, owner) or block[layout.uuid : layout.uuid + 16] != self.uuid:
                raise GuestError(f"inode {owner}: a block of it is another one's")

    def address(self, block: int) -> int:
        """Return where a block lies, by its number, in bytes. Raises GuestError."""
        group, inside = block >> self._group_log, block & ((1 << self._group_log) - 1)
        number: int = group * self.group_blocks + inside
        if inside >= self.group_blocks or number >= self._blocks:
            raise GuestError(f"there is no block {block:#x}")
        return number * int(self.block)

    def first_inode(self, group: int, inside: int) -> int:
        """Return the number of the first inode in a block of an allocation group."""
        return int(group << self._group_log | inside) << int(self._per_block_log)

    def place(self, number: int) -> int:
        """Return where an inode lies, in bytes. Raises NotFound."""
        try:
            at = self.address(number >> self._per_block_log)
        except GuestError:
            raise NotFound(f"there is no inode {number}") from None
        inside: int = (number & ((1 << self._per_block_log) - 1)) * self.inode_size
        return at + inside

    def _inode(self, number: int) -> Inode:
        """Return an inode. Raises NotFound, GuestError."""
        raw = self.read(self.place(number), self.inode_size)
        magic, mode, version, form = struct.unpack_from(">2sHBB", raw)
        if magic != b"IN" or version != (3 if self.version == 5 else 2):
            raise GuestError(f"inode {number} is damaged")
        flags2 = 0
        if version == 3:
            self._check_sum(raw, 100, f"inode {number}")
            (flags2,) = struct.unpack_from(">Q", raw, 120)
            if struct.unpack_from(">Q", raw, 152)[0] != number or raw[160:176] != self.uuid:
                raise GuestError(f"inode {number} is another one's")
        if not mode:
            raise NotFound(f"there is no inode {number}")
        uid, gid, nlink = struct.unpack_from(">III", raw, 8)
        is_big = bool(flags2 & _BIGTIME)
        size, blocks, _, extents, few, fork, attribute_form = struct.unpack_from(">QQIIHBB", raw, 56)
        if flags2 & _LARGE_COUNTS:
            (extents,), few = struct.unpack_from(">Q", raw, 24), extents
        core = _CORE_OF_V3 if version == 3 else _CORE_OF_V2
        middle = core + fork * 8
        if middle > self.inode_size:
            raise GuestError(f"inode {number} is damaged")
        return Inode(
            number=number,
            mode=mode,
            uid=uid,
            gid=gid,
            nlink=nlink,
            size=size,
            blocks=blocks,
            atime_ns=_time(raw[32:40], big=is_big),
            mtime_ns=_time(raw[40:48], big=is_big),
            ctime_ns=_time(raw[48:56], big=is_big),
            form=form,
            data=raw[core:middle] if fork else raw[core:],
            extents=extents,
            attribute_form=attribute_form,
            attributes=raw[middle:] if fork else b"",
            attribute_extents=few,
            realtime=bool(struct.unpack_from(">H", raw, 90)[0] & _REALTIME),
        )

    def mapped(self, inode: Inode, *, attributes: bool = False) -> Sequence[Mapped]:
        """Return where a fork lies, in order. Raises GuestError."""
        form, fork, count = inode.form, inode.data, inode.extents
        if attributes:
            form, fork, count = inode.attribute_form, inode.attributes, inode.attribute_extents
        if inode.realtime and not attributes:
            raise GuestError(f"inode {inode.number} lies on a realtime device, which is not read")
        if count > _MOST_EXTENTS:
            raise GuestError(f"inode {inode.number} lies in {count} pieces, which are too many")
        if form == EXTENTS:
            records = fork[: count * 16]
        elif form == BTREE:
            records = self._leaves(inode.number, fork, count)
        else:
            raise GuestError(f"inode {inode.number} is damaged: it lies nowhere")
        if len(records) != count * 16:
            raise GuestError(f"inode {inode.number} is damaged: it lies in another number of pieces than it says")
        found, end = [], 0
        for high, low in struct.iter_unpack(">QQ", records):
            block, blocks = (high & 0x1FF) << 43 | low >> 21, low & 0x1FFFFF
            piece = Mapped((high >> 9 & (1 << 54) - 1) * self.block, blocks * self.block, 0, bool(high >> 63))
            at = self.address(block)
            if piece.offset < end or not blocks or self.address(block + blocks - 1) != at + piece.length - self.block:
                raise GuestError(f"inode {inode.number} is damaged: its pieces lie over each other")
            found.append(piece._replace(at=at))
            end = piece.offset + piece.length
        return found

    def _leaves(self, owner: int, root: bytes, count: int) -> bytes:
        """Return the records of a B+tree of extents, whose root is in the inode."""
        level, entries = struct.unpack_from(">HH", root)
        pointers = 4 + (len(root) - 4) // 16 * 8
        blocks = struct.unpack_from(f">{entries}Q", root, pointers)
        header = 72 if self.version == 5 else 24
        magic = b"BMA3" if self.version == 5 else b"BMAP"
        if not 0 < level <= _DEEPEST:
            raise GuestError(f"inode {owner} is damaged: its tree is {level} levels high")
        while True:
            level -= 1
            leaves, children = [], list[int]()
            for number in blocks:
                at = self.address(number)
                block = self.read(at, self.block)
                self.check(block, at, owner, _TREE, magic)
                said, entries = struct.unpack_from(">HH", block, 4)
                room = (self.block - header) // 16
                if said != level or entries > room:
                    raise GuestError(f"inode {owner} is damaged: its tree makes no sense")
                if level:
                    children += struct.unpack_from(f">{entries}Q", block, header + room * 8)
                else:
                    leaves.append(block[header : header + entries * 16])
                if len(children) > count or len(leaves) > count:
                    raise GuestError(f"inode {owner} is damaged: its tree is too large")
            if not level:
                return b"".join(leaves)
            blocks = tuple(children)


def _time(raw: bytes, *, big: bool) -> int:
    if big:
        (ns,) = struct.unpack(">Q", raw)
        return int(ns) - _BIGTIME_EPOCH * 10**9
    seconds, ns = struct.unpack(">iI", raw)
    return int(seconds * 10**9 + min(ns, 10**9 - 1))
