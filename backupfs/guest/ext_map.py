"""Where the content of an ext inode lies: a tree of extents, or blocks of pointers.

Source: Linux, fs/ext4/ext4_extents.h, extents.c (ext4_valid_extent_entries, ext4_extent_block_csum), indirect.c.
"""

import functools
import struct
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from backupfs.errors import GuestError
from backupfs.guest.crc32c import crc32c
from backupfs.guest.ext_inode import EXTENTS_FLAG, Inode, Inodes

_MAGIC, _DEEPEST = 0xF30A, 5
_HEAD, _SIZE = 12, 12  # bytes: of a node's head, and of each extent
_LONGEST = 0x8000  # blocks of an extent; what was never written says more
_DIRECT = 12  # pointers in the inode itself


class Segment(NamedTuple):
    """Blocks of a file that lie side by side.

    Args:
        first: of them in the file.
        blocks: how many.
        at: where they lie, counted in blocks.
        written: False: they read as zeroes.
    """

    first: int
    blocks: int
    at: int
    written: bool


class Map:
    """Finds it, block by block."""

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes
        self._pointers_at = functools.lru_cache(64)(self._read_pointers)
        self._node_at = functools.lru_cache(64)(self._read_node)

    def segments(self, inode: Inode, first: int, end: int) -> Iterator[Segment]:
        """Yield what is stored of a range of blocks, in order.

        Raises:
            GuestError: the inode is damaged, or a part of what is to be read can't be.
        """
        found = (
            self._extents(inode, inode.block, None, 0, (first, end))
            if inode.flags & EXTENTS_FLAG
            else self._mapped(inode, first, end)
        )
        last: Segment | None = None
        for one in found:
            begin, stop = max(one.first, first), min(one.first + one.blocks, end)
            if begin >= stop:
                continue
            cut = Segment(begin, stop - begin, one.at + begin - one.first, one.written)
            if last is None:
                last = cut
            elif last.written == cut.written and (last.first + last.blocks, last.at + last.blocks) == (begin, cut.at):
                last = Segment(last.first, last.blocks + cut.blocks, last.at, last.written)
            else:
                yield last
                last = cut
        if last is not None:
            yield last

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Return a range of bytes, whatever the file's size is. Raises GuestError."""
        block, content = self._inodes.block, bytearray(length)
        for part in self.segments(inode, offset // block, -(-(offset + length) // block)):
            if part.written:
                begin = max(part.first * block, offset)
                stop = min((part.first + part.blocks) * block, offset + length)
                at = part.at * block + begin - part.first * block
                content[begin - offset : stop - offset] = self._inodes.read(at, stop - begin)
        return bytes(content)

    # Extents.

    def _extents(
        self, inode: Inode, node: bytes, depth: int | None, key: int, wanted: tuple[int, int]
    ) -> Iterator[Segment]:
        """Yield what a node holds, of a range at least.

        Args:
            depth: of the node; None: it is the one in the inode.
            key: the first block that is in it.
        """
        magic, count, most, level = struct.unpack_from("<4H", node)
        if magic != _MAGIC or count > most or _HEAD + most * _SIZE > len(node) or level > _DEEPEST:
            self._damaged(inode)
        if depth is not None and (level != depth or not count or struct.unpack_from("<I", node, _HEAD)[0] != key):
            self._damaged(inode)
        if level == 0:
            yield from self._leaf(inode, node, count, key)
            return
        keys = [struct.unpack_from("<I", node, _HEAD + i * _SIZE)[0] for i in range(count)]
        if keys != sorted(set(keys)):
            self._damaged(inode)
        for i, (begin, stop) in enumerate(zip(keys, [*keys[1:], 1 << 32], strict=True)):
            if begin < wanted[1] and wanted[0] < stop:
                low, high = struct.unpack_from("<IH", node, _HEAD + i * _SIZE + 4)
                inner = self._node_at(self._placed(inode, low | high << 32, 1), inode)
                for found in self._extents(inode, inner, level - 1, begin, wanted):
                    if found.first + found.blocks > stop:
                        self._damaged(inode)
                    yield found

    def _leaf(self, inode: Inode, node: bytes, count: int, key: int) -> Iterator[Segment]:
        behind = key
        for i in range(count):
            at, length, high, low = struct.unpack_from("<IHHI", node, _HEAD + i * _SIZE)
            written = length <= _LONGEST
            blocks = length if written else length - _LONGEST
            if at < behind or not blocks or at + blocks > 1 << 32:
                self._damaged(inode)
            behind = at + blocks
            yield Segment(at, blocks, self._placed(inode, low | high << 32, blocks), written)

    def _read_node(self, at: int, inode: Inode) -> bytes:
        node = self._inodes.read(at * self._inodes.block, self._inodes.block)
        end = _HEAD + struct.unpack_from("<H", node, 4)[0] * _SIZE
        seed = self._inodes.seed(inode)
        if seed is not None and (
            end + 4 > len(node) or crc32c(node[:end], seed) != struct.unpack_from("<I", node, end)[0]
        ):
            raise GuestError(f"inode {inode.number} is damaged: the checksum of a block of its extents is wrong")
        return node

    # Pointers.

    def _mapped(self, inode: Inode, first: int, end: int) -> Iterator[Segment]:
        pointers, per_block = struct.unpack("<15I", inode.block), self._inodes.block // 4
        for i, pointer in enumerate(pointers[:_DIRECT]):
            if pointer and first <= i < end:
                yield Segment(i, 1, self._placed(inode, pointer, 1), True)
        begin = _DIRECT
        for level, pointer in enumerate(pointers[_DIRECT:], 1):
            yield from self._pointed(inode, pointer, level, begin, (first, end))
            begin += per_block**level

    def _pointed(
        self, inode: Inode, pointer: int, level: int, begin: int, wanted: tuple[int, int]
    ) -> Iterator[Segment]:
        """Yield what a block of pointers holds of a range, which begins at a block of the file."""
        inner = (self._inodes.block // 4) ** (level - 1)
        first, end = wanted
        if not pointer or begin >= end or begin + inner * (self._inodes.block // 4) <= first:
            return
        found = self._pointers_at(self._placed(inode, pointer, 1))
        i, stop = max(0, (first - begin) // inner), min(len(found), -(-(end - begin) // inner))
        while i < stop:
            if level > 1:
                yield from self._pointed(inode, found[i], level - 1, begin + i * inner, wanted)
                i += 1
                continue
            # Blocks that lie side by side at once: a large file has millions.
            count, at = 1, found[i]
            while i + count < stop and found[i + count] == (at + count if at else 0):
                count += 1
            if at:
                yield Segment(begin + i, count, self._placed(inode, at, count), True)
            i += count

    def _read_pointers(self, at: int) -> tuple[int, ...]:
        block = self._inodes.block
        return struct.unpack(f"<{block // 4}I", self._inodes.read(at * block, block))

    def _placed(self, inode: Inode, at: int, count: int) -> int:
        if at <= self._inodes.first_data or at + count > self._inodes.blocks:
            self._damaged(inode)
        return at

    @staticmethod
    def _damaged(inode: Inode) -> NoReturn:
        raise GuestError(f"inode {inode.number} is damaged: its list of blocks makes no sense")
