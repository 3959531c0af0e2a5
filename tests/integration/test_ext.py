"""ext2, ext3 and ext4 as backupfs reads them, and as the kernel does: the same."""

import os
import random
import shutil
import struct
from contextlib import closing
from pathlib import Path

import pytest
from servers import need, run
from test_guest_files import (
    ACL,
    LONG,
    damage_inode,
    detect_dirty,
    differences,
    fill,
    flip_bytes,
    look,
    make_ext4,
    mounted,
    open_image,
)

from backupfs.errors import GuestError
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.timeout(300 if not LONG else 3600)


def fill_ext(root: Path) -> None:
    """Make files whose content lies far apart, in many pieces."""
    with (root / "far").open("wb") as file:
        for place in (0, 11, 12, 300, 70_000):  # blocks of 1 KiB: one behind each limit of their pointers
            file.seek(place * KiB)
            file.write(b"%d" % place * 300)
    with (root / "pieces").open("wb") as file:
        for number in range(600):
            file.seek(number * 8192)
            file.write(b"%d" % number * 500)
            if number % 2:
                os.fsync(file.fileno())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-O", "inline_data"),
        ("-I", "128"),
        ("-b", "4096", "-O", "^64bit,^metadata_csum"),
        ("-t", "ext2"),
        ("-t", "ext3", "-b", "1024"),
        ("-b", "1024", "-O", "meta_bg,^resize_inode", "-g", "1024"),
        ("-O", "bigalloc,ea_inode", "-C", "16384"),
        ("-b", "1024", "-O", "^metadata_csum,uninit_bg,64bit"),
        ("-O", "sparse_super2,metadata_csum_seed,uninit_bg,^has_journal"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_ext(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = make_ext4(tmp_path / "disk", *options)
    small = options == ("-I", "128")  # such inodes have no room for more than seconds until 2038
    with mounted(path, tmp_path / "mnt") as root:
        fill(root, posix=True)
        fill_ext(root)
        if "bigalloc,ea_inode" in options:
            os.setxattr(root / "a/tiny", "user.large", random.Random(3).randbytes(50_000))
    with (
        mounted(path, tmp_path / "mnt", read_only=True) as root,
        closing(open_image(path)) as system,
    ):
        assert system.kind == ("ext3" if "ext3" in options else "ext2" if "ext2" in options else "ext4")
        assert system.notes == ()
        assert differences(system, root) == []
        holes = [e for e in system.extents(look(system, "a/sparse"), 0, 9 * MiB) if e.flag]
        assert sum(e.length for e in holes) >= 9 * MiB - 128 * KiB
        assert not small or system.stat(look(system, "a/big")).mtime_ns % 10**9 == 0


@pytest.mark.parametrize(
    "options", [("-b", "1024"), ("-b", "4096"), ("-b", "1024", "-O", "^metadata_csum"), ("-O", "^dir_index")]
)
def test_large_folders_of_ext4(tmp_path: Path, options: tuple[str, ...]) -> None:
    """With 1 KiB blocks the index has two levels."""
    path, names = make_ext4(tmp_path / "disk", "-N", "30000", *options), set()
    with mounted(path, tmp_path / "mnt") as root:
        (root / "folder").mkdir()
        for number in range(6000):
            name = f"{number} {'n' * (number % 230)}"
            (root / "folder" / name).touch()
            if number % 3:
                names.add(name.encode())
        for number in range(0, 6000, 3):  # what is left of them lies between the others
            (root / f"folder/{number} {'n' * (number % 230)}").unlink()
    with closing(open_image(path)) as system:
        found = [entry.name for entry in system.list(look(system, "folder"))]
    assert len(found) == len(names)
    assert set(found) == names


def test_a_damaged_folder_of_ext4(tmp_path: Path) -> None:
    """Each byte of names is checked: none is missing, and none invented, without an error."""
    need("debugfs")
    path = make_ext4(tmp_path / "disk", "-b", "1024")
    with mounted(path, tmp_path / "mnt") as root:
        (root / "folder").mkdir()
        for number in range(100):
            (root / f"folder/file {number}").touch()
    content, chance = path.read_bytes(), random.Random(1)
    blocks = [int(number) * 1024 for number in run("debugfs", "-R", "blocks /folder", path).split()]
    assert len(blocks) > 2
    with closing(open_image(path)) as system:
        folder = look(system, "folder")
        expected = {entry.name for entry in system.list(folder)}
    assert len(expected) == 100
    errors = 0
    for _ in range(25):
        damaged = bytearray(content)
        damaged[chance.choice(blocks) + chance.randrange(1024)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with closing(open_image(path)) as system:
            try:
                assert {entry.name for entry in system.list(folder)} == expected
            except GuestError as e:
                errors += "checksum" in str(e)
    assert errors > 12, "what is not used in the index has no checksum"


def test_a_damaged_description_of_a_group(tmp_path: Path) -> None:
    """Without checksums of inodes nothing else tells that a table of them is elsewhere."""
    path = make_ext4(tmp_path / "disk", "-b", "1024", "-O", "^metadata_csum,uninit_bg,^64bit")
    with mounted(path, tmp_path / "mnt") as root:
        (root / "file").write_bytes(b"content")
    with path.open("r+b") as file:
        file.seek(2048 + 8)  # the first group's table of inodes
        (table,) = struct.unpack("<I", file.read(4))
        file.seek(2048 + 8)
        file.write(struct.pack("<I", table + 1))
    with pytest.raises(GuestError, match="the description of group 0 is damaged"):
        open_image(path)


def test_more_names_than_are_told_at_once(tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk", "-N", "40000")
    with mounted(disk, tmp_path / "mnt") as root:
        for number in range(30_000):
            os.close(os.open(root / f"name {number}", os.O_CREAT | os.O_WRONLY))
        inodes = {name: os.lstat(os.path.join(bytes(root), name)).st_ino for name in os.listdir(bytes(root))}
    with closing(open_image(disk)) as system:
        assert {entry.name: entry.stat.inode for entry in system.list(system.root)} == inodes


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_an_ext4_that_was_written_to(tmp_path: Path, seed: int) -> None:
    """The disk at a moment while programs write: what is read is what the kernel shows once it replayed the journal."""
    path, moment, chance = make_ext4(tmp_path / "disk"), tmp_path / "moment", random.Random(seed)
    with mounted(path, tmp_path / "mnt") as root:
        fill(root, posix=True)
        os.sync()
        for number in range(chance.randrange(50, 400)):
            file = root / f"many/{chance.randrange(60)}"
            match chance.randrange(4):
                case 0:
                    file.unlink(missing_ok=True)
                case 1:
                    (root / f"folder {number}").mkdir()
                case 2:
                    file.write_bytes(chance.randbytes(chance.randrange(20_000)))
                case _:
                    with file.open("ab") as opened:
                        opened.write(b"more")
                        os.fsync(opened.fileno())
        shutil.copyfile(path, moment)
    assert detect_dirty(moment), "there is something to replay"
    with closing(open_image(moment)) as system:
        assert system.notes == ()
        copy = tmp_path / "copy"
        shutil.copyfile(moment, copy)
        with mounted(copy, tmp_path / "mnt"):
            pass  # the kernel replays it
        with mounted(copy, tmp_path / "mnt", read_only=True) as root:
            assert differences(system, root) == []
        assert detect_dirty(moment), "nothing was written to it"


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """An ext4 with folders that have an index, trees of extents, and blocks of extended attributes."""
    path = make_ext4(tmp_path / "disk", "-b", "1024", "-N", "1000", "-J", "size=1")
    with mounted(path, tmp_path / "mnt") as root:
        for folder in ("one", "two"):
            (root / folder).mkdir()
            for number in range(120):
                (root / f"{folder}/file {number}").touch()
        (root / "link").symlink_to("x" * 30)
        for name in ("pieces", "more"):
            with (root / name).open("wb") as file:
                for number in range(400):
                    file.seek(number * 8192)
                    file.write(b"%d" % number)
                    os.fsync(file.fileno())
            os.setxattr(root / name, "user.large", name.encode() * 100)
            os.setxattr(root / name, "system.posix_acl_access", ACL)
    return path


def test_a_flipped_bit_of_ext4_is_an_error(indexed: Path) -> None:
    assert flip_bytes(indexed, 3000 if LONG else 150, (b" content",)) > 3


def test_a_name_whose_inode_is_damaged(indexed: Path) -> None:
    with closing(open_image(indexed)) as system:
        inode = look(system, "one/file 7")
        folder = look(system, "one")
    damage_inode(indexed, inode, KiB)
    with closing(open_image(indexed)) as system:
        found = {entry.name: entry.stat.mode for entry in system.list(folder)}
        assert [name for name, mode in found.items() if not mode] == [b"file 7"]
        assert len(found) == 120
        with pytest.raises(GuestError, match=f"inode {inode} is damaged: its checksum is wrong"):
            system.stat(inode)
