"""Extents against a byte-by-byte model."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from backupfs.extents import Extent, clip, coalesce, intersect, narrow, widen

UNIT = 4


@st.composite
def covers(draw: st.DrawFn) -> list[Extent]:
    """Extents that cover a range from a multiple of UNIT, without gaps."""
    position = draw(st.integers(0, 5)) * UNIT
    found = []
    for length, flag in draw(st.lists(st.tuples(st.integers(1, 11), st.booleans()), min_size=1, max_size=12)):
        found.append(Extent(position, length, flag))
        position += length
    return found


def flags(extents: list[Extent]) -> dict[int, bool]:
    return {byte: e.flag for e in extents for byte in range(e.offset, e.end)}


def assert_in_order(extents: list[Extent]) -> None:
    for a, b in itertools.pairwise(extents):
        assert a.end == b.offset


@given(covers())
def test_coalesce_keeps_every_byte_and_joins_neighbours(extents: list[Extent]) -> None:
    joined = list(coalesce(extents))
    assert flags(joined) == flags(extents)
    assert all(a.flag != b.flag for a, b in itertools.pairwise(joined))


@given(covers(), st.integers(0, 40), st.integers(0, 40))
def test_clip_cuts_to_the_range(extents: list[Extent], offset: int, length: int) -> None:
    expected = {b: f for b, f in flags(extents).items() if offset <= b < offset + length}
    assert flags(list(clip(extents, offset, length))) == expected


@given(covers())
def test_widen_flags_a_unit_when_any_byte_is_flagged(extents: list[Extent]) -> None:
    model, end = flags(extents), extents[-1].end
    wide = list(widen(extents, UNIT, end))
    assert_in_order(wide)
    assert flags(wide) == {
        b: any(model.get(c, False) for c in range(b // UNIT * UNIT, b // UNIT * UNIT + UNIT)) for b in model
    }


@given(covers())
def test_narrow_flags_a_unit_when_every_byte_is_flagged(extents: list[Extent]) -> None:
    model, end = flags(extents), extents[-1].end
    tight = list(narrow(extents, UNIT, end))
    assert_in_order(tight)
    assert flags(tight) == {
        b: all(model.get(c, True) for c in range(b // UNIT * UNIT, b // UNIT * UNIT + UNIT)) for b in model
    }


@given(covers(), covers())
def test_intersect_cuts_both_sides_alike(left: list[Extent], right: list[Extent]) -> None:
    length = min(sum(e.length for e in left), sum(e.length for e in right))
    offset = left[0].offset
    right = [Extent(e.offset - right[0].offset + offset, e.length, e.flag) for e in right]
    left, right = list(clip(left, offset, length)), list(clip(right, offset, length))
    pairs = list(intersect(left, right))
    assert all((a.offset, a.length) == (b.offset, b.length) for a, b in pairs)
    assert flags([a for a, _ in pairs]) == flags(left)
    assert flags([b for _, b in pairs]) == flags(right)
