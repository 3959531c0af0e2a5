"""An XFS as it is once its log was replayed: in memory, the disk stays as it is.

What a running guest writes to its file system's metadata is in the log first. An inode that the log changes may be
another file's by now, and its old blocks too: without the log, what is read through it would be somebody else's bytes.
So it is replayed, as the kernel does it when it mounts. An inode that the log does not change is right, blocks and all,
since blocks change hands only with the inodes of both.

What was begun as several transactions and not ended, such as taking over the blocks of a copy, is ended by the kernel
afterwards. That is not done here: those inodes are refused. What else it ends then (free space, unlinked inodes, who
uses a block) is not seen here.

Source: fs/xfs/xfs_buf_item_recover.c, xfs_inode_item_recover.c, xfs_icreate_item.c.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from crc32c import crc32c

from backupfs.errors import GuestError
from backupfs.guest.xfs_disk import Disk
from backupfs.guest.xfs_log import Log, Region, Transaction
from backupfs.guest.xfs_overlay import MOST_SECTORS, Replayed, TooMuchError
from backupfs.guest.xfs_records import SECTOR, UnreadableLogError
from backupfs.image import Image

_INODE, _BUFFER, _NEW_INODES = 0x123B, 0x123C, 0x123F
# Free space, quotas, who else uses a block, the list of unlinked inodes: nothing that is read here.
_OTHERS = frozenset((*range(0x1236, 0x1239), 0x123D, 0x123E, *range(0x1240, 0x1244), *range(0x124A, 0x1250)))
_BEGUN = {0x1244: "mapping", 0x1246: "attributes", 0x1248: "exchange"}  # BUI, ATTRI, XMI
_ENDED = frozenset((0x1245, 0x1247, 0x1249))  # BUD, ATTRD, XMD
_OF_INODES, _CANCEL = 0x1, 0x2  # of a buffer: only the list of unlinked inodes is changed; it was freed
_CHUNK, _MOST_WORDS = 128, 17  # bytes of a buffer that a bit of its map is for; words of that
_CORE = 176
_FORKS = ((0x02 | 0x04, 0x08), (0x40 | 0x80, 0x100))  # fields of an inode item, for each fork: as it is, a tree's root
_DEVICE, _OWNER_CHANGE = 0x10, 0x200 | 0x400
_BIGTIME, _LARGE_COUNTS = 0x8, 0x10  # di_flags2

# Where there is the number of the transaction that changed a block last, and the UUID; by the magic at its beginning.
_SHORT, _LONG, _FOLDER, _NODE = (24, 32), (32, 40), (16, 24), (24, 32)
_NUMBERS = {
    **dict.fromkeys((b"AB3B", b"AB3C", b"IAB3", b"FIB3", b"RMB3", b"R3FC"), _SHORT),
    b"BMA3": _LONG,
    b"XAGF": (208, 64),
    b"XAFL": (24, 8),
    b"XAGI": (320, 296),
    b"XSLM": (48, 16),
    **dict.fromkeys((b"XDB3", b"XDD3", b"XDF3"), _FOLDER),
}
_NODE_MAGICS = (b"\x3d\xf1", b"\x3d\xff", b"\x3b\xee", b"\x3e\xbe")  # at 8
_OF_SUPERBLOCK = 240


@dataclass(slots=True)
class Pending:
    """What of the log was not replayed: inodes, and sectors of metadata; `all`: it can't be known."""

    inodes: set[int] = field(default_factory=set)
    sectors: set[int] = field(default_factory=set)
    all: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing."""
        return not (self.inodes or self.sectors or self.all)


def replayed(volume: Image) -> tuple[Disk, Replayed | None, Pending]:
    """Return an XFS with its log replayed, what differs by it (None: nothing does), and what was not replayed.

    Of version 4 nothing is replayed: it has no numbers by which to tell what is newer on the disk than in the log.

    Raises:
        GuestError: it can't be read.
    """
    disk = Disk(volume)
    try:
        log = Log(disk)
        if log.is_clean:
            return disk, None, Pending()
        if disk.version != 5:
            return disk, None, _changes(log)
        image = Replayed(volume)
        try:
            pending = _Replay(disk, log, image).run()
        except TooMuchError:
            return disk, None, _changes(log)
        return Disk(image, image.differs), image, pending
    except (UnreadableLogError, struct.error, IndexError):
        return disk, None, Pending(all=True)


def _changes(log: Log) -> Pending:
    """Return what is in the log."""
    found = Pending()
    for transaction in log.transactions():
        for item in transaction.items:
            kind, flags, length = struct.unpack_from("<H2xHH", item[0])
            if kind == _INODE:
                found.inodes.add(_inode_format(item[0])[1])
            elif kind == _BUFFER:
                (first,) = struct.unpack_from("<q", item[0], 8)
                if not flags & _OF_INODES:
                    found.sectors.update(range(first, first + length))
            elif kind in _BEGUN:
                found.inodes.update(_owners(kind, item[0]))
            elif kind not in _ENDED and kind != _NEW_INODES and kind not in _OTHERS:
                raise UnreadableLogError
            if len(found.sectors) > MOST_SECTORS:
                raise UnreadableLogError
    return found


class _Replay:
    """Replays a log. Raises UnreadableLogError, GuestError, struct.error, IndexError."""

    def __init__(self, disk: Disk, log: Log, image: Replayed) -> None:
        self._disk = disk
        self._log = log
        self._image = image
        self._cancelled: Counter[tuple[int, int]] = Counter()  # buffers that the log frees: sector, sectors
        self._cancelled_at: Counter[int] = Counter()  # the same, by sectors alone
        self._begun: dict[int, tuple[int, ...]] = {}  # by its number: the inodes
        self._refused: set[int] = set()

    def run(self) -> Pending:
        """Replay all; return what was not."""
        for transaction in self._log.transactions():
            for item in transaction.items:
                kind, flags, length = struct.unpack_from("<H2xHH", item[0])
                if kind == _BUFFER and flags & _CANCEL:
                    (first,) = struct.unpack_from("<q", item[0], 8)
                    self._cancelled[first, length] += 1
                    self._cancelled_at[first] += 1
        for transaction in self._log.transactions():
            for item in _in_order(transaction):
                self._replay(transaction.lsn, item)
        return Pending(self._refused.union(*self._begun.values()))

    def _replay(self, lsn: int, item: Sequence[Region]) -> None:
        (kind,) = struct.unpack_from("<H", item[0])
        if kind == _BUFFER:
            self._buffer(lsn, item)
        elif kind == _INODE:
            self._inode(lsn, item)
        elif kind == _NEW_INODES:
            self._new_inodes(item[0])
        elif kind in _BEGUN:
            self._begun[struct.unpack_from("<Q", item[0], 8)[0]] = _owners(kind, item[0])
        elif kind in _ENDED:
            self._begun.pop(struct.unpack_from("<Q", item[0], 8)[0], None)
        elif kind not in _OTHERS:
            raise UnreadableLogError

    def _buffer(self, lsn: int, item: Sequence[Region]) -> None:
        """Source: xlog_recover_buf_commit_pass2, xlog_recover_do_reg_buffer."""
        flags, length, first, words = struct.unpack_from("<HHqI", item[0], 4)
        if flags & _CANCEL:
            self._cancelled[first, length] -= 1
            self._cancelled_at[first] -= 1
            return
        if self._cancelled[first, length] > 0 or flags & _OF_INODES:
            return
        if words > _MOST_WORDS:
            raise UnreadableLogError
        at, size = first * SECTOR, length * SECTOR
        if self._is_newer(self._image.get(at, min(size, SECTOR)), lsn):
            return
        bits = int.from_bytes(item[0][20 : 20 + 4 * words], "little")
        bit = 0
        for region in item[1:]:
            while not bits >> bit & 1:
                bit += 1
                if bit * _CHUNK >= size:
                    raise UnreadableLogError
            chunks = len(region) // _CHUNK
            if (
                len(region) % _CHUNK
                or (bit + chunks) * _CHUNK > size
                or bits >> bit & (1 << chunks) - 1 != (1 << chunks) - 1
            ):
                raise UnreadableLogError
            self._image.put(at + bit * _CHUNK, region)
            bit += chunks

    def _is_newer(self, head: bytes, lsn: int) -> bool:
        """Whether a block was written after a transaction, or by it. Source: xlog_recover_get_buf_lsn."""
        if head[:4] == b"XFSB":
            return bool(struct.unpack_from(">Q", head, _OF_SUPERBLOCK)[0] >= lsn)
        place = _NUMBERS.get(head[:4]) or (_NODE if head[8:10] in _NODE_MAGICS else None)
        if place is None or head[place[1] : place[1] + 16] != self._disk.uuid:
            return False
        (found,) = struct.unpack_from(">Q", head, place[0])
        return found not in (0, 2**64 - 1) and found >= lsn

    def _inode(self, lsn: int, item: Sequence[Region]) -> None:
        """Source: xlog_recover_inode_commit_pass2, xfs_log_dinode_to_disk."""
        fields, number, rdev, first, length, offset = _inode_format(item[0])
        if fields & _OWNER_CHANGE:
            self._refused.add(number)
        if self._cancelled[first, length] > 0:
            return
        at = first * SECTOR + offset
        raw = bytearray(self._image.get(at, self._disk.inode_size))
        (newer,) = struct.unpack_from(">Q", raw, 112)
        if raw[:2] != b"IN" or raw[4] != 3:
            raise UnreadableLogError
        if newer not in (0, 2**64 - 1) and newer > lsn:
            return
        raw[:_CORE] = _core(item[1], raw[96:100], lsn)
        if struct.unpack_from(">Q", raw, 152)[0] != number or raw[160:176] != self._disk.uuid:
            raise UnreadableLogError
        if fields & _DEVICE:
            struct.pack_into(">I", raw, _CORE, rdev)
        middle = _CORE + raw[82] * 8 if raw[82] else len(raw)
        regions = list(item[2:])  # without any, what is said of the forks counts for nothing
        for (plain, root), begin, end in zip(_FORKS, (_CORE, middle), (middle, len(raw)), strict=True):
            if len(item) > 2 and fields & (plain | root):
                content = regions.pop(0)
                if fields & root:
                    content = _root(content, end - begin)
                if begin + len(content) > end or end > len(raw):
                    raise UnreadableLogError
                raw[begin : begin + len(content)] = content
        struct.pack_into("<I", raw, 100, crc32c(bytes(raw[:100]) + bytes(4) + bytes(raw[104:])))
        self._image.put(at, bytes(raw))

    def _new_inodes(self, item: Region) -> None:
        """Source: xlog_recover_icreate_commit_pass2, xfs_ialloc_inode_init."""
        group, block, count, size, length, generation = struct.unpack_from(">6I", item, 4)
        disk = self._disk
        first, begin = disk.first_inode(group, block), (group * disk.group_blocks + block) * disk.block
        most = max(64, disk.block // size if size else 0)
        if size != disk.inode_size or count * size != length * disk.block or not 0 < count <= most:
            raise UnreadableLogError
        if any(self._cancelled_at[at] > 0 for at in range(begin // SECTOR, (begin + count * size) // SECTOR)):
            return
        everything = bytearray(count * size)
        for i in range(count):
            raw = memoryview(everything)[i * size : (i + 1) * size]
            struct.pack_into(">2sHB", raw, 0, b"IN", 0, 3)
            struct.pack_into(">II", raw, 92, generation, 0xFFFFFFFF)
            struct.pack_into(">Q16s", raw, 152, first + i, disk.uuid)
            struct.pack_into("<I", raw, 100, crc32c(bytes(raw)))
        self._image.put(begin, bytes(everything))


def _in_order(transaction: Transaction) -> Iterator[Sequence[Region]]:
    """Yield what a transaction changes in the order of replay. Source: xlog_recover_reorder_trans."""

    def place(item: Sequence[Region]) -> int:
        kind, flags = struct.unpack_from("<H2xH", item[0])
        if kind == _BUFFER:
            return 3 if flags & _CANCEL else 2 if flags & _OF_INODES else 0
        return 0 if kind == _NEW_INODES else 1

    return iter(sorted(transaction.items, key=place))


def _inode_format(item: Region) -> tuple[int, int, int, int, int, int]:
    """Return fields, inode, device, sector and sectors of its buffer, offset in it. 32-bit systems leave no gaps."""
    if len(item) == struct.calcsize("<HHIHHQ16sqii"):
        _, _, fields, _, _, number, rdev, first, length, offset = struct.unpack("<HHIHHQI12xqii", item)
    else:
        _, _, fields, _, _, number, rdev, first, length, offset = struct.unpack("<HHIHH4xQI12xqii", item)
    return fields, number, rdev, first, length, offset


def _owners(kind: int, item: Region) -> tuple[int, ...]:
    """Return whose contents something that was begun changes. Source: xfs_log_format.h."""
    if _BEGUN[kind] == "mapping":
        (count,) = struct.unpack_from("<I", item, 4)
        if len(item) < 16 + 32 * count:
            raise UnreadableLogError
        return tuple(struct.unpack_from("<Q", item, 16 + 32 * i)[0] for i in range(count))
    return struct.unpack_from("<Q" if _BEGUN[kind] == "attributes" else "<QQ", item, 16)


def _core(logged: Region, unlinked: Region, lsn: int) -> bytes:
    """Return what an inode begins with, as it is on the disk. Source: xfs_log_dinode_to_disk."""
    if len(logged) < _CORE or logged[:2] != b"NI":
        raise UnreadableLogError
    magic, mode, version, form, more, uid, gid, nlink, project, project_high = struct.unpack_from("<HHBBHIIIHH", logged)
    size, blocks, hint, fork, attribute_form, events, state, flags, generation = struct.unpack_from(
        "<QQI6xBBIHHI", logged, 56
    )
    changes, _, flags2, cow_hint, number, uuid = struct.unpack_from("<QQQI20xQ16s", logged, 104)
    is_big = bool(flags2 & _BIGTIME)
    accessed, modified, changed, made = (_moment(logged[at : at + 8], is_big=is_big) for at in (32, 40, 48, 144))
    if flags2 & _LARGE_COUNTS:
        counts, few = logged[24:32][::-1], logged[76:80][::-1] + bytes(2)
    else:
        counts, few = bytes(8), logged[76:80][::-1] + logged[80:82][::-1]
    return b"".join(
        (
            struct.pack(">HHBBHIIIHH", magic, mode, version, form, more, uid, gid, nlink, project, project_high),
            counts,
            accessed,
            modified,
            changed,
            struct.pack(">QQI", size, blocks, hint),
            few,
            struct.pack(">BBIHHI", fork, attribute_form, events, state, flags, generation),
            bytes(unlinked),
            bytes(4),  # the checksum
            struct.pack(">QQQI12x", changes, lsn, flags2, cow_hint),
            made,
            struct.pack(">Q", number),
            uuid,
        )
    )


def _moment(logged: Region, *, is_big: bool) -> Region:
    return logged[::-1] if is_big else logged[:4][::-1] + logged[4:][::-1]


def _root(block: Region, room: int) -> bytes:
    """Return the root of a tree of extents as an inode has it. Source: xfs_bmbt_to_bmdr."""
    header = 72
    (entries,) = struct.unpack_from(">H", block, 6)
    most, fits = (len(block) - header) // 16, (room - 4) // 16
    if not 0 < entries <= min(most, fits):
        raise UnreadableLogError
    keys, pointers = header, header + most * 8
    return b"".join(
        (
            block[4:8],
            block[keys : keys + entries * 8],
            bytes((fits - entries) * 8),
            block[pointers : pointers + entries * 8],
        )
    )


def refuse(what: str) -> GuestError:
    """Return the error for what was not replayed."""
    return GuestError(
        f"{what} was changed last in the log of the XFS, of which that is not replayed; the kernel does it when "
        "DISK.rw is mounted (backupfs mount --scratch)"
    )
