"""Getting many chunks of a point at once, neighbours in a layer by one call: for restores. Mounts read chunk by chunk.

Nothing goes through the cache: each chunk is read once. Checked as everywhere. From any thread.
"""

from itertools import pairwise

import numpy as np
import xxhash

from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.chunkmap import POSITION
from backupfs.repository.format import CODEC_SHIFT, LENGTH_MASK, REGION_CHUNKS, Rows
from backupfs.repository.layer import Layer
from backupfs.repository.payloads import read_chunk
from backupfs.repository.point import PointImage
from backupfs.units import KiB

_GAP = np.uint64(64 * KiB)  # between two payloads: rather read than skipped


def read_chunks(image: PointImage, offset: int, buffer: memoryview) -> None:
    """Fill all of `buffer` with the disk's bytes from `offset` on, which is where a chunk begins.

    Raises:
        Corrupt: a layer is missing or damaged; `buffer` then holds anything.
    """
    unit = image.chunk_size
    first, end = offset // unit, -(-(offset + len(buffer)) // unit)
    regions = range(first // REGION_CHUNKS, (end - 1) // REGION_CHUNKS + 1)
    held = np.frombuffer(b"".join(image.map.region(r) for r in regions), POSITION)
    positions = held[first - regions.start * REGION_CHUNKS :][: end - first]
    for i in np.flatnonzero(positions["packed"] == 0).tolist():
        part = buffer[i * unit : (i + 1) * unit]
        part[:] = bytes(len(part))
    places = np.flatnonzero(positions["packed"])
    places = places[np.lexsort((positions["offset"][places], positions["seq"][places]))]
    found = positions[places]
    ends = found["offset"] + (found["packed"] & LENGTH_MASK)
    apart = (found["seq"][1:] != found["seq"][:-1]) | (found["offset"][1:] > ends[:-1] + _GAP)
    borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(found)]
    try:
        for a, b in pairwise(borders):
            if a < b:
                _read_span(image.layer(int(found["seq"][a])), found[a:b], places[a:b].tolist(), unit, buffer)
    except Corrupt:
        image.readinto(offset, buffer)  # finds what gc has moved meanwhile; or says what is wrong


def _read_span(layer: Layer, found: Rows, places: list[int], unit: int, buffer: memoryview) -> None:
    """Read the chunks of one piece of a layer file into their places, counted in chunks, in the buffer."""
    begin = int(found["offset"][0])
    last = int((found["offset"] + (found["packed"] & LENGTH_MASK)).max())
    data = memoryview(layer.data.pread(begin, last - begin))
    columns = zip(found["offset"].tolist(), found["packed"].tolist(), found["xxh3"].tolist(), places, strict=True)
    for offset, packed, xxh3, place in columns:
        payload = data[offset - begin :][: packed & LENGTH_MASK]
        chunk = decoded(payload, packed >> CODEC_SHIFT, unit)
        if chunk is None or xxhash.xxh3_64_intdigest(chunk) != xxh3:
            chunk = read_chunk(layer, offset, packed, xxh3, unit)  # says what is wrong
        part = buffer[place * unit : (place + 1) * unit]
        part[:] = chunk[: len(part)]


def clone_chunks(image: PointImage, target: int) -> int:
    """Have a file share the blocks of chunks that are stored as they are, each at its place on the disk.

    Nothing is compared with hashes here. Where the file system can't do it, the rest is left out.

    Args:
        target: a descriptor of a file on the same file system.

    Returns:
        The bytes that are shared now.
    """
    unit, shared = image.chunk_size, 0
    chunks = image.size // unit  # a last piece of a chunk would make the file longer
    whole = unit | codec.NONE << CODEC_SHIFT
    for region in image.map.occupied(0, -(-chunks // REGION_CHUNKS)):
        first = region * REGION_CHUNKS
        positions = image.map.positions(region)[: chunks - first]
        places = np.flatnonzero(positions["packed"] == whole)
        offsets, seqs = positions["offset"][places].astype(np.int64), positions["seq"][places]
        apart = (np.diff(places) != 1) | (seqs[1:] != seqs[:-1]) | (np.diff(offsets) != unit)
        borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
        for a, b in pairwise(borders):
            if a < b:
                length, place = (b - a) * unit, (first + int(places[a])) * unit
                try:
                    image.layer(int(seqs[a])).data.clone(int(offsets[a]), length, target, place)
                except OSError:
                    return shared
                shared += length
    return shared


def decoded(payload: memoryview, codec_id: int, chunk_size: int) -> bytes | memoryview | None:
    """Return the chunk in a payload, not compared with any hash yet; None when there is none in it."""
    if codec_id == codec.NONE:
        return payload if len(payload) == chunk_size else None
    try:
        return codec.decompress(payload, chunk_size) if codec_id == codec.ZSTD else None
    except ValueError:
        return None
