"""What a partition table comes to."""

from dataclasses import dataclass

MOST_PARTITIONS = 255
"""The highest number that a partition may have. Source: Linux, DISK_MAX_PARTS."""

SECTORS = (512, 4096)
"""Bytes of a sector that a table may count in."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition: its number as Linux counts, its offset on the disk and its length in bytes."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Table:
    """A disk's partitions, and what of the table can't be shown or should be known, each in a line of words."""

    partitions: tuple[Partition, ...] = ()
    problems: tuple[str, ...] = ()


def outside(number: int, offset: int, length: int, disk_size: int) -> str:
    """Say that a partition is not inside its disk."""
    return f"partition {number} is at {offset}, {length} bytes long: that is not inside a disk of {disk_size} bytes"
