"""Permanent codec ids, and how each turns a chunk into a payload and back. May be called from any thread."""

import threading

import zstandard

from backupfs.errors import UnsupportedFormat

# Never reused, also when a codec goes away: they stand in every layer.
ZERO = 0  # no payload; the row's length counts chunks
NONE = 1  # the chunk as it is, aligned to 4 KiB
ZSTD = 2  # one Zstandard frame with its content size

NAMES = {"none": NONE, "zstd": ZSTD}

# Level -4: with the check 60 percent faster than 1, for 25 percent more bytes; ingest is bound by it
# (tools/bench ingest).
_LEVEL = -4

_per_thread = threading.local()


def by_name(name: str) -> int:
    """Return the id of the codec that the repository names.

    Raises:
        UnsupportedFormat: this program knows no such codec.
    """
    try:
        return NAMES[name]
    except KeyError:
        raise UnsupportedFormat(f"codec {name!r} is not known to this backupfs; it knows {', '.join(NAMES)}") from None


def compress(chunk: bytes | memoryview) -> bytes | None:
    """Return `chunk` as a Zstandard frame, or None when that would spare less than a sixteenth."""
    compressor = getattr(_per_thread, "compressor", None)
    if compressor is None:
        compressor = _per_thread.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
    payload: bytes = compressor.compress(chunk)
    return payload if len(payload) <= len(chunk) * 15 // 16 else None


def decompress(payload: bytes | memoryview, chunk_size: int) -> bytes:
    """Return the chunk in a Zstandard frame.

    Raises:
        ValueError: the frame is damaged or holds another number of bytes.
    """
    decompressor = getattr(_per_thread, "decompressor", None)
    if decompressor is None:
        decompressor = _per_thread.decompressor = zstandard.ZstdDecompressor()
    try:
        # Asked first: a damaged size field must not make the library allocate it.
        if zstandard.frame_content_size(payload) != chunk_size:
            raise ValueError("the frame's content size is not the chunk's")
        chunk: bytes = decompressor.decompress(payload, max_output_size=chunk_size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ValueError(str(e)) from e
    if len(chunk) != chunk_size:
        raise ValueError("the frame holds another number of bytes than a chunk")
    return chunk
