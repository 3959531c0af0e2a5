"""A volume with what the log of its XFS changes: in memory, by sectors. The volume stays as it is."""

from collections.abc import Iterator

from backupfs.extents import Extent
from backupfs.guest.xfs_records import SECTOR, UnreadableLogError
from backupfs.image import Buffer, Image, check_range

MOST_SECTORS = 700_000
"""That change: some 550 MB of memory."""


class TooMuchError(UnreadableLogError):
    """More changed than is remembered."""


class Replayed:
    """An Image: a volume, with other contents of some sectors."""

    def __init__(self, volume: Image) -> None:
        self.size = volume.size
        self._volume = volume
        self._sectors: dict[int, bytearray] = {}

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        self._volume.readinto(offset, view)
        end = offset + len(view)
        for number in self._changed(offset, len(view)):
            begin = number * SECTOR
            first, last = max(offset, begin), min(end, begin + SECTOR)
            view[first - offset : last - offset] = self._sectors[number][first - begin : last - begin]

    def differs(self, offset: int, length: int) -> bool:
        """Whether a range may be another one than on the volume."""
        return next(self._changed(offset, length), None) is not None

    def _changed(self, offset: int, length: int) -> Iterator[int]:
        numbers = range(offset // SECTOR, -(-(offset + length) // SECTOR))
        if len(self._sectors) < len(numbers):
            return (number for number in self._sectors if number in numbers)
        return (number for number in numbers if number in self._sectors)

    def get(self, offset: int, length: int) -> bytes:
        """Return a range. Raises UnreadableLogError: it is not on the volume."""
        if not 0 <= offset <= self.size - length:
            raise UnreadableLogError
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def put(self, offset: int, content: bytes | bytearray) -> None:
        """Change a range. Raises UnreadableLogError: it is not on the volume, or too much would have changed."""
        if not 0 <= offset <= self.size - len(content):
            raise UnreadableLogError
        end = offset + len(content)
        for number in range(offset // SECTOR, -(-end // SECTOR)):
            begin = number * SECTOR
            first, last = max(offset, begin), min(end, begin + SECTOR)
            part, sector = content[first - offset : last - offset], self._sectors.get(number)
            if sector is None:
                if len(self._sectors) >= MOST_SECTORS:
                    raise TooMuchError
                whole = part if len(part) == SECTOR else self.get(begin, min(SECTOR, self.size - begin))
                sector = self._sectors[number] = bytearray(whole)
            sector[first - begin : last - begin] = part

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        if length:
            yield Extent(offset, length, False)

    def close(self) -> None:
        self._volume.close()
