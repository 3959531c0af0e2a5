"""Decoded chunks in memory: what goes, what stays, and that nobody gets another's."""

import random
from concurrent.futures import ThreadPoolExecutor

from backupfs.repository.chunk_cache import NOTHING, ChunkCache, Key

LARGE = 1000


def key(number: int) -> Key:
    return 1, 2, number, number * 7


def chunk(number: int) -> bytes:
    return b"%d" % number * (LARGE // len(b"%d" % number))


def kept(cache: ChunkCache, numbers: range) -> list[int]:
    return [number for number in numbers if cache.get(key(number)).chunk is not None]


def test_what_came_first_goes_first() -> None:
    cache = ChunkCache(3 * LARGE)
    cells = [cache.put(key(number), chunk(number)) for number in range(5)]
    assert kept(cache, range(5)) == [2, 3, 4]
    assert [cell.chunk is None for cell in cells] == [True, True, False, False, False]
    assert cache.get(key(0)) is NOTHING
    assert cells[4].chunk == chunk(4)


def test_what_was_looked_at_stays_for_another_round() -> None:
    cache = ChunkCache(3 * LARGE)
    for number in range(3):
        cache.put(key(number), chunk(number))
    cache.get(key(0)).used = True
    cache.put(key(3), chunk(3))
    assert kept(cache, range(4)) == [0, 2, 3]
    cache.put(key(4), chunk(4))
    assert kept(cache, range(5)) == [0, 3, 4], "its turn comes after those that were there"
    cache.put(key(5), chunk(5))
    assert kept(cache, range(6)) == [3, 4, 5]


def test_all_of_them_in_use_are_no_reason_to_keep_more() -> None:
    cache = ChunkCache(3 * LARGE)
    for number in range(3):
        cache.put(key(number), chunk(number)).used = True
    cache.put(key(3), chunk(3)).used = True
    assert kept(cache, range(4)) == [1, 2, 3]


def test_the_same_again_and_one_that_is_too_large() -> None:
    cache = ChunkCache(2 * LARGE)
    first = cache.put(key(1), chunk(1))
    second = cache.put(key(1), chunk(1))
    assert (first.chunk, second.chunk) == (None, chunk(1))
    cache.put(key(2), chunk(2))
    assert kept(cache, range(4)) == [1, 2]
    cache.put(key(3), chunk(3) * 5)
    assert kept(cache, range(4)) == [3]
    cell = cache.get(key(3))
    cache.clear()
    assert cell.chunk is None
    cache.put(key(1), chunk(1))
    cache.put(key(2), chunk(2))
    assert kept(cache, range(4)) == [1, 2], "nothing counts that was dropped"


def test_many_threads() -> None:
    cache = ChunkCache(20 * LARGE)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5000):
            number = rng.randrange(50)
            cell = cache.get(key(number))
            found = cell.chunk
            if found is None:
                cache.put(key(number), chunk(number))
            else:
                cell.used = True
                assert found == chunk(number)
            if rng.random() < 0.001:
                cache.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert 0 < len(kept(cache, range(50))) <= 20
