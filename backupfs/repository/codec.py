"""Permanent codec ids, and how each turns a chunk into a payload and back. May be called from any thread."""

import threading
from collections.abc import Iterator

import xxhash
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

_SINGLE_SEGMENT, _CHECKSUM = 1 << 5, 1 << 2  # in a frame header's descriptor

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


def compress_to(chunk: bytes, length: int) -> bytes | None:
    """Return a Zstandard frame of exactly `length` bytes that holds `chunk`, or None when there is none so short.

    For a payload that has to lie where another one lay. Another version of the library may have made that one, so a
    shorter frame is filled up: with blocks of 0 bytes, which take 3 bytes each, and by writing the header longer.
    Source: RFC 8878, 3.1.1.
    """
    for level in (_LEVEL, 1, 3, 9, 19):
        payload = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(chunk)
        if len(payload) == length:
            return payload
        for header, checksum in _frame_ends(payload, chunk):
            body = payload[zstandard.frame_header_size(payload) :]
            missing = length - len(header) - len(body) - len(checksum)
            if missing >= 0 and missing % 3 == 0:
                return header + bytes(missing) + body + checksum
    return None


def _frame_ends(payload: bytes, chunk: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the frame's header and what follows its last block, in all lengths that the format knows."""
    descriptor, window = payload[4], payload[5:6]
    if descriptor & _SINGLE_SEGMENT:
        window = b""
    for flag, size, minus in ((1, 2, 256), (2, 4, 0), (3, 8, 0)):
        if 0 <= len(chunk) - minus < 1 << 8 * size:
            for checked in (0, _CHECKSUM):
                first = descriptor & ~(3 << 6) & ~_CHECKSUM | flag << 6 | checked
                header = payload[:4] + bytes([first]) + window + (len(chunk) - minus).to_bytes(size, "little")
                check = xxhash.xxh64_intdigest(chunk) & 0xFFFFFFFF
                yield header, check.to_bytes(4, "little") if checked else b""


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
