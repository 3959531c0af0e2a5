"""What guests write on disks, made by hand: partition tables, LVM's labels and metadata, right ones and wrong ones."""

import struct
import zlib
from collections.abc import Mapping, Sequence

from backupfs.guest.lvm import checksum

LINUX = bytes.fromhex("AF3DC60F838472478E793D69D8477DE4")
MDA_AT, MDA_SIZE, DATA_AT = 4096, 1020 * 1024, 1 << 20


def entry(kind: int, first: int, sectors: int, boot: int = 0) -> bytes:
    """Return an entry of an MBR or of a table of logical partitions."""
    return struct.pack("<B3sB3sII", boot, bytes(3), kind, bytes(3), first, sectors)


def table(*entries: bytes) -> bytes:
    """Return a sector with up to four entries."""
    return bytes(446) + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


def put(disk: bytearray, offset: int, content: bytes) -> None:
    """Write to a disk."""
    assert offset + len(content) <= len(disk)
    disk[offset : offset + len(content)] = content


def put_gpt(
    disk: bytearray,
    partitions: Mapping[int, tuple[int, int]],
    sector: int = 512,
    *,
    count: int = 128,
    copies: Sequence[str] = ("first", "backup"),
    protective: bool = True,
) -> None:
    """Write a GPT.

    Args:
        partitions: by number, first and last LBA.
        sector: bytes.
        count: of entries.
        copies: which to write.
        protective: write the first sector that announces it.
    """
    last = len(disk) // sector - 1
    entries = bytearray(128 * count)
    for number, (first, end) in partitions.items():
        put(entries, 128 * (number - 1), struct.pack("<16s16sQQ", LINUX, bytes([number % 256] * 16), first, end))
    width = -(-len(entries) // sector)
    if protective:
        put(disk, 0, table(entry(0xEE, 1, min(last, 0xFFFFFFFF))))
    for copy in copies:
        mine, other, at = (1, last, 2) if copy == "first" else (last, 1, last - width)
        put(disk, at * sector, entries)
        put(
            disk, mine * sector, gpt_header(entries, mine, other, at, usable=(2 + width, last - width - 1), count=count)
        )


def gpt_header(entries: bytes, mine: int, other: int, at: int, *, usable: tuple[int, int], count: int) -> bytes:
    """Return a GPT's header, with its checksums."""
    words = (b"EFI PART", 0x10000, 92, 0, mine, other, *usable, b"g" * 16, at, count, 128, zlib.crc32(entries))
    header = struct.pack("<8sIII4xQQQQ16sQIII", *words)
    return header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]


def pv_uuid(number: int) -> str:
    """Return a physical volume's id, without dashes."""
    return f"{number:02d}PhysicalVolume".ljust(32, "x")


def put_pv(
    disk: bytearray, offset: int, length: int, number: int, text: str | bytes = b"", *, start: int = 512
) -> None:
    """Make a range of a disk a physical volume.

    Args:
        number: of which the id is made.
        text: its metadata; none: it has no area for any.
        start: where in the metadata area the text begins; it wraps around at the end.
    """
    content = text.encode("latin-1") if isinstance(text, str) else text
    places = [(DATA_AT, 0), (0, 0), *([(MDA_AT, MDA_SIZE)] if content else []), (0, 0)]
    label = struct.pack("<I8s32sQ", 32, b"LVM2 001", pv_uuid(number).encode(), length)
    label += b"".join(struct.pack("<QQ", *place) for place in places)
    label = label.ljust(492, b"\0")
    put(disk, offset + 512, struct.pack("<8sQI", b"LABELONE", 1, checksum(label)) + label)
    if not content:
        return
    header = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, MDA_AT, MDA_SIZE)
    header += struct.pack("<QQII", start, len(content), checksum(content), 0)
    header = header.ljust(508, b"\0")
    put(disk, offset + MDA_AT, struct.pack("<I", checksum(header)) + header)
    first = content[: MDA_SIZE - start]
    put(disk, offset + MDA_AT + start, first)
    put(disk, offset + MDA_AT + 512, content[len(first) :])


def segment(start: int, count: int, stripes: str, *, kind: str = "striped", stripe_sectors: int = 0) -> str:
    """Return a segment's section; `stripes` as `"pv0", 0, "pv1", 0`."""
    legs = stripes.count('"') // 2
    size = f"stripe_size = {stripe_sectors}" if stripe_sectors else ""
    return (
        f'segment{start + 1} {{ start_extent = {start} extent_count = {count} type = "{kind}" '
        f"stripe_count = {legs} {size} stripes = [ {stripes} ] }}"
    )


def logical(name: str, *segments: str, status: str = '"READ", "WRITE", "VISIBLE"') -> str:
    """Return a logical volume's section."""
    body = " ".join(segments)
    return f'{name} {{ id = "x" status = [{status}] flags = [] segment_count = {len(segments)} {body} }}\n'


def group(
    *volumes: str, name: str = "vg0", pvs: Sequence[int] = (0,), seqno: int = 1, extents: int = 16, extent: int = 128
) -> str:
    """Return a volume group's metadata.

    Args:
        volumes: sections of `logical`.
        pvs: numbers of the physical volumes, which are called pv0 and so on.
        extents: of each physical volume.
        extent: sectors.
    """
    members = "".join(
        f'pv{i} {{ id = "{pv_uuid(number)}" status = [] pe_start = {DATA_AT // 512} pe_count = {extents} }}\n'
        for i, number in enumerate(pvs)
    )
    uuid = f"{zlib.crc32(name.encode()):032x}"
    return (
        'contents = "Text Format Volume Group" # by hand\nversion = 1\ndescription = "a \\"quoted\\" { word"\n'
        f'{name} {{ id = "{uuid}" seqno = {seqno} format = "lvm2" status = ["READ"] flags = [] '
        f"extent_size = {extent}\nphysical_volumes {{\n{members}}}\nlogical_volumes {{\n{''.join(volumes)}}} }}\n\0"
    )
