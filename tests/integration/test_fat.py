"""FAT as backupfs reads it, and as mtools do: the same. The reference kernel of the tests may have no vfat."""

import os
import random
import struct
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from images import FileImage
from servers import need, run
from test_guest_files import LONG, SIZE, differences, fill, look, open_image

from backupfs.errors import GuestError
from backupfs.guest.detect import detect
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.timeout(300 if not LONG else 3600)


def make_fat(path: Path, bits: str, *options: str) -> Path:
    """Make a FAT with some files of 10,000 bytes and more."""
    need("mkfs.fat", "mcopy")
    source = path.parent / "files"
    source.mkdir()
    for number in range(20):
        (source / f"file {number}").write_bytes(random.Random(number).randbytes(10_000 + number * 1000))
    with path.open("wb") as file:
        file.truncate({"12": 15, "16": 64, "32": 300}[bits] * MiB)
    run("mkfs.fat", "-F", bits, *options, path)
    run("mcopy", "-i", path, "-s", source, "::folder")
    return source


def contents(path: Path) -> dict[str, bytes]:
    with closing(open_image(path)) as system:
        entries = system.list(look(system, "folder"))
        return {entry.name.decode(): system.read(entry.stat.inode, 0, entry.stat.size) for entry in entries}


def patch(path: Path, edit: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


@pytest.mark.parametrize("bits", ["12", "16"])
def test_what_older_systems_keep_in_an_entry(tmp_path: Path, bits: str) -> None:
    """OS/2 and DR-DOS use what is the upper half of FAT32's cluster numbers for something else."""
    source, path = make_fat(tmp_path / "disk", bits), tmp_path / "disk"

    def mark(content: bytearray) -> None:
        at, marked = 0, 0
        while (at := content.find(b"FILE", at)) >= 0:
            if at % 32 == 0 and not content[at + 11] & 0x18:
                struct.pack_into("<H", content, at + 20, 0x1234)
                marked += 1
            at += 1
        assert marked == 20

    patch(path, mark)
    assert contents(path) == {file.name: file.read_bytes() for file in source.iterdir()}


def test_one_table_of_a_fat32_may_be_kept_up_to_date_alone(tmp_path: Path) -> None:
    source, path = make_fat(tmp_path / "disk", "32"), tmp_path / "disk"

    def leave_one(content: bytearray) -> None:
        (reserved,), (length,) = struct.unpack_from("<H", content, 14), struct.unpack_from("<I", content, 36)
        struct.pack_into("<H", content, 40, 0x81)
        content[reserved * 512 : (reserved + length) * 512] = bytes(length * 512)

    patch(path, leave_one)
    assert contents(path) == {file.name: file.read_bytes() for file in source.iterdir()}

    patch(path, lambda content: struct.pack_into("<H", content, 40, 0x82))
    with pytest.raises(GuestError, match="makes no sense"):
        open_image(path)


def test_a_fat32_without_a_first_folder(tmp_path: Path) -> None:
    make_fat(tmp_path / "disk", "32")
    patch(tmp_path / "disk", lambda content: struct.pack_into("<I", content, 44, 0))
    with pytest.raises(GuestError, match="no first folder"):
        open_image(tmp_path / "disk")


@pytest.mark.parametrize(("bits", "options"), [("16", ("-A",)), ("12", ()), ("16", ()), ("32", ())])
def test_a_fat_that_does_not_say_so(tmp_path: Path, bits: str, options: tuple[str, ...]) -> None:
    """Its numbers count, not the words in it, which mkfs.fat -A leaves out; and all of them have to fit."""
    path = tmp_path / "disk"
    source = make_fat(path, bits, *options)

    def without_words(content: bytearray) -> None:
        content[3:11] = b"odd name"
        at = 82 if bits == "32" else 54
        content[at : at + 8] = b"whatever"

    patch(path, without_words)
    assert contents(path) == {file.name: file.read_bytes() for file in source.iterdir()}
    good = path.read_bytes()
    (reserved,) = struct.unpack_from("<H", good, 14)
    (sector,) = struct.unpack_from("<H", good, 11)
    wrong = {"sector": 12, "clusters": 13, "tables": 16, "medium": 21, "table's first": reserved * sector}
    for what, at in wrong.items():
        patch(path, lambda content, at=at: content.__setitem__(at, 0x33))  # type: ignore[misc]
        assert kind(path) is None, what
        path.write_bytes(good)
    with path.open("r+b") as file:
        file.truncate(len(good) // 2)
    assert kind(path) is None, "cut off"


def test_other_first_sectors_are_not_taken_for_fat(tmp_path: Path) -> None:
    """Those of NTFS and exFAT, also without their names, a partition table with code, and anything."""
    need("mkfs.ntfs")
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    run("mkfs.ntfs", "-q", "-F", "-f", path)
    patch(path, lambda content: content.__setitem__(slice(3, 11), b"odd name"))
    assert kind(path) is None
    exfat = b"\xeb\x76\x90odd name" + bytes(53) + struct.pack("<QQIIIII", 0, SIZE // 512, 128, 128, 256, 9000, 4)
    path.write_bytes((exfat.ljust(510, b"\0") + b"\x55\xaa").ljust(64 * KiB, b"\0") + b"\xf8\xff\xff\xff" * 4096)
    assert kind(path) is None
    chance = random.Random(5)
    for _ in range(300):
        first = chance.randbytes(510) + b"\x55\xaa"
        path.write_bytes(b"\xeb\x3c\x90" + first[3:] + b"\xf8\xff\xff\xff" * 2048)
        assert kind(path) is None


def test_times_that_are_none(tmp_path: Path) -> None:
    """Linux adds them up."""
    make_fat(tmp_path / "disk", "16")
    given = [(0, 0), (1 << 5 | 1, 31 | 24 << 11), (13 << 5 | 2, 0), (20 << 9 | 2 << 5 | 30, 0)]

    def mark(content: bytearray) -> None:
        at = 0
        for date, time in given:
            at = content.index(b"FILE", at + 1)
            struct.pack_into("<HH", content, at + 22, time, date)

    patch(tmp_path / "disk", mark)
    with closing(open_image(tmp_path / "disk")) as system:
        entries = system.list(look(system, "folder"))
        found = [entry.stat.mtime_ns for entry in entries[: len(given)]]
    expected = ["1980-01-01T00:00:00", "1980-01-02T00:01:02", "1980-01-02T00:00:00", "2000-03-01T00:00:00"]
    assert found == [int(datetime.fromisoformat(f"{time}+00:00").timestamp()) * 10**9 for time in expected]


def kind(path: Path) -> str | None:
    with closing(FileImage(path)) as image:
        return detect(image).family


@pytest.mark.parametrize("bits", ["12", "16", "32"])
def test_fat(tmp_path: Path, bits: str) -> None:
    need("mkfs.fat", "mcopy")
    path, source = tmp_path / "disk", tmp_path / "source"
    with path.open("wb") as file:
        file.truncate(SIZE if bits != "12" else 15 * MiB)
    run("mkfs.fat", "-F", bits, "-n", "LABEL", *(("-s", "1") if bits == "32" else ()), path)
    source.mkdir()
    fill(source, posix=False)
    if bits == "12":
        (source / "a/sparse").unlink()
    for folder in ("a", "many"):
        run("env", "TZ=UTC", "LC_ALL=C.UTF-8", "mcopy", "-i", path, "-s", "-m", source / folder, "::")
    with closing(open_image(path)) as system:
        inside = {entry.name for entry in system.list(system.root)}
        assert inside == {b"a", b"many"}
        times = ("mode", "nlink", "atime_ns", "mtime_ns", "ctime_ns", "allocated")
        assert [line for line in differences(system, source, *times) if ": size " not in line] == []
        written = (source / "a/big").stat().st_mtime
        assert abs(system.stat(look(system, "a/big")).mtime_ns / 10**9 - written) <= 2, "FAT counts in pairs of seconds"


@pytest.mark.parametrize("bits", ["12", "16", "32"])
def test_a_large_folder_of_fat(tmp_path: Path, bits: str) -> None:
    """Long names, and short ones, of which some were removed and renamed."""
    need("mkfs.fat", "mcopy", "mdel", "mren")
    path, source = tmp_path / "disk", tmp_path / "source"
    with path.open("wb") as file:
        file.truncate({"12": 15, "16": 64, "32": 300}[bits] * MiB)
    run("mkfs.fat", "-F", bits, *(("-s", "8") if bits == "32" else ()), path)
    source.mkdir()
    names = [f"{number} ü {'n' * (1 + number * 7 % 200)}" for number in range(120)]
    for number, name in enumerate(names):
        (source / name).write_bytes(random.Random(number).randbytes(number * 70))
    in_utc = ("env", "TZ=UTC", "LC_ALL=C.UTF-8")
    run(*in_utc, "mmd", "-i", path, "::folder")
    run(*in_utc, "mcopy", "-i", path, "-m", *source.iterdir(), "::folder")
    run(*in_utc, "mdel", "-i", path, *(f"::folder/{name}" for name in names[::3]))
    for name in names[::3]:
        (source / name).unlink()
    for number in range(1, 120, 30):
        run(*in_utc, "mren", "-i", path, f"::folder/{names[number]}", f"renamed {number}")
        (source / names[number]).rename(source / f"renamed {number}")
    for number in range(20):  # in the places of what was removed
        (source / f"SHORT{number}.TXT").write_bytes(random.Random(number).randbytes(20_000 + number))
    run(*in_utc, "mcopy", "-i", path, "-m", *source.glob("SHORT*"), "::folder")
    content = path.read_bytes()
    with closing(open_image(path)) as system:
        found = {entry.name: entry.stat for entry in system.list(look(system, "folder"))}
        assert set(found) == set(os.listdir(os.fsencode(source)))
        for name, s in found.items():
            expected = (source / os.fsdecode(name)).read_bytes()
            assert system.read(s.inode, 0, s.size + 10) == expected
            runs = system.runs(s.inode)
            assert runs is not None
            assert b"".join(content[r.offset :][: r.length] for r in runs if r.offset is not None) == expected
