"""What is read without looking anything up: right bytes or none, whatever happened since it was looked up."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from repositories import add_point

from backupfs.errors import Corrupt
from backupfs.repository import point as point_module
from backupfs.repository.payloads import Payloads
from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository
from backupfs.units import KiB

CHUNK = 64 * KiB
SIZE = 8 * CHUNK


def open_image(path: Path, codec: str, disk: bytes) -> Iterator[PointImage]:
    Repository.init(str(path), codec_name=codec)
    with Repository.open(str(path)) as repository:
        image = repository.open_image("web01", add_point(repository, disk).id, "vda")
        assert isinstance(image, PointImage)
        yield image
        image.close()


@pytest.fixture
def disk() -> bytes:
    words = random.Random(5)
    return b"".join(words.randbytes(CHUNK // 2) + bytes(CHUNK // 2) for _ in range(6)) + bytes(2 * CHUNK)


@pytest.fixture(params=["none", "zstd"])
def image(request: pytest.FixtureRequest, tmp_path: Path, disk: bytes) -> Iterator[PointImage]:
    yield from open_image(tmp_path / "repo", request.param, disk)


@pytest.fixture
def stored(tmp_path: Path, disk: bytes) -> Iterator[PointImage]:
    yield from open_image(tmp_path / "repo", "none", disk)


def at_once(image: PointImage, offset: int, length: int = 4096) -> bytes | None:
    memory = bytearray(b"\xee" * length)
    return bytes(memory) if image.at_once(offset, [memoryview(memory)]) else None


def read(image: PointImage, offset: int, length: int = 4096) -> bytes:
    return b"".join(image.gather(offset, length))


def test_nothing_is_at_hand_before_it_was_read(image: PointImage, disk: bytes) -> None:
    assert at_once(image, 0) is None
    assert read(image, 0) == disk[:4096]
    for length in (512, 4096, CHUNK):
        assert at_once(image, 0, length) == disk[:length]
    assert at_once(image, CHUNK - 512, 512) == disk[CHUNK - 512 : CHUNK]


def test_ranges_that_leave_the_chunk_are_not_at_hand(image: PointImage) -> None:
    image.readinto(0, bytearray(SIZE))
    for chunk in (0, 6):
        assert at_once(image, chunk * CHUNK) is not None
        assert at_once(image, (chunk + 1) * CHUNK - 512, 1024) is None
        assert at_once(image, chunk * CHUNK, CHUNK + 512) is None
    assert at_once(image, SIZE - 512, 1024) is None


def test_chunks_that_left_the_cache_or_whose_layer_was_closed(image: PointImage, disk: bytes) -> None:
    for _ in range(2):
        image.readinto(0, bytearray(SIZE))
        for offset in range(0, SIZE, 4096):
            found = at_once(image, offset)
            assert found is None or found == disk[offset : offset + 4096]
            read(image, offset)
            assert at_once(image, offset) == disk[offset : offset + 4096]
        image._store.opened.clear()
        image._store.chunks.clear()
        gc.collect()
        assert at_once(image, 0) is None
        assert at_once(image, 6 * CHUNK) == bytes(4096)


def test_memory_is_bounded_for_all_images(image: PointImage, disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_module, "_MOST_AT_HAND", 3)
    image.readinto(0, bytearray(SIZE))
    for offset in range(0, SIZE, CHUNK):
        read(image, offset)
        assert at_once(image, offset) == disk[offset : offset + 4096]
        assert len(image._store.at_hand) <= 3


def test_two_images_do_not_see_each_others_chunks(tmp_path: Path) -> None:
    first, second = (random.Random(n).randbytes(SIZE) for n in (1, 2))
    Repository.init(str(tmp_path / "repo"), codec_name="none")
    with Repository.open(str(tmp_path / "repo")) as repository:
        images = [repository.open_image("web01", add_point(repository, d).id, "vda") for d in (first, second)]
        for image, expected in zip(images, (first, second), strict=True):
            image.readinto(0, bytearray(SIZE))
            for offset in range(0, SIZE, CHUNK):
                read(image, offset)
                assert at_once(image, offset) == expected[offset : offset + 4096]
        for image in images:
            image.close()


def test_who_reads_a_layer_that_was_opened_again_concerns_those_who_read_it_before(
    stored: PointImage, disk: bytes, tmp_path: Path
) -> None:
    store, chain = stored._store, stored._chain
    assert read(stored, 0) == disk[:4096]
    assert at_once(stored, 0) == disk[:4096]
    before = store.payloads(chain, 0)  # as a thread that is still in it would hold it
    store.opened.clear()
    again = store.payloads(chain, 0)
    assert again is not before
    assert at_once(stored, 0) == disk[:4096], "it is the same file, and was checked"
    damage(tmp_path, disk[:4096])
    with pytest.raises(Corrupt, match="checksum"):
        stored._chunk(again, 0, *_row(stored))
    assert at_once(stored, 0) is None, "bad, and in memory"
    assert before.marks is again.marks


def damage(tmp_path: Path, old: bytes) -> None:
    """Write over some bytes of the layer's file, as another program would; they stay in memory."""
    (file,) = tmp_path.rglob("*.raw")
    file.chmod(0o600)
    with file.open("r+b", buffering=0) as damaged:
        damaged.seek(file.read_bytes().index(old))
        damaged.write(b"\xff" * len(old))
        os.fsync(damaged.fileno())


def test_several_chunks_are_checked_again_once_one_of_them_was_read_from_the_disk(
    stored: PointImage, disk: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    check = Payloads.check
    monkeypatch.setattr(Payloads, "check", lambda self, *args: checks.append(args[1]) or check(self, *args))
    for _ in range(2):
        assert read(stored, 0, SIZE) == disk
        assert len(checks) == 6, "each once, as long as they stay in memory"
    damage(tmp_path, disk[2 * CHUNK : 2 * CHUNK + 512])
    with pytest.raises(Corrupt, match="checksum"):
        read(stored, 2 * CHUNK)  # a chunk by itself comes from the disk again, and is checked
    for _ in range(2):
        with pytest.raises(Corrupt, match="checksum"):
            read(stored, 0, SIZE)
        assert read(stored, 3 * CHUNK, 3 * CHUNK) == disk[3 * CHUNK : 6 * CHUNK]


def test_chunks_that_left_the_memory_are_checked_again(stored: PointImage, disk: bytes, tmp_path: Path) -> None:
    assert read(stored, 0, SIZE) == disk
    (file,) = tmp_path.rglob("*.raw")
    damage(tmp_path, disk[4 * CHUNK : 4 * CHUNK + 512])
    with file.open("rb") as cached:
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(Corrupt, match="checksum"):
        read(stored, 0, SIZE)


def _row(image: PointImage) -> tuple[int, int, int]:
    at, xxh3, _, packed = point_module.PLACE.unpack_from(image.map.region(0), 0)
    return at, xxh3, packed
