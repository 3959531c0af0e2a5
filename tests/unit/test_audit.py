"""The audit's sample and comparison."""

import random
from collections import Counter

from images import BytesImage

from backupfs.image import ZeroImage
from backupfs.services.audit import Sample, first_difference


def test_every_chunk_is_as_likely_as_any_other() -> None:
    rng = random.Random(1)
    counts: Counter[int] = Counter()
    for _ in range(4000):
        sample = Sample(5, rng)
        for first, count in ((0, 3), (10, 20), (40, 1), (50, 26)):
            sample.add(first, count)
        assert len(set(sample.chunks)) == 5
        counts.update(sample.chunks)
    assert sum(counts.values()) == 20000
    assert set(counts) == {*range(3), *range(10, 30), 40, *range(50, 76)}
    assert all(300 < n < 500 for n in counts.values())  # 400 expected, standard deviation 19


def test_a_sample_takes_all_when_there_are_few() -> None:
    sample = Sample(64, random.Random(2))
    sample.add(7, 3)
    assert sample.chunks == [7, 8, 9]
    none = Sample(0, random.Random(2))
    none.add(0, 100)
    assert none.chunks == []


def test_a_huge_range_costs_little() -> None:
    sample = Sample(64, random.Random(3))
    sample.add(0, 1 << 50)
    assert len(sample.chunks) == 64


def test_the_first_difference_is_told() -> None:
    before = BytesImage(bytes(40))
    assert first_difference(ZeroImage(40), before, [0, 1, 2], 16) is None
    assert first_difference(BytesImage(bytes(33) + b"x" * 7), before, [2, 0], 16) == 32
    assert first_difference(ZeroImage(20), BytesImage(bytes(20) + b"x"), [1], 16) == 16
