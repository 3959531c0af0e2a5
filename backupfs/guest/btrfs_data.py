"""What compressed extents of btrfs hold. Source: fs/btrfs/lzo.c, lib/lzo/lzo1x_decompress_safe.c."""

import struct
import zlib

import zstandard

from backupfs.errors import GuestError

NONE, ZLIB, LZO, ZSTD = range(4)
_LARGEST = 1 << 20  # bytes; the kernel's are 128 KiB at most


def decompress(data: bytes, how: int, size: int, sector: int) -> bytes:
    """Return the content of an extent, which is `size` bytes. Raises GuestError."""
    if size > _LARGEST:
        raise GuestError(f"a compressed extent of {size} bytes")
    try:
        match how:
            case 1:
                found = zlib.decompressobj().decompress(data, size)
            case 2:
                found = _lzo(data, size, sector)
            case 3:
                found = zstandard.ZstdDecompressor().decompressobj().decompress(data)[:size]
            case _:
                raise GuestError(f"compressed in a way that is not known ({how})")
    except (zlib.error, zstandard.ZstdError, IndexError, struct.error) as e:
        raise GuestError(f"a compressed extent is damaged: {e}") from e
    return found + bytes(size - len(found))  # what is missing are zeroes


def _lzo(data: bytes, size: int, sector: int) -> bytes:
    """Segments with their lengths, which never lie across the border of two sectors."""
    (end,) = struct.unpack_from("<I", data)
    found, position = bytearray(), 4
    while position < min(end, len(data)) and len(found) < size:
        if sector - position % sector < 4:
            position += sector - position % sector
        (length,) = struct.unpack_from("<I", data, position)
        found += _segment(data[position + 4 : position + 4 + length], sector)
        position += 4 + length
    return bytes(found[:size])


def _segment(data: bytes, most: int) -> bytearray:  # noqa: PLR0915, as the kernel has it
    """Decompress LZO1X."""
    out, position, state = bytearray(), 0, 0

    def long(count: int, base: int) -> int:
        """Return a count that goes on behind zero bytes."""
        nonlocal position
        while not data[position]:
            count += 255
            position += 1
        count += base + data[position]
        position += 1
        return count

    def literals(count: int) -> None:
        nonlocal position
        if position + count > len(data):
            raise IndexError("it ends too early")
        out.extend(data[position : position + count])
        position += count

    if data[0] > 17:
        position = 1
        literals(data[0] - 17)
        state = data[0] - 17 if data[0] < 21 else 4
    while len(out) <= most:
        code = data[position]
        position += 1
        if code < 16 and not state:
            literals((code if code else long(0, 15)) + 3)
            state = 4
            continue
        if code < 16:
            back = (1 if state != 4 else 0x801) + (code >> 2) + (data[position] << 2)
            count, state = 2 if state != 4 else 3, code & 3
            position += 1
        elif code >= 64:
            back = 1 + (code >> 2 & 7) + (data[position] << 3)
            count, state = (code >> 5) + 1, code & 3
            position += 1
        else:
            mask, base = (31, 31) if code >= 32 else (7, 7)
            count = (code & mask) + 2
            if count == 2:
                count = long(2, base)
            (following,) = struct.unpack_from("<H", data, position)
            position += 2
            state = following & 3
            back = (following >> 2) + (1 if code >= 32 else (code & 8) << 11)
            if code < 32:
                if not back:
                    return out
                back += 0x4000
        if back > len(out):
            raise IndexError("it points before its beginning")
        for _ in range(count):
            out.append(out[-back])
        literals(state)
    raise IndexError("it is longer than a sector")
