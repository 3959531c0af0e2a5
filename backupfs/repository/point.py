"""PointImage: one disk at one point, put together on the fly from the layers of its chain. From any thread.

A read costs, per chunk: one look-up of the chunk's position (chunkmap.py), and one pread of all of it, with decoding
and the xxh3 check (payloads.py), unless it is in the cache. No step depends on the length of the chain.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from backupfs.errors import Corrupt, RepositoryError
from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, check_range
from backupfs.repository import codec, names
from backupfs.repository.at_hand import LARGEST, ZEROES, AtHand, Decoded, OneChunk, OpenLayers, Stored, Zero
from backupfs.repository.cache import LruCache
from backupfs.repository.chunk_cache import ChunkCache
from backupfs.repository.chunkmap import PLACE, ChunkMap, RegionCache
from backupfs.repository.format import (
    CODEC_SHIFT,
    REGION_CHUNKS,
    LayerId,
    format_digest,
    round_up,
)
from backupfs.repository.index import Index
from backupfs.repository.layer import Layer
from backupfs.repository.locks import Pin
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.payloads import Payloads, Run, Scratch
from backupfs.units import MiB

log = logging.getLogger(__name__)

_REGION_CACHE = 16 * MiB
CHUNK_CACHE = 24 * MiB
_OPEN_LAYERS = 4096
_MOST_AT_HAND = 1 << 16  # chunks of all images, some 300 bytes each: 4 GiB of disks
_IMAGE_SHIFT = 52  # an image has fewer chunks than that many bits count
_STEP = MiB  # that `readinto` gathers at a time


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

    def __init__(self, index: Index, repository_id: bytes, chunk_size: int, chunk_cache: int = CHUNK_CACHE) -> None:
        self.index = index
        self.chunk_size = chunk_size
        self.regions: RegionCache = LruCache(_REGION_CACHE)
        self.chunks = ChunkCache(chunk_cache)
        # (the image's number << _IMAGE_SHIFT) + the chunk's.
        self.at_hand: dict[int, AtHand] = {}
        self.image_numbers = itertools.count()
        self.one_chunk = OneChunk(chunk_size)
        self.scratch = Scratch()
        self._repository_id = repository_id
        # A quarter of the descriptors that the process may have; the mount raises its limit first.
        self.opened: OpenLayers = LruCache(min(_OPEN_LAYERS, os.sysconf("SC_OPEN_MAX") // 4))

    def payloads(self, chain: Chain, seq: int) -> Payloads:
        """Return what an open layer stores; it is the layer in the index.

        Raises:
            Corrupt: the file is missing or damaged, or another layer than the one that was indexed.
        """
        held = self.opened.get((chain.no, seq))
        if held is None:
            path = layer_path(chain.root, chain.vm, chain.disk, chain.name, seq)
            layer = Layer(path)
            check_address(layer, self._repository_id, chain, seq, self.index.layer_id(chain.no, seq))
            held = Payloads(layer, self.chunk_size)
            self.opened.put((chain.no, seq), held, 1)
        return held

    def layer(self, chain: Chain, seq: int) -> Layer:
        """Return an open layer. Raises as `payloads`."""
        return self.payloads(chain, seq).layer

    def note_moved(self, chain: Chain, payloads: Payloads) -> None:
        """Have looked up again what was looked up in another file of the layer, where that leads to the newest one."""
        layer, seq = payloads.layer, payloads.layer.header.seq
        self.at_hand.clear()
        if not layer.is_current():
            self.opened.drop((chain.no, seq))
        elif seq == 0 or self.index.edition(chain.no, seq) == layer.header.edition:
            self.regions.clear()

    def close(self) -> None:
        """Drop everything; layers that a thread still reads from close after it."""
        self.opened.clear()
        self.at_hand.clear()
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
        self._at_hand = store.at_hand
        self._first_key = next(store.image_numbers) << _IMAGE_SHIFT
        self.map = self._new_map()

    def _new_map(self) -> ChunkMap:
        base = self._store.layer(self._chain, 0)
        return ChunkMap(self._store.index, self._chain.no, self._entry.seq, base, self._store.regions)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""
        return self._chunk_size

    def layer(self, seq: int) -> Layer:
        """Return an open layer of the image's chain. Raises Corrupt."""
        return self._store.layer(self._chain, seq)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        position = 0
        while position < len(view):
            for piece in self.gather(offset + position, min(_STEP, len(view) - position)):
                view[position : position + len(piece)] = piece
                position += len(piece)

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        chunk_no = offset // self._chunk_size
        chunk = self._at_hand.get(self._first_key + chunk_no) or self._find(chunk_no)
        return chunk is not None and chunk.read(offset, into)

    def _find(self, chunk_no: int) -> AtHand | None:
        """Return a chunk if its place is known, and keep it at hand."""
        region, i = divmod(chunk_no, REGION_CHUNKS)
        store, chain_no, first = self._store, self._chain.no, chunk_no * self._chunk_size
        positions = store.regions.get((chain_no, self._entry.seq, region))
        if positions is None:
            return None
        at, xxh3, seq, packed = PLACE.unpack_from(positions, i * PLACE.size)
        end = min(first + self._chunk_size, self.size)
        found: AtHand
        if not packed:
            found = Zero(end)
        elif packed >> CODEC_SHIFT != codec.NONE:
            found = Decoded(store.chunks, (chain_no, seq, at, xxh3), first, end)
        elif self._chunk_size > LARGEST:
            return None
        else:
            key, memory = (chain_no, seq, at, xxh3), store.one_chunk
            found = Stored(store.chunks, key, first, end, opened=store.opened, memory=memory)
        if len(self._at_hand) >= _MOST_AT_HAND:
            self._at_hand.clear()
        self._at_hand[self._first_key + chunk_no] = found
        return found

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        try:
            return self._gather(offset, length)
        except Corrupt:
            # It was read from a layer that gc has written again since its place was looked up, or it is damaged.
            return [self._piece(at, size) for at, size in self._chunks(offset, length)]

    def _chunks(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a range at the borders of chunks."""
        end = offset + length
        while offset < end:
            size = min(self._chunk_size - offset % self._chunk_size, end - offset)
            yield offset, size
            offset += size

    def _piece(self, offset: int, length: int) -> Buffer | bytes:
        """Return a part of one chunk; where its layer was written again, from where it is now.

        A layer's file has a table of its own places, so it does not matter which of the two is known to whom.
        """
        chunk_no, within = divmod(offset, self._chunk_size)
        region, i = divmod(chunk_no, REGION_CHUNKS)
        at, xxh3, seq, packed = PLACE.unpack_from(self.map.region(region), i * PLACE.size)
        if not packed:
            return ZEROES[:length]
        payloads = self._store.payloads(self._chain, seq)
        try:
            chunk = self._chunk(payloads, seq, at, xxh3, packed)
        except Corrupt:
            now = None
            with contextlib.suppress(Corrupt):
                now = payloads.place(chunk_no, xxh3)
            if now is None or now == (at, packed):
                raise
            chunk = self._chunk(payloads, seq, now[0], xxh3, now[1])
            with contextlib.suppress(RepositoryError):  # it only makes the next reads faster
                self._store.note_moved(self._chain, payloads)
                if seq == 0:
                    self.map = self._new_map()
        return memoryview(chunk)[within : within + length]

    def _gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        chunk_no, within = divmod(offset, self._chunk_size)
        if within + length > self._chunk_size:
            return self._pieces_of_chunks(offset, length)
        region, i = divmod(chunk_no, REGION_CHUNKS)
        at, xxh3, seq, packed = PLACE.unpack_from(self.map.region(region), i * PLACE.size)
        if not packed:
            return (ZEROES[:length],)
        payloads = self._store.payloads(self._chain, seq)
        return (memoryview(self._chunk(payloads, seq, at, xxh3, packed))[within : within + length],)

    def _pieces_of_chunks(self, offset: int, length: int) -> list[Buffer | bytes]:
        """Return the pieces of a range that is in several chunks. What lies side by side in a layer is read at once."""
        pieces: list[Buffer | bytes] = []
        run: Run | None = None
        memory = self._store.scratch.take(length)
        position, end = offset, offset + length
        while position < end:
            chunk_no, within = divmod(position, self._chunk_size)
            size = min(self._chunk_size - within, end - position)
            position += size
            region, i = divmod(chunk_no, REGION_CHUNKS)
            at, xxh3, seq, packed = PLACE.unpack_from(self.map.region(region), i * PLACE.size)
            if packed:
                payloads = self._store.payloads(self._chain, seq)
                if packed == payloads.whole and size == self._chunk_size:
                    if run is None or not run.extend(payloads, at, xxh3):
                        if run is not None:
                            pieces.append(run.read(memory))
                            memory = memory[len(pieces[-1]) :]
                        run = Run(payloads, at, xxh3)
                    continue
            if run is not None:
                pieces.append(run.read(memory))
                memory = memory[len(pieces[-1]) :]
                run = None
            if packed:
                pieces.append(memoryview(self._chunk(payloads, seq, at, xxh3, packed))[within : within + size])
            else:
                pieces.append(ZEROES[:size])
        if run is not None:
            pieces.append(run.read(memory))
        return pieces

    def _chunk(self, payloads: Payloads, seq: int, at: int, xxh3: int, packed: int) -> bytes | memoryview:
        """Return a decoded chunk. What is stored as it is the kernel keeps."""
        if packed == payloads.whole:
            return payloads.chunk(at, xxh3, packed)
        key = (self._chain.no, seq, at, xxh3)
        cell = self._store.chunks.get(key)
        held = cell.chunk
        if held is not None:
            cell.used = True
            return held
        chunk = payloads.chunk(at, xxh3, packed)
        self._store.chunks.put(key, chunk)
        return chunk

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        return coalesce(clip((e for e, _ in self.placed_extents(offset, length)), offset, length))

    def placed_extents(self, offset: int, length: int) -> Iterator[tuple[Extent, int]]:
        """Cover the range, widened to whole regions and clipped to the disk, with (extent, seq of its layer).

        A zero extent's seq is -1.
        """
        span = REGION_CHUNKS * self._chunk_size
        position, last = offset // span * span, min(round_up(offset + length, span), self.size)
        for region, positions in self.map.resolved(offset // span, -(-last // span)):
            if region * span > position:
                yield Extent(position, region * span - position, True), -1
            seqs = np.where(positions["packed"] == 0, -1, positions["seq"].astype(np.int64))
            borders = (np.flatnonzero(seqs[1:] != seqs[:-1]) + 1).tolist()
            for first, behind in zip([0, *borders], [*borders, len(seqs)], strict=True):
                start = region * span + first * self._chunk_size
                stop = min(region * span + behind * self._chunk_size, self.size)
                if start < stop:
                    yield Extent(start, stop - start, bool(seqs[first] < 0)), int(seqs[first])
            position = region * span + len(positions) * self._chunk_size
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
