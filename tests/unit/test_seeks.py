"""Walks over a handle's data and holes, against the extents themselves."""

import errno
import os
import random
from collections.abc import Iterator

import pytest

from backupfs.extents import Extent
from backupfs.fuse import workers
from backupfs.fuse.workers import File
from backupfs.image import Buffer, seek

SIZE = 200_000


class Pieces:
    """A disk of pieces of data and holes, which may touch others of their kind. Counts what is asked for."""

    def __init__(self, seed: int, most: int) -> None:
        rng = random.Random(seed)
        self.size, self.asked, self.bytes_asked = SIZE, 0, 0
        self.pieces: list[Extent] = []
        position = 0
        while position < SIZE:
            length = min(rng.randint(1, most), SIZE - position)
            self.pieces.append(Extent(position, length, rng.random() < 0.5))
            position += length

    def readinto(self, offset: int, buffer: Buffer) -> None:
        raise AssertionError

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        assert 0 <= offset < offset + length <= SIZE
        self.asked += 1
        self.bytes_asked += length
        for piece in self.pieces:
            begin, end = max(piece.offset, offset), min(piece.end, offset + length)
            if begin < end:
                yield Extent(begin, end - begin, piece.flag)

    def close(self) -> None:
        pass


class Held:
    condemned = None
    backing = None

    def __init__(self, image: Pieces) -> None:
        self.image = image


def ask(file: File, offset: int, whence: int) -> int | None:
    try:
        return file.seek(offset, whence)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return None


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_FIRST_LOOK", 1000)
    monkeypatch.setattr(workers, "_LARGEST_LOOK", 50_000)
    monkeypatch.setattr(workers, "_FEW", 20)


@pytest.mark.parametrize("most", [30, 300, 30_000, 3 * SIZE])
def test_seeks_from_anywhere(most: int) -> None:
    for seed in range(3):
        image = Pieces(seed, most)
        file, rng = File(1, Held(image)), random.Random(seed)
        offset = at_once = 0
        for _ in range(300):
            whence = rng.choice((os.SEEK_DATA, os.SEEK_HOLE))
            # On from the last answer, as who walks does, or anywhere.
            offset = rng.randrange(SIZE) if rng.random() < 0.3 else offset
            try:
                expected: int | None = seek(image, offset, whence)
            except OSError:
                expected = None
            assert file.seek_at_once(offset, whence) in (None, expected)
            assert ask(file, offset, whence) == expected, (seed, offset, whence)
            again = file.seek_at_once(offset, whence)
            assert again in (None, expected)
            at_once += again is not None
            offset = expected if expected is not None and expected < SIZE else rng.randrange(SIZE)
        assert at_once > 20


@pytest.mark.parametrize("most", [300, 30_000])
def test_a_walk_asks_for_each_part_about_once(most: int) -> None:
    image = Pieces(5, most)
    file, offset, found = File(1, Held(image)), 0, []
    while (start := ask(file, offset, os.SEEK_DATA)) is not None:
        offset = file.seek(start, os.SEEK_HOLE)
        found.append((start, offset))
        if offset == SIZE:
            break
    whole = [[e.offset, e.end] for e in image.pieces if not e.flag]
    joined: list[tuple[int, int]] = []
    for begin, end in whole:
        joined[-1:] = [(joined[-1][0], end)] if joined and joined[-1][1] == begin else [*joined[-1:], (begin, end)]
    assert found == joined
    assert image.bytes_asked <= 1.1 * SIZE
    assert image.asked < 200


@pytest.mark.parametrize(("offset", "whence"), [(SIZE, os.SEEK_DATA), (SIZE + 5, os.SEEK_HOLE), (-1, os.SEEK_DATA)])
def test_behind_the_end(offset: int, whence: int) -> None:
    assert ask(File(1, Held(Pieces(1, 300))), offset, whence) is None


def test_another_whence() -> None:
    with pytest.raises(OSError, match="not a seek"):
        File(1, Held(Pieces(1, 300))).seek(0, 9)
