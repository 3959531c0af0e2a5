"""Extents: ranges of a disk that are alike. Pure functions on iterators of them, in order of offset.

dirty   ####----####----          what may have changed
zero    --##########----          what is zero now
chunks  |...|...|...|...|
plan    read zero zero  (last chunk: not dirty)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a disk: `offset` and `length` in bytes.

    `flag` says what it is; its meaning comes with where the extent came from: zero or data for an allocation,
    dirty or clean for a bitmap.
    """

    offset: int
    length: int
    flag: bool

    @property
    def end(self) -> int:
        """The offset just after the extent."""
        return self.offset + self.length


def coalesce(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that touch and have the same flag; drop empty ones."""
    held: Extent | None = None
    for extent in extents:
        if extent.length == 0:
            continue
        if held is not None and held.end == extent.offset and held.flag == extent.flag:
            held = Extent(held.offset, held.length + extent.length, held.flag)
            continue
        if held is not None:
            yield held
        held = extent
    if held is not None:
        yield held


def clip(extents: Iterable[Extent], offset: int, length: int) -> Iterator[Extent]:
    """Cut everything outside `offset`, `length` away."""
    end = offset + length
    for extent in extents:
        first, last = max(extent.offset, offset), min(extent.end, end)
        if first < last:
            yield Extent(first, last - first, extent.flag)


def widen(extents: Iterable[Extent], unit: int, end: int) -> Iterator[Extent]:
    """Cover a range with whole units: a unit is flagged when any byte in it is.

    `extents` cover a range that begins on a unit, without gaps; `end` is where that range, and the answer, ends.
    """
    flagged_to = -1
    position = -1
    for extent in extents:
        if position < 0:
            position = extent.offset
        if not extent.flag:
            continue
        first = max(extent.offset // unit * unit, flagged_to)
        last = min(-(-extent.end // unit) * unit, end)
        if first > position:
            yield Extent(position, first - position, False)
        if last > first:
            yield Extent(first, last - first, True)
            position = flagged_to = last
    if 0 <= position < end:
        yield Extent(position, end - position, False)


def narrow(extents: Iterable[Extent], unit: int, end: int) -> Iterator[Extent]:
    """Cover a range with whole units: a unit is flagged only when every byte in it is. Otherwise as `widen`."""
    flipped = (Extent(e.offset, e.length, not e.flag) for e in coalesce(extents))
    for extent in widen(flipped, unit, end):
        yield Extent(extent.offset, extent.length, not extent.flag)


def intersect(left: Iterable[Extent], right: Iterable[Extent]) -> Iterator[tuple[Extent, Extent]]:
    """Yield both sides cut at each other's borders, in pairs that cover the same range.

    Both cover the same range without gaps.
    """
    lefts, rights = iter(left), iter(right)
    a, b = next(lefts, None), next(rights, None)
    while a is not None and b is not None:
        length = min(a.length, b.length)
        yield Extent(a.offset, length, a.flag), Extent(b.offset, length, b.flag)
        a = Extent(a.offset + length, a.length - length, a.flag) if a.length > length else next(lefts, None)
        b = Extent(b.offset + length, b.length - length, b.flag) if b.length > length else next(rights, None)
