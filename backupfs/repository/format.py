"""Magics, structs and checks of the bytes on disk: pure encode and decode. FORMAT.md describes every field.

Nothing here opens a file. A decoder takes the path only to name it in `Corrupt`.
"""

import struct
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt
import xxhash

from backupfs.errors import Corrupt, UnsupportedFormat
from backupfs.units import KiB, MiB

VERSION = 1
PLAIN_VERSION = 3  # of a plain layer's header
REWRITTEN = 2  # of a layer that gc wrote again: other programs must not take the index's old offsets for its own

LAYER_MODE = 0o400  # of a file that is complete: nobody writes to it any more
HEADER_SIZE = 4 * KiB
ALIGNMENT = 4 * KiB
MIN_CHUNK, MAX_CHUNK = 4 * KiB, MiB
DEFAULT_CHUNK = 64 * KiB
MAX_DISK = 1 << 60
FENCE_ROWS = 256  # rows of the footer table behind one fence
REGION_CHUNKS = 256  # chunks of the disk behind one key of the index

LayerId = NewType("LayerId", bytes)
NO_LAYER = LayerId(bytes(16))

Words = npt.NDArray[np.uint64]
# A structured array: one row of the footer table, or one record of the index, an element.
Rows = npt.NDArray[np.void]

ROW = np.dtype(
    [
        ("chunk_no", "<u8"),
        ("offset", "<u8"),
        ("xxh3", "<u8"),
        ("id0", "<u8"),
        ("id1", "<u8"),
        ("length", "<u4"),
        ("codec", "<u4"),
        ("check", "<u8"),
    ]
)
# Sorts by chunk and then seq as bytes, which is how LMDB compares: these two are big-endian.
RECORD = np.dtype(
    [
        ("chunk", ">u2"),
        ("seq", ">u4"),
        ("run", "<u2"),
        ("offset", "<u8"),
        ("xxh3", "<u8"),
        ("id0", "<u8"),
        ("id1", "<u8"),
        ("packed", "<u4"),
        ("check", "<u4"),
    ]
)
CODEC_SHIFT = 24  # `packed` is length | codec << 24
LENGTH_MASK = (1 << CODEC_SHIFT) - 1

assert ROW.itemsize == 56
assert RECORD.itemsize == 48

_HEADER = struct.Struct("<8sIIQII16s16s16s")
_NAME = struct.Struct("<H")
_EDITION = struct.Struct("<Q")  # before the header's check
_CHECK = struct.Struct("<Q")
_TRAILER = struct.Struct("<8sQQQQQ16sQ")
HEADER_MAGIC = b"BFSLAYER"
TRAILER_MAGIC = b"BFSLEND\n"
TRAILER_SIZE = _TRAILER.size

# Odd multipliers, so that a change of one word always changes the sum; the first outputs of splitmix64 from 0, | 1.
_PRIMES = np.array(
    [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F5,
        0x06C45D188009454F,
        0xF88BB8A8724C81ED,
        0x1B39896A51A8749B,
        0x53CB9F0C747EA2EB,
    ],
    np.uint64,
)
_MASK64 = (1 << 64) - 1


def mix64(words: Words) -> Words:
    """Return each word scrambled, one to one. Source: the finaliser of splitmix64."""
    words = words ^ (words >> np.uint64(30))
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words = words * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def unmix64(words: Words) -> Words:
    """Return what `mix64` made these words of."""
    words = words ^ (words >> np.uint64(31)) ^ (words >> np.uint64(62))
    words = words * np.uint64(pow(0x94D049BB133111EB, -1, 1 << 64))
    words = words ^ (words >> np.uint64(27)) ^ (words >> np.uint64(54))
    words = words * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
    found: Words = words ^ (words >> np.uint64(30)) ^ (words >> np.uint64(60))
    return found


def checks(rows: Rows, seed: int | Words) -> Words:
    """Return a 64-bit check of each row or record: of all its bytes but its own check, and of `seed`, its address.

    Args:
        rows: of type ROW or RECORD.
        seed: one for all, or one for each.

    A numpy expression rather than xxh3, because whole regions are checked at once: 20 us for 2,000 records.
    """
    return mix64(_sums(rows) + np.asarray(seed, np.uint64))


def addresses(rows: Rows) -> Words:
    """Return of each row, of type ROW, the address for which its check is right."""
    return unmix64(rows["check"]) - _sums(rows)


def _sums(rows: Rows) -> Words:
    words = np.ascontiguousarray(rows).view("<u8").reshape(len(rows), rows.dtype.itemsize // 8)
    if rows.dtype == RECORD:
        low = words[:, 5] & np.uint64(0xFFFFFFFF)  # the upper half of the last word is the check
        sums: Words = (words[:, :5] * _PRIMES[:5]).sum(axis=1, dtype=np.uint64) + low * _PRIMES[5]
    else:
        sums = (words[:, :6] * _PRIMES).sum(axis=1, dtype=np.uint64)
    return sums


@dataclass(frozen=True, slots=True)
class LayerHeader:
    """What a layer says of itself in its first 4 KiB.

    Attributes:
        plain: a base whose payloads are not in the layer's file, but make up a raw image of the disk beside it.
        edition: 0 as it was published; else a random number that gc gave it when it wrote it again.
    """

    repository_id: bytes
    layer_id: LayerId
    parent_id: LayerId  # NO_LAYER in a base
    parent_seq: int
    seq: int
    chunk_size: int
    virtual_size: int
    vm: str
    disk: str
    chain: str
    plain: bool = False
    edition: int = 0

    @property
    def is_base(self) -> bool:
        """Whether the layer starts its chain."""
        return self.parent_id == NO_LAYER

    def encode(self) -> bytes:
        """Return the header's 4,096 bytes."""
        fixed = _HEADER.pack(
            HEADER_MAGIC,
            REWRITTEN if self.edition else PLAIN_VERSION if self.plain else VERSION,
            self.chunk_size,
            self.virtual_size,
            self.seq,
            self.parent_seq,
            self.repository_id,
            self.layer_id,
            self.parent_id,
        )
        names = b"".join(_NAME.pack(len(n)) + n for n in (s.encode() for s in (self.vm, self.disk, self.chain)))
        body = (fixed + names).ljust(HEADER_SIZE - _CHECK.size - _EDITION.size, b"\0") + _EDITION.pack(self.edition)
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))

    @property
    def seed(self) -> int:
        """The address part of the layer's row checks: the header's own checksum."""
        return header_seed(self.encode())


def header_seed(data: bytes) -> int:
    """Return the checksum at the end of an encoded header."""
    return int(_CHECK.unpack_from(data, HEADER_SIZE - _CHECK.size)[0])


def decode_header(data: bytes, path: str) -> LayerHeader:
    """Return what `encode` made.

    Raises:
        Corrupt: damaged, or not a layer.
        UnsupportedFormat: a layer of another format version.
    """
    if len(data) < HEADER_SIZE or data[:8] != HEADER_MAGIC:
        raise Corrupt(path, 0, "not a layer file")
    if xxhash.xxh3_64_intdigest(data[: HEADER_SIZE - _CHECK.size]) != header_seed(data):
        raise Corrupt(path, 0, "the header's checksum does not match")
    _, version, chunk_size, virtual_size, seq, parent_seq, repository_id, layer_id, parent_id = _HEADER.unpack_from(
        data
    )
    if version not in (VERSION, PLAIN_VERSION, REWRITTEN):
        raise UnsupportedFormat(f"{path}: layer of format version {version}; this backupfs knows up to {PLAIN_VERSION}")
    plain = version == PLAIN_VERSION
    if plain and parent_id != NO_LAYER:
        raise Corrupt(path, 0, "a plain layer with a parent can't be")
    (edition,) = _EDITION.unpack_from(data, HEADER_SIZE - _CHECK.size - _EDITION.size)
    if (edition != 0) != (version == REWRITTEN):
        raise Corrupt(path, HEADER_SIZE - _CHECK.size - _EDITION.size, "the layer's edition can't be")
    names, position = [], _HEADER.size
    try:
        for _ in range(3):
            (length,) = _NAME.unpack_from(data, position)
            position += _NAME.size
            names.append(data[position : position + length].decode())
            position += length
    except (struct.error, UnicodeDecodeError) as e:
        raise Corrupt(path, position, f"the header's names can't be: {e}") from e
    vm, disk, chain = names
    return LayerHeader(
        repository_id=repository_id,
        layer_id=LayerId(layer_id),
        parent_id=LayerId(parent_id),
        parent_seq=parent_seq,
        seq=seq,
        chunk_size=chunk_size,
        virtual_size=virtual_size,
        vm=vm,
        disk=disk,
        chain=chain,
        plain=plain,
        edition=edition,
    )


@dataclass(frozen=True, slots=True)
class LayerTrailer:
    """The last bytes of a layer: where its footer table is."""

    table_offset: int
    rows: int
    data_chunks: int
    fences_xxh3: int
    layer_id: LayerId

    @property
    def fences_offset(self) -> int:
        return self.table_offset + self.rows * ROW.itemsize

    @property
    def fence_count(self) -> int:
        return -(-self.rows // FENCE_ROWS)

    @property
    def length(self) -> int:
        """The layer file's whole length."""
        return self.fences_offset + 8 * self.fence_count + TRAILER_SIZE

    def encode(self) -> bytes:
        """Return the trailer's bytes."""
        body = _TRAILER.pack(
            TRAILER_MAGIC,
            self.table_offset,
            self.rows,
            self.data_chunks,
            self.fences_xxh3,
            0,
            self.layer_id,
            0,
        )[: -_CHECK.size]
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def decode_trailer(data: bytes, file_length: int, path: str) -> LayerTrailer:
    """Return what `encode` made.

    Raises:
        Corrupt: damaged, cut off, or of another length than the file.
    """
    place = max(file_length - TRAILER_SIZE, 0)
    if len(data) != TRAILER_SIZE or data[:8] != TRAILER_MAGIC:
        raise Corrupt(path, place, "the trailer is missing: the file was cut off or overwritten")
    _, table_offset, rows, data_chunks, fences_xxh3, _, layer_id, check = _TRAILER.unpack(data)
    if xxhash.xxh3_64_intdigest(data[: -_CHECK.size]) != check:
        raise Corrupt(path, place, "the trailer's checksum does not match")
    trailer = LayerTrailer(table_offset, rows, data_chunks, fences_xxh3, LayerId(layer_id))
    if trailer.length != file_length:
        raise Corrupt(path, place, f"the file is {file_length} bytes long, its trailer says {trailer.length}")
    return trailer


def map_digest(chunk_no: Words, id0: Words, id1: Words) -> tuple[int, int]:
    """Return the two 64-bit lanes of a chunk map's digest: sums over all chunks that are not zero.

    A sum, so that a delta's digest follows from its parent's and the chunks that changed. It tells damage of the
    index, not malice: for that a chunk's identity is BLAKE3.
    """
    lane0, lane1 = digest_terms(chunk_no, id0, id1)
    return int(lane0.sum(dtype=np.uint64)), int(lane1.sum(dtype=np.uint64))


def digest_terms(chunk_no: Words, id0: Words, id1: Words) -> tuple[Words, Words]:
    """Return what each chunk adds to the two lanes of its map's digest."""
    with np.errstate(over="ignore"):
        address = mix64(chunk_no.astype(np.uint64) + np.uint64(1))
        return mix64(id0 ^ address), mix64(id1 + address)


def format_digest(lane0: int, lane1: int) -> str:
    """Return a map's digest as 32 hexadecimal digits."""
    return f"{lane0 & _MASK64:016x}{lane1 & _MASK64:016x}"


def parse_digest(text: str) -> tuple[int, int]:
    """Return the lanes of `format_digest`'s text."""
    return int(text[:16], 16), int(text[16:], 16)


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit
