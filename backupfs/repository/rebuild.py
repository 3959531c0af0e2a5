"""Putting a layer's header, table or trailer right, in place. Under the writer lock; mounts go on meanwhile.

A point's manifest has the BLAKE3 of its layer's header, table and trailer together. So what is put together here, from
whatever can be had (remains.py), is to the bit what was published, or it is not written. For layers whose point is gone
see orphans.py.

What was there before is kept in the repository's folder `damaged`. A crash in the middle leaves a damaged layer, as
before.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from backupfs.errors import RepositoryError
from backupfs.repository.files import open_regular
from backupfs.repository.format import HEADER_SIZE, LayerHeader, decode_header
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.mend import keep, writable
from backupfs.repository.remains import Piece, Records, Remains, read


def rebuild(root: str, path: str, header: LayerHeader | None, entry: DiskEntry, sources: Sequence[Records]) -> bool:
    """Put header, table and trailer of a layer right.

    Args:
        root: the repository's folder.
        header: what the layer's should be, where that is known; a good one in the file counts before it.
        entry: what its point's manifest says of it.
        sources: of this layer's records: indexes, or the raw image.

    Returns:
        Whether they are right now; if not nothing was written.

    Raises:
        RepositoryError: it can't be read or written.
    """
    with opened(path) as fd:
        with contextlib.suppress(RepositoryError):
            header = decode_header(read(fd, 0, HEADER_SIZE), path)
        if header is None or header.layer_id.hex() != entry.layer_id or os.fstat(fd).st_size != entry.layer_bytes:
            return False
        remains = Remains(fd, path, header, entry.data_bytes // header.chunk_size)
        found = next((v for v in remains.versions(sources) if v.blake3 == entry.layer_blake3), None)
        if found is None:
            return False
        pieces = found.pieces(fd)
    write(root, path, entry.layer_id, pieces)
    return True


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """Yield a descriptor of a damaged layer. Raises RepositoryError."""
    try:
        fd = open_regular(path)
    except OSError as e:
        raise RepositoryError(f"{path}: can't be repaired: {e.strerror}") from e
    try:
        yield fd
    finally:
        os.close(fd)


def write(root: str, path: str, layer_id: str, pieces: Sequence[Piece]) -> None:
    """Keep what is there, and write what should be. Raises RepositoryError."""
    try:
        for offset, old, _ in pieces:
            keep(root, layer_id, offset, old)
        with writable(path) as fd:
            for offset, _, new in pieces:
                done = os.pwrite(fd, new, offset)
                if done < len(new):
                    raise RepositoryError(f"{path}: can't be repaired: written in part only; try again")
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as e:
        raise RepositoryError(f"{path}: can't be repaired: {e.strerror}") from e
