"""--repair of layers whose own point was deleted, and that other points stand on."""

import random
from pathlib import Path

import numpy as np
import pytest
from commands import backupfs
from damaging import check, flip, kept, layer, overwrite, repaired
from repositories import add_point, read_point

from backupfs.repository import codec
from backupfs.repository.format import FENCE_ROWS, HEADER_SIZE, ROW, TRAILER_SIZE, decode_header
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services.gc import gc
from backupfs.units import KiB

CHUNK = 4 * KiB
CHUNKS = 900
SECTOR = 4 * KiB


class Disk:
    """A repository of a full point and three deltas, some of which are deleted."""

    def __init__(self, path: Path, codec_name: str, deleted: int) -> None:
        Repository.init(str(path), chunk_size=CHUNK, codec_name=codec_name)
        self.repository = Repository.open(str(path))
        rng = random.Random(1)
        data = bytearray(b"".join(rng.randbytes(CHUNK // 4) * 4 for _ in range(CHUNKS)) + b"the end")
        self.states: dict[str, bytes] = {}
        for number in range(4):
            self.states[add_point(self.repository, bytes(data)).id] = bytes(data)
            for chunk in range(number, CHUNKS, 5):
                data[chunk * CHUNK : (chunk + 1) * CHUNK] = rng.randbytes(CHUNK // 2) * 2
            data[600 * CHUNK : (603 + number) * CHUNK] = bytes((3 + number) * CHUNK)
        gone = list(self.states)[:deleted]
        with self.repository.exclusive():
            self.repository.remove_points([("web01", point) for point in gone])
        for point in gone:
            del self.states[point]
        gc(self.repository)

    def layer(self, seq: int) -> Path:
        return layer(self.repository, seq)

    def check(self) -> None:
        self.repository.store.close()  # drops what is open
        assert list(check(self.repository).all_damage(CHUNK)) == []
        assert {p: read_point(self.repository, p) for p in self.repository.points("web01")} == self.states
        gc(self.repository)
        assert {p: read_point(self.repository, p) for p in self.repository.points("web01")} == self.states


@pytest.mark.parametrize("deleted", [1, 3])
@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_flipped_bits(tmp_path: Path, codec_name: str, deleted: int) -> None:
    disk = Disk(tmp_path / "repo", codec_name, deleted)
    rng = random.Random(deleted)
    for seq in range(deleted):
        path = disk.layer(seq)
        whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
        places = [0, 9, 20, 70, 2000, HEADER_SIZE - 12, HEADER_SIZE - 1, trailer.fences_offset, len(whole) - 72]
        places += [len(whole) - 40, len(whole) - 1]
        places += [rng.randrange(trailer.table_offset, trailer.fences_offset) for _ in range(8)]
        for place in places:
            flip(path, place)
            assert all(d.repaired for d in repaired(disk.repository)), place
            assert path.read_bytes() == whole, place
            assert path.stat().st_mode & 0o777 == 0o444
    assert len(kept(disk.repository)) == len(places) * deleted
    disk.check()


@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_the_command(tmp_path: Path, codec_name: str) -> None:
    disk = Disk(tmp_path / "repo", codec_name, 1)
    path = disk.layer(0)
    disk.repository.close()
    whole = path.read_bytes()
    flip(path, Layer(str(path)).trailer().table_offset + 70)
    backupfs(tmp_path / "repo", "gc", code=20)
    said = backupfs(tmp_path / "repo", "verify", "web01", "--repair")
    assert "repaired from the points that stand on it" in said
    assert path.read_bytes() == whole
    backupfs(tmp_path / "repo", "verify")
    disk.check()


@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_all_of_them_at_once(tmp_path: Path, codec_name: str) -> None:
    """Header and trailer lost, and a bit in a row: of the base and of two deltas, one of which keeps verify from it."""
    disk = Disk(tmp_path / "repo", codec_name, 3)
    whole = {}
    for seq in (0, 1, 2):
        path = disk.layer(seq)
        whole[path], trailer = path.read_bytes(), Layer(str(path)).trailer()
        flip(path, trailer.table_offset + 3 * ROW.itemsize + 24)
        overwrite(path, 0, bytes(HEADER_SIZE))
        overwrite(path, trailer.fences_offset, bytes(len(whole[path]) - trailer.fences_offset))
    assert all(d.repaired for d in repaired(disk.repository))
    assert {path: path.read_bytes() for path in whole} == whole
    disk.check()


@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_without_an_index(tmp_path: Path, codec_name: str) -> None:
    """A header is worked out from those around it, and a row's hashes from its payload."""
    disk = Disk(tmp_path / "repo", codec_name, 2)
    path = disk.layer(1)
    whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
    edition = decode_header(whole[:HEADER_SIZE], str(path)).edition
    disk.repository.close()
    for seq in (0, 1):
        disk.layer(seq).with_suffix(".copy").write_bytes(disk.layer(seq).read_bytes())
    (tmp_path / "repo/index").rename(tmp_path / "gone")
    overwrite(path, 0, bytes(HEADER_SIZE - 16 if edition else HEADER_SIZE))
    at = next(at for at in range(trailer.rows) if row_of(whole, trailer.table_offset, at)["codec"] != codec.ZERO)
    overwrite(path, trailer.table_offset + at * ROW.itemsize + 16, bytes(24))
    assert all(d.repaired for d in repaired(disk.repository))
    assert path.read_bytes() == whole
    disk.check()


def row_of(whole: bytes, table: int, place: int) -> np.void:
    row: np.void = np.frombuffer(whole, ROW, 1, table + place * ROW.itemsize)[0]
    return row


@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_a_lost_sector_of_a_delta(tmp_path: Path, codec_name: str) -> None:
    disk = Disk(tmp_path / "repo", codec_name, 3)
    for seq in (1, 2):
        path = disk.layer(seq)
        whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
        for at in range(trailer.table_offset, trailer.fences_offset, SECTOR):
            overwrite(path, at, bytes(min(SECTOR, trailer.fences_offset - at)))
            assert all(d.repaired for d in repaired(disk.repository))
            assert path.read_bytes() == whole
    disk.check()


def test_a_lost_sector_of_a_plain_base(tmp_path: Path) -> None:
    """Its rows follow from the raw image; those of chunks that gc took out of it, since nobody sees them, say so."""
    disk = Disk(tmp_path / "repo", "none", 3)
    path = disk.layer(0)
    whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
    rows = np.frombuffer(whole, ROW, trailer.rows, trailer.table_offset)
    for at in range(trailer.table_offset, trailer.fences_offset, SECTOR):
        overwrite(path, at, bytes(min(SECTOR, trailer.fences_offset - at)))
        assert all(d.repaired for d in repaired(disk.repository))
    found = np.frombuffer(path.read_bytes(), ROW, trailer.rows, trailer.table_offset)
    unseen = np.flatnonzero(rows != found)
    assert 0 < len(unseen) < CHUNKS
    assert set(found["id0"][unseen].tolist()) == set(found["xxh3"][unseen].tolist()) == {0}
    assert path.read_bytes()[trailer.fences_offset :] == whole[trailer.fences_offset :]
    image = path.with_suffix(".raw").read_bytes()
    for chunk in unseen.tolist():
        assert not image[chunk * CHUNK : (chunk + 1) * CHUNK].strip(b"\0")
    disk.check()


@pytest.mark.parametrize("payload_too", [False, True])
@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_the_highest_bits_of_words(tmp_path: Path, codec_name: str, *, payload_too: bool) -> None:
    """The row's check does not say in which word it was: the payload does, or the digests of the points."""
    disk = Disk(tmp_path / "repo", codec_name, 1)
    path = disk.layer(0)
    whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
    data = path.with_suffix(".raw") if codec_name == "none" else path
    payloads = data.read_bytes()
    places = range(301, 304) if payload_too else range(301, 340)
    for place in places:
        if place % 5 != 0:  # else nobody may see its chunk
            word = (16, 24, 32)[place % 3]
            at = trailer.table_offset + place * ROW.itemsize + word + 7
            overwrite(path, at, bytes([whole[at] ^ 0x80]))
            if payload_too:
                flip(data, int(row_of(whole, trailer.table_offset, place)["offset"]) + 30)
    table, *chunks = repaired(disk.repository)
    assert table.repaired
    assert bool(chunks) == payload_too
    assert not any(c.repaired for c in chunks)
    assert path.read_bytes()[trailer.table_offset :] == whole[trailer.table_offset :]
    if payload_too:
        data.chmod(0o600)
        data.write_bytes(payloads)
    disk.check()


def test_a_layer_that_was_written_again(tmp_path: Path) -> None:
    """It has an edition, and an index that knows of another is not asked for its rows."""
    disk = Disk(tmp_path / "repo", "zstd", 3)
    layers = {seq: Layer(str(disk.layer(seq))) for seq in (0, 1, 2)}
    again = [seq for seq in layers if layers[seq].header.edition]
    assert again
    for seq in again:
        path = disk.layer(seq)
        whole, trailer = path.read_bytes(), layers[seq].trailer()
        overwrite(path, 0, bytes(HEADER_SIZE))
        flip(path, trailer.table_offset + 30)
        assert all(d.repaired for d in repaired(disk.repository))
        assert path.read_bytes() == whole
    disk.check()


def test_the_layer_of_a_manifest_that_is_damaged(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "repo", "zstd", 0)
    point = list(disk.states)[1]
    manifest = tmp_path / "repo/vms/web01/points" / f"{point}.json"
    kept_manifest, path = manifest.read_bytes(), disk.layer(1)
    whole = path.read_bytes()
    flip(manifest, 60)
    flip(path, Layer(str(path)).trailer().table_offset + 77)
    assert {d.kind: bool(d.repaired) for d in repaired(disk.repository)} == {"manifest": False, "table": True}
    assert path.read_bytes() == whole
    manifest.write_bytes(kept_manifest)
    disk.check()


def test_what_can_not_be_proven_is_left(tmp_path: Path) -> None:
    def refused(disk: Disk) -> None:
        path = disk.layer(0)
        before = path.read_bytes()
        (found,) = repaired(disk.repository)
        assert (found.file, found.repaired, found.points) == (str(path), None, list(disk.states))
        assert "its point is gone, and what is left of it is not enough" in found.what
        assert path.read_bytes() == before
        assert not kept(disk.repository)

    compressed, plain = Disk(tmp_path / "zstd", "zstd", 1), Disk(tmp_path / "none", "none", 1)
    for disk in (compressed, plain):
        path = disk.layer(0)
        whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
        overwrite(path, 0, disk.layer(1).read_bytes()[:HEADER_SIZE])  # a good one, of another layer
        refused(disk)
        overwrite(path, 0, whole[:HEADER_SIZE])
        path.chmod(0o600)
        path.write_bytes(whole[: -TRAILER_SIZE - 8 * -(-trailer.rows // FENCE_ROWS)])
        refused(disk)
        path.write_bytes(whole)
        overwrite(path, trailer.table_offset + SECTOR, bytes(SECTOR))
        if disk is plain:  # and a chunk that is seen is not what it was
            flip(path.with_suffix(".raw"), 101 * CHUNK + 7)
        refused(disk)
        overwrite(path, 0, whole)
        if disk is plain:
            flip(path.with_suffix(".raw"), 101 * CHUNK + 7)
        disk.check()
