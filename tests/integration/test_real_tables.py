"""Partition tables made by the real tools, read by us, by them and by The Sleuth Kit."""

import json
import re
import struct
import subprocess
from pathlib import Path

import pytest
from images import BytesImage
from servers import need, run

from backupfs.guest.partitions import read_table
from backupfs.guest.table import Table
from backupfs.units import MiB

Places = dict[int, tuple[int, int]]

DOS = """label: dos
start=63, size=1000, type=83, bootable
start=2048, size=4096, type=82
size=40960, type=5
size=4096, type=7
size=2048, type=83
size=6000, type=8e
start=22000, size=2048, type=83
"""
GPT = """label: gpt
size=4096, type=U
4: start=20480, size=2048
2: size=1
128: size=100, name="the \\x22last\\x22 one"
"""


def image(path: Path, size: int = 32 * MiB) -> Path:
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def sfdisk(path: Path, script: str, *options: str) -> None:
    need("sfdisk")
    done = subprocess.run(["sfdisk", "-q", *options, path], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def ours(path: Path) -> Table:
    return read_table(BytesImage(path.read_bytes()))


def places(table: Table) -> Places:
    return {p.number: (p.offset, p.length) for p in table.partitions}


def said_by_sfdisk(path: Path) -> Places:
    """Return what sfdisk reads, but for extended partitions, which hold the logical ones."""
    found: Places = {}
    table = json.loads(run("sfdisk", "-J", path))["partitiontable"]
    for partition in table["partitions"]:
        if partition["type"] not in ("5", "f", "85"):
            number = int(re.fullmatch(re.escape(str(path)) + r"(\d+)", partition["node"])[1])  # type: ignore[index]
            found[number] = (partition["start"] * table["sectorsize"], partition["size"] * table["sectorsize"])
    return found


def said_by_sleuthkit(path: Path, sector: int = 512) -> set[tuple[int, int]]:
    """Return the ranges that mmls takes for partitions; it numbers them in another way."""
    need("mmls")
    found = set()
    for line in run("mmls", "-a", "-b", str(sector), path).splitlines():
        match = re.match(r"\d+:\s+\S+\s+(\d+)\s+(\d+)\s+(\d+)\s+(.*)", line)
        if match and "xtended" not in match[4]:
            found.add((int(match[1]) * sector, int(match[3]) * sector))
    return found


@pytest.mark.parametrize("script", [DOS, GPT], ids=["dos", "gpt"])
def test_sfdisk(tmp_path: Path, script: str) -> None:
    path = image(tmp_path / "disk")
    sfdisk(path, script)
    found = ours(path)
    assert found.problems == ()
    assert places(found) == said_by_sfdisk(path)
    assert set(places(found).values()) == said_by_sleuthkit(path)
    assert set(places(found)) == ({1, 2, 4, 5, 6, 7} if script == DOS else {1, 2, 4, 128})


def test_many_logical_partitions_in_another_order_than_on_the_disk(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    sfdisk(path, "label: dos\nsize=2048\nsize=60000, type=f\n" + "".join("\n,500\n" for _ in range(12)))
    run("sfdisk", "-q", "--delete", path, "7")
    sfdisk(path, "size=100\n", "--append")
    sfdisk(path, "size=200\n", "--append")
    found = places(ours(path))
    assert found == said_by_sfdisk(path)
    assert len(found) > 12
    assert set(found.values()) == said_by_sleuthkit(path)


def test_sectors_of_4096_bytes(tmp_path: Path) -> None:
    """Neither tool asks a file for its sectors, so they are told."""
    need("sgdisk", "losetup")
    path = image(tmp_path / "disk")
    loop = run("losetup", "--find", "--show", "--sector-size", "4096", path).strip()
    try:
        run("sgdisk", "-n", "1:0:+4M", "-n", "3:0:+8M", "-n", "2:4096:0", loop)
        said = [line.split()[:3] for line in run("sgdisk", "-p", loop).splitlines() if re.match(r" +\d", line)]
    finally:
        run("losetup", "--detach", loop)
    expected = {int(n): (int(first) * 4096, (int(last) + 1 - int(first)) * 4096) for n, first, last in said}
    assert set(expected) == {1, 2, 3}
    assert places(ours(path)) == expected
    assert said_by_sleuthkit(path, 4096) == set(expected.values())


def test_parted_and_sgdisk(tmp_path: Path) -> None:
    need("parted", "sgdisk")
    path = image(tmp_path / "disk")
    for words in (
        "mklabel msdos mkpart primary 1MiB 3MiB mkpart extended 4MiB 30MiB",
        "mkpart logical 5MiB 7MiB mkpart logical 10MiB 11MiB mkpart logical 8MiB 9MiB",
    ):
        run("parted", "-s", path, *words.split())
    assert places(ours(path)) == said_by_sfdisk(path)
    run("sgdisk", "--mbrtogpt", path)
    assert places(ours(path)) == said_by_sfdisk(path)
    run("sgdisk", "--hybrid=1:2", path)
    assert places(ours(path)) == said_by_sfdisk(path)
    run("sgdisk", "--sort", "--move-main-table=100", path)
    assert places(ours(path)) == said_by_sfdisk(path)
    assert ours(path).problems == ()


def test_the_backup_of_a_gpt(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    sfdisk(path, GPT)
    expected = places(ours(path))
    for damage in (slice(512, 1024), slice(1024, 17408), slice(0, 64 * 1024)):
        content = bytearray(path.read_bytes())
        content[damage] = bytes(damage.stop - damage.start)
        found = read_table(BytesImage(bytes(content)))
        assert places(found) == expected
        assert found.problems


def test_file_systems_on_bare_disks_have_no_partitions(tmp_path: Path) -> None:
    need("mkfs.ext4", "mkfs.xfs", "mkntfs", "mkswap")
    for command in (
        ["mkfs.ext4", "-q"],
        ["mkfs.xfs", "-q"],
        ["mkntfs", "-qFf", "-s", "512", "-p", "0", "-H", "16", "-S", "63"],
        ["mkswap", "-q"],
    ):
        path = image(tmp_path / "disk", 320 * MiB if "xfs" in command[0] else 32 * MiB)
        run(*command, path)
        assert ours(path) == Table(), command


def test_a_table_over_an_old_file_system(tmp_path: Path) -> None:
    """Its superblock is still there, and so is an old GPT's backup."""
    need("mkfs.ext4")
    path = image(tmp_path / "disk")
    sfdisk(path, GPT)
    run("mkfs.ext4", "-qF", path)
    assert ours(path) == Table()
    sfdisk(path, DOS, "--wipe", "never")
    content = path.read_bytes()
    assert struct.unpack_from("<H", content, 1080) == (0xEF53,)
    assert places(ours(path)) == said_by_sfdisk(path)
