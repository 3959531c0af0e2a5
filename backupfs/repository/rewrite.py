"""Writing a layer again with only what is seen of it, where holes of whole blocks leave too much.

The layer keeps its number, id and parent; rows that no point sees go, zero rows stay, offsets change, and with them the
index's records. Its header gets an *edition* (format.py), so that its rows' checks are its own. Only layers whose own
point is gone: what a manifest says of a layer never changes.

Who has the old file open reads on in it. Who has looked up where a chunk is in one file, and then opens the other,
finds out by the chunk's hash, and asks the table of the file that it has (point.py). So neither the order nor the time
matter in which readers and the index learn of it.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

import blake3
import numpy as np

from backupfs import interrupts
from backupfs.errors import Corrupt
from backupfs.repository import codec
from backupfs.repository.files import fsync_folder
from backupfs.repository.format import ALIGNMENT, FENCE_ROWS, HEADER_SIZE, ROW, TRAILER_SIZE, Rows, round_up
from backupfs.repository.layer import Layer, LayerWriter
from backupfs.repository.payloads import Scratch
from backupfs.repository.reach import Flags
from backupfs.repository.scrub import damaged_chunks
from backupfs.units import MiB

_BATCH = 4 * MiB  # of payloads, copied at a time
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Need:
    """What a layer would take if it were written again: bytes on the file system; and if it has compressed chunks."""

    size: int
    compressed: bool


def needed(layer: Layer, live: Flags) -> Need:
    """Work out what a layer would take. Raises Corrupt.

    Args:
        live: of each chunk with data, in the table's order.
    """
    payloads = count = 0
    compressed = False
    for rows, kept in _kept(layer, live):
        compressed |= bool(np.any(rows["codec"] == codec.ZSTD))
        payloads += int(kept["length"][kept["codec"] != codec.ZERO].sum(dtype=np.int64))
        count += len(kept)
    table = count * ROW.itemsize + 8 * -(-count // FENCE_ROWS) + TRAILER_SIZE
    return Need(round_up(HEADER_SIZE + payloads, ALIGNMENT) + round_up(table, ALIGNMENT), compressed)


def _kept(layer: Layer, live: Flags) -> Iterator[tuple[Rows, Rows]]:
    """Yield rows, and those of them that stay, many at a time."""
    done = 0
    for rows in layer.rows():
        keep = rows["codec"] == codec.ZERO
        data = np.flatnonzero(~keep)
        keep[data] = live[done : done + len(data)]
        done += len(data)
        yield rows, rows[keep]


def rewrite(layer: Layer, live: Flags, folder: str, chunk_size: int) -> bool:
    """Put a layer with only what is live in the place of this one. When it returns that is on the disk.

    Args:
        folder: the repository's, for temporary files.

    Returns:
        False when a chunk is damaged, or the table: nothing was done, and `verify --repair` finds all where it was.

    Raises:
        RepositoryError: no space, or the disk failed; the layer is as it was.
        OSError: it can't be given its name.
    """
    edition = secrets.randbits(64) or 1
    temporary = os.path.join(folder, "tmp", f"{layer.header.layer_id.hex()}-{edition:016x}.layer")
    with contextlib.ExitStack() as stack:
        with interrupts.deferred():  # a file that is there has to be one that is removed
            writer = LayerWriter(temporary, replace(layer.header, edition=edition))
            stack.callback(writer.remove)
        try:
            copied = _copy(layer, live, writer)
        except Corrupt:
            return False
        writer.finish()
        if _read_back(temporary, chunk_size) != copied:
            return False
        os.rename(temporary, layer.path)
        fsync_folder(os.path.dirname(layer.path))
    return True


def _copy(layer: Layer, live: Flags, writer: LayerWriter) -> str:
    """Copy what stays; return a hash of what the rows say, but for places. Raises Corrupt, RepositoryError."""
    said = blake3.blake3()
    for _, kept in _kept(layer, live):
        _say(said, kept)
        sizes = np.where(kept["codec"] == codec.ZERO, 0, kept["length"]).astype(np.int64)
        pieces = np.maximum((np.cumsum(sizes) - sizes) // _BATCH, np.arange(len(kept)) // _BATCH_ROWS)
        for rows in np.split(kept, np.flatnonzero(np.diff(pieces)) + 1):
            if len(rows):
                _append(layer, rows.copy(), writer)
    return said.hexdigest()


def _append(layer: Layer, rows: Rows, writer: LayerWriter) -> None:
    # What is stored as it is comes first, so that its places are whole blocks without padding between.
    order = np.argsort(rows["codec"], kind="stable")
    order = order[rows["codec"][order] != codec.ZERO]
    lengths = rows["length"][order].astype(np.int64)
    payloads = [layer.data.pread(int(rows["offset"][i]), int(rows["length"][i])) for i in order.tolist()]
    rows["offset"][order] = np.cumsum(lengths) - lengths
    writer.append(rows, payloads)


def _read_back(path: str, chunk_size: int) -> str | None:
    """Return the same hash of a finished layer if all of its chunks are right; else None."""
    layer, memory, said = Layer(path), Scratch(), blake3.blake3()
    layer.data.forget_cached()  # so that it comes from the disk
    try:
        for rows in layer.rows():
            _say(said, rows)
            data = rows[rows["codec"] != codec.ZERO]
            data = data[np.argsort(data["offset"], kind="stable")]
            if len(data) and damaged_chunks(layer, data, chunk_size, memory):
                return None
    except Corrupt:
        return None
    return said.hexdigest()


def _say(said: blake3.blake3, rows: Rows) -> None:
    rows = rows.copy()
    rows["offset"] = rows["check"] = 0
    said.update(rows.tobytes())
