"""In which ranges two points differ: by the identities (BLAKE3) of their chunks, from the index; no data is read."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from backupfs.errors import NotFound
from backupfs.extents import Extent, clip, coalesce
from backupfs.repository.chunkmap import ChunkMap
from backupfs.repository.format import REGION_CHUNKS
from backupfs.repository.point import PointImage
from backupfs.repository.repository import Repository

_REGIONS = 4  # compared at a time; each has all versions of its chunks in memory for a moment

Point = tuple[str, str]  # VM, id


def differences(repository: Repository, left: Point, right: Point, disk: str | None) -> Iterator[dict[str, Any]]:
    """Yield what differs: disk, offset, length; whole chunks, cut at the longer disk's end; in order.

    A disk that only one point has differs as a whole, and so does what one disk has beyond the other's end.

    Args:
        disk: only this one.

    Raises:
        NotFound: neither point has such a disk.
        Corrupt: the index, or a manifest, is damaged.
    """
    sides = [{d.name: d.size for d in repository.manifest(*point).disks} for point in (left, right)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    if disk is not None:
        if disk not in names:
            raise NotFound(f"neither {'/'.join(left)} nor {'/'.join(right)} has a disk {disk!r}")
        names = [disk]
    for name in names:
        if name in sides[0] and name in sides[1]:
            extents = _of_disk(repository, left, right, name)
        else:
            extents = iter([Extent(0, sides[0].get(name, 0) or sides[1].get(name, 0), True)])
        for extent in coalesce(extents):
            yield {"disk": name, "offset": extent.offset, "length": extent.length}


def _of_disk(repository: Repository, left: Point, right: Point, disk: str) -> Iterator[Extent]:
    images: list[PointImage] = []
    try:
        for point in (left, right):
            images.append(repository.open_image(*point, disk))
            images[-1].check_map()
        a, b = images
        common, longer = sorted((a.size, b.size))
        yield from clip(_unequal_chunks(a, b, common), 0, common)
        yield Extent(common, longer - common, True)
    finally:
        for image in images:
            image.close()


def _unequal_chunks(a: PointImage, b: PointImage, size: int) -> Iterator[Extent]:
    unit = a.chunk_size
    regions = -(-size // (unit * REGION_CHUNKS))
    for region in _occupied(a.map, b.map, regions):
        count = min(_REGIONS, regions - region)
        left, right = a.map.positions(region, count), b.map.positions(region, count)
        unequal = (left["packed"] == 0) != (right["packed"] == 0)
        for lane in ("id0", "id1"):
            unequal |= left[lane] != right[lane]
        borders = np.flatnonzero(np.diff(unequal, prepend=False, append=False))
        for first, end in borders.reshape(-1, 2).tolist():
            yield Extent((region * REGION_CHUNKS + first) * unit, (end - first) * unit, True)


def _occupied(a: ChunkMap, b: ChunkMap, regions: int) -> Iterator[int]:
    """Yield where _REGIONS regions begin that together have all that is not zero in both."""
    region = 0
    while region < regions:
        found = [next(m.occupied(region, regions), regions) for m in (a, b)]
        region = min(found)
        if region < regions:
            yield region
            region += _REGIONS
