"""Checking many stored chunks of one layer against both of their hashes. From any thread.

BLAKE3 says that a chunk is what was taken; xxh3 is what every read goes by, so a row with a wrong one could not be read
back. It costs a tenth of what BLAKE3 does.
"""

import logging
from sys import intern

import blake3
import numpy as np
import xxhash

from backupfs.errors import Corrupt
from backupfs.repository.bulk import decoded
from backupfs.repository.format import Rows
from backupfs.repository.layer import Layer
from backupfs.repository.mend import check_chunk
from backupfs.repository.payloads import Scratch
from backupfs.repository.visible import spans
from backupfs.units import KiB, MiB

log = logging.getLogger(__name__)

_READ = MiB  # at once: what was read is hashed while a processor's cache still has it
_GAP = 64 * KiB  # rather read than skipped


def damaged_chunks(layer: Layer, rows: Rows, chunk_size: int, memory: Scratch) -> list[tuple[int, str]]:
    """Read and check chunks.

    Args:
        rows: with data, sorted by offset.
        memory: to read into.

    Returns:
        Of each damaged one its place in `rows`, and what is wrong.
    """
    offsets = rows["offset"].tolist()
    # A longer payload can't be; what a hostile table says must not be allocated.
    lengths = np.minimum(rows["length"], chunk_size).tolist()
    codecs, hashes = rows["codec"].tolist(), rows["xxh3"].tolist()
    identities = np.stack((rows["id0"], rows["id1"]), axis=1).tobytes()
    xxh3, blake = xxhash.xxh3_64_intdigest, blake3.blake3
    bad: list[tuple[int, str]] = []
    for first, end in spans(rows, _READ, _GAP):
        begin = offsets[first]
        view = memory.take(max(map(int.__add__, offsets[first:end], lengths[first:end])) - begin)
        try:
            layer.data.pread_into(begin, view)
            readable = True
        except Corrupt:  # a sector that can't be read; which chunk is it in?
            readable = False
        for i in range(first, end):
            start = offsets[i] - begin
            if readable:
                chunk = decoded(view[start : start + lengths[i]], codecs[i], chunk_size)
                if (
                    chunk is not None
                    and blake(chunk).digest(length=16) == identities[16 * i : 16 * i + 16]
                    and xxh3(chunk) == hashes[i]
                ):
                    continue
            try:
                check_chunk(layer, rows[i], chunk_size)
                if readable:
                    log.warning("%s: read wrong at offset %d, and right the second time", layer.data.path, offsets[i])
            except Corrupt as e:
                bad.append((i, intern(e.what)))  # a few words for, maybe, a million chunks
    return bad
