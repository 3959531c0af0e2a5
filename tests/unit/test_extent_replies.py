"""What a server may say about a range, and what it may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.errors import ProtocolError
from backupfs.extents import Extent
from backupfs.sources.source import DIRTY, ZERO, align, pair_extents, parse_descriptors, split


def parse(entries: list[int], bit: int = ZERO, offset: int = 1000, length: int = 100) -> list[tuple[int, int, bool]]:
    return [(e.offset, e.length, e.flag) for e in parse_descriptors(entries, bit, offset, length)]


@pytest.mark.parametrize(
    ("entries", "extents"),
    [
        pytest.param([100, 0], [(1000, 100, False)], id="all of it"),
        pytest.param([60, 2, 40, 0], [(1000, 60, True), (1060, 40, False)], id="two"),
        pytest.param([60, 2], [(1000, 60, True)], id="short"),
        pytest.param([1, 2], [(1000, 1, True)], id="one byte"),
        pytest.param([5000, 2], [(1000, 100, True)], id="one, over-long"),
        pytest.param([60, 0, 5000, 2], [(1000, 60, False), (1060, 40, True)], id="the last, over-long"),
        pytest.param([0xFFFFFFFF, 3], [(1000, 100, True)], id="4 GiB"),
        pytest.param([50, 2, 50, 2], [(1000, 50, True), (1050, 50, True)], id="alike"),
    ],
)
def test_a_legal_reply_becomes_extents(entries: list[int], extents: list[tuple[int, int, bool]]) -> None:
    assert parse(entries) == extents


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([], id="nothing"),
        pytest.param([100], id="half a descriptor"),
        pytest.param([100, 0, 1], id="one and a half"),
        pytest.param([0, 0], id="empty extent"),
        pytest.param([50, 0, 0, 2, 50, 0], id="empty extent inside"),
        pytest.param([100, 0, 0, 0], id="empty extent at the end"),
        pytest.param([100, 0, 1, 0], id="goes on at the end"),
        pytest.param([5000, 0, 1, 0], id="goes on after the end"),
    ],
)
def test_an_illegal_reply_is_refused(entries: list[int]) -> None:
    with pytest.raises(ProtocolError, match="offset 1000"):
        parse(entries)


@pytest.mark.parametrize(
    ("flags", "zero"), [(0, False), (1, False), (2, True), (3, True), (0xFFFFFFFC, False), (0xFFFFFFFF, True)]
)
def test_only_the_zero_bit_means_zeroes(flags: int, zero: bool) -> None:
    assert parse([100, flags]) == [(1000, 100, zero)]


@pytest.mark.parametrize(("flags", "dirty"), [(0, False), (1, True), (2, False), (0xFFFFFFFE, False)])
def test_only_the_first_bit_of_a_bitmap_means_dirty(flags: int, dirty: bool) -> None:
    assert parse([100, flags], DIRTY) == [(1000, 100, dirty)]


def test_pairs_reach_as_far_as_the_shorter_reply() -> None:
    pairs = pair_extents([Extent(0, 40, True), Extent(40, 60, False)], [Extent(0, 70, True)], 0, 100)
    assert pairs == [(Extent(0, 40, True), Extent(0, 40, True)), (Extent(40, 30, False), Extent(40, 30, True))]


def test_pairs_are_clipped_to_what_was_wanted() -> None:
    pairs = pair_extents([Extent(0, 512, True)], [Extent(0, 512, False)], 100, 200)
    assert pairs == [(Extent(100, 200, True), Extent(100, 200, False))]


@pytest.mark.parametrize("side", [0, 1])
def test_a_reply_without_progress_is_refused(side: int) -> None:
    replies = [[Extent(0, 512, True)], [Extent(0, 512, True)]]
    replies[side] = [Extent(0, 100, True)]
    with pytest.raises(ProtocolError, match="offset 100"):
        pair_extents(*replies, 100, 200)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7)), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7)), min_size=1, max_size=9),
    st.integers(0, 100),
)
def test_pairs_of_legal_replies_cover_a_beginning(
    zeroes: list[tuple[int, int]], dirties: list[tuple[int, int]], offset: int
) -> None:
    totals = [sum(length for length, _ in side) for side in (zeroes, dirties)]
    length = max(totals)
    sides = [
        parse_descriptors([n for pair in side for n in pair], bit, offset, length)
        for side, bit in ((zeroes, ZERO), (dirties, DIRTY))
    ]
    position = offset
    for zero, dirty in pair_extents(*sides, offset, length):
        assert (zero.offset, zero.length) == (dirty.offset, dirty.length)
        assert zero.offset == position
        assert zero.length > 0
        position = zero.end
    assert position == offset + min(totals)


@pytest.mark.parametrize(
    ("asked", "aligned"),
    [
        ((0, 512), (0, 512)),
        ((1, 1), (0, 512)),
        ((511, 2), (0, 1024)),
        ((1024, 200), (1024, 276)),
        ((1299, 1), (1024, 276)),
    ],
)
def test_align_goes_outwards_but_not_past_the_disk(asked: tuple[int, int], aligned: tuple[int, int]) -> None:
    assert align(*asked, 512, 1300) == aligned


def test_split_cuts_from_the_beginning() -> None:
    assert list(split(10, 25, 10)) == [(10, 10), (20, 10), (30, 5)]
    assert list(split(10, 0, 10)) == []
