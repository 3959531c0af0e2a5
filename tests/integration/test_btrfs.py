"""btrfs as backupfs reads it, and as the kernel does: the same."""

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from crc32c import crc32c
from images import FileImage
from servers import need, run
from test_guest_files import (
    LONG,
    FailingImage,
    _damaged_images,
    _read_all,
    differences,
    fill,
    flip_bytes,
    look,
    open_image,
    tree_of,
)

from backupfs.errors import GuestError
from backupfs.guest.btrfs import BtrfsFileSystem
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(300 if not LONG else 3600), pytest.mark.usefixtures("no_image_stays")]

MANY, PIECES = (20_000, 5000) if LONG else (2000, 300)


@contextmanager
def mounted(image: Path, folder: Path, options: str = "rw") -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,{options}", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def make(path: Path, *options: str, size: int = 300 * MiB) -> Path:
    need("mkfs.btrfs", "btrfs")
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.btrfs", "-q", "-f", *options, path)
    return path


def fill_btrfs(root: Path) -> None:
    """Make what btrfs stores in ways of its own."""
    fill(root, posix=True)
    chance = random.Random(1)
    (root / "long link").symlink_to("y" * 3500)
    os.setxattr(root / "a/tiny", "user.large", chance.randbytes(3000))
    for number in range(60):
        os.setxattr(root / "a/b", f"user.attribute {number}", bytes([number]) * 100)
    (root / "thousands").mkdir()
    for number in range(MANY):
        (root / f"thousands/a name of some length {number}").touch()
    with (root / "pieces").open("wb") as file:
        for number in range(PIECES):
            file.seek(number * 8192)
            file.write(b"%d" % number * 500)
            if number % 50 == 0:
                os.fsync(file.fileno())
    text = b"some text again and again " * 40_000
    (root / "text").write_bytes(text + chance.randbytes(200_000) + bytes(300_000) + b"x" * 100)
    run("cp", "--reflink=auto", root / "a/big", root / "clone")
    with (root / "clone").open("r+b") as clone, (root / "text").open("r+b") as part:
        clone.seek(MiB)
        clone.write(b"not shared")
        part.seek(70_000)
        part.write(b"inside of an extent")
    run("btrfs", "subvolume", "create", root / "sub")
    (root / "sub/inside").write_text("inside")
    run("btrfs", "subvolume", "create", root / "sub/nested")
    (root / "sub/nested/file").write_text("nested")
    run("btrfs", "subvolume", "snapshot", "-r", root / "sub", root / "snapshot")
    (root / "sub/inside").write_text("changed")


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ((), "rw"),
        ((), "compress-force=zstd"),
        ((), "compress-force=zlib"),
        ((), "compress-force=lzo"),
        ((), "nodatacow"),
        (("--csum", "xxhash"), "rw"),
        (("--csum", "sha256", "-n", "4096"), "rw"),
        (("--csum", "blake2", "-M"), "compress=zstd"),
        (("-O", "^no-holes"), "rw"),
    ],
    ids=str,
)
def test_it_is_what_the_kernel_shows(tmp_path: Path, options: tuple[str, ...], how: str) -> None:
    path = make(tmp_path / "disk", *options)
    with mounted(path, tmp_path / "mnt", how) as root:
        fill_btrfs(root)
    with mounted(path, tmp_path / "mnt", "ro") as root, closing(open_image(path)) as system:
        assert (system.kind, system.notes) == ("btrfs", ())
        # A folder that is only the place of a subvolume has the time at which somebody looks.
        assert [line for line in differences(system, root) if "snapshot/nested': " not in line] == []
        assert system.list(look(system, "snapshot/nested")) == []
        assert (system.runs(look(system, "pieces")) is None) == (how != "nodatacow"), "checksums have to be checked"
        holes = [e for e in system.extents(look(system, "a/sparse"), 0, 9 * MiB) if e.flag]
        assert sum(e.length for e in holes) >= 9 * MiB - 256 * KiB


def test_a_log_that_was_not_replayed(tmp_path: Path) -> None:
    path, moment = make(tmp_path / "disk"), tmp_path / "moment"
    with mounted(path, tmp_path / "mnt") as root:
        (root / "before").write_text("before")
        os.sync()
        with (root / "flushed").open("w") as file:
            file.write("flushed")
            file.flush()
            os.fsync(file.fileno())
        shutil.copyfile(path, moment)
    with closing(open_image(moment)) as system:
        (note,) = system.notes
        assert "log was not replayed" in note
        assert system.read(look(system, "before"), 0, 10) == b"before"
    with closing(open_image(path)) as system:
        assert system.notes == ()
        assert system.read(look(system, "flushed"), 0, 10) == b"flushed"


def test_times_that_are_far_away(tmp_path: Path) -> None:
    """They are numbers of 64 bits. What takes more, in ns, must not hide what is beside it."""
    path = make(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt") as root:
        (root / "folder").mkdir()
        for second in (-(1 << 63), -(10**10), 0, 2 * 10**10, (1 << 63) - 1):
            run("touch", "-d", f"@{second}", root / f"folder/{second}")
    with mounted(path, tmp_path / "mnt", "ro") as root, closing(open_image(path)) as system:
        assert differences(system, root) == []


def test_an_extent_of_which_an_old_kernel_wrote_less_than_it_stored(tmp_path: Path) -> None:
    """Before 6.11 `ram_bytes` of what is not compressed may be too small, and nobody minds. Source: file-item.c"""
    path, content = make(tmp_path / "disk"), random.Random(3).randbytes(MiB)
    with mounted(path, tmp_path / "mnt") as root:
        (root / "file").write_bytes(content)
        os.sync()
        os.truncate(root / "file", MiB // 2)
    disk = bytearray(path.read_bytes())
    old = struct.pack("<QBBHB", MiB, 0, 0, 0, 1)  # ram_bytes, nothing of compression, …, a regular extent
    node, changed = 16 * KiB, 0
    for at in range(128 * KiB, len(disk) - node, 4 * KiB):
        (checksum,) = struct.unpack_from("<I", disk, at)
        if disk[at + 32 : at + 48] == disk[0x10020:0x10030] and crc32c(bytes(disk[at + 32 : at + node])) == checksum:
            place = disk.find(old, at + 101, at + node)
            if place > 0:
                struct.pack_into("<Q", disk, place, MiB // 2)
                struct.pack_into("<I", disk, at, crc32c(bytes(disk[at + 32 : at + node])))
                changed += 1
    assert changed
    path.write_bytes(disk)
    with mounted(path, tmp_path / "mnt", "ro") as root, closing(open_image(path)) as system:
        assert (root / "file").read_bytes() == content[: MiB // 2]
        assert differences(system, root) == []


def test_several_devices_are_refused(tmp_path: Path) -> None:
    need("losetup")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(200 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-d", "raid0", "-m", "raid1", *paths)
    with pytest.raises(GuestError, match="2 devices"):
        open_image(paths[0])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = make(tmp_path / "disk", size=120 * MiB)
    with mounted(path, tmp_path / "mnt", "compress=zstd") as root:
        for number in range(20):
            (root / f"file {number}").write_bytes(b"content" * 1000 * number)
            os.setxattr(root / f"file {number}", "user.long", b"value" * 100)
        (root / "folder").mkdir()
        for number in range(100):
            (root / f"folder/name {number}").touch()
        (root / "link").symlink_to("target" * 100)
        (root / "random").write_bytes(random.Random(1).randbytes(200_000))
    return path


def used(content: bytes) -> list[int]:
    return [at for at in range(0, len(content), 4 * KiB) if any(content[at : at + 4 * KiB])]


def test_damaged_file_systems(small: Path) -> None:
    """Nothing hangs, and nothing but GuestError comes out."""
    rounds = 400 if LONG else 12
    closed, failed = _damaged_images(small, rounds, _read_all)
    print(f"{rounds} damaged images: {closed} can't be opened, in {failed} something can't be read")
    assert closed + failed < rounds, "some of what was flipped concerns nobody"


def test_a_flipped_byte_is_an_error_or_read_from_the_other_copy(small: Path) -> None:
    assert flip_bytes(small, 3000 if LONG else 150, ()) > 5


def test_what_can_not_be_read_is_not_taken_for_absent(small: Path) -> None:
    content, errors = small.read_bytes(), 0
    with closing(FailingImage(small)) as image:
        right = tree_of(BtrfsFileSystem(image))
        places = used(content)
        for at in places if LONG else random.Random(8).sample(places, min(60, len(places))):
            image.bad = range(0)
            system = BtrfsFileSystem(image)
            image.bad = range(at, at + 4 * KiB)
            found = tree_of(system)
            for key, value in found.items():
                assert value is GuestError or value == right[key], (at, key)
            errors += GuestError in found.values()
    assert errors > 3


def test_the_other_copy_of_the_metadata(small: Path) -> None:
    """mkfs keeps two: with each node of the first one destroyed all can be read."""
    with closing(FileImage(small)) as image:
        system = BtrfsFileSystem(image)
        right = tree_of(system)
    content = bytearray(small.read_bytes())
    destroyed = 0
    for length, places in system._disk._chunks:
        if len(places) == 2:
            content[places[0] : places[0] + length] = bytes(length)
            destroyed += 1
    assert destroyed >= 2
    small.write_bytes(content)
    with closing(FileImage(small)) as image:
        assert tree_of(BtrfsFileSystem(image)) == right


def test_it_is_read_by_a_command_too(small: Path, tmp_path: Path) -> None:
    from commands import BACKUPFS

    repo = tmp_path / "repo"
    for words in (["init"], ["backup", "web", f"vda={small}"], ["cp", "web/latest/vda:/random", str(tmp_path / "out")]):
        subprocess.run([*BACKUPFS, "-r", str(repo), *words], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "out").read_bytes() == random.Random(1).randbytes(200_000)
