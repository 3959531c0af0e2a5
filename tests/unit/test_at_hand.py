"""What is read without looking anything up: right bytes or none, whatever happened since it was looked up."""

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from repositories import add_point

from backupfs.errors import Corrupt
from backupfs.repository import point as point_module
from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository
from backupfs.units import KiB, MiB

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
        assert at_once(image, 0) == disk[:4096], "it is in the cache"
        image._store.chunks.clear()
        assert at_once(image, 0) is None
        assert at_once(image, 6 * CHUNK) == bytes(4096)


def test_what_is_stored_as_it_is_comes_out_of_the_kernels_memory(stored: PointImage, disk: bytes) -> None:
    assert read(stored, 0) == disk[:4096]
    for offset in range(0, SIZE, 4096):
        assert at_once(stored, offset) == disk[offset : offset + 4096]


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


def test_what_the_kernel_has_in_memory_is_checked_each_time(stored: PointImage, disk: bytes, tmp_path: Path) -> None:
    """A part of a checked chunk may be gone bad: it left the memory, and somebody had it read from the disk again."""
    store = stored._store
    assert read(stored, 0, SIZE) == disk
    assert at_once(stored, 0) == disk[:4096]
    for _ in range(3):
        assert at_once(stored, CHUNK) == disk[CHUNK : CHUNK + 4096]
    damage(tmp_path, disk[:512])
    damage(tmp_path, disk[CHUNK : CHUNK + 512])
    assert at_once(stored, CHUNK + 4096) == disk[CHUNK + 4096 : CHUNK + 8192], "asked for often, so it is in the cache"
    store.chunks.clear()
    assert at_once(stored, CHUNK + 4096) is None
    for offset in (0, 4096, CHUNK - 512):
        assert at_once(stored, offset, 512) is None
        with pytest.raises(Corrupt, match="checksum"):
            read(stored, offset, 512)
    with pytest.raises(Corrupt, match="checksum"):
        read(stored, 0, SIZE)
    assert read(stored, 2 * CHUNK, 4 * CHUNK) == disk[2 * CHUNK : 6 * CHUNK]


def test_large_chunks_hold_nobody_up(tmp_path: Path) -> None:
    disk = random.Random(3).randbytes(MiB)
    Repository.init(str(tmp_path / "repo"), codec_name="none", chunk_size=MiB)
    with Repository.open(str(tmp_path / "repo")) as repository:
        image = repository.open_image("web01", add_point(repository, disk, step=MiB).id, "vda")
        assert read(image, 0) == disk[:4096]
        assert at_once(image, 4096) is None
        image.close()


def damage(tmp_path: Path, old: bytes) -> None:
    """Write over some bytes of the layer's file, as another program would; they stay in memory."""
    (file,) = tmp_path.rglob("*.raw")
    file.chmod(0o600)
    with file.open("r+b", buffering=0) as damaged:
        damaged.seek(file.read_bytes().index(old))
        damaged.write(b"\xff" * len(old))


def test_many_threads_read_what_is_at_hand(tmp_path: Path, disk: bytes) -> None:
    """Each has memory of its own for what it checks, and nothing is kept that would hide it."""
    Repository.init(str(tmp_path / "repo"), codec_name="none")
    before = sys.getswitchinterval()
    with Repository.open(str(tmp_path / "repo"), chunk_cache=1) as repository:
        image = repository.open_image("web01", add_point(repository, disk).id, "vda")
        read(image, 0, SIZE)

        def look(seed: int) -> int:
            rng, found = random.Random(seed), 0
            for _ in range(3000):
                offset = rng.randrange(SIZE // 4096) * 4096
                seen = at_once(image, offset)
                assert seen in (None, disk[offset : offset + 4096])
                found += seen is not None
            return found

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                assert min(pool.map(look, range(4))) > 1000
        finally:
            sys.setswitchinterval(before)
        image.close()
