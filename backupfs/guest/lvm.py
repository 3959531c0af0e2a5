"""LVM2's physical volumes: their labels, and the metadata of their volume group in them.

    sector 1 (of 0 to 3)   label, physical volume header: where the metadata areas are
    metadata area          header of 512 bytes: where in the area the newest text is; the text, which may wrap around

Source: LVM2, lib/label/label.c, lib/format_text/layout.h and format-text.c.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from backupfs.guest.reading import read
from backupfs.image import Image
from backupfs.units import MiB

LARGEST_TEXT = 4 * MiB
"""Bytes of a metadata text that is taken; by default there is room for 0.5 MiB."""

UUID = re.compile(r"[0-9A-Za-z!#]{32}", re.ASCII)
"""What a UUID is made of, without its dashes."""

_SECTOR = 512
_LABEL = struct.Struct("<8sQII8s")  # "LABELONE", sector, CRC of what follows it, where the header begins, type
_PLACE = struct.Struct("<QQ")  # offset, size; lists of them end with offset 0
_AREA = struct.Struct("<I16sIQQ")  # CRC of what follows it, magic, version, the area's offset and size
_TEXT = struct.Struct("<QQII")  # offset in the area, size, CRC, flags
_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_HEADER = 512
_IGNORED = 1
_UUID_SIZE = 32
_MOST_AREAS = 4  # of metadata; LVM makes two at most


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """A range of a disk with a label.

    Args:
        uuid: 32 characters.
        disk: its name.
        offset, length: in bytes.
        texts: the metadata in it; none when it has no area for them.
        problems: what is wrong with its areas.
        unread: whether there is metadata that may be right, but is too long.
    """

    uuid: str
    disk: str
    offset: int
    length: int
    texts: tuple[bytes, ...]
    problems: tuple[str, ...]
    unread: bool = False


@dataclass(slots=True)
class Budget:
    """How many bytes of metadata may still be read, of all physical volumes together: a guest can make many."""

    left: int = 32 * MiB

    def take(self, size: int) -> bool:
        """Return whether there is room for `size` bytes more, and use it up."""
        if size > self.left:
            return False
        self.left -= size
        return True


class _Bad(Exception):
    """In words, what is wrong with metadata."""


class _TooLong(_Bad):
    """It may be right."""


def checksum(content: bytes) -> int:
    """Return LVM's CRC: the usual polynomial with a beginning of its own, and without the inversions."""
    return zlib.crc32(content, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def read_physical_volume(part: Image, disk: str, offset: int, budget: Budget) -> PhysicalVolume | None:
    """Return the physical volume that a part of a disk is, or None when it is none.

    Args:
        part: the range of the disk.
        disk, offset: its name, and where on it that is.
        budget: for the metadata.

    Raises:
        BackupfsError: the disk can't be read.
    """
    label = find_label(part)
    if label is None:
        return None
    sector, header = label
    uuid = sector[header : header + _UUID_SIZE]
    texts, problems, unread = [], [], False
    for area, size in _areas(sector, header + _UUID_SIZE + 8):
        try:
            text = _read_text(part, area, size, budget)
        except _Bad as e:
            unread |= isinstance(e, _TooLong)
            problems.append(f"its LVM metadata at {area} {e}")
        else:
            texts += [text] if text else []
    return PhysicalVolume(uuid.decode(), disk, offset, part.size, tuple(texts), tuple(problems), unread)


def find_label(part: Image) -> tuple[bytes, int] | None:
    """Return the sector that makes a physical volume of a part, and where in it the header begins; None: there is none.

    Raises:
        BackupfsError: the disk can't be read.
    """
    for number in range(4):
        sector = read(part, number * _SECTOR, _SECTOR)
        if sector is None or sector[:8] != b"LABELONE":
            continue
        _, mine, crc, header, kind = _LABEL.unpack_from(sector)
        if mine != number or kind != b"LVM2 001" or checksum(sector[20:]) != crc:
            continue
        if not _LABEL.size <= header <= _SECTOR - _UUID_SIZE - 8:
            continue
        if UUID.fullmatch(sector[header : header + _UUID_SIZE].decode("latin-1")):
            return sector, header
    return None


def _areas(sector: bytes, position: int) -> Iterator[tuple[int, int]]:
    """Yield the metadata areas: the second of two lists."""
    lists, found = 0, 0
    while position + _PLACE.size <= len(sector) and lists < 2 and found < _MOST_AREAS:
        offset, size = _PLACE.unpack_from(sector, position)
        position += _PLACE.size
        if not offset:
            lists += 1
        elif lists == 1:
            found += 1
            yield offset, size


def _read_text(part: Image, area: int, size: int, budget: Budget) -> bytes | None:
    """Return an area's text, or None when it has none. Raises _Bad, BackupfsError."""
    header = read(part, area, _AREA_HEADER)
    if header is None or not _AREA_HEADER < size <= part.size - area:
        raise _Bad("is not inside it")
    crc, magic, version, mine, room = _AREA.unpack_from(header)
    if magic != _MAGIC or version != 1 or checksum(header[4:]) != crc or (mine, room) != (area, size):
        raise _Bad("has a damaged header")
    offset, text_size, text_crc, flags = _TEXT.unpack_from(header, _AREA.size)
    if not offset or not text_size or flags & _IGNORED:
        return None
    if not _AREA_HEADER <= offset < size or text_size > size - _AREA_HEADER:
        raise _Bad("points out of its area")
    if text_size > LARGEST_TEXT or not budget.take(text_size):
        raise _TooLong(f"is {text_size} bytes long: that is too much")
    before_end = min(text_size, size - offset)
    first, rest = read(part, area + offset, before_end), read(part, area + _AREA_HEADER, text_size - before_end)
    text = (first or b"") + (rest or b"")
    if len(text) != text_size or checksum(text) != text_crc:
        raise _Bad("is damaged: its checksum is wrong")
    return text
