"""Journals of ext file systems that stopped as in a crash: replayed in memory, and by the kernel: the same blocks."""

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images import BytesImage
from servers import need, run

from backupfs.errors import GuestError
from backupfs.guest.crc32c import crc32c
from backupfs.guest.ext_journal import replayed
from backupfs.units import MiB

LONG = bool(os.environ.get("BACKUPFS_LONG"))
SIZE = 48 * MiB
SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN: nothing more is written, not even by umount
WITH_LOG, WITHOUT_LOG = 1, 2
MAGIC = b"\xc0\x3b\x39\x98"

pytestmark = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="mounting is root's")


@contextmanager
def mounted(image: Path, *options: str) -> Iterator[Path]:
    need("mkfs.ext4", "mount")
    folder = image.with_name("mnt")
    folder.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(("loop", *options)), image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def crashed(
    image: Path, make: tuple[str, ...], options: tuple[str, ...], write: Callable[[Path], None], flag: int = WITH_LOG
) -> bytes:
    """Return the disk as it was when the power went."""
    need("mkfs.ext4", "mount")
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", *make, image)
    with mounted(image, *options) as root:
        write(root)
        handle = os.open(root, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(handle)
        return image.read_bytes()  # before umount, which writes what memory still holds to its place


def by_kernel(image: Path, disk: bytes) -> bytes | None:
    """Return the disk after the kernel replayed it; None: it does not mount it."""
    image.write_bytes(disk)
    folder = image.with_name("mnt")
    loop = run("losetup", "--find", "--show", image).strip()  # writable, as `mount -o loop,ro` does not make it
    try:
        done = subprocess.run(["mount", "-o", "ro", loop, folder], capture_output=True, check=False)
        if done.returncode:
            return None
        run("umount", folder)
    finally:
        run("losetup", "--detach", loop)
    return image.read_bytes()


def by_us(disk: bytes) -> tuple[bytes, tuple[str, ...]]:
    image, notes = replayed(BytesImage(disk))
    content = bytearray(image.size)
    chance, position = random.Random(4), 0
    while position < image.size:  # in pieces, to cut blocks
        length = min(chance.choice([1000, 70_000, MiB + 5]), image.size - position)
        image.readinto(position, memoryview(content)[position : position + length])
        position += length
    return bytes(content), notes


def different(disk: bytes, ours: bytes, theirs: bytes) -> list[int]:
    """Return the kilobytes in which two disks differ, but for the superblocks of the file system and of its journal."""
    (block,) = (1024 << value for value in struct.unpack_from("<I", disk, 1024 + 24))
    journals = {at for at in range(0, len(disk), block) if disk[at : at + 8] == MAGIC + b"\0\0\0\4"}
    found = [at for at in range(0, len(disk), 1024) if ours[at : at + 1024] != theirs[at : at + 1024]]
    return [at for at in found if at != 1024 and at not in journals]


def work(root: Path) -> None:
    """Make, change and remove files and folders, in many transactions."""
    chance = random.Random(5)
    for number in range(40):
        (root / f"d{number}").mkdir()
        for name in range(6):
            (root / f"d{number}/{name}").write_bytes(chance.randbytes(chance.choice([10, 3000, 20_000])))
        if number % 4 == 3:
            shutil.rmtree(root / f"d{number - 2}")  # revokes its blocks
            (root / f"d{number}/0").write_bytes(MAGIC + chance.randbytes(9000))
        if number % 3 == 0:
            handle = os.open(root, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "1k": (("-b", "1024"), ()),
    "no checksums": (("-O", "^metadata_csum,^64bit"), ()),
    "ext3": (("-t", "ext3", "-b", "1024"), ()),
    "journalled data": ((), ("data=journal",)),
    "journalled, no checksums": (("-O", "^metadata_csum", "-b", "2048"), ("data=journal",)),
    "checksums, asynchronous": (("-O", "^metadata_csum"), ("journal_async_commit", "data=writeback")),
    "wraps": (("-b", "1024", "-J", "size=1"), ("data=journal",)),
}


def to_be_replayed(image: Path, kind: str) -> tuple[bytes, bytes]:
    """Return a disk with something in its journal alone, and what the kernel makes of it.

    The sync(2) of another test may write all of it to its place just then.
    """
    for _ in range(5):
        disk = crashed(image, *KINDS[kind], work)
        theirs = by_kernel(image, disk)
        assert theirs is not None
        if different(disk, disk, theirs):
            return disk, theirs
    pytest.fail("nothing was to be replayed")


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_kernel_replays(tmp_path: Path, kind: str) -> None:
    disk, theirs = to_be_replayed(tmp_path / "disk", kind)
    ours, notes = by_us(disk)
    assert notes == ()
    assert different(disk, ours, theirs) == []
    assert not ours[1024 + 96] & 4
    assert run("dumpe2fs", "-h", _written(tmp_path / "ours", ours)), "the superblock matches its checksum"
    again, notes = by_us(theirs)
    assert (again, notes) == (theirs, ()), "there is nothing left to replay"


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    disk = crashed(image, (), (), work, WITHOUT_LOG)
    theirs = by_kernel(image, disk)
    assert theirs is not None
    assert different(disk, by_us(disk)[0], theirs) == []


@pytest.mark.parametrize("kind", ["default", "no checksums", "journalled data"])
def test_damaged_journals(tmp_path: Path, kind: str) -> None:
    """Where the kernel replays, we do, with the same result; where it does not mount, nor do we show anything."""
    image = tmp_path / "disk"
    disk = crashed(image, *KINDS[kind], work)
    block = 1024 << struct.unpack_from("<I", disk, 1024 + 24)[0]
    described = [at for at in range(0, len(disk), block) if disk[at : at + 4] == MAGIC and disk[at + 7] in (1, 2, 5)]
    chance, refused = random.Random(6), 0
    rounds = 200 if LONG else 3
    for _ in range(rounds):
        damaged = bytearray(disk)
        at = chance.choice(described) + chance.choice([chance.randrange(64), chance.randrange(block), 3, 11])
        damaged[at] ^= 1 << chance.randrange(8)
        theirs = by_kernel(image, bytes(damaged))
        try:
            ours, _ = by_us(bytes(damaged))
        except GuestError:
            refused += 1
            continue
        if theirs is None:
            assert different(disk, ours, bytes(damaged)), "it was replayed, and can't be mounted for another reason"
        else:
            assert different(disk, ours, theirs) == []
    print(f"{rounds} damaged journals: {refused} were refused")


def test_the_end_of_the_first_transaction_is_damaged(tmp_path: Path) -> None:
    """The kernel does not take that for the end of the journal, though nothing of it could be replayed."""
    image = tmp_path / "disk"
    disk = bytearray(crashed(image, (), (), work))
    block = 1024 << struct.unpack_from("<I", disk, 1024 + 24)[0]
    ends = [at for at in range(0, len(disk), block) if disk[at : at + 8] == MAGIC + b"\0\0\0\2"]
    first = min(ends, key=lambda at: struct.unpack_from(">I", disk, at + 8)[0])
    disk[first + 26] ^= 1
    assert by_kernel(image, bytes(disk)) is None
    with pytest.raises(GuestError, match="the end of transaction"):
        by_us(bytes(disk))


def test_a_journal_elsewhere_and_fast_commits(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    disk = bytearray(crashed(image, (), (), work))
    struct.pack_into("<2I", disk, 1024 + 0xE0, 0, 0x700)
    with pytest.raises(GuestError, match="on another disk"):
        by_us(bytes(disk))

    def fast(root: Path) -> None:
        work(root)
        os.sync()
        for number in range(5):
            with (root / f"fast{number}").open("wb") as file:
                file.write(b"fast")
                file.flush()
                os.fsync(file.fileno())

    _, notes = by_us(crashed(image, ("-O", "fast_commit"), (), fast, WITHOUT_LOG))
    assert [("fast commits" in note) for note in notes] == [True]


def test_older_checksums(tmp_path: Path) -> None:
    """Journals with checksums 2, which no kernel makes any more: debugfs does."""
    need("debugfs", "mkfs.ext4")
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", image)
    content = _written(tmp_path / "blocks", MAGIC + random.Random(7).randbytes(4096 * 3 - 4))
    script = _written(
        tmp_path / "script",
        f"jo -c -v 2\njw -b 9000,9001,9002 {content}\njw -r 9001\njw -b 9003,9004,9002 {content}\njc\n".encode(),
    )
    run("debugfs", "-w", "-f", script, image)
    disk = image.read_bytes()
    (tmp_path / "mnt").mkdir()
    theirs = by_kernel(image, disk)
    assert theirs is not None
    ours, notes = by_us(disk)
    assert notes == ()
    assert different(disk, ours, theirs) == []
    assert ours[9000 * 4096 : 9001 * 4096] == content.read_bytes()[:4096]
    assert not any(ours[9001 * 4096 : 9002 * 4096]), "it was revoked"


def test_crc32c() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789")
