"""What a verification finds: damage, and what it hurts. Values only."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from backupfs.repository.format import Rows
from backupfs.repository.layer import Layer


@dataclass(slots=True, kw_only=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        kind: manifest, layer (missing, or not what it should be), table (header, table or trailer), index, chunk, image
            (data in a raw image's holes).
        points: those of the VM that it touches.
        disk, offset, length: the range of the disk that these points can't read; None where that can't be told, or
            where it is all of the disk.
        file, file_offset: where the damage lies.
        repaired: where the right bytes came from; None: it is there still.
    """

    kind: str
    vm: str
    points: list[str]
    disk: str | None = None
    offset: int | None = None
    length: int | None = None
    file: str
    file_offset: int = 0
    what: str
    repaired: str | None = None


@dataclass(slots=True)
class BadRows:
    """Damaged chunks of one layer, in order of chunk number.

    Attributes:
        first, last: which of `points` see each chunk.
        points: in order, each with the disk's size.
        repaired: by row, where the right bytes came from.
    """

    vm: str
    disk: str
    layer: Layer
    rows: Rows
    first: int
    last: npt.NDArray[np.intp]
    points: list[tuple[str, int]]
    what: list[str]
    repaired: list[str | None]


@dataclass(slots=True)
class Report:
    """What a verification found. `sample`: the share of the chunks that was read, 1 for all."""

    sample: float
    points: int = 0
    layers: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    damage: list[Damage] = field(default_factory=list)
    bad: list[BadRows] = field(default_factory=list)

    def all_damage(self, chunk_size: int) -> Iterator[Damage]:
        """Yield all damage; of chunks as ranges."""
        yield from self.damage
        for bad in self.bad:
            yield from _ranges(bad, chunk_size)


def _ranges(bad: BadRows, chunk_size: int) -> Iterator[Damage]:
    """Yield damaged chunks as ranges of the disk: neighbours that hurt the same points; `what` is of the first."""
    held: Damage | None = None
    facts = zip(bad.rows["chunk_no"].tolist(), bad.rows["offset"].tolist(), bad.last.tolist(), strict=True)
    for i, (number, file_offset, last) in enumerate(facts):
        seen_by = bad.points[bad.first : last]
        offset = number * chunk_size
        length = min(chunk_size, max(size for _, size in seen_by) - offset)
        points = [point for point, _ in seen_by]
        if (
            held
            and (held.offset or 0) + (held.length or 0) == offset
            and (held.points, held.repaired) == (points, bad.repaired[i])
        ):
            held.length = (held.length or 0) + length
            continue
        if held:
            yield held
        held = Damage(
            kind="chunk",
            vm=bad.vm,
            points=points,
            disk=bad.disk,
            offset=offset,
            length=length,
            file=bad.layer.data.path,
            file_offset=file_offset,
            what=bad.what[i],
            repaired=bad.repaired[i],
        )
    if held:
        yield held
