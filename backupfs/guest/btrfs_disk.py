"""btrfs on the disk: superblock, chunks, trees. Every node's checksum is checked, and the other copy tried.

Source of all layouts: Linux, include/uapi/linux/btrfs_tree.h. All numbers are little-endian.
"""

import functools
import hashlib
import itertools
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

import xxhash
from crc32c import crc32c

from backupfs.errors import GuestError
from backupfs.guest.reading import read
from backupfs.image import Image

SUPER, _SUPER_SIZE = 0x10000, 4096
_KNOWN = 0xFFF | 0x10000  # of incompat; 0x80, RAID56, needs several devices
_METADATA_UUID = 0x400
_HEADER = 101
_ITEM, _POINTER = struct.Struct("<QBQII"), struct.Struct("<QBQQQ")
_CHUNK, _STRIPE = struct.Struct("<QQQQIIIHH"), struct.Struct("<QQ16x")
_DUP, _PROFILES = 1 << 5, 0xFF << 3
_DEEPEST = 8
ROOT_TREE, FS_TREE, CHECKSUM_TREE = 1, 5, 7
ROOT_ITEM, CHUNK_ITEM = 132, 228
_CHECKSUMS: tuple[tuple[int, Callable[[bytes], bytes]], ...] = (
    (4, lambda data: struct.pack("<I", crc32c(data))),
    (8, lambda data: struct.pack("<Q", xxhash.xxh64_intdigest(data))),
    (32, lambda data: hashlib.sha256(data).digest()),
    (32, lambda data: hashlib.blake2b(data, digest_size=32).digest()),
)

Key = tuple[int, int, int]


class Root(NamedTuple):
    """Where a tree begins."""

    at: int
    level: int
    generation: int


class _Node(NamedTuple):
    keys: list[Key]
    children: list[Root]  # of a leaf none
    data: list[bytes]  # of a leaf


class Disk:
    """A volume with a btrfs of its own.

    Raises:
        GuestError: it can't be read.
    """

    def __init__(self, volume: Image) -> None:
        self._volume = volume
        head = self._read(SUPER, _SUPER_SIZE)
        if head[64:72] != b"_BHRfS_M" or struct.unpack_from("<H", head, 196)[0] >= len(_CHECKSUMS):
            raise GuestError("its superblock is damaged, or has a checksum that is not known")
        self.checksum_size, self.checksum = _CHECKSUMS[struct.unpack_from("<H", head, 196)[0]]
        if self.checksum(head[32:]) != head[: self.checksum_size]:
            raise GuestError("its superblock is damaged: its checksum is wrong")
        generation, root, chunks, self.log = struct.unpack_from("<4Q", head, 72)
        (devices,) = struct.unpack_from("<Q", head, 136)
        self.sector, self.node = struct.unpack_from("<II", head, 144)
        size, chunk_generation, _, _, incompat, _, level, chunk_level = struct.unpack_from("<IQQQQHBB", head, 160)
        (self._device,) = struct.unpack_from("<Q", head, 201)
        self._uuid = head[571:587] if incompat & _METADATA_UUID else head[32:48]
        if devices != 1:
            raise GuestError(f"it lies on {devices} devices, of which this is one: not read")
        if incompat & ~_KNOWN:
            raise GuestError(f"it has features that backupfs does not know ({incompat & ~_KNOWN:#x})")
        if self.sector not in (4096, 8192, 16384, 65536) or self.node not in (4096, 8192, 16384, 32768, 65536):
            raise GuestError("its superblock makes no sense")
        self._begins: list[int] = []
        self._chunks: list[tuple[int, tuple[int, ...]]] = []  # length, places of the copies
        self._node = functools.lru_cache(1024)(self._read_node)
        for begin, chunk in _system_chunks(head[811 : 811 + min(size, 2048)]):
            self._add_chunk(begin, chunk)
        chunk_root = Root(chunks, chunk_level, chunk_generation)
        for (_, kind, begin), chunk in self.walk(chunk_root, (256, CHUNK_ITEM, 0)):
            if kind == CHUNK_ITEM:
                self._add_chunk(begin, chunk)
        self._roots = {ROOT_TREE: Root(root, level, generation)}

    def _read(self, offset: int, length: int) -> bytes:
        data = read(self._volume, offset, length)
        if data is None:
            raise GuestError(f"it wants {length} bytes at {offset}, behind the end of the volume")
        return data

    # Chunks: where logical addresses lie.

    def _add_chunk(self, begin: int, chunk: bytes) -> None:
        length, _, _, kind, _, _, _, stripes, _ = _CHUNK.unpack_from(chunk)
        places = [_STRIPE.unpack_from(chunk, _CHUNK.size + 32 * i) for i in range(stripes)]
        if kind & _PROFILES & ~_DUP or any(device != self._device for device, _ in places) or not places:
            raise GuestError("a part of it is in a RAID of several devices: not read")
        if not kind & _DUP and len(places) != 1:
            raise GuestError("a chunk of it is damaged")
        i = bisect_left(self._begins, begin)
        if i < len(self._begins) and self._begins[i] == begin:
            return
        before = self._begins[i - 1] + self._chunks[i - 1][0] if i else 0
        if before > begin or (i < len(self._begins) and begin + length > self._begins[i]):
            raise GuestError("its chunks lie over each other")
        self._begins.insert(i, begin)
        self._chunks.insert(i, (length, tuple(place for _, place in places)))

    def places(self, logical: int, length: int) -> list[int]:
        """Return where a range lies on the volume, all copies. Raises GuestError."""
        i = bisect_right(self._begins, logical) - 1
        if i < 0 or logical + length > self._begins[i] + self._chunks[i][0]:
            raise GuestError(f"there is nothing at {logical:#x}")
        return [place + logical - self._begins[i] for place in self._chunks[i][1]]

    def read_logical(self, logical: int, length: int, is_right: Callable[[bytes], bool], what: str) -> bytes:
        """Return a range from the first copy that is right. Raises GuestError."""
        problem: GuestError | None = None
        for place in self.places(logical, length):
            try:
                data = self._read(place, length)
            except GuestError as e:
                problem = e
                continue
            if is_right(data):
                return data
        raise problem or GuestError(f"{what} is damaged: its checksum is wrong")

    # Trees.

    def _read_node(self, root: Root) -> _Node:
        def is_right(data: bytes) -> bool:
            return bool(self.checksum(data[32:]) == data[: self.checksum_size])

        data = self.read_logical(root.at, self.node, is_right, f"the node at {root.at:#x}")
        (place,) = struct.unpack_from("<Q", data, 48)
        (generation,) = struct.unpack_from("<Q", data, 80)
        count, level = struct.unpack_from("<IB", data, 96)
        if (place, generation, level, data[32:48]) != (root.at, root.generation, root.level, self._uuid):
            raise GuestError(f"the node at {root.at:#x} is another one")
        entry = _POINTER if level else _ITEM
        if _HEADER + count * entry.size > len(data):
            raise GuestError(f"the node at {root.at:#x} is damaged")
        rows = list(entry.iter_unpack(data[_HEADER : _HEADER + count * entry.size]))
        keys = [row[:3] for row in rows]
        if any(a >= b for a, b in itertools.pairwise(keys)):
            raise GuestError(f"the node at {root.at:#x} is damaged: its keys are in disorder")
        if level:
            return _Node(keys, [Root(at, level - 1, born) for _, _, _, at, born in rows], [])
        items = [data[_HEADER + at : _HEADER + at + size] for _, _, _, at, size in rows]
        if any(len(item) != row[4] for item, row in zip(items, rows, strict=True)):
            raise GuestError(f"the node at {root.at:#x} is damaged")
        return _Node(keys, [], items)

    def walk(self, root: Root, first: Key) -> Iterator[tuple[Key, bytes]]:
        """Yield the items of a tree in order, from a key on. Raises GuestError."""
        if root.level >= _DEEPEST:
            raise GuestError(f"the tree at {root.at:#x} is damaged")
        path: list[tuple[_Node, int]] = []
        node = self._node(root)
        last: Key | None = None
        while True:
            while node.children:
                i = max(bisect_right(node.keys, first) - 1, 0)
                path.append((node, i))
                node = self._node(node.children[i])
            for i in range(bisect_left(node.keys, first), len(node.keys)):
                if last is not None and node.keys[i] <= last:
                    raise GuestError(f"the tree at {root.at:#x} is damaged: its keys are in disorder")
                last = node.keys[i]
                yield last, node.data[i]
            while path and path[-1][1] + 1 >= len(path[-1][0].children):
                path.pop()
            if not path:
                return
            above, i = path.pop()
            path.append((above, i + 1))
            first = max(first, above.keys[i + 1])
            node = self._node(above.children[i + 1])

    def before(self, root: Root, key: Key) -> Key | None:
        """Return the last key of a tree that is not behind `key`. Raises GuestError."""
        node = self._node(root)
        while node.children:
            node = self._node(node.children[max(bisect_right(node.keys, key) - 1, 0)])
        i = bisect_right(node.keys, key) - 1
        return node.keys[i] if i >= 0 else None

    def items(self, tree: int, objectid: int, kind: int, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield the items of an object of one kind: the offset of each key, and the item. Raises GuestError."""
        for (number, found, offset), data in self.walk(self.root(tree), (objectid, kind, first)):
            if (number, found) != (objectid, kind):
                return
            yield offset, data

    def root(self, tree: int) -> Root:
        """Return where a tree begins. Raises GuestError."""
        known = self._roots.get(tree)
        if known is None:
            for _, item in self.items(ROOT_TREE, tree, ROOT_ITEM):
                (generation,) = struct.unpack_from("<Q", item, 160)
                known = Root(struct.unpack_from("<Q", item, 176)[0], item[238], generation)
            if known is None:
                raise GuestError(f"there is no tree {tree}")
            self._roots[tree] = known
        return known


def _system_chunks(array: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 17 + _CHUNK.size <= len(array):
        (begin,) = struct.unpack_from("<Q", array, position + 9)
        stripes = _CHUNK.unpack_from(array, position + 17)[7]
        end = position + 17 + _CHUNK.size + 32 * stripes
        yield begin, array[position + 17 : end]
        position = end
