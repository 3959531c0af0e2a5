"""A point's manifest: a JSON document that carries its own checksum. Pure encode and decode.

The last member, `blake3`, covers all bytes before it, so that a flipped bit anywhere in the file is found and the
file still is plain JSON.
"""

from typing import Annotated, Any, Literal, TypeVar

import blake3
import msgspec

from backupfs.errors import Corrupt, UnsupportedFormat
from backupfs.repository.format import MAX_DISK, VERSION

_SEAL = b',"blake3":"'
_SEAL_LENGTH = len(_SEAL) + 64 + len(b'"}\n')


Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_DISK)]
Seq = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Hex128 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Hex256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class DiskEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One disk at one point. Sizes in bytes."""

    name: str
    size: Bytes
    kind: Literal["full", "delta"]
    chain: str
    seq: Seq
    parent: str | None  # the point that this delta continues
    layer: str  # file name
    raw: str | None = None  # of a plain layer, the file name of its payloads
    layer_id: Hex128
    layer_bytes: Bytes
    layer_blake3: Hex256
    read: Literal["all", "dirty"]
    reason: str
    data_bytes: Bytes
    stored_bytes: Bytes
    allocated_bytes: Bytes  # of the whole disk as it shows at this point
    digest: Hex128
    bitmap: str | None = None
    recorder: str | None = None  # what has recorded since: QEMU's bitmap, libvirt's checkpoint
    source_format: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One point of one VM."""

    format: int
    repository: Hex128
    vm: str
    id: str
    time: str
    parent: str | None
    consistency: Literal["crash", "frozen"]
    disks: list[DiskEntry]
    domain_xml: str | None = None
    tags: list[str] = []
    note: str = ""
    pinned: bool = False
    program: str = ""

    def disk(self, name: str) -> DiskEntry | None:
        """Return the entry of the disk called `name`."""
        return next((d for d in self.disks if d.name == name), None)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """backupfs.json: what all of a repository shares."""

    format: int
    id: Hex128
    chunk_size: int
    codec: str
    created: str


def seal(document: msgspec.Struct | dict[str, Any]) -> bytes:
    """Return the document as JSON with its checksum as the last member."""
    body = msgspec.json.encode(document)[:-1]
    return body + _SEAL + blake3.blake3(body).hexdigest().encode() + b'"}\n'


def seal_of(data: bytes) -> bytes:
    """Return the 32 bytes of the checksum in a sealed document."""
    return bytes.fromhex(data[-_SEAL_LENGTH + len(_SEAL) : -3].decode())


def _open_seal(data: bytes, path: str) -> None:
    body, tail = data[:-_SEAL_LENGTH], data[-_SEAL_LENGTH:]
    if tail != _SEAL + blake3.blake3(body).hexdigest().encode() + b'"}\n':
        raise Corrupt(path, 0, "the checksum in the file does not match the rest of it")


class _Version(msgspec.Struct):
    format: int


def _check_version(data: bytes, path: str) -> None:
    """Refuse another version before anything else is believed: a later one may be sealed in another way."""
    try:
        version = msgspec.json.decode(data, type=_Version).format
    except msgspec.DecodeError as e:
        raise Corrupt(path, 0, f"not a JSON document of backupfs: {e}") from e
    if version > VERSION:
        _open_seal(data, path)  # else it may be a flipped bit
        raise UnsupportedFormat(f"{path}: format version {version}; this backupfs knows version {VERSION}")


T = TypeVar("T", bound=msgspec.Struct)


def _decode(data: bytes, path: str, kind: type[T]) -> T:
    _check_version(data, path)
    return open_sealed(data, path, kind)


def open_sealed(data: bytes, path: str, kind: type[T]) -> T:
    """Return what `seal` made of a document of this kind. Raises Corrupt."""
    _open_seal(data, path)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as e:
        raise Corrupt(path, 0, str(e)) from e


def decode_manifest(data: bytes, path: str) -> Manifest:
    """Return the manifest in `data`.

    Raises:
        Corrupt: damaged.
        UnsupportedFormat: of a later format version.
    """
    return _decode(data, path, Manifest)


def decode_settings(data: bytes, path: str) -> Settings:
    """Return the settings in `data`. Raises as `decode_manifest`."""
    return _decode(data, path, Settings)
