"""Partition tables made by hand, right ones and hostile ones. Real tools' tables: integration/test_real_tables.py."""

import os
import random
import struct

from guest_disks import entry, gpt_header, put, put_gpt, table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import BytesImage

from backupfs.guest.partitions import read_table
from backupfs.guest.table import MOST_PARTITIONS, Partition, Table
from backupfs.image import Buffer
from backupfs.units import KiB, MiB

EXAMPLES = 20_000 if os.environ.get("BACKUPFS_LONG") else 500
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class CountingImage(BytesImage):
    """Counts what is read."""

    reads = 0

    def readinto(self, offset: int, buffer: Buffer) -> None:
        self.reads += 1
        super().readinto(offset, buffer)


def read(disk: bytes) -> Table:
    image = CountingImage(bytes(disk))
    found = read_table(image)
    assert image.reads <= 4 * MOST_PARTITIONS
    assert len(found.partitions) <= MOST_PARTITIONS
    numbers = [p.number for p in found.partitions]
    assert numbers == sorted(set(numbers))
    for p in found.partitions:
        assert 0 <= p.offset < p.offset + p.length <= len(disk)
        assert p.number >= 1
    return found


def places(found: Table) -> dict[int, tuple[int, int]]:
    return {p.number: (p.offset, p.length) for p in found.partitions}


def mbr(*entries: bytes, size: int = 1 * MiB) -> bytearray:
    disk = bytearray(size)
    put(disk, 0, table(*entries))
    return disk


def test_nothing_is_nothing() -> None:
    for disk in (b"", b"x" * 511, bytes(512), bytes(1 * MiB), random.Random(1).randbytes(1 * MiB)):
        assert read(disk) == Table()


def test_primary_partitions_keep_their_numbers() -> None:
    disk = mbr(entry(0x83, 63, 100, 0x80), bytes(16), entry(7, 200, 10), entry(0, 300, 5))
    assert places(read(disk)) == {1: (63 * 512, 51200), 3: (102400, 5120), 4: (153600, 2560)}


def test_what_reaches_beyond_the_end_is_named() -> None:
    disk = mbr(entry(0x83, 1, 2047), entry(0x83, 2, 2047), entry(0x83, 0xFFFFFFFF, 0xFFFFFFFF))
    found = read(disk)
    assert places(found) == {1: (512, 2047 * 512)}
    assert [p.split(" is at")[0] for p in found.problems] == ["partition 2", "partition 3"]
    assert "not inside a disk of 1048576 bytes" in found.problems[0]


def test_logical_partitions_in_the_order_of_the_chain() -> None:
    disk = mbr(entry(0x83, 1, 9), entry(0x0F, 100, 1000), entry(0x83, 1500, 10))
    put(disk, 100 * 512, table(entry(0x83, 2, 50), entry(5, 500, 100)))
    put(disk, 600 * 512, table(entry(0x83, 1, 7), entry(5, 200, 100), entry(0x83, 9999, 9999), bytes(16)))
    put(disk, 300 * 512, table(bytes(16), entry(5, 400, 20)))  # an empty one, as DR-DOS makes them
    put(disk, 500 * 512, table(entry(0x83, 1, 1)))
    assert places(read(disk)) == {
        1: (512, 9 * 512),
        3: (1500 * 512, 5120),
        5: (102 * 512, 50 * 512),
        6: (601 * 512, 7 * 512),
        7: (501 * 512, 512),
    }
    assert read(disk).problems == ()


def test_a_loop_of_logical_partitions_ends() -> None:
    disk = mbr(entry(5, 100, 1000))
    put(disk, 100 * 512, table(entry(0x83, 2, 50), entry(5, 500, 100)))
    put(disk, 600 * 512, table(entry(0x83, 2, 50), entry(5, 0, 100)))
    found = read(disk)
    assert set(places(found)) == {5, 6}
    assert found.problems == ("partition 1 is extended, and the chain of its logical ones is a loop",)
    put(disk, 600 * 512, table(entry(0x83, 2, 50), entry(5, 1990, 100)))
    assert "breaks off" in read(disk).problems[0]
    put(disk, 600 * 512, table(entry(0x83, 2, 50), entry(5, 0xFFFFFFFF, 100)))
    assert "breaks off" in read(disk).problems[0]


def test_there_are_only_so_many_logical_partitions() -> None:
    for content in (entry(0x83, 0, 1), bytes(16)):
        disk = mbr(entry(5, 1, 2000))
        for i in range(1900):
            put(disk, (1 + i) * 512, table(content, entry(5, i + 1, 1)))
        found = read(disk)
        assert len(found.partitions) == (MOST_PARTITIONS - 4 if any(content) else 0)
        assert found.problems


def test_boot_sectors_are_no_tables() -> None:
    fat = bytearray(table(entry(0x83, 1, 9)))
    fat[:3], fat[54:62] = b"\xeb\x3c\x90", b"FAT16   "
    assert read(mbr()[:0] + fat + bytes(1 * MiB)) == Table()
    code = table(entry(0x83, 1, 9, boot=0x33))
    assert read(code + bytes(1 * MiB)) == Table()


def test_an_mbr_for_sectors_of_4096_bytes() -> None:
    """Nothing in the table says so: but there is a file system where its partition begins then, and none otherwise."""
    disk = mbr(entry(0x83, 10, 20))
    assert places(read(disk)) == {1: (5120, 10240)}
    put(disk, 40960 + 1080, b"\x53\xef")
    assert places(read(disk)) == {1: (40960, 81920)}
    put(disk, 5120, b"XFSB")
    assert places(read(disk)) == {1: (5120, 10240)}


def test_a_gpt_of_either_sector_size() -> None:
    for sector, size in ((512, 1 * MiB), (4096, 4 * MiB)):
        disk = bytearray(size)
        put_gpt(disk, {1: (40, 50), 3: (60, 60), 128: (70, 80)}, sector)
        expected = {1: (40 * sector, 11 * sector), 3: (60 * sector, sector), 128: (70 * sector, 11 * sector)}
        assert places(read(disk)) == expected
        assert read(disk).problems == ()


def test_the_backup_stands_in_for_a_damaged_gpt() -> None:
    for sector, size in ((512, 1 * MiB), (4096, 4 * MiB)):
        for damaged in (sector, sector + 16, sector + 72, 2 * sector + 3):
            disk = bytearray(size)
            put_gpt(disk, {2: (40, 50)}, sector)
            disk[damaged] ^= 1
            found = read(disk)
            assert places(found) == {2: (40 * sector, 11 * sector)}
            assert found.problems == ("the first GPT is damaged: the partitions are those of its backup",)
            disk[size - sector] ^= 1
            found = read(disk)
            assert not found.partitions
            assert "damaged" in found.problems[0]


def test_the_backup_where_the_disk_has_grown() -> None:
    small = bytearray(1 * MiB)
    put_gpt(small, {2: (40, 50)})
    small[1024] ^= 1
    assert set(places(read(small + bytes(3 * MiB)))) == {2}
    put(small, 0, table(entry(0xEE, 1, 0xFFFFFFFF)))  # so the damaged header has to say where it is
    assert set(places(read(small + bytes(3 * MiB)))) == {2}


def test_a_gpt_on_a_disk_that_has_shrunk() -> None:
    disk = bytearray(1 * MiB)
    put_gpt(disk, {2: (40, 50)})
    found = read(disk[: 512 * KiB])
    assert not found.partitions
    assert found.problems


def test_a_wiped_beginning() -> None:
    """The backup is shown, unless there is something else where the table was, of a later time."""
    disk = bytearray(1 * MiB)
    put_gpt(disk, {2: (40, 50)})
    put(disk, 0, bytes(64 * KiB))
    found = read(disk)
    assert set(places(found)) == {2}
    assert "the first sector is not" in found.problems[0]
    put(disk, 1080, b"\x53\xef")
    assert read(disk) == Table()
    put(disk, 0, table(entry(0x83, 1, 9)))
    assert places(read(disk)) == {1: (512, 9 * 512)}


def test_a_hybrid_table_is_a_gpt() -> None:
    disk = bytearray(1 * MiB)
    put_gpt(disk, {2: (40, 50)})
    put(disk, 0, table(entry(0xEE, 1, 39), entry(0x83, 40, 11)))
    assert set(places(read(disk))) == {2}


def test_two_tables_for_two_sector_sizes_are_refused() -> None:
    disk = bytearray(4 * MiB)
    put_gpt(disk, {1: (40, 50)}, count=4, copies=["first"])
    put_gpt(disk, {1: (40, 50)}, 4096, copies=["first"])
    assert "another for those of 4,096" in read(disk).problems[0]
    assert not read(disk).partitions


def test_a_gpt_that_says_too_much() -> None:
    disk = bytearray(1 * MiB)
    put_gpt(
        disk, {1: (2000, 5000), 2: (60, 50), 3: (60, 59), 4: (1 << 63, (1 << 64) - 1), 5: (40, 41), 6: (0, 2**64 - 1)}
    )
    found = read(disk)
    assert set(places(found)) == {5}
    assert len(found.problems) == 5
    put_gpt(disk, {255: (40, 41), 256: (42, 43), 400: (44, 45)}, count=512)
    found = read(disk)
    assert set(places(found)) == {255}
    assert "above 255" in found.problems[0]


def test_gpt_headers_with_right_checksums_and_wrong_words() -> None:
    disk = bytearray(1 * MiB)
    put_gpt(disk, {1: (40, 41)})
    entries = bytes(disk[1024 : 1024 + 16384])
    good = {"mine": 1, "other": 2047, "at": 2, "usable": (34, 2000), "count": 128}
    put(disk, 512, gpt_header(entries, **good))  # type: ignore[arg-type]
    assert set(places(read(disk))) == {1}
    put(disk, len(disk) - 512, bytes(512))
    wrong = {"mine": [0, 2, 1 << 63], "at": [2047, 1 << 62, (1 << 64) - 1], "usable": [(50, 40), (34, 2048)]}
    wrong["count"] = [0, 1 << 31, 9000]  # type: ignore[list-item]
    for word, values in wrong.items():
        for value in values:
            put(disk, 512, gpt_header(entries, **{**good, word: value}))  # type: ignore[arg-type]
            assert not read(disk).partitions, (word, value)


GPT = bytearray(256 * KiB)
put_gpt(GPT, {1: (40, 50), 2: (60, 70), 9: (100, 400)})
MBR = mbr(entry(0x83, 1, 9), entry(5, 100, 200), entry(0x83, 400, 10), size=256 * KiB)
for _i in range(5):
    put(MBR, (100 + 20 * _i) * 512, table(entry(0x83, 1, 5), entry(5, 20 * _i + 20, 10)))
PLACES = (*range(440, 600), *range(1024, 1300), 256 * KiB - 512 + 8, *(51200 + 10240 * i + 454 for i in range(5)))


@many
@given(
    st.sampled_from([GPT, MBR]),
    st.lists(st.tuples(st.sampled_from(PLACES), st.binary(min_size=1, max_size=12)), max_size=8),
    st.integers(0, 256 * KiB),
)
def test_any_change_of_a_table_is_an_error_or_inside_the_disk(
    disk: bytearray, changes: list[tuple[int, bytes]], cut: int
) -> None:
    changed = bytearray(disk)
    for place, content in changes:
        put(changed, place, content)
    read(changed)
    read(changed[:cut])


@many
@given(
    st.lists(st.tuples(*[st.sampled_from([0, 5, 0x0F, 0x83, 0xEE]), *[st.integers(0, 600)] * 2]), max_size=4),
    st.lists(st.tuples(*[st.sampled_from([0, 5, 0x83])] * 2, *[st.integers(0, 64)] * 4), max_size=40),
)
def test_any_chain_of_logical_partitions_ends(
    primary: list[tuple[int, int, int]], links: list[tuple[int, int, int, int, int, int]]
) -> None:
    disk = mbr(*(entry(*words) for words in primary), size=64 * KiB)
    for i, (kind, following, *words) in enumerate(links):
        put(disk, (i + 1) * 512, table(entry(kind, *words[:2]), entry(following, *words[2:])))
    read(disk)


@many
@given(st.binary(max_size=512), st.binary(max_size=512), st.binary(max_size=512))
def test_any_sectors(first: bytes, header: bytes, last: bytes) -> None:
    disk = first[:510].ljust(510, b"\0") + b"\x55\xaa" + header.ljust(512, b"\0") + bytes(64 * KiB) + last.rjust(512)
    read(disk)


@many
@given(st.tuples(*[st.integers(0, (1 << 64) - 1) | st.integers(0, 600)] * 6), st.integers(0, 1 << 20))
def test_any_words_of_a_gpt_with_right_checksums(words: tuple[int, ...], count: int) -> None:
    mine, at, first, last, begin, end = words
    disk = bytearray(256 * KiB)
    put_gpt(disk, {}, copies=[])
    entries = struct.pack("<16s16sQQ80x", b"t" * 16, b"u" * 16, begin, end) * (1 + count % 200)
    put(disk, 1024, entries)
    put(disk, 512, gpt_header(entries, mine, 511, at, usable=(first, last), count=count))
    read(disk)
    put(disk, 512, gpt_header(entries, 1, 511, 2, usable=(34, 400), count=len(entries) // 128))
    there = [Partition(1, begin * 512, (end + 1 - begin) * 512)] if begin <= end < 512 else []
    assert [p for p in read(disk).partitions if p.number == 1] == there
