"""LVM's labels, metadata and volume groups made by hand; real ones are in test_real_lvm.py."""

import contextlib
import os
import random

import pytest
from guest_disks import DATA_AT, MDA_AT, MDA_SIZE, entry, group, logical, put, put_gpt, put_pv, pv_uuid, segment, table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import BytesImage

from backupfs.errors import Corrupt
from backupfs.guest import lvm, lvm_groups
from backupfs.guest.lvm import checksum
from backupfs.guest.lvm_text import BadText, parse
from backupfs.guest.scan import Division, scan
from backupfs.guest.volumes import Leg, Run, assemble
from backupfs.image import Buffer
from backupfs.units import KiB, MiB

EXAMPLES = 20_000 if os.environ.get("BACKUPFS_LONG") else 500
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
EXTENT = 64 * KiB
PV = DATA_AT + 16 * EXTENT

ROOT = logical("root", segment(0, 4, '"pv0", 2'))


def look(*disks: bytes) -> list[Division]:
    """Scan disks called a, b and so on, and check that what is found can be read."""
    images = {"abcdefgh"[i]: BytesImage(bytes(disk)) for i, disk in enumerate(disks)}
    found = scan(images)
    assert list(found) == list(images)
    for division in found.values():
        names = [volume.name for volume in division.volumes]
        assert len(names) == len(set(names))
        for volume in division.volumes:
            image = assemble(volume, images)
            assert image.size == volume.size > 0
            assert "/" not in volume.name
            assert volume.name.isprintable()
        assert all(line.isprintable() for line in division.problems)
    return list(found.values())


def volumes(division: Division) -> dict[str, tuple[Run, ...]]:
    return {volume.name: volume.runs for volume in division.volumes if volume.name not in ("0", "1", "2")}


def pv(number: int = 0, text: str | bytes = b"", size: int = PV, start: int = 512) -> bytearray:
    disk = bytearray(size)
    put_pv(disk, 0, size, number, text, start=start)
    return disk


def alone(text: str) -> Division:
    return look(pv(0, text))[0]


def refused(*sections: str) -> str:
    """Return why a volume of a group is refused, beside another that is not."""
    found = alone(group(ROOT, *sections))
    assert list(volumes(found)) == ["vg0-root"]
    (problem,) = found.problems
    return problem


def test_a_linear_volume_on_a_bare_disk() -> None:
    found = alone(group(ROOT))
    assert volumes(found) == {"vg0-root": (Run(4 * EXTENT, (Leg("a", DATA_AT + 2 * EXTENT),)),)}
    assert found.volumes[0].name == "0"
    assert found.problems == ()


def test_text_that_wraps_around() -> None:
    for start in (MDA_SIZE - 1, MDA_SIZE - 100, MDA_SIZE - len(group(ROOT)), 512):
        assert "vg0-root" in volumes(look(pv(0, group(ROOT), start=start))[0])


def test_segments_on_partitions_of_several_disks() -> None:
    text = group(
        logical("many", segment(0, 3, '"pv1", 5'), segment(3, 4, '"pv0", 0'), segment(7, 2, '"pv0", 4')),
        logical("fast", segment(0, 6, '"pv0", 8, "pv1", 9', stripe_sectors=32)),
        pvs=[4, 7],
    )
    a, b = bytearray(4 * MiB), bytearray(4 * MiB)
    put(a, 0, table(entry(0x8E, 2048, PV // 512)))
    put_pv(a, 1 * MiB, PV, 4, text)
    put_gpt(b, {2: (1024, 1024 + PV // 512 - 1)})
    put_pv(b, 512 * KiB, PV, 7)  # without metadata
    at = {"a": 1 * MiB + DATA_AT, "b": 512 * KiB + DATA_AT}
    expected = {
        "vg0-many": (Run(3 * EXTENT, (Leg("b", at["b"] + 5 * EXTENT),)), Run(6 * EXTENT, (Leg("a", at["a"]),))),
        "vg0-fast": (Run(6 * EXTENT, (Leg("a", at["a"] + 8 * EXTENT), Leg("b", at["b"] + 9 * EXTENT)), 16 * KiB),),
    }
    for division, other in zip(look(a, b), look(b, a)[::-1], strict=True):
        assert volumes(division) == expected
        assert list(volumes(other)) == list(expected)
        assert division.problems == ()


def test_a_missing_physical_volume_takes_only_its_volumes_away() -> None:
    text = group(ROOT, logical("gone", segment(0, 1, '"pv0", 9'), segment(1, 1, '"pv1", 0')), pvs=[0, 1])
    found = alone(text)
    assert list(volumes(found)) == ["vg0-root"]
    assert found.problems == (f"vg0/gone: its physical volume pv1 ({pv_uuid(1)}) is on no disk of this point",)


def test_the_newest_text_counts() -> None:
    old, new = (
        group(logical(name, segment(0, 1, '"pv0", 0')), pvs=[0, 1], seqno=n) for n, name in ((9, "old"), (10, "new"))
    )
    for first, second in ((old, new), (new, old)):
        a, b = look(pv(0, first), pv(1, second))
        assert list(volumes(a)) == ["vg0-new"]
        assert not volumes(b)
        assert not a.problems


def test_two_newest_texts_are_refused() -> None:
    first, second = (group(logical(name, segment(0, 1, '"pv0", 0')), pvs=[0, 1]) for name in ("old", "new"))
    a, b = look(pv(0, first), pv(1, second))
    assert not volumes(a)
    assert a.problems == b.problems == ("vg0: two texts, different and with one number, describe it",)


def test_a_text_that_can_not_be_read_may_be_the_newest() -> None:
    good = group(ROOT, pvs=[0, 1])
    for bad in (good.replace("seqno", "seqno seqno"), good + " " * (lvm.LARGEST_TEXT + 1)):
        disk = pv(0, good)
        other = bytearray(PV + 8 * MiB)
        put_pv(other, 0, len(other), 1, bad[:10] if len(bad) > MDA_SIZE else bad)
        if len(bad) > MDA_SIZE:  # only its length
            header = bytearray(other[MDA_AT : MDA_AT + 512])
            put(header, 48, (lvm.LARGEST_TEXT + 1).to_bytes(8, "little"))
            put(header, 32, (8 * MiB).to_bytes(8, "little"))
            label = bytearray(other[512:1024])
            put(label, 32 + 40 + 32 + 8, (8 * MiB).to_bytes(8, "little"))
            put(label, 16, checksum(label[20:]).to_bytes(4, "little"))
            put(header, 0, checksum(header[4:]).to_bytes(4, "little"))
            put(other, MDA_AT, header)
            put(other, 512, label)
        a, _ = look(disk, other)
        assert not volumes(a)
        assert any("there may be a newer text" in problem for problem in a.problems)


def test_a_stale_physical_volume_says_nothing() -> None:
    """It was taken out of the group, and its text is of a time before that; nobody else has the group."""
    a, b = look(pv(0, group(ROOT, pvs=[5])), pv(5))
    assert not volumes(a)
    assert not volumes(b)


def test_the_same_physical_volume_twice() -> None:
    a, b = look(pv(0, group(ROOT)), pv(0, group(ROOT)))
    for found in (a, b):
        assert not volumes(found)
        assert found.problems == (
            f"vg0/root: its physical volume pv0 ({pv_uuid(0)}) is on several disks or partitions",
        )


def test_two_groups_of_one_name() -> None:
    """Each disk shows its own; where both are on one disk neither is shown."""
    first = group(ROOT)
    second = group(ROOT, pvs=[1]).replace('id = "0000', 'id = "1111')
    a, b = look(pv(0, first), pv(1, second))
    assert list(volumes(a)) == list(volumes(b)) == ["vg0-root"]
    disk = bytearray(8 * MiB)
    put(disk, 0, table(entry(0x8E, 2048, PV // 512), entry(0x8E, 8192, PV // 512)))
    put_pv(disk, 1 * MiB, PV, 0, first)
    put_pv(disk, 4 * MiB, PV, 1, second)
    (found,) = look(disk)
    assert not volumes(found)
    assert found.problems == ("vg0-root: several logical volumes have that name",) * 2


@pytest.mark.parametrize(
    "kind",
    [
        "thin",
        "thin-pool",
        "raid1",
        "raid5_ls",
        "mirror",
        "cache",
        "cache-pool",
        "writecache",
        "vdo",
        "vdo-pool",
        "error",
    ],
)
def test_other_types_are_refused_by_name(kind: str) -> None:
    problem = refused(logical("other", segment(0, 1, '"pv0", 9', kind=kind)))
    assert problem == f"vg0/other: logical volumes of type {kind} are not supported"


def test_snapshots_are_refused_by_name_and_their_origin_is_not() -> None:
    """The volume that holds a snapshot's copies looks like a linear one."""
    snapshot = 'snapshot0 { id = "x" status = ["READ"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 '
    snapshot += 'type = "snapshot" chunk_size = 8 origin = "root" cow_store = "snap" } }\n'
    snap = logical("snap", segment(0, 1, '"pv0", 9'))
    assert refused(snap, snapshot) == "vg0/snap: snapshots are not supported"
    merging = snapshot.replace("cow_store", "merging_store")
    found = alone(group(ROOT, snap, merging))
    assert not volumes(found)
    assert set(found.problems) == {
        "vg0/snap: snapshots are not supported",
        "vg0/root: volumes that a snapshot is being merged into are not supported",
    }


@pytest.mark.parametrize(
    ("why", "section"),
    [
        ("lies on the logical volume pvmove0", logical("x", segment(0, 1, '"pvmove0", 0'))),
        ("beyond the end", logical("x", segment(0, 1, '"pv0", 16'))),
        ("beyond the end", logical("x", segment(0, 16, '"pv0", 1'))),
        ("beyond the end", logical("x", segment(0, 1 << 40, '"pv0", 0'))),
        ("without a gap", logical("x", segment(1, 1, '"pv0", 1'))),
        ("without a gap", logical("x", segment(0, 2, '"pv0", 1'), segment(1, 2, '"pv0", 5'))),
        ("without a gap", logical("x", segment(0, 0, '"pv0", 1'))),
        ("do not fit", logical("x", segment(0, 3, '"pv0", 1, "pv0", 5', stripe_sectors=8))),
        ("do not fit", logical("x", segment(0, 3, ""))),
        (
            "stripes of 0 bytes",
            logical("x", segment(0, 2, '"pv0", 1, "pv0", 5')).replace("stripes", "stripe_size=0 stripes"),
        ),
        ("stripes of 512 bytes", logical("x", segment(0, 2, '"pv0", 1, "pv0", 5', stripe_sectors=1))),
        ("stripes of 24576", logical("x", segment(0, 2, '"pv0", 1, "pv0", 5', stripe_sectors=48))),
        ("stripes of 131072", logical("x", segment(0, 2, '"pv0", 1, "pv0", 5', stripe_sectors=256))),
        ("names no place", logical("x", segment(0, 1, '"pv0", -1'))),
        ("names no place", logical("x", segment(0, 1, '"pv0", "pv0"')).replace("stripe_count = 2", "stripe_count = 1")),
        ("no number stripe_size", logical("x", segment(0, 2, '"pv0", 1, "pv0", 5'))),
        ("no list stripes", logical("x", segment(0, 1, '"pv0", 1')).replace("stripes =", "strips =")),
        ("segments are missing", logical("x")),
        (
            "segments are missing",
            logical("x", segment(0, 1, '"pv0", 1')).replace("segment_count = 1", "segment_count = 2"),
        ),
        ("state MERGING", logical("x", segment(0, 1, '"pv0", 1'), status='"VISIBLE", "MERGING"')),
        ("name is too long", logical("x" * 240, segment(0, 1, '"pv0", 1'))),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(why: str, section: str) -> None:
    problem = refused(section)
    assert problem.startswith("vg0/x")
    assert why in problem


def test_hidden_volumes_are_left_out() -> None:
    hidden = logical("pool_tdata", segment(0, 1, '"pv0", 9'), status='"READ", "WRITE"')
    assert list(volumes(alone(group(ROOT, hidden)))) == ["vg0-root"]


def test_a_physical_volume_that_is_larger_than_its_partition() -> None:
    (found,) = look(pv(0, group(ROOT, logical("end", segment(0, 1, '"pv0", 15'))))[: PV - 1])
    assert list(volumes(found)) == ["vg0-root"]
    assert "vg0/end: it reaches beyond the end" in found.problems[0]


def test_names_become_no_paths() -> None:
    names = {
        "a-b": "vg0-a--b",
        '"../../etc"': "vg0-..%2F..%2Fetc",
        '"x\ny"': "vg0-x%0Ay",
        '"ü"': "vg0-%C3%BC",
        "9": "vg0-9",
    }
    text = group(*(logical(name, segment(0, 1, f'"pv0", {i}')) for i, name in enumerate(names)))
    disk = pv(0, text.encode())
    assert list(volumes(look(disk)[0])) == list(names.values())
    assert list(volumes(alone(group(ROOT, name='".."')))) == ["..-root"]
    problem = alone(group(logical('"\x1b[31m"', segment(0, 1, '"pv0", 99')))).problems[0]
    assert problem.startswith("vg0/%1B%5B31m: ")


def test_what_is_wrong_with_labels_and_areas() -> None:
    good = pv(0, group(ROOT))
    for place in (512, 520, 528, 536, 544, 560, 1000):  # in the label: then it is none
        disk = bytearray(good)
        disk[place] ^= 1
        assert look(disk)[0] == look(bytes(PV))[0]
    for place, words in ((MDA_AT, "header"), (MDA_AT + 40, "header"), (MDA_AT + 600, "checksum")):
        disk = bytearray(good)
        disk[place] ^= 1
        (found,) = look(disk)
        assert not volumes(found)
        assert f"0: its LVM metadata at {MDA_AT}" in found.problems[0]
        assert words in found.problems[0]


def test_a_label_in_another_sector() -> None:
    disk = pv(0, group(ROOT))
    label = bytearray(disk[512:1024])
    put(disk, 512, bytes(512))
    put(label, 8, (3).to_bytes(8, "little"))
    put(disk, 3 * 512, label)
    assert list(volumes(look(disk)[0])) == ["vg0-root"]
    put(disk, 3 * 512, bytes(512))
    put(disk, 2 * 512, label)
    assert not volumes(look(disk)[0])


class BrokenImage(BytesImage):
    def __init__(self, data: bytes, bad: range) -> None:
        super().__init__(data)
        self.bad = bad

    def readinto(self, offset: int, buffer: Buffer) -> None:
        if offset < self.bad.stop and offset + len(buffer) > self.bad.start:
            raise Corrupt("x.layer", 7, "flipped")
        super().readinto(offset, buffer)


def test_what_can_not_be_read_is_told_and_the_rest_is_shown() -> None:
    disk = bytearray(8 * MiB)
    put(disk, 0, table(entry(0x83, 2048, 100), entry(0x8E, 8192, PV // 512)))
    put_pv(disk, 4 * MiB, PV, 0, group(ROOT))
    good = scan({"a": BytesImage(disk)})["a"]
    assert [v.name for v in good.volumes] == ["1", "2", "vg0-root"]
    for bad, names in (
        (range(4 * MiB, 5 * MiB), ["1", "2"]),
        (range(1 * MiB, 2 * MiB), ["1", "2", "vg0-root"]),
        (range(9), []),
    ):
        found = scan({"a": BrokenImage(disk, bad)})["a"]
        assert [v.name for v in found.volumes] == names
        assert not found.complete
        assert "x.layer: damaged at offset 7" in found.problems[0]


def test_the_metadata_of_hostile_disks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many physical volumes, each with a text of its own as large as it may be: some are read, the rest is named."""
    monkeypatch.setattr(lvm_groups, "_MOST_TEXT", 3 * len(group(ROOT)))
    disks = []
    for i in range(6):
        disks.append(pv(i, group(ROOT, name=f"vg{i}", pvs=[i])))
    found = look(*disks)
    assert [len(volumes(division)) for division in found] == [1, 1, 1, 0, 0, 0]
    assert "too much" in found[5].problems[0]
    budget = lvm.Budget(2 * len(group(ROOT)))
    read = [lvm.read_physical_volume(BytesImage(bytes(disk)), "a", 0, budget) for disk in disks]
    assert [len(volume.texts) for volume in read if volume] == [1, 1, 0, 0, 0, 0]
    assert [volume.unread for volume in read if volume] == [False, False, True, True, True, True]


# The text.


def test_the_text_that_lvm_writes() -> None:
    assert parse('a = 1 # x = "y"\nb { c = ["x", # "z"\n -2 , "\\"\\\\#"] d=[] }\n e="" f = word \n\n') == {
        "a": 1,
        "b": {"c": ["x", -2, '"\\#'], "d": []},
        "e": "",
        "f": "word",
    }
    assert parse("") == {}


@pytest.mark.parametrize(
    "text",
    [
        *("a", "a {", "a = ", "a = [", "a = [1", "a = [1 2]", "a = [1,,2]", "a = [1,]", "}", "a { } }", "a = {", "= 1"),
        *("a { } a { }", 'a = "x', "{ }", "[", '"" = 1', "a = ]", "a a", "x { " * 17 + "} " * 17, 'a = "\\', ", = 1"),
        "a = 1 a = 2",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(BadText):
        parse(text)


def test_a_text_of_megabytes_is_refused_or_read_in_seconds() -> None:
    size = lvm.LARGEST_TEXT
    for text in ("#" * size, " #\n" * (size // 3), " " * size):
        assert parse(text) == {}
    strings = ('a = "' + "\\x" * (size // 2) + '"', '"' * size, '"\\' * (size // 2), 'a = "' + "x" * size + '"')
    lists = ("[" * size, "a = [ " + "1," * (size // 2), "a = [ " + "1," * (size // 2) + "1 ]", "a = [ #" * (size // 7))
    sections = ("a { " * (size // 4), "} " * (size // 2), "".join(f"k{i} {{}}" for i in range(size // 10)))
    for text in ("a" * size, "\\" * size, *strings, *lists, *sections):
        with pytest.raises(BadText):
            parse(text)


@many
@given(st.text(alphabet=st.sampled_from('ab1-"\\{}[]=,# \n'), max_size=60) | st.text(max_size=60))
def test_any_text(text: str) -> None:
    with contextlib.suppress(BadText):
        parse(text)


TEXT = group(
    ROOT,
    logical("fast", segment(0, 4, '"pv0", 8, "pv1", 9', stripe_sectors=32)),
    logical("many", segment(0, 3, '"pv1", 5'), segment(3, 2, '"pv0", 0')),
    pvs=[0, 1],
)
WORDS = [
    "0",
    "1",
    "16",
    "4294967296",
    "-1",
    "99999999999999999999",
    '"pv1"',
    '"root"',
    "{",
    "}",
    "[",
    "]",
    "=",
    '"',
    "#",
    "",
]


@many
@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(WORDS)), min_size=1, max_size=6), st.randoms())
def test_any_metadata_with_a_right_checksum(changes: list[tuple[int, str]], draw: random.Random) -> None:
    words = TEXT.split(" ")
    for place, word in changes:
        words[place % len(words)] = word
    text = " ".join(words).encode("latin-1", errors="replace")[:MDA_SIZE]
    look(pv(0, text), pv(1, draw.choice([b"", TEXT, text])))


@many
@given(st.lists(st.tuples(st.integers(0, PV - 9), st.binary(min_size=1, max_size=8)), max_size=4), st.booleans())
def test_any_label_and_area_with_right_checksums(changes: list[tuple[int, bytes]], seal: bool) -> None:
    disk = pv(0, TEXT)
    for place, content in changes:
        where = (512 + place % 512, MDA_AT + place % 512, place)[place % 3]
        put(disk, where, content)
    if seal:
        put(disk, 528, checksum(disk[532:1024]).to_bytes(4, "little"))
        put(disk, MDA_AT, checksum(disk[MDA_AT + 4 : MDA_AT + 512]).to_bytes(4, "little"))
    look(disk, pv(1))
