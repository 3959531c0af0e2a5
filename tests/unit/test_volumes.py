"""Volumes as images: the bytes and holes of their runs, however they are read."""

import os
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.extents import Extent
from backupfs.guest.volumes import JoinedImage, Leg, Run, Volume, assemble, joined
from backupfs.image import Gatherer, Image, ZeroImage, check_range, seek

UNIT = 16
SIZE = 96 * UNIT


class HoleyImage:
    """A disk of random bytes with holes. What it gathers is only good until it is asked again, as PointImage's."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.size = SIZE
        self.holes = [draw.random() < 0.5 for _ in range(SIZE // UNIT)]
        self.data = b"".join(bytes(UNIT) if hole else draw.randbytes(UNIT) for hole in self.holes)
        self.scratch = bytearray()
        self.closed = False

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def gather(self, offset: int, length: int) -> list[memoryview]:
        check_range(self, offset, length)
        self.scratch[:] = b"?" * len(self.scratch)
        self.scratch = bytearray(self.data[offset : offset + length])
        return [memoryview(bytes(self.scratch))[: length // 2], memoryview(bytes(self.scratch))[length // 2 :]]

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        length = len(into[0])
        if offset % (4 * UNIT) + length > 4 * UNIT or not 0 <= offset <= self.size - length:
            return False
        into[0][:] = self.data[offset : offset + length]
        return True

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        position = offset
        while position < offset + length:
            end = min((position // UNIT + 1) * UNIT, offset + length)
            yield Extent(position, end - position, self.holes[position // UNIT])
            position = end

    def close(self) -> None:
        self.closed = True


@st.composite
def runs(draw: st.DrawFn) -> Run:
    legs = draw(st.integers(1, 3))
    stripe = draw(st.integers(1, 40)) if legs > 1 else 0
    each = draw(st.integers(1, 6)) * stripe if stripe else draw(st.integers(1, 300))
    places = [Leg(draw(st.sampled_from("abc")), draw(st.integers(0, SIZE - each))) for _ in range(legs)]
    return Run(each * legs, tuple(places), stripe)


def expected(volume: Volume, disks: dict[str, bytes]) -> bytes:
    """Return a volume's bytes, stripe by stripe."""
    found = bytearray()
    for run in volume.runs:
        legs = [disks[leg.disk][leg.offset : leg.offset + run.length // len(run.legs)] for leg in run.legs]
        step = run.stripe or run.length
        for position in range(0, len(legs[0]), step):
            for leg in legs:
                found += leg[position : position + step]
    return bytes(found)


DISKS = {name: HoleyImage(i) for i, name in enumerate("abc")}
BYTES = {name: disk.data for name, disk in DISKS.items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(runs(), min_size=1, max_size=5), st.randoms(use_true_random=False), st.booleans())
def test_a_volume_is_its_runs(found: list[Run], draw: random.Random, join: bool) -> None:
    volume = Volume("1", joined(found) if join else tuple(found))
    image, data = assemble(volume, DISKS), expected(volume, BYTES)
    assert isinstance(image, Gatherer)
    assert image.size == volume.size == len(data)
    whole = bytearray(image.size)
    image.readinto(0, whole)
    assert whole == data
    for _ in range(20):
        offset = draw.randrange(image.size)
        length = draw.randint(1, image.size - offset)
        assert b"".join(image.gather(offset, length)) == data[offset : offset + length]
        short = min(length, draw.randint(1, 2 * UNIT))
        at_once = bytearray(short)
        assert not image.at_once(offset, [memoryview(at_once)]) or at_once == data[offset : offset + short]
        check_extents(image, offset, length, data)
    for bad in ((-1, 2), (image.size - 1, 2), (image.size, 1)):
        assert not image.at_once(bad[0], [memoryview(bytearray(bad[1]))])
        with pytest.raises(ValueError, match="is not inside"):
            image.gather(*bad)
        with pytest.raises(ValueError, match="is not inside"):
            list(image.extents(*bad))


def check_extents(image: Image, offset: int, length: int, data: bytes) -> None:
    extents = list(image.extents(offset, length))
    assert sum(e.length for e in extents) == length
    assert extents[0].offset == offset
    assert all(a.end == b.offset for a, b in pairwise(extents))
    for e in extents:
        if e.flag:
            assert not any(data[e.offset : e.end])
        elif e.length >= 3 * UNIT:  # a hole of the disk's is not taken for data
            assert any(data[e.offset : e.end])


def test_seeking() -> None:
    image = assemble(Volume("x", (Run(2 * SIZE, (Leg("a", 0), Leg("b", 0)), UNIT), Run(SIZE, (Leg("c", 0),)))), DISKS)
    data = bytearray(image.size)
    image.readinto(0, data)
    assert seek(image, 0, os.SEEK_DATA) == len(data) - len(data.lstrip(b"\0")) // UNIT * UNIT


def test_long_holes_of_stripes_take_no_time() -> None:
    """2^40 bytes in stripes of 64: by each of them it would take days."""
    huge = {"a": ZeroImage(1 << 40), "b": ZeroImage(1 << 40)}
    image = assemble(Volume("x", (Run(1 << 41, (Leg("a", 0), Leg("b", 0)), 64),)), huge)
    assert list(image.extents(7, (1 << 41) - 9)) == [Extent(7, (1 << 41) - 9, True)]


@pytest.mark.parametrize(
    "run",
    [
        Run(0, (Leg("a", 0),)),
        Run(-1, (Leg("a", 0),)),
        Run(SIZE + 1, (Leg("a", 0),)),
        Run(2, (Leg("a", SIZE - 1),)),
        Run(1, (Leg("a", -1),)),
        Run(16, (Leg("a", 0), Leg("b", 0))),
        Run(16, (Leg("a", 0),), 8),
        Run(17, (Leg("a", 0), Leg("b", 0)), 1),
        Run(24, (Leg("a", 0), Leg("b", 0)), 8),
        Run(16, ()),
        Run(16, (Leg("a", 0), Leg("b", SIZE - 7)), 8),
    ],
)
def test_what_is_no_run_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=r"run|range"):
        assemble(Volume("1", (run,)), DISKS)


def test_closing() -> None:
    disks = {name: HoleyImage(0) for name in "ab"}
    image = assemble(Volume("x", (Run(8, (Leg("a", 0),)), Run(8, (Leg("a", 8), Leg("b", 0)), 4))), disks)
    assert isinstance(image, JoinedImage)
    image.close()
    assert all(disk.closed for disk in disks.values())


def test_neighbours_are_joined() -> None:
    def linear(disk: str, offset: int) -> Run:
        return Run(8, (Leg(disk, offset),))

    striped = Run(8, (Leg("a", 40), Leg("a", 60)), 4)
    found = joined([linear("a", 0), linear("a", 8), linear("a", 17), linear("b", 25), striped, linear("a", 44)])
    assert [run.length for run in found] == [16, 8, 8, 8, 8]
