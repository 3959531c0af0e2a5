"""Repositories for tests, written through PointWriter and read through images."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from backupfs.extents import Extent
from backupfs.repository.manifest import Manifest
from backupfs.repository.repository import Repository

MOMENT = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


def add_point(
    repository: Repository,
    data: bytes,
    changed: Iterable[Extent] | None = None,
    *,
    vm: str = "web01",
    disk: str = "vda",
    chain: str = "main",
    full: bool = False,
    step: int = 1 << 18,
    day: int | None = None,
) -> Manifest:
    """Add a point of one disk that holds `data`.

    Args:
        changed: ranges of whole chunks to give to the writer, their flag: zero; None gives all, unflagged.
        step: bytes of a write; a multiple of the chunk size.
        day: of the point; None: an hour for each point that is there.
    """
    with repository.writer() as writer:
        end = None if full else writer.chain_ends(vm, [disk], chain)[disk]
        moment = MOMENT + (timedelta(hours=len(repository.points(vm))) if day is None else timedelta(days=day))
        point = writer.begin(vm, moment)
        try:
            target = point.add_disk(
                disk, len(data), end.entry.chain if end else writer.next_chain(vm, disk, chain), end
            )
            for extent in [Extent(0, len(data), False)] if changed is None else changed:
                if extent.flag:
                    target.zero(extent.offset, extent.length)
                    continue
                for offset in range(extent.offset, extent.end, step):
                    target.write(offset, memoryview(data)[offset : min(offset + step, extent.end)])
            point.finish_disk(target, read="all", reason="test")
            return writer.commit(point, parent=end.point if end else None)
        finally:
            point.abandon()


def read_point(repository: Repository, point: str, *, vm: str = "web01", disk: str = "vda") -> bytes:
    """Return all bytes of a disk at a point."""
    image = repository.open_image(vm, point, disk)
    data = bytearray(image.size)
    image.readinto(0, data)
    return bytes(data)
