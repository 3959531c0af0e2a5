"""DISK.files of disks with many files, in a mount: what rsync finds there is what it finds in their own driver's.

BACKUPFS_LONG=1: 10,000 files and one of 500 MB for each kind of file system.
"""

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_btrfs
from mounts import needs_fuse
from servers import need, run
from test_guest_files import ACL, LONG, fill, mounted
from test_mounted_files import Mounted, differences

from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(900 if LONG else 120), needs_fuse]

FILES, LARGE = (10_000, 500_000_000) if LONG else (300, 8_000_000)
SIZE = 1536 * MiB if LONG else 320 * MiB


@contextmanager
def by_linux(image: Path, folder: Path, how: str) -> Iterator[Path]:
    with mounted(image, folder, read_only=how == "ro") as root:
        yield root


@contextmanager
def by_linux_compressed(image: Path, folder: Path, how: str) -> Iterator[Path]:
    with test_btrfs.mounted(image, folder, f"{how},compress=zstd") as root:
        yield root


@contextmanager
def by_ntfs_3g(image: Path, folder: Path, how: str) -> Iterator[Path]:
    with mounted(image, folder, read_only=how == "ro", ntfs=True) as root:
        yield root


@contextmanager
def by_mtools(image: Path, folder: Path, how: str) -> Iterator[Path]:
    """No mount: a folder that is copied into the image, or made from it. Not every kernel has FAT."""
    need("mcopy")
    in_utc = ("env", "TZ=UTC", "LC_ALL=C.UTF-8")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if how == "ro":
        run(*in_utc, "mcopy", "-i", image, "-s", "-m", "::*", folder)
        os.utime(folder, (0, 0))  # the first folder of a FAT has no times
    yield folder
    if how == "rw":
        run(*in_utc, "mcopy", "-i", image, "-s", "-m", *folder.iterdir(), "::")


@dataclass(frozen=True)
class Kind:
    """A kind of file system.

    Attributes:
        driver: mounts it, `ro` or `rw`.
        posix: it has owners, links, attributes.
        compare: what rsync compares, and that it only tells.
        ignored: what of `stat` it tells otherwise.
    """

    make: tuple[str, ...]
    driver: Callable[..., "contextmanager[Path]"] = by_linux
    posix: bool = True
    compare: str = "-naHAXi"
    ignored: tuple[str, ...] = ()


KINDS = {
    "ext4": Kind(("mkfs.ext4", "-q", "-F", "-N", "30000")),
    "ext4-inline": Kind(("mkfs.ext4", "-q", "-F", "-N", "30000", "-O", "inline_data")),
    "xfs": Kind(("mkfs.xfs", "-q", "-f")),
    "btrfs-zstd": Kind(("mkfs.btrfs", "-q", "-f"), by_linux_compressed),
    # As README says: what compressed and tiny files take, sizes of folders and names for DOS are told otherwise.
    "ntfs": Kind(
        ("mkfs.ntfs", "-q", "-F", "-f"), by_ntfs_3g, posix=False, compare="-naXi", ignored=("blocks", "nlink")
    ),
    "fat32": Kind(
        ("mkfs.fat", "-F", "32"),
        by_mtools,
        posix=False,
        compare="-nrltXi",
        ignored=("mode", "nlink", "uid", "gid", "blocks", "atime_ns", "ctime_ns"),
    ),
}


def fill_whole(root: Path, kind: str) -> None:
    """Make FILES files in twenty folders, and a large one, beside what `fill` makes."""
    chance, posix = random.Random(5), KINDS[kind].posix
    fill(root, posix=posix)
    for number in range(20):
        (root / f"tree/folder {number}").mkdir(parents=True)
    for number in range(FILES):
        name = f"{number}" if number % 10 else f"{number} ä 'odd' & ~long~ " + "n" * 150
        path = root / f"tree/folder {number % 20}/{name}"
        path.write_bytes(chance.randbytes(chance.choice((0, 50, 100, 2000, 5000, 20_000))))
        if posix and not number % 7:
            os.setxattr(path, "user.number", b"%d" % number)
            os.setxattr(path, "system.posix_acl_access", ACL)
            os.chown(path, number, 2 * number)
        if posix and not number % 11:
            (root / f"tree/folder {number % 20}/link {number}").hardlink_to(path)
            (root / f"tree/folder {number % 20}/symlink {number}").symlink_to(path.name)
    with (root / "large").open("wb") as file:
        while file.tell() < LARGE:
            # Text and noise, so that some is compressed and some is not.
            file.write(chance.choice((chance.randbytes(100_000), b"a line of text\n" * 7000))[: LARGE - file.tell()])
    if kind == "ntfs":
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        for number in range(FILES // 100):
            text = b"some text again and again " * 4000 + chance.randbytes(40 * KiB)
            (root / f"compressed/{number}").write_bytes(text)
            os.setxattr(root / f"compressed/{number}", "user.stream", text[:2000])


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mount = Mounted(tmp_path, lane=True)
    try:
        yield mount
    finally:
        mount.close()
        (tmp_path / "disk").unlink(missing_ok=True)
        for name in ("repo", "copy", "mnt"):  # pytest would keep gigabytes
            shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.mark.parametrize("name", KINDS)
def test_rsync_finds_what_the_driver_shows(shown: Mounted, tmp_path: Path, name: str) -> None:
    kind, disk = KINDS[name], tmp_path / "disk"
    need(kind.make[0], "rsync")
    with disk.open("wb") as file:
        file.truncate(SIZE)
    run(*kind.make, disk)
    with kind.driver(disk, tmp_path / "mnt", "rw") as root:
        fill_whole(root, name)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    with kind.driver(disk, tmp_path / "mnt", "ro") as root:
        assert sum(len(found) for _, _, found in os.walk(files)) > FILES
        found = differences(files, root, *kind.ignored)
        assert [line for line in found if kind.posix or ": size " not in line] == []
        for a, b in ((files, root), (root, files)):
            assert run("rsync", kind.compare, "--checksum", "--delete", f"{a}/", f"{b}/") == ""
        run("rsync", "-aHAX", f"{files}/", tmp_path / "copy")
        assert run("rsync", kind.compare, "--checksum", "--delete", f"{tmp_path / 'copy'}/", f"{root}/") == ""
