"""Volumes: what lies on a point's disks and is read as a disk of its own, a partition or a logical volume.

    volume   [ run 0 ][       run 1       ]        runs touch, in order
    linear   vda: ....[ run 0 ]....                one leg
    striped  vda: [0][2][4]    vdb: [1][3][5]      several legs of the same length, dealt out a stripe at a time

A Volume only says where; `assemble` makes an Image of it. All methods of the images may be called from any thread, as
those of the images below them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, Gatherer, Image, SliceImage, check_range, gather


@dataclass(frozen=True, slots=True)
class Leg:
    """Where bytes lie in a row: a disk's name, and the offset on it in bytes."""

    disk: str
    offset: int


@dataclass(frozen=True, slots=True)
class Run:
    """A range of a volume.

    Args:
        length: bytes; of several legs a multiple of their number times `stripe`.
        legs: where it lies.
        stripe: bytes that each leg gets at a time; 0 if there is only one.
    """

    length: int
    legs: tuple[Leg, ...]
    stripe: int = 0


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition or a logical volume.

    Args:
        name: a partition's number, or the name that the logical volume has in Linux's /dev/mapper, escaped: it may be
            part of a file's name.
        runs: its bytes, from the first to the last.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(run.length for run in self.runs)

    @property
    def disks(self) -> tuple[str, ...]:
        """The names of the disks that it lies on, each once."""
        return tuple(dict.fromkeys(leg.disk for run in self.runs for leg in run.legs))


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join linear runs that follow each other on one disk: fewer, longer reads."""
    found: list[Run] = []
    for run in runs:
        if found and not found[-1].stripe and not run.stripe:
            before, leg = found[-1].legs[0], run.legs[0]
            if (before.disk, before.offset + found[-1].length) == (leg.disk, leg.offset):
                found[-1] = Run(found[-1].length + run.length, found[-1].legs)
                continue
        found.append(run)
    return tuple(found)


def assemble(volume: Volume, images: Mapping[str, Image]) -> Image:
    """Return a volume as an Image over its disks. Closing it closes them.

    Raises:
        ValueError: a run is not inside its disk, or is no run.
    """
    parts = []
    for run in volume.runs:
        if run.length <= 0 or not run.legs or (len(run.legs) > 1) != (run.stripe > 0):
            raise ValueError(f"volume {volume.name}: a run that is none")
        each, rest = divmod(run.length, len(run.legs))
        if run.stripe and (rest or each % run.stripe):
            raise ValueError(f"volume {volume.name}: a run that does not end with a stripe")
        legs = [SliceImage(images[leg.disk], leg.offset, each) for leg in run.legs]
        parts.append(StripedImage(legs, run.stripe) if run.stripe else legs[0])
    return parts[0] if len(parts) == 1 else JoinedImage(parts)


class JoinedImage:
    """Images one behind the other, as one; a Gatherer. Closing it closes them."""

    def __init__(self, parts: Sequence[Gatherer]) -> None:
        self._parts = parts
        self._starts: list[int] = []
        self.size = 0
        for part in parts:
            self._starts.append(self.size)
            self.size += part.size

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        for part, within, length in self._cut(offset, len(view)):
            part.readinto(within, view[:length])
            view = view[length:]

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        if offset < 0:
            return False
        # What reaches into the next part the part itself refuses.
        i = bisect_right(self._starts, offset) - 1
        return self._parts[i].at_once(offset - self._starts[i], into)

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        i = bisect_right(self._starts, offset) - 1
        within = offset - self._starts[i]
        if within + length <= self._parts[i].size:
            return self._parts[i].gather(within, length)
        # The pieces of one part are good only until the next is asked for its own.
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return (buffer,)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        return coalesce(self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        for part, within, size in self._cut(offset, length):
            for extent in clip(part.extents(within, size), within, size):
                yield Extent(offset + extent.offset - within, extent.length, extent.flag)
            offset += size

    def _cut(self, offset: int, length: int) -> Iterator[tuple[Image, int, int]]:
        i, end = bisect_right(self._starts, offset) - 1, offset + length
        while offset < end:
            within = offset - self._starts[i]
            size = min(self._parts[i].size - within, end - offset)
            yield self._parts[i], within, size
            offset, i = offset + size, i + 1

    def close(self) -> None:
        for part in self._parts:
            part.close()


class StripedImage:
    """Images of the same size that take turns, `stripe` bytes each; a Gatherer. Closing it closes them."""

    def __init__(self, legs: Sequence[Gatherer], stripe: int) -> None:
        self._legs = legs
        self._stripe = stripe
        self._row = stripe * len(legs)
        self.size = sum(leg.size for leg in legs)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        target, end = memoryview(buffer), offset + len(buffer)
        for i, leg in enumerate(self._legs):
            # What of the leg is wanted lies in a row, so it is read at once and then dealt out.
            first, last = self._before(i, offset), self._before(i, end)
            if first == last:
                continue
            content = memoryview(bytearray(last - first))
            leg.readinto(first, content)
            position = first
            while position < last:
                row, within = divmod(position, self._stripe)
                length = min(self._stripe - within, last - position)
                at = row * self._row + i * self._stripe + within - offset
                target[at : at + length] = content[position - first : position - first + length]
                position += length

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        row, within = divmod(offset, self._row)
        i, within = divmod(within, self._stripe)
        if offset < 0 or within + len(into[0]) > self._stripe:
            return False
        return self._legs[i].at_once(row * self._stripe + within, into)

    def gather(self, offset: int, length: int) -> Sequence[Buffer | bytes]:
        check_range(self, offset, length)
        row, within = divmod(offset, self._row)
        i, within = divmod(within, self._stripe)
        if within + length <= self._stripe:
            return gather(self._legs[i], row * self._stripe + within, length)
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return (buffer,)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        return coalesce(clip(self._extents(offset, offset + length), offset, length))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        """Cover the range, widened to whole rows. As many steps as the legs have extents, not as there are stripes."""
        row, behind = offset // self._row, -(-end // self._row)
        first, length = row * self._stripe, (behind - row) * self._stripe
        legs = [_Walk(leg.extents(first, length)) for leg in self._legs]
        while row < behind:
            position = row * self._stripe
            # While the legs' extents last, one row is like the next.
            alike = min(leg.end_at(position) for leg in legs) // self._stripe
            flags = {leg.flag for leg in legs}
            if alike > row and len(flags) == 1:
                yield Extent(row * self._row, (alike - row) * self._row, flags.pop())
                row = alike
                continue
            for i, leg in enumerate(legs):
                at = row * self._row + i * self._stripe - position
                for extent in leg.take(position, self._stripe):
                    yield Extent(at + extent.offset, extent.length, extent.flag)
            row += 1

    def _before(self, i: int, offset: int) -> int:
        """Return how many of the leg's bytes come before an offset of the volume."""
        row, within = divmod(offset, self._row)
        return row * self._stripe + min(max(within - i * self._stripe, 0), self._stripe)

    def close(self) -> None:
        for leg in self._legs:
            leg.close()


class _Walk:
    """The extents of a leg, asked for in order."""

    def __init__(self, extents: Iterator[Extent]) -> None:
        self._extents = coalesce(extents)
        self._held = next(self._extents)

    @property
    def flag(self) -> bool:
        """Of the extent that `end_at` found."""
        return self._held.flag

    def end_at(self, position: int) -> int:
        """Return the end of the extent that `position` is in."""
        while self._held.end <= position:
            self._held = next(self._extents)
        return self._held.end

    def take(self, position: int, length: int) -> Iterator[Extent]:
        """Cover a range."""
        end = position + length
        while position < end:
            until = min(self.end_at(position), end)
            yield Extent(position, until - position, self._held.flag)
            position = until
