"""A plain layer's raw image beyond its chunks: what should be holes, and what the table follows from.

The table is a list of the image's chunks with their hashes, so as long as the image is whole it can be made again.
"""

import errno
import os
from collections.abc import Iterator

import blake3
import numpy as np
import xxhash

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import codec
from backupfs.repository.datafile import DataFile
from backupfs.repository.format import CODEC_SHIFT, RECORD, REGION_CHUNKS, Rows, Words
from backupfs.repository.layer import Layer
from backupfs.repository.mend import keep, writable
from backupfs.units import KiB, MiB

_STEP = MiB
_KEPT = 64 * KiB  # at a time


def stray_data(layer: Layer) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of pieces of the image, at most _STEP, that hold data where the table has no chunk.

    Raises:
        Corrupt: the table is damaged, or the image can't be read.
    """
    size, position = layer.header.chunk_size, 0
    for rows in layer.rows():
        numbers = rows["chunk_no"].astype(np.int64)
        # Where the next chunk is not the neighbour.
        befores = np.concatenate(([position // size], numbers[:-1] + 1))
        for i in np.flatnonzero(numbers != befores).tolist():
            yield from _data_in(layer, int(befores[i]) * size, int(numbers[i]) * size)
        position = (int(numbers[-1]) + 1) * size
    yield from _data_in(layer, position, layer.header.virtual_size)


def _data_in(layer: Layer, begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start, stop in _stored(layer.data, begin, end):
        for offset in range(start, stop, _STEP):
            found = layer.data.pread(offset, min(_STEP, stop - offset))
            if found.strip(b"\0"):
                yield offset, len(found)


def _stored(file: DataFile, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what is no hole. Raises Corrupt. Source: lseek(2), SEEK_DATA."""
    while begin < end:
        try:
            start = os.lseek(file.fd, begin, os.SEEK_DATA)
            begin = min(os.lseek(file.fd, start, os.SEEK_HOLE), end)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise Corrupt(file.path, begin, f"can't be read: {e}") from e
        if start < begin:
            yield start, begin


def clear(root: str, layer: Layer) -> int:
    """Write zeroes over all stray data, which is kept in the folder `damaged`. Returns the bytes.

    Raises:
        Corrupt: as `stray_data`.
        RepositoryError: it can't be written.
    """
    done = 0
    try:
        with writable(layer.data.path) as fd:
            for offset, length in stray_data(layer):
                for at in range(offset, offset + length, _KEPT):
                    found = layer.data.pread(at, min(_KEPT, offset + length - at))
                    if found.strip(b"\0"):
                        keep(root, layer.header.layer_id.hex(), at, found)
                        if os.pwrite(fd, bytes(len(found)), at) != len(found):
                            raise RepositoryError(f"{layer.data.path}: written in part only; try again")
                        done += len(found)
            os.fsync(fd)
    except OSError as e:
        raise RepositoryError(f"{layer.data.path}: can't be repaired: {e.strerror}") from e
    return done


def image_records(path: str, chunk_size: int, first_region: int, end_region: int) -> tuple[Words, Rows]:
    """Return what the table says of a range, as records of the index, worked out from the image itself.

    Returns:
        The region of each record, and the records. They count only if the whole table then has the right BLAKE3.

    Raises:
        Corrupt: the image is missing or can't be read.
    """
    file = DataFile(path, "the layer's raw image", filled_up=True)
    span = REGION_CHUNKS * chunk_size
    regions: list[int] = []
    records: list[tuple[int, int, int, int, int, int, int, int, int]] = []
    done = first_region * REGION_CHUNKS
    for start, stop in _stored(file, first_region * span, min(end_region * span, file.length)):
        for number in range(max(start // chunk_size, done), -(-stop // chunk_size)):
            done = number + 1
            chunk = file.pread(number * chunk_size, chunk_size)
            if not chunk.strip(b"\0"):
                continue
            identity = blake3.blake3(chunk).digest(length=16)
            id0, id1 = int.from_bytes(identity[:8], "little"), int.from_bytes(identity[8:], "little")
            xxh3, packed = xxhash.xxh3_64_intdigest(chunk), chunk_size | codec.NONE << CODEC_SHIFT
            regions.append(number // REGION_CHUNKS)
            records.append((number % REGION_CHUNKS, 0, 1, number * chunk_size, xxh3, id0, id1, packed, 0))
    return np.array(regions, np.uint64), np.array(records, RECORD)
