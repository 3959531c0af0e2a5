"""Writing a point: PointWriter publishes last. One writer a repository (its lock), one point at a time.

A crash before `publish` renames the manifest leaves the old set of points, after it the new one. What else it leaves,
files in tmp/ and layers that no manifest names, the next writer removes or passes over.
"""

import os
import secrets
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import blake3
import numpy as np
import xxhash

from backupfs import __version__, interrupts
from backupfs.errors import RepositoryError
from backupfs.repository import codec, names
from backupfs.repository.chunkmap import POSITION, ChunkMap
from backupfs.repository.files import fsync_folder, make_folders, rename_new, write_new
from backupfs.repository.format import (
    MAX_DISK,
    NO_LAYER,
    REGION_CHUNKS,
    ROW,
    VERSION,
    LayerHeader,
    LayerId,
    Rows,
    Words,
    format_digest,
    map_digest,
    parse_digest,
)
from backupfs.repository.layer import LayerWriter, raw_path
from backupfs.repository.manifest import DiskEntry, Manifest, Settings, seal
from backupfs.repository.point import PointImage, disk_folder, layer_path

_DIGEST_CHUNKS = 4096  # whose part of the digest is worked out at a time


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """Where a chain ends now: what a delta continues."""

    point: str
    entry: DiskEntry
    image: PointImage
    last_seq: int = 0  # the highest that is indexed: of a point that was taken away since, maybe


class DiskWriter:
    """Takes one disk's bytes for one point. `write` and `zero` may be called from several threads at once, each
    chunk at most once; a chunk that is never given stays as it was at the parent (zero in a full one).

    Attributes:
        parent: the end of the chain that is continued; None when a chain begins.
        size: of the disk, bytes.
    """

    def __init__(self, layer: LayerWriter, default_codec: int, parent: ChainEnd | None) -> None:
        self.parent = parent
        self.size = layer.header.virtual_size
        self.layer = layer
        self._codec = default_codec
        self._chunk_size = layer.header.chunk_size
        self._zero_chunk = bytes(self._chunk_size)
        self._zero_xxh3 = xxhash.xxh3_64_intdigest(self._zero_chunk)
        self._map: ChunkMap | None = parent.image.map if parent else None
        self._lock = threading.Lock()
        self._lane0, self._lane1 = parse_digest(parent.entry.digest) if parent else (0, 0)
        self._chunks = parent.entry.allocated_bytes // self._chunk_size if parent else 0
        self._gone: list[tuple[Words, Words, Words]] = []  # chunk numbers and identities, not in the digest yet
        self._come: list[tuple[Words, Words, Words]] = []
        self._waiting = 0
        if parent and self._map:
            # A disk that shrank: when it grows again, what was cut off must not come back.
            self._zero_chunks(self._map, -(-self.size // self._chunk_size), -(-parent.entry.size // self._chunk_size))

    def write(self, offset: int, data: memoryview) -> None:
        """Store the disk's bytes from `offset` on: whole chunks, or up to the disk's end.

        A chunk equal to the parent's is not stored again; one that is zero becomes a ZERO record where the parent
        has data.

        Raises:
            RepositoryError: no space, or the disk failed.
            Corrupt: the parent's map can't be read.
        """
        size = self._chunk_size
        if offset % size or (len(data) % size and offset + len(data) != self.size):
            raise ValueError("write takes whole chunks")
        first = offset // size
        count = -(-len(data) // size)
        olds = self._old(first, count)
        rows = np.zeros(count, ROW)
        whole: list[bytes | memoryview] = []  # stored as they are: they come first, so that no padding is between
        packed: list[bytes | memoryview] = []
        position = used = 0  # of the next compressed one, from the first of them
        for i in range(count):
            chunk: bytes | memoryview = data[i * size : (i + 1) * size]
            if len(chunk) < size:
                chunk = bytes(chunk).ljust(size, b"\0")
            old = olds[i]
            xxh3 = xxhash.xxh3_64_intdigest(chunk)
            if xxh3 == self._zero_xxh3 and bytes(chunk) == self._zero_chunk:
                if old["packed"]:
                    rows[used] = (first + i, 0, 0, 0, 0, 1, codec.ZERO, 0)
                    used += 1
                continue
            identity = blake3.blake3(chunk).digest(length=16)
            id0, id1 = int.from_bytes(identity[:8], "little"), int.from_bytes(identity[8:], "little")
            if old["packed"] and id0 == old["id0"] and id1 == old["id1"]:
                continue
            codec_id, payload = self._encode(chunk)
            if codec_id == codec.NONE:
                rows[used] = (first + i, len(whole) * size, xxh3, id0, id1, size, codec_id, 0)
                whole.append(payload)
            else:
                rows[used] = (first + i, position, xxh3, id0, id1, len(payload), codec_id, 0)
                packed.append(payload)
                position += len(payload)
            used += 1
        if used:
            rows = rows[:used]
            rows["offset"][rows["codec"] == codec.ZSTD] += np.uint64(len(whole) * size)
            self._account(rows["chunk_no"], olds[(rows["chunk_no"] - np.uint64(first)).astype(np.intp)], rows)
            self.layer.append(rows, whole + packed)

    def zero(self, offset: int, length: int) -> None:
        """Say that a range reads as zeroes: whole chunks, or up to the disk's end. Raises as `write`."""
        if self._map is None:
            return
        first, end = offset // self._chunk_size, -(-(offset + length) // self._chunk_size)
        self._zero_chunks(self._map, first, end)

    def _zero_chunks(self, parent: ChunkMap, first: int, end: int) -> None:
        for region in parent.occupied(first // REGION_CHUNKS, -(-end // REGION_CHUNKS)):
            start = region * REGION_CHUNKS
            olds = np.frombuffer(parent.region(region), POSITION)
            wanted = np.arange(start, start + REGION_CHUNKS)
            data = np.flatnonzero((olds["packed"] != 0) & (wanted >= first) & (wanted < end))
            if not len(data):
                continue
            self._account((data + start).astype(np.uint64), olds[data], np.zeros(len(data), ROW))
            starts = np.append(True, np.diff(data) != 1)
            firsts = data[starts]
            lengths = np.diff(np.append(np.flatnonzero(starts), len(data)))
            rows = np.zeros(len(firsts), ROW)
            rows["chunk_no"], rows["length"], rows["codec"] = firsts + start, lengths, codec.ZERO
            self.layer.append(rows, [])

    def _account(self, chunk_no: Words, olds: Rows, news: Rows) -> None:
        """Take the old versions of these chunks out of the map's digest, and the new ones in."""
        was, now = olds["packed"] != 0, news["codec"] != codec.ZERO
        with self._lock:
            self._gone.append((chunk_no[was], olds["id0"][was], olds["id1"][was]))
            self._come.append((chunk_no[now], news["id0"][now], news["id1"][now]))
            self._waiting += len(chunk_no)
            if self._waiting >= _DIGEST_CHUNKS:
                self._settle()

    def _settle(self) -> None:
        """Work into the digest what waits; many chunks at a time, since a call of numpy's costs the same for one."""
        for sign, waiting in ((-1, self._gone), (1, self._come)):
            if not waiting:
                continue
            chunk_no, id0, id1 = (np.concatenate(column) for column in zip(*waiting, strict=True))
            lanes = map_digest(chunk_no, id0, id1)
            self._lane0 += sign * lanes[0]
            self._lane1 += sign * lanes[1]
            self._chunks += sign * len(chunk_no)
            waiting.clear()
        self._waiting = 0

    @property
    def digest(self) -> str:
        """The digest of the disk's chunk map with all that was given so far."""
        with self._lock:
            self._settle()
        return format_digest(self._lane0, self._lane1)

    @property
    def allocated_bytes(self) -> int:
        """Bytes in chunks that are not zero, with all that was given so far."""
        with self._lock:
            self._settle()
        return self._chunks * self._chunk_size

    def _old(self, first: int, count: int) -> Rows:
        """Return the parent's positions of `count` chunks."""
        if self._map is None:
            return np.zeros(count, POSITION)
        regions = range(first // REGION_CHUNKS, (first + count - 1) // REGION_CHUNKS + 1)
        held = np.frombuffer(b"".join(self._map.region(r) for r in regions), POSITION)
        start = first - regions.start * REGION_CHUNKS
        return held[start : start + count]

    def _encode(self, chunk: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        """Return the codec and the payload. What was compressed is decompressed and compared before it counts."""
        if self._codec == codec.ZSTD:
            payload = codec.compress(chunk)
            if payload is not None:
                if codec.decompress(payload, len(chunk)) != bytes(chunk):
                    raise RepositoryError("the compressor gave back other bytes: bad memory or a bad library")
                return codec.ZSTD, payload
        return codec.NONE, chunk


class PointWriter:
    """One point in the making: `add_disk` for each, `finish_disk` for each, `publish`; or `abandon`, which undoes.

    Args:
        root: the repository's folder.
        settings: of the repository.
        vm: a checked name.
        moment: the point's time.
        codec_name: what chunks are tried with; a base that is not compressed is a plain layer.

    Attributes:
        id: the point's; free, and staying so while the writer lock is held.
        consistency, domain_xml: for the manifest.
    """

    def __init__(self, root: str, settings: Settings, vm: str, moment: datetime, codec_name: str) -> None:
        self.vm = vm
        self.moment = moment.astimezone(UTC)
        self.consistency: Literal["crash", "frozen"] = "crash"
        self.domain_xml: str | None = None
        self._root = root
        self._points = os.path.join(os.path.dirname(os.path.dirname(disk_folder(root, vm, "x"))), "points")
        self.id = self._free_id()
        self._repository_id = settings.id
        self._chunk_size = settings.chunk_size
        self._codec = codec.by_name(codec_name)
        self._layers: list[LayerWriter] = []
        self._entries: list[tuple[DiskEntry, LayerWriter]] = []

    def add_disk(self, disk: str, size: int, chain: str, parent: ChainEnd | None) -> DiskWriter:
        """Begin a disk's layer: a delta on `parent`, or the base of a new chain.

        Raises:
            RepositoryError: the disk is too large for a layer, or the temporary file can't be made.
        """
        largest = min(MAX_DISK, self._chunk_size * REGION_CHUNKS << 32)  # the index counts regions in 32 bits
        if size > largest:
            raise RepositoryError(f"disk {disk}: {size} bytes are more than the {largest} that a layer can describe")
        header = LayerHeader(
            repository_id=bytes.fromhex(self._repository_id),
            layer_id=LayerId(secrets.token_bytes(16)),
            parent_id=LayerId(bytes.fromhex(parent.entry.layer_id)) if parent else NO_LAYER,
            parent_seq=parent.entry.seq if parent else 0,
            seq=self._next_seq(disk, chain, max(parent.entry.seq, parent.last_seq)) if parent else 0,
            chunk_size=self._chunk_size,
            virtual_size=size,
            vm=self.vm,
            disk=disk,
            chain=chain,
            plain=parent is None and self._codec == codec.NONE,
        )
        temporary = os.path.join(self._root, "tmp", f"{header.layer_id.hex()}.layer")
        with interrupts.deferred():  # a file that is there has to be one that `abandon` knows of
            layer = LayerWriter(temporary, header)
            self._layers.append(layer)
        return DiskWriter(layer, self._codec, parent)

    def drop_disk(self, writer: DiskWriter) -> None:
        """Give up a disk that was begun, as if it never had been."""
        writer.layer.remove()
        self._layers.remove(writer.layer)

    def _next_seq(self, disk: str, chain: str, last: int) -> int:
        """Return a number that was never used in the chain: layers of a crash and of deleted points keep their own."""
        folder = os.path.dirname(layer_path(self._root, self.vm, disk, chain, 0))
        try:
            used = [names.layer_seq(name) for name in os.listdir(folder)]
        except OSError as e:
            raise RepositoryError(f"{folder}: {e.strerror}") from e
        return max(last, *(seq for seq in used if seq is not None)) + 1

    def finish_disk(
        self,
        writer: DiskWriter,
        *,
        read: Literal["all", "dirty"],
        reason: str,
        bitmap: str | None = None,
        recorder: str | None = None,
        source_format: str | None = None,
    ) -> DiskEntry:
        """Complete the disk's layer and put it on the disk, still under its temporary name.

        Raises:
            RepositoryError: no space, or the disk failed.
        """
        facts = writer.layer.finish()
        header = writer.layer.header
        name = os.path.basename(layer_path(self._root, self.vm, header.disk, header.chain, header.seq))
        entry = DiskEntry(
            name=header.disk,
            size=header.virtual_size,
            kind="delta" if writer.parent else "full",
            chain=header.chain,
            seq=header.seq,
            parent=writer.parent.point if writer.parent else None,
            layer=name,
            raw=raw_path(name) if header.plain else None,
            layer_id=header.layer_id.hex(),
            layer_bytes=facts.length,
            layer_blake3=facts.blake3,
            read=read,
            reason=reason,
            data_bytes=facts.data_chunks * self._chunk_size,
            stored_bytes=facts.stored_bytes,
            allocated_bytes=writer.allocated_bytes,
            digest=writer.digest,
            bitmap=bitmap,
            recorder=recorder,
            source_format=source_format,
        )
        self._entries.append((entry, writer.layer))
        return entry

    def publish(self, *, parent: str | None, tags: list[str] | None = None, note: str = "") -> tuple[Manifest, bytes]:
        """Give every layer its name and then the manifest its own: that is the commit.

        Returns:
            The manifest, and its bytes.

        Raises:
            RepositoryError: it failed, and nothing was published.
        """
        published = False
        try:
            make_folders(self._root, self._points)  # first: layers without it are damage, for gc
            for entry, layer in self._entries:
                path = layer_path(self._root, self.vm, entry.name, entry.chain, entry.seq)
                make_folders(self._root, os.path.dirname(path))
                if layer.raw_path:  # first: where a layer is, all of it is
                    rename_new(layer.raw_path, raw_path(path))
                rename_new(layer.path, path)
                fsync_folder(os.path.dirname(path))
            manifest = Manifest(
                format=VERSION,
                repository=self._repository_id,
                vm=self.vm,
                id=self.id,
                time=self.moment.isoformat().replace("+00:00", "Z"),
                parent=parent,
                consistency=self.consistency,
                domain_xml=self.domain_xml,
                disks=[entry for entry, _ in self._entries],
                tags=tags or [],
                note=note,
                program=f"backupfs {__version__}",
            )
            data = seal(manifest)
            temporary = os.path.join(self._root, "tmp", f"{secrets.token_hex(16)}.json")
            write_new(temporary, data)
            rename_new(temporary, os.path.join(self._points, f"{manifest.id}.json"))
            published = True
            fsync_folder(self._points)
        except OSError as e:
            what = (
                f"{self.vm}/{self.id} is there, but may not outlive a power cut"
                if published
                else "nothing was published"
            )
            raise RepositoryError(f"publishing the point: {e}; {what}") from e
        return manifest, data

    def _free_id(self) -> str:
        ordinal = 1
        while os.path.lexists(os.path.join(self._points, names.point_id(self.moment, ordinal) + ".json")):
            ordinal += 1
        return names.point_id(self.moment, ordinal)

    def abandon(self) -> None:
        """Remove what was written. After `publish` it does nothing."""
        for layer in self._layers:
            layer.remove()
