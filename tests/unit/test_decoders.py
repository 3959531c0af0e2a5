"""Any bytes at all, and sealed ones that say anything at all: decoders raise what they document, and nothing else."""

import contextlib
import os
import struct

import blake3
import msgspec
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupfs.errors import Corrupt, ProtocolError, UnsupportedFormat
from backupfs.repository import codec, format, manifest
from backupfs.repository.records import decode_layer
from backupfs.repository.results import Result
from backupfs.sources.source import DIRTY, ZERO, parse_descriptors

EXAMPLES = 20_000 if os.environ.get("BACKUPFS_LONG") else 300
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
REFUSED = (Corrupt, UnsupportedFormat)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = sorted({*manifest.Manifest.__struct_fields__, *manifest.Settings.__struct_fields__, "blake3"})
documents = st.dictionaries(st.sampled_from(MEMBERS), json | st.integers(0, 3)) | json


def sealed(body: bytes) -> bytes:
    return body + b',"blake3":"' + blake3.blake3(body).hexdigest().encode() + b'"}\n'


def decode_each(data: bytes) -> None:
    for decode in (manifest.decode_manifest, manifest.decode_settings):
        with contextlib.suppress(*REFUSED):
            decode(data, "x")
    with contextlib.suppress(Corrupt):
        manifest.open_sealed(data, "x", Result)


@many
@given(st.binary(max_size=400), documents)
def test_documents(data: bytes, document: object) -> None:
    decode_each(data)
    decode_each(sealed(data))
    decode_each(sealed(b'{"format":1' + data))
    encoded = msgspec.json.encode(document)
    decode_each(encoded)
    decode_each(sealed(encoded[:-1]))


@many
@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 4088), st.integers(0, 65535))
def test_headers_with_a_right_checksum(data: bytes, version: int, cut: int, length: int) -> None:
    names = struct.pack("<H", length) + data
    body = (format.HEADER_MAGIC + struct.pack("<I", version) + bytes(68) + names).ljust(4088, b"\0")[:4088]
    encoded = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    for bad in (data, encoded, encoded[:cut]):
        try:
            found = format.decode_header(bad, "x")
        except REFUSED:
            continue
        assert found.vm is not None
        assert all(len(name.encode()) < 4096 for name in (found.vm, found.disk, found.chain))


@many
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4), st.integers(0, 1 << 63), st.binary(max_size=90))
def test_trailers_with_a_right_checksum(words: list[int], length: int, data: bytes) -> None:
    encoded = format.LayerTrailer(*words, format.LayerId(bytes(16))).encode()
    for bad, told in ((encoded, length), (data, length), (data, len(data))):
        try:
            found = format.decode_trailer(bad, told, "x")
        except Corrupt:
            continue
        assert found.length == told


@many
@given(st.binary(max_size=200), st.sampled_from([4096, 65536]), st.integers(0, 199), st.integers(0, 7))
def test_frames(data: bytes, chunk_size: int, place: int, bit: int) -> None:
    frame = bytearray(codec.compress(b"backupfs" * (chunk_size // 8)) or b"")
    frame[place % len(frame)] ^= 1 << bit
    for bad in (data, bytes(frame), b"\x28\xb5\x2f\xfd" + data):
        with contextlib.suppress(ValueError):
            assert len(codec.decompress(bad, chunk_size)) == chunk_size


@many
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_layers_in_the_index(key: bytes, value: bytes) -> None:
    with contextlib.suppress(struct.error, ValueError):  # what Index turns into Corrupt
        layer_id, _, _ = decode_layer(key, value)
        assert len(layer_id) == 16


@many
@given(
    st.lists(st.integers(0, (1 << 64) - 1), max_size=9),
    st.sampled_from([ZERO, DIRTY]),
    st.integers(0, 1 << 63),
    st.integers(1, 1 << 32),
)
def test_extents(entries: list[int], bit: int, offset: int, length: int) -> None:
    try:
        found = parse_descriptors(entries, bit, offset, length)
    except ProtocolError:
        return
    position = offset
    for extent in found:
        assert extent.offset == position
        assert extent.length > 0
        position = extent.end
    assert offset < position <= offset + length
