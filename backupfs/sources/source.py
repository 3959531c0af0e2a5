"""Source: an Image that also tells what is dirty and that reads many ranges at once. Pure things only.

What a server says about a range is parsed here, as values, so that every legal and illegal reply can be tested without
a server.

request        |----------------|      offset, length
legal          |####|-----------|      covers it
legal          |####|---|              short: the next request goes on from its end
legal          |####|-------------->   only the last descriptor may pass the end: it is cut
illegal        |####||-----------|     an empty descriptor
illegal        |####|-----------|##|   a descriptor that begins at or after the end
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from backupfs.errors import ProtocolError
from backupfs.extents import Extent, clip, coalesce, intersect
from backupfs.image import Image

ZERO = 2  # base:allocation: reads as zeroes. HOLE (1) says nothing about the content. Source: NBD proto.md
DIRTY = 1  # qemu:dirty-bitmap: changed since the bitmap was made. Source: QEMU docs/interop/nbd.txt


class Source(Image, Protocol):
    """A disk to be backed up.

    Attributes:
        description: for messages and the manifest: the URI or the path.
        format: "nbd" for a URI, else QEMU's name of the image's format: "raw", "qcow2", ...
        request_size: bytes of the parts that `read_many` yields.
        bitmap: the dirty bitmap that can be used, or None.
        bitmap_problem: why the bitmap that was asked for can't be used; None if it can, or if none was asked for.
    """

    description: str
    format: str
    request_size: int
    bitmap: str | None
    bitmap_problem: str | None

    def dirty(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover the range exactly, in order, with extents whose flag means: dirty.

        Raises:
            BitmapUnusable: `bitmap` is None.
            SourceError: the source failed.
        """

    def status(self, offset: int, length: int) -> Iterator[tuple[Extent, Extent]]:
        """Cover the range exactly, in order, with pairs of equal extents: (reads as zeroes, dirty).

        One walk finds both. Without a bitmap everything is dirty. May be called while `read_many` is being iterated,
        from inside of its `ranges` too.
        """

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """Read ranges, many at once, and yield (offset, bytes) of the parts as they come in, in any order.

        A range that begins at a multiple of 64 KiB comes in parts of a multiple of 64 KiB, and a last one (of less when
        the server's maximum is less). A part's memory belongs to the caller from then on. `ranges` are (offset,
        length); they are taken as they are needed.

        Raises:
            ValueError: a range is not inside the disk.
            SourceError: the source failed.
        """


def parse_descriptors(entries: Sequence[int], bit: int, offset: int, length: int) -> list[Extent]:
    """Return the extents that a server's reply for one metadata context describes, within the request.

    Args:
        entries: length, flags, length, flags, ...
        bit: the flag that counts; the others may be anything.
        offset, length: the request. The extents begin at `offset` and may end before its end.

    Raises:
        ProtocolError: the reply is empty, has an empty descriptor, or one that begins after the request's end.

    Source: NBD proto.md, NBD_REPLY_TYPE_BLOCK_STATUS.
    """
    if not entries or len(entries) % 2:
        raise ProtocolError(f"the block status at offset {offset} has {len(entries)} numbers, not pairs")
    position, end = offset, offset + length
    extents = []
    for size, flags in zip(entries[::2], entries[1::2], strict=True):
        if size <= 0:
            raise ProtocolError(f"the block status at offset {offset} has an extent of {size} bytes")
        if position >= end:
            raise ProtocolError(f"the block status at offset {offset} goes on after the {length} bytes asked for")
        extents.append(Extent(position, min(size, end - position), bool(flags & bit)))
        position += size
    return extents


def pair_extents(
    zeroes: Iterable[Extent], dirties: Iterable[Extent], offset: int, length: int
) -> list[tuple[Extent, Extent]]:
    """Return (zero, dirty) pairs over equal ranges from `offset` on, as far as both replies reach within `length`.

    Raises:
        ProtocolError: a reply does not reach past `offset`, so that asking on would never end.
    """
    pairs = list(intersect(coalesce(clip(zeroes, offset, length)), coalesce(clip(dirties, offset, length))))
    if not pairs:
        raise ProtocolError(f"the block status at offset {offset} says nothing about the bytes asked for")
    return pairs


def align(offset: int, length: int, unit: int, size: int) -> tuple[int, int]:
    """Return the smallest range around this one whose borders are multiples of `unit`, or the disk's end `size`."""
    first = offset // unit * unit
    last = min(-(-(offset + length) // unit) * unit, size)
    return first, last - first


def split(offset: int, length: int, part: int) -> Iterator[tuple[int, int]]:
    """Cut a range into parts of `part` bytes from its beginning on, and a last one."""
    for position in range(offset, offset + length, part):
        yield position, min(part, offset + length - position)
