"""Putting a damaged chunk right, in the layer where it lies. Under the writer lock; mounts go on meanwhile.

A layer stays what it is: table, trailer, length, manifest and index do not change. Only the damaged payload's bytes
do: they become a payload of the same length that gives the chunk whose BLAKE3 is in the table. What they were is kept
in the repository's folder `damaged` first. A crash in the middle leaves a damaged payload where one was.
"""

import contextlib
import os
from collections.abc import Iterator

import blake3
import numpy as np

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import codec
from backupfs.repository.files import fsync_folder, write_new
from backupfs.repository.format import CODEC_SHIFT, LAYER_MODE, Rows
from backupfs.repository.layer import Layer
from backupfs.repository.payloads import read_chunk

DAMAGED = "damaged"


def check_chunk(layer: Layer, row: np.void, chunk_size: int) -> bytes:
    """Return the chunk of a table's row, checked against both of its hashes. Raises Corrupt."""
    offset = int(row["offset"])
    packed = int(row["length"]) | int(row["codec"]) << CODEC_SHIFT
    chunk = read_chunk(layer, offset, packed, int(row["xxh3"]), chunk_size)
    if blake3.blake3(chunk).digest(length=16) != identity(row):
        raise Corrupt(layer.data.path, offset, "the chunk's BLAKE3 does not match")
    return chunk


def identity(row: np.void) -> bytes:
    """Return the 16 bytes of BLAKE3 in a row."""
    return int(row["id0"]).to_bytes(8, "little") + int(row["id1"]).to_bytes(8, "little")


def mend(root: str, layer: Layer, row: np.void, chunk: bytes) -> bool:
    """Put a chunk in the place of a damaged payload.

    Args:
        root: the repository's folder.
        row: of the damaged payload, from the layer's own table.
        chunk: what should be there; anything whose BLAKE3 is another one is refused.

    Returns:
        False when no payload with these bytes has the right length.

    Raises:
        Corrupt: the table says something else by now.
        RepositoryError: it can't be written.
    """
    if blake3.blake3(chunk).digest(length=16) != identity(row):
        raise ValueError("these are not the bytes that were lost")
    if not _is_still_there(layer, row):
        raise Corrupt(layer.path, int(row["offset"]), "another layer has taken this one's place; verify again")
    payload = _payload(row, chunk)
    if payload is None:
        return False
    try:
        with contextlib.suppress(Corrupt):  # what the disk can't read can't be kept
            damaged = layer.data.pread(int(row["offset"]), int(row["length"]))
            keep(root, layer.header.layer_id.hex(), int(row["offset"]), damaged)
        _write(layer, int(row["offset"]), payload)
    except OSError as e:
        raise RepositoryError(f"{layer.data.path}: can't be repaired: {e.strerror}") from e
    check_chunk(layer, row, len(chunk))
    return True


def _is_still_there(layer: Layer, row: np.void) -> bool:
    now = Layer(layer.path)
    number = int(row["chunk_no"])
    found = [r for rows in now.rows(number, number + 1) for r in rows if r == row]
    return now.header == layer.header and len(found) == 1


def _payload(row: np.void, chunk: bytes) -> bytes | None:
    length = int(row["length"])
    if row["codec"] == codec.NONE:
        return chunk if len(chunk) == length else None
    if row["codec"] != codec.ZSTD:
        return None
    payload = codec.compress_to(chunk, length)
    if payload is None or len(payload) != length or codec.decompress(payload, len(chunk)) != chunk:
        return None
    return payload


def keep(root: str, layer_id: str, offset: int, damaged: bytes) -> None:
    """Put damaged bytes aside, into the repository's folder `damaged`. Raises OSError."""
    folder = os.path.join(root, DAMAGED)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        fsync_folder(root)
    # One damaged twice, in different ways, is kept twice.
    name = f"{layer_id}-{offset}-{blake3.blake3(damaged).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        write_new(os.path.join(folder, name), damaged)
    fsync_folder(folder)


def _write(layer: Layer, offset: int, payload: bytes) -> None:
    with writable(layer.data.path) as fd:
        view, position = (
            memoryview(payload)[: layer.data.length - offset],
            offset,
        )  # a raw image ends where the disk does
        while view:
            done = os.pwrite(fd, view, position)
            view, position = view[done:], position + done
        os.fsync(fd)
        # So that what is read next is what the disk has.
        os.posix_fadvise(fd, offset, len(payload), os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def writable(path: str) -> Iterator[int]:
    """Yield a descriptor to write to a layer, which is read-only."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except PermissionError:  # not root
        os.chmod(path, 0o600)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        finally:
            os.chmod(path, LAYER_MODE)
    try:
        yield fd
    finally:
        os.close(fd)


def rows_like(layer: Layer, wanted: np.ndarray) -> Iterator[Rows]:
    """Yield the layer's rows whose chunk may be wanted. A damaged table ends it.

    Args:
        wanted: the first words of the chunks' BLAKE3, sorted.
    """
    with contextlib.suppress(Corrupt):
        for rows in layer.rows():
            data = rows[rows["codec"] != codec.ZERO]
            places = np.searchsorted(wanted, data["id0"])
            hits = data[wanted[np.minimum(places, len(wanted) - 1)] == data["id0"]]
            if len(hits):
                yield hits
