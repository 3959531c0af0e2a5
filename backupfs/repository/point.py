"""PointImage: one disk at one point, put together on the fly from the layers of its chain. From any thread.

A read costs, per chunk: one look-up of the chunk's position (chunkmap.py), and, when the decoded chunk is not in the
cache, one pread, the decoding and the xxh3 check. No step depends on the length of the chain.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from backupfs.errors import Corrupt
from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, check_range
from backupfs.repository import codec, names
from backupfs.repository.cache import LruCache
from backupfs.repository.chunkmap import POSITION, UNPACK, ChunkMap, RegionCache
from backupfs.repository.format import (
    CODEC_SHIFT,
    LENGTH_MASK,
    REGION_CHUNKS,
    LayerId,
    format_digest,
    round_up,
)
from backupfs.repository.index import Index
from backupfs.repository.layer import Layer
from backupfs.repository.locks import Pin
from backupfs.repository.manifest import DiskEntry
from backupfs.units import MiB

log = logging.getLogger(__name__)

_REGION_CACHE = 16 * MiB
_CHUNK_CACHE = 24 * MiB
_OPEN_LAYERS = 4096


def disk_folder(root: str, vm: str, disk: str) -> str:
    """Return the folder of a disk's chains."""
    return os.path.join(root, "vms", names.escape(vm), "disks", names.escape(disk))


def layer_path(root: str, vm: str, disk: str, chain: str, seq: int) -> str:
    """Return a layer's path: SEQ.layer in the folder of its chain."""
    return os.path.join(disk_folder(root, vm, disk), chain, names.layer_name(seq))


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain's address: its folder and its number in the index."""

    root: str
    vm: str
    disk: str
    name: str
    no: int


class LayerStore:
    """Opens layers, keeps them open, and keeps what was decoded from them; all images of a repository share it."""

    def __init__(self, index: Index, repository_id: bytes, chunk_size: int) -> None:
        self.index = index
        self.chunk_size = chunk_size
        self.regions: RegionCache = LruCache(_REGION_CACHE)
        self.chunks: LruCache[tuple[int, int, int], bytes] = LruCache(_CHUNK_CACHE)
        self._repository_id = repository_id
        # A quarter of the descriptors that the process may have; the mount raises its limit first.
        self._layers: LruCache[tuple[int, int], Layer] = LruCache(min(_OPEN_LAYERS, os.sysconf("SC_OPEN_MAX") // 4))

    def layer(self, chain: Chain, seq: int) -> Layer:
        """Return an open layer that is the one in the index.

        Raises:
            NotFound: the file is missing.
            Corrupt: it is damaged, or another layer than the one that was indexed.
        """
        held = self._layers.get((chain.no, seq))
        if held is None:
            path = layer_path(chain.root, chain.vm, chain.disk, chain.name, seq)
            held = Layer(path)
            check_address(held, self._repository_id, chain, seq, self.index.layer_id(chain.no, seq))
            self._layers.put((chain.no, seq), held, 1)
        return held

    def close(self) -> None:
        """Drop everything; layers that a thread still reads from close after it."""
        self._layers.clear()
        self.regions.clear()
        self.chunks.clear()


def check_address(layer: Layer, repository_id: bytes, chain: Chain, seq: int, layer_id: LayerId | None) -> None:
    """Raise Corrupt unless the layer's header says that it belongs where it lies."""
    header = layer.header
    found = (header.repository_id, header.vm, header.disk, header.chain, header.seq)
    if found != (repository_id, chain.vm, chain.disk, chain.name, seq) or (layer_id and header.layer_id != layer_id):
        raise Corrupt(layer.path, 0, "this is another layer than the one that belongs here; run backupfs reindex")


class PointImage:
    """An Image of one disk at one point. Until it is closed gc keeps what it sees."""

    def __init__(self, store: LayerStore, chain: Chain, entry: DiskEntry, pin: Pin) -> None:
        self.size = entry.size
        self._store = store
        self._chain = chain
        self._entry = entry
        self._pin: Pin | None = pin
        self._chunk_size = store.chunk_size
        base = store.layer(chain, 0)
        self.map = ChunkMap(store.index, chain.no, entry.seq, base, store.regions)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""
        return self._chunk_size

    def layer(self, seq: int) -> Layer:
        """Return an open layer of the image's chain. Raises NotFound, Corrupt."""
        return self._store.layer(self._chain, seq)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        chunk_size = self._chunk_size
        position, end = 0, len(view)
        while position < end:
            chunk_no, within = divmod(offset + position, chunk_size)
            length = min(chunk_size - within, end - position)
            chunk = self._chunk(chunk_no)
            if chunk is None:
                view[position : position + length] = bytes(length)
            elif length == chunk_size:
                view[position : position + length] = chunk
            else:
                view[position : position + length] = memoryview(chunk)[within : within + length]
            position += length

    def _chunk(self, chunk_no: int) -> bytes | None:
        """Return the decoded chunk, None when it is zero."""
        region, i = divmod(chunk_no, REGION_CHUNKS)
        offset, xxh3, _, _, seq, packed = UNPACK.unpack_from(self.map.region(region), i * UNPACK.size)
        if not packed:
            return None
        key = (self._chain.no, seq, offset)
        held = self._store.chunks.get(key)
        if held is None:
            layer = self._store.layer(self._chain, seq)
            held = read_chunk(layer, offset, packed, xxh3, self._chunk_size)
            self._store.chunks.put(key, held, len(held))
        return held

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        return coalesce(clip((e for e, _ in self.placed_extents(offset, length)), offset, length))

    def placed_extents(self, offset: int, length: int) -> Iterator[tuple[Extent, int]]:
        """Cover the range, widened to whole regions and clipped to the disk, with (extent, seq of its layer).

        A zero extent's seq is -1.
        """
        span = REGION_CHUNKS * self._chunk_size
        position, last = offset // span * span, min(round_up(offset + length, span), self.size)
        for region in self.map.occupied(offset // span, -(-(offset + length) // span)):
            if region * span > position:
                yield Extent(position, region * span - position, True), -1
            positions = np.frombuffer(self.map.region(region), POSITION)
            seqs = np.where(positions["packed"] == 0, -1, positions["seq"].astype(np.int64))
            borders = np.flatnonzero(seqs[1:] != seqs[:-1]) + 1
            firsts = [0, *borders.tolist()]
            for first, end in zip(firsts, [*firsts[1:], REGION_CHUNKS], strict=True):
                start = region * span + first * self._chunk_size
                stop = min(region * span + end * self._chunk_size, self.size)
                if start < stop:
                    yield Extent(start, stop - start, bool(seqs[first] < 0)), int(seqs[first])
            position = (region + 1) * span
        if position < last:
            yield Extent(position, last - position, True), -1

    def check_map(self) -> None:
        """Work the digest of the whole chunk map out and compare it with the manifest's. Slow: a second a few millions.

        Raises:
            Corrupt: they differ: the index, or the base's table, does not say what was published.
        """
        regions = -(-self.size // (REGION_CHUNKS * self._chunk_size))
        lane0, lane1, chunks = self.map.digest(regions)
        expected = (self._entry.digest, self._entry.allocated_bytes)
        if (format_digest(lane0, lane1), chunks * self._chunk_size) != expected:
            raise Corrupt(
                self._store.index.folder,
                0,
                f"the chunk map of {self._chain.vm}/{self._chain.disk}, chain {self._chain.name}, layer "
                f"{self._entry.seq} is not the one that was published; run backupfs reindex",
            )

    def close(self) -> None:
        self._pin = None


def read_chunk(layer: Layer, offset: int, packed: int, xxh3: int, chunk_size: int) -> bytes:
    """Return one decoded and checked chunk.

    Args:
        layer: where it is stored.
        offset: of its payload in the layer.
        packed: payload length and codec, as in a record.
        xxh3: of the decoded chunk.
        chunk_size: bytes of the decoded chunk.

    Raises:
        Corrupt: the bytes are not those that were written.
    """
    length, codec_id = packed & LENGTH_MASK, packed >> CODEC_SHIFT
    if length > chunk_size or (codec_id == codec.NONE and length != chunk_size):
        raise Corrupt(layer.path, offset, f"a chunk of {length} stored bytes can't be")
    chunk = layer.pread(offset, length)
    if codec_id == codec.ZSTD:
        try:
            chunk = codec.decompress(chunk, chunk_size)
        except ValueError as e:
            raise Corrupt(layer.path, offset, f"the chunk can't be decompressed: {e}") from e
    elif codec_id != codec.NONE:
        raise Corrupt(layer.path, offset, f"unknown codec {codec_id}")
    if xxhash.xxh3_64_intdigest(chunk) != xxh3:
        raise Corrupt(layer.path, offset, "the chunk's checksum does not match")
    return chunk
