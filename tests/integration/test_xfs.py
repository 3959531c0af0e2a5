"""XFS as backupfs reads it, and as the kernel does: the same."""

import os
import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
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
    mounted,
    open_image,
    tree_of,
)

from backupfs.errors import GuestError
from backupfs.guest.xfs import XfsFileSystem
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(300 if not LONG else 3600), pytest.mark.usefixtures("no_image_stays")]

SIZE = 320 * MiB  # mkfs.xfs makes no smaller ones
MANY, PIECES = (20_000, 5000) if LONG else (3000, 600)


def make(path: Path, *options: str) -> Path:
    need("mkfs.xfs")
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.xfs", "-q", "-f", *options, path)
    return path


def fill_xfs(root: Path) -> None:
    """Make what XFS stores in ways of its own."""
    fill(root, posix=True)
    (root / "long link").symlink_to("y" * 1000)
    (root / "link").symlink_to("z" * 300)
    os.setxattr(root / "a/tiny", "user.huge", random.Random(1).randbytes(64 * KiB))
    for number in range(60):
        os.setxattr(root / "a/b", f"user.attribute {number}", bytes([number]) * 300)
    for folder, names in (("one", 1), ("ten", 10), ("hundreds", 500), ("thousands", MANY)):
        (root / folder).mkdir()
        for number in range(names):
            (root / folder / f"a name of some length {number}").touch()
    with (root / "pieces").open("wb") as file:
        for number in range(PIECES):
            file.seek(number * 8192)
            file.write(b"%d" % number * 500)
            if number % 2:
                os.fsync(file.fileno())
    run("cp", "--reflink=auto", root / "a/big", root / "clone")
    with (root / "clone").open("r+b") as file:
        file.seek(MiB)
        file.write(b"not shared")


@pytest.mark.parametrize(
    "options",
    [(), ("-n", "size=16384"), ("-b", "size=1024"), ("-i", "nrext64=1,size=2048"), ("-m", "bigtime=0,reflink=0")],
    ids=lambda options: " ".join(options) or "default",
)
def test_it_is_what_the_kernel_shows(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = make(tmp_path / "disk", *options)
    with mounted(path, tmp_path / "mnt") as root:
        fill_xfs(root)
    with mounted(path, tmp_path / "mnt", read_only=True) as root, closing(open_image(path)) as system:
        assert (system.kind, system.notes) == ("xfs", ())
        # 1970 and 2038 bound it without bigtime; the kernel has cut these times when they were set.
        assert differences(system, root) == []
        runs = system.runs(look(system, "pieces"))
        assert runs is not None
        assert len(runs) > PIECES
        holes = [e for e in system.extents(look(system, "a/sparse"), 0, 9 * MiB) if e.flag]
        assert sum(e.length for e in holes) >= 9 * MiB - 128 * KiB


def test_version_4(tmp_path: Path) -> None:
    """Kernels of today mount it no more, so it is filled by mkfs."""
    need("mkfs.xfs")
    (tmp_path / "content").write_bytes(random.Random(2).randbytes(100_000))
    names = "".join(f"file{n} ---644 {n} {n + 1} {tmp_path / 'content'}\n" for n in range(100))
    prototype = f"/dev/null\n0 0\nd--755 0 0\nlink l--777 0 0 file7\nfolder d--750 5 6\n{names}$\n$\n"
    (tmp_path / "prototype").write_text(prototype)
    path = make(tmp_path / "disk", "-m", "crc=0", "-p", str(tmp_path / "prototype"))
    with closing(open_image(path)) as system:
        assert {entry.name for entry in system.list(system.root)} == {b"link", b"folder"}
        assert system.readlink(look(system, "link")) == b"file7"
        assert len(system.list(look(system, "folder"))) == 100
        found = system.stat(look(system, "folder/file7"))
        assert (found.mode, found.uid, found.gid, found.size) == (0o100644, 7, 8, 100_000)
        assert system.read(found.inode, 0, 200_000) == (tmp_path / "content").read_bytes()


def test_inodes_beyond_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(8 << 40)
    run("mkfs.xfs", "-q", "-f", "-l", "size=64m", "-d", "agcount=9", path)
    with mounted(path, tmp_path / "mnt") as root:
        for number in range(9):
            (root / f"{number}/empty").mkdir(parents=True)
            (root / f"{number}/one").mkdir()
            (root / f"{number}/one/name").touch()
    with mounted(path, tmp_path / "mnt", read_only=True) as root, closing(open_image(path)) as system:
        assert any(entry.stat.inode >> 32 for entry in system.list(system.root))
        assert differences(system, root) == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = make(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt") as root:
        for number in range(20):
            (root / f"file {number}").write_bytes(b"content" * 100 * number)
            os.setxattr(root / f"file {number}", "user.long", b"value" * 100)
        (root / "folder").mkdir()
        for number in range(200):
            (root / f"folder/name {number}").touch()
        (root / "link").symlink_to("target" * 100)
        os.setxattr(root / "file 3", "user.huge", b"y" * 20_000)
        with (root / "pieces").open("wb") as file:
            for number in range(60):
                file.seek(number * 8192)
                file.write(b"%d" % number * 500)
    return path


def test_damaged_file_systems(small: Path) -> None:
    """Nothing hangs, and nothing but GuestError comes out."""
    rounds = 400 if LONG else 12
    closed, failed = _damaged_images(small, rounds, _read_all)
    print(f"{rounds} damaged images: {closed} can't be opened, in {failed} something can't be read")
    assert closed + failed < rounds, "some of what was flipped concerns nobody"


def test_a_flipped_byte_of_metadata_is_an_error(small: Path) -> None:
    """Every block of version 5 has a checksum: what is said is right, or it is an error."""
    # What is in files has no checksum in XFS: the repository's hashes are there for that.
    assert flip_bytes(small, 3000 if LONG else 150, (b" content",)) > 5


def test_what_can_not_be_read_is_not_taken_for_absent(small: Path) -> None:
    content = small.read_bytes()
    used = [at for at in range(0, len(content), 4 * KiB) if any(content[at : at + 4 * KiB])]
    errors = 0
    with closing(FailingImage(small)) as image:
        right = tree_of(XfsFileSystem(image))
        assert GuestError not in right.values()
        for at in used if LONG else random.Random(8).sample(used, min(60, len(used))):
            image.bad = range(0)
            system = XfsFileSystem(image)
            image.bad = range(at, at + 4 * KiB)
            found = tree_of(system)
            for key, value in found.items():
                assert value is GuestError or value == right[key], (at, key)
            errors += GuestError in found.values()
    assert errors > 5


def test_what_is_refused(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfs_db")
    path = make(tmp_path / "disk")
    for bit, words in ((0x10, "needs repair"), (0x4000, "does not know")):
        expression = f"write -d features_incompat {0xB | bit:#x}"
        subprocess.run(["xfs_db", "-x", "-c", "sb 0", "-c", expression, path], check=True, capture_output=True)
        with pytest.raises(GuestError, match=words):
            open_image(path)
