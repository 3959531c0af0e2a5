"""The format against its description, and every bit of what is encoded."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import backupfs
from backupfs.errors import BackupfsError, Corrupt, UnsupportedFormat
from backupfs.repository import codec, format, manifest

DOCUMENT = (Path(backupfs.__file__).parent / "repository" / "FORMAT.md").read_text()
HEADER = format.LayerHeader(
    repository_id=bytes(range(16)),
    layer_id=format.LayerId(bytes(range(16, 32))),
    parent_id=format.LayerId(bytes(range(32, 48))),
    parent_seq=6,
    seq=7,
    chunk_size=65536,
    virtual_size=(10 << 40) + 512,
    vm="Büro",
    disk="vda",
    chain="main.2",
)
AGAIN = dataclasses.replace(HEADER, edition=0x0123456789ABCDEF)  # as gc writes it
TRAILER = format.LayerTrailer(8192, 300, 299, 12345, HEADER.layer_id)


def documented(name: str) -> str:
    found = re.search(rf"^\| {re.escape(name)} \| `?([^|`]*?)`? \|$", DOCUMENT, re.MULTILINE)
    assert found, f"FORMAT.md does not give {name}"
    return found[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format version", format.VERSION),
        ("version of a plain layer", format.PLAIN_VERSION),
        ("version of a layer that gc wrote again", format.REWRITTEN),
        ("chunk size, smallest", format.MIN_CHUNK),
        ("chunk size, default", format.DEFAULT_CHUNK),
        ("chunk size, largest", format.MAX_CHUNK),
        ("header size", format.HEADER_SIZE),
        ("alignment", format.ALIGNMENT),
        ("row size", format.ROW.itemsize),
        ("rows behind a fence", format.FENCE_ROWS),
        ("trailer size", format.TRAILER_SIZE),
        ("chunks in a region", format.REGION_CHUNKS),
        ("record size", format.RECORD.itemsize),
        ("codec ZERO", codec.ZERO),
        ("codec NONE", codec.NONE),
        ("codec ZSTD", codec.ZSTD),
    ],
)
def test_constants_are_those_of_the_document(name: str, value: int) -> None:
    assert int(documented(name)) == value


def test_magics_are_those_of_the_document() -> None:
    assert documented("header magic").encode() == format.HEADER_MAGIC
    assert documented("trailer magic").replace("\\n", "\n").encode() == format.TRAILER_MAGIC


def test_header_and_trailer_come_back() -> None:
    for header in (HEADER, AGAIN):
        assert format.decode_header(header.encode(), "x") == header
    assert format.decode_trailer(TRAILER.encode(), TRAILER.length, "x") == TRAILER


@pytest.mark.parametrize(("version", "edition"), [(1, 5), (2, 0), (3, 5), (4, 5)])
def test_a_version_and_an_edition_that_can_not_be(version: int, edition: int) -> None:
    data = bytearray(HEADER.encode())
    data[8:12] = version.to_bytes(4, "little")
    data[4080:4088] = edition.to_bytes(8, "little")
    data[4088:] = format.xxhash.xxh3_64_intdigest(bytes(data[:4088])).to_bytes(8, "little")
    with pytest.raises(Corrupt if version < 4 else UnsupportedFormat):
        format.decode_header(bytes(data), "x")


@pytest.mark.parametrize("header", [HEADER, AGAIN])
def test_every_flipped_bit_of_a_header_is_found(header: format.LayerHeader) -> None:
    good = header.encode()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            format.decode_header(bytes(bad), "x")


def test_every_flipped_bit_of_a_trailer_is_found() -> None:
    good = TRAILER.encode()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            format.decode_trailer(bytes(bad), TRAILER.length, "x")


def test_a_header_that_is_cut_off_is_found() -> None:
    for length in (0, 8, 100, 4095):
        with pytest.raises(Corrupt):
            format.decode_header(HEADER.encode()[:length], "x")


@pytest.mark.parametrize("dtype", [format.ROW, format.RECORD])
def test_every_flipped_bit_of_a_row_is_found(dtype: np.dtype[np.void]) -> None:
    rng = np.random.default_rng(1)
    rows = np.frombuffer(rng.bytes(50 * dtype.itemsize), dtype).copy()
    width = rows["check"].dtype
    rows["check"] = format.checks(rows, 77).astype(width)
    assert np.array_equal(format.checks(rows, 77).astype(width), rows["check"])
    assert not np.any(format.checks(rows, 78).astype(width) == rows["check"])
    data = rows.tobytes()
    for bit in range(8 * dtype.itemsize):
        bad = bytearray(data)
        for row in range(50):
            bad[row * dtype.itemsize + bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(bad), dtype)
        assert not np.any(format.checks(flipped, 77).astype(width) == flipped["check"])


def test_the_address_follows_from_a_row_and_its_check() -> None:
    rows = np.frombuffer(np.random.default_rng(5).bytes(1000 * format.ROW.itemsize), format.ROW).copy()
    rows["check"] = format.checks(rows, 77)
    assert set(format.addresses(rows).tolist()) == {77}


def test_a_digest_follows_from_what_changes() -> None:
    rng = np.random.default_rng(2)
    numbers = np.arange(100, dtype=np.uint64)
    id0, id1 = (rng.integers(0, 1 << 64, 100, np.uint64) for _ in range(2))
    whole = format.map_digest(numbers, id0, id1)
    parts = [format.map_digest(numbers[s], id0[s], id1[s]) for s in (slice(0, 40), slice(40, None))]
    text = format.format_digest(*whole)
    assert format.format_digest(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]) == text
    assert format.format_digest(*format.parse_digest(text)) == text
    swapped = format.map_digest(numbers[::-1], id0, id1)
    assert format.format_digest(*swapped) != text


SETTINGS = manifest.Settings(format=1, id="00" * 16, chunk_size=65536, codec="zstd", created="2026-11-22T20:00:00Z")


def test_every_flipped_bit_of_a_sealed_document_is_found() -> None:
    good = manifest.seal(SETTINGS)
    assert manifest.decode_settings(good, "x") == SETTINGS
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BackupfsError) as caught:
            manifest.decode_settings(bytes(bad), "x")
        assert caught.value.exit_code in (12, 20)


def test_a_later_version_is_refused_by_name() -> None:
    later = manifest.seal(manifest.Settings(format=2, id="0", chunk_size=1, codec="x", created=""))
    with pytest.raises(UnsupportedFormat, match="format version 2"):
        manifest.decode_settings(later, "x")


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\xff" * 200, b'{"format":1}', b"[" * 2000])
def test_what_is_no_document_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        manifest.decode_settings(data, "x")


def test_damaged_frames_are_refused_and_never_inflated() -> None:
    chunk = b"backupfs" * 8192
    payload = codec.compress(chunk)
    assert payload is not None
    assert codec.decompress(payload, len(chunk)) == chunk
    with pytest.raises(ValueError, match="size"):
        codec.decompress(payload, 4096)
    for bad in (b"", payload[:-1], payload + b"x", b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8, bytes(100)):
        with pytest.raises(ValueError, match=r".+"):
            codec.decompress(bad, len(chunk))


def test_random_bytes_are_not_compressed() -> None:
    assert codec.compress(np.random.default_rng(3).bytes(65536)) is None
