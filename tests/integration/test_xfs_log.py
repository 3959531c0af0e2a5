"""The log of an XFS that was in use: replayed, it is what the kernel makes of it."""

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest
from crc32c import crc32c
from images import FileImage
from servers import run
from test_guest_files import LONG, differences, look, mounted, open_image
from test_xfs import make

from backupfs.errors import GuestError
from backupfs.filesystem import FileSystem
from backupfs.guest import xfs_overlay
from backupfs.guest.xfs import XfsFileSystem
from backupfs.guest.xfs_disk import Disk
from backupfs.guest.xfs_log import Log
from backupfs.guest.xfs_log_ends import _before, _behind
from backupfs.guest.xfs_records import SECTOR, Records, UnreadableLogError
from backupfs.units import MiB

pytestmark = [pytest.mark.timeout(300 if not LONG else 3600), pytest.mark.usefixtures("no_image_stays")]

GOING_DOWN, FLUSH_LOG, NO_FLUSH = 0x8004587D, 1, 2  # XFS_IOC_GOINGDOWN and its flags
CLONE = 0x40049409  # FICLONE
LAYOUTS = (  # of mkfs, and of mount
    ((), "rw"),
    (("-b", "size=1024"), "rw"),
    (("-n", "size=16384"), "logbsize=64k"),
    (("-i", "nrext64=1,size=2048"), "logbsize=256k"),
    (("-m", "bigtime=0,reflink=0,rmapbt=0,finobt=0"), "rw"),
    (("-l", "su=32k"), "rw"),
    (("-l", "su=256k"), "rw"),
    (("-s", "size=4096"), "logbsize=128k"),
)
SMALL_LOG = ("-l", "size=8m", "-m", "reflink=0,rmapbt=0")
TINY_LOG = ("-l", "size=860b", "-m", "reflink=0,rmapbt=0")
UNCHECKED = {"TEST_DIR": "/", "TEST_DEV": "/", "QA_CHECK_FS": "1"}  # has mkfs.xfs make small logs, as it did once


@contextmanager
def mounted_with(options: str, disk: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,{options}", disk, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextmanager
def in_use(disk: Path, folder: Path, flag: int = NO_FLUSH, options: str = "rw") -> Iterator[Path]:
    """Mount a disk; afterwards it is as after a power cut. What the log has by then is not written to its places."""
    with mounted_with(options, disk, folder) as root:
        try:
            yield root
        finally:
            number = os.open(root, os.O_RDONLY)
            try:
                fcntl.ioctl(number, GOING_DOWN, struct.pack("I", flag))
            finally:
                os.close(number)


@contextmanager
def as_the_kernel_shows(disk: Path, folder: Path) -> Iterator[Path | None]:
    """Mount a disk read-only, so that nothing but its log changes what is shown; None: the kernel refuses it."""
    device = run("losetup", "--find", "--show", disk).strip()
    try:
        done = subprocess.run(["mount", "-o", "ro", device, folder], capture_output=True, check=False)
        if done.returncode:
            yield None
            return
        try:
            yield folder
        finally:
            run("umount", folder)
    finally:
        run("losetup", "-d", device)


def change(root: Path, chance: random.Random, times: int, *, past_log: bool = True) -> None:
    """Do what changes metadata in all its ways."""
    for _ in range(times):
        folder = root / str(chance.randrange(5))
        folder.mkdir(exist_ok=True)
        new = folder / f"{chance.randrange(200)}{'x' * chance.randrange(40)}"
        old = chance.choice(sorted(folder.iterdir()) or [new])
        do = chance.choice(CHANGES)
        with suppress(OSError):  # there is none, there is one already, it is a link
            if past_log or do is not set_attribute:
                do(old, new, chance)


def set_attribute(path: Path, _new: Path, chance: random.Random) -> None:
    """Set one. A large value is written past the log."""
    os.setxattr(path, f"user.{chance.randrange(20)}", chance.randbytes(chance.choice((3, 300, 3000, 30_000))))


def fragment(path: Path) -> None:
    with path.open("wb") as file:
        for number in range(60):
            file.seek(number * 8192)
            file.write(b"a" * 3000)
            if number % 9 == 0:
                os.fsync(file.fileno())


def clone(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new, suppress(OSError):  # without reflinks
        fcntl.ioctl(new, CLONE, old.fileno())


def write(path: Path, content: bytes, offset: int) -> None:
    number = os.open(path, os.O_RDWR)
    os.pwrite(number, content, offset)
    os.fsync(number)
    os.close(number)


def preallocate(path: Path, size: int) -> None:
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(number, 0, size)
    os.pwrite(number, b"z" * 5000, size // 2)
    os.close(number)


CHANGES: tuple[Callable[[Path, Path, random.Random], object], ...] = (
    *[lambda _, new, chance: new.write_bytes(chance.randbytes(chance.choice((1, 100, 5000, 70_000, 400_000))))] * 4,
    lambda old, _, __: old.unlink(),
    lambda old, new, _: old.rename(new),
    lambda old, new, _: new.hardlink_to(old),
    lambda _, new, chance: new.symlink_to("t" * chance.choice((5, 200, 900))),
    set_attribute,
    lambda old, _, chance: os.truncate(old, chance.randrange(200_000)),
    lambda _, new, __: fragment(new),
    lambda old, new, _: clone(old, new),
    lambda old, _, chance: write(old, chance.randbytes(9000), chance.randrange(60_000)),
    lambda _, new, chance: preallocate(new, chance.randrange(1, 300_000)),
    lambda old, _, chance: old.chmod(chance.randrange(0o777)),
    lambda *_: os.sync(),
    lambda old, _, chance: shutil.rmtree(old.parent) if chance.random() < 0.1 else None,
)


@pytest.mark.parametrize(("options", "mount"), LAYOUTS, ids=[" ".join((*o, m)) for o, m in LAYOUTS])
def test_a_log_is_replayed(tmp_path: Path, options: tuple[str, ...], mount: str) -> None:
    """Again and again on the same disk, so that the log goes round and what is older and newer is mixed."""
    disk, chance = make(tmp_path / "disk", *options), random.Random(repr(options))
    with closing(open_image(disk)) as system:
        assert (system.notes, system.list(system.root)) == ((), []), "as mkfs made it"
    for _ in range(20 if LONG else 3):
        with in_use(disk, tmp_path / "mnt", chance.choice((FLUSH_LOG, NO_FLUSH, NO_FLUSH)), mount) as root:
            change(root, chance, chance.randrange(1, 600))
        assert_same(disk, tmp_path / "mnt")
        with mounted(disk, tmp_path / "mnt"):
            pass
        with closing(open_image(disk)) as system:
            assert system.notes == ()
            with mounted(disk, tmp_path / "mnt", read_only=True) as root:
                assert differences(system, root) == []


@pytest.mark.parametrize("before", ["rw", "logbsize=64k"])
def test_what_changed_hands_in_the_log(tmp_path: Path, before: str) -> None:
    """Blocks of a removed file that another one has by now, and inodes too; behind records of another size."""
    disk = make(tmp_path / "disk")
    with mounted_with(before, disk, tmp_path / "mnt") as root:
        (root / "first").write_bytes(b"A" * (200 * MiB))
        (root / "folder").mkdir()
        for number in range(300):
            (root / f"folder/{number}").write_bytes(b"%d" % number * 3000)
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        (root / "first").unlink()
        shutil.rmtree(root / "folder")
        os.sync()
        (root / "second").write_bytes(b"B" * (200 * MiB))
        for number in range(300):
            (root / f"new {number}").write_bytes(b"%d" % number * 100)
        os.sync()
    with closing(open_image(disk)) as system:
        assert system.notes == ()
        names = {entry.name for entry in system.list(system.root)}
        assert names == {b"second", *(b"new %d" % number for number in range(300))}
        for offset in range(0, 200 * MiB, MiB):
            assert system.read(look(system, "second"), offset, MiB) == b"B" * MiB
        for number in range(300):
            assert system.read(look(system, f"new {number}"), 0, 1000) == b"%d" % number * 100


def assert_same(disk: Path, folder: Path) -> None:
    """Compare with the kernel's view."""
    copy = disk.with_name("copy of it")
    shutil.copyfile(disk, copy)
    with as_the_kernel_shows(copy, folder) as shown, closing(open_image(disk)) as system:
        assert shown
        assert system.notes == ()
        assert differences(system, shown) == []


@pytest.mark.parametrize("options", [TINY_LOG, SMALL_LOG], ids=["860 blocks", "8 MiB"])
def test_a_small_log(tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes round many times; behind its head the kernel clears 2 MiB of it at each mount."""
    for name, value in UNCHECKED.items():
        monkeypatch.setenv(name, value)
    disk, chance = make(tmp_path / "disk", *options), random.Random(9)
    for _ in range(3):
        with mounted(disk, tmp_path / "mnt") as root:
            (root / "file").write_bytes(chance.randbytes(10))
        assert_same(disk, tmp_path / "mnt")
    for _ in range(20 if LONG else 4):
        with in_use(disk, tmp_path / "mnt", chance.choice((FLUSH_LOG, NO_FLUSH))) as root:
            change(root, chance, chance.randrange(100, 800))
        assert_same(disk, tmp_path / "mnt")


def test_a_file_system_that_grew(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk")
    os.truncate(disk, 900 * MiB)
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        run("xfs_growfs", root)
        for number in range(20):
            (root / f"folder {number}").mkdir()
            (root / f"folder {number}/file").write_bytes(b"x" * 5000)
        change(root, random.Random(3), 100)
        os.sync()
    assert_same(disk, tmp_path / "mnt")


def test_large_blocks(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk", "-b", "size=65536", "-m", "reflink=0,rmapbt=0")
    (tmp_path / "mnt").mkdir()
    with as_the_kernel_shows(disk, tmp_path / "mnt") as shown:
        if not shown:
            pytest.skip("this kernel mounts no blocks of 64 KiB")
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        change(root, random.Random(3), 100)
    assert_same(disk, tmp_path / "mnt")


def test_only_the_last_records_can_be_torn(tmp_path: Path) -> None:
    """One that is damaged further back is damage: Linux does not mount it, and nothing of it is shown."""
    disk, copy = make(tmp_path / "disk"), tmp_path / "copy"
    with in_use(disk, tmp_path / "mnt") as root:
        for number in range(40):
            (root / f"file {number}").touch()
            os.sync()
    _, records, _ = log_of(disk)
    assert len(records) > 30
    for back, is_torn in ((1, True), (5, True), (8, True), (9, False), (12, False), (30, False)):
        shutil.copyfile(disk, copy)
        with copy.open("r+b") as file:
            file.seek((records[-back] + 1) * SECTOR + 100)
            file.write(b"????")
        with closing(open_image(copy)) as system, as_the_kernel_shows(copy, tmp_path / "mnt") as shown:
            assert (shown is not None) == is_torn, back
            if shown:
                assert (system.notes, differences(system, shown)) == ((), [])
            else:
                assert "log was not replayed" in system.notes[0]


def test_a_tail_that_was_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record right behind the head, which is the tail by the last one: what tore it was behind that."""
    for name, value in UNCHECKED.items():
        monkeypatch.setenv(name, value)
    disk = make(tmp_path / "disk", *SMALL_LOG)
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        for _ in range(8):  # until it has gone round
            names = [root / f"file {number} {'n' * 80}" for number in range(1500)]
            for number, name in enumerate(names):
                name.touch()
                name.chmod(0o600)
                if number % 40 == 0:
                    os.sync()
            for name in names:
                name.unlink()
        for number in range(30):
            (root / f"kept {number}").write_text(str(number))
            os.sync()
    first, records, head = log_of(disk)
    with closing(FileImage(disk)) as image:
        log = Records(Disk(image))
        oldest = _behind(log, head - first, head - first, 1)
        last = log.record(records[-1] - first)
        content = bytearray(log.read(last.at, last.sectors))
        lsn = log.record(oldest).lsn
        assert lsn >> 32 == (last.lsn >> 32) - 1
    struct.pack_into(">Q", content, 24, lsn)
    length = struct.unpack_from(">I", content, 12)[0]
    head_sum = crc32c(bytes(content[:32]) + bytes(4) + bytes(content[36:328]))
    struct.pack_into("<I", content, 32, crc32c(bytes(content[SECTOR : SECTOR + length]), head_sum))
    with disk.open("r+b") as file:
        file.seek((first + last.at) * SECTOR)
        file.write(content)
    assert_same(disk, tmp_path / "mnt")
    with disk.open("r+b") as file:
        file.seek((first + oldest + 1) * SECTOR)
        file.write(b"\x55" * SECTOR)
    assert_same(disk, tmp_path / "mnt")


def log_of(disk: Path) -> tuple[int, list[int], int]:
    """Return where the log is, where its records begin (of a clean one the last), and its head: sectors of the disk."""
    with closing(FileImage(disk)) as image:
        volume = Disk(image)
        log, sectors = Log(volume), Records(volume)
        assert volume.log_at is not None
        first, head = volume.log_at // SECTOR, log.ends.head
        begins = [record.at for record in log.records()] or [_before(sectors, head, head, 1)]
        return first, [first + at for at in begins], first + head


def zero(disk: Path, first: int, end: int) -> None:
    with disk.open("r+b") as file:
        file.seek(first * SECTOR)
        file.write(bytes((end - first) * SECTOR))


def refused(system: FileSystem, shown: Path) -> set[str]:
    """Compare what is not refused with what the kernel shows; return the names of what is refused."""
    found = set[str]()
    for folder in system.list(system.root):
        for entry in system.list(folder.stat.inode):
            name = f"{os.fsdecode(folder.name)}/{os.fsdecode(entry.name)}"
            path = shown / name
            assert path.lstat().st_ino == entry.stat.inode
            if path.is_symlink():
                continue
            try:
                content = system.read(entry.stat.inode, 0, MiB)
            except GuestError:
                found.add(name)
            else:
                assert content == path.read_bytes(), name
    return found


def test_every_moment_of_a_log(tmp_path: Path) -> None:
    """Cut off behind each record: what was begun and not ended is refused, and all else is what the kernel shows."""
    disk, copy, chance = make(tmp_path / "disk"), tmp_path / "copy", random.Random(4)
    with in_use(disk, tmp_path / "mnt") as root:
        change(root, chance, 900, past_log=False)
        (root / "0/source").write_bytes(b"s" * 600_000)
        for number in range(40):
            clone(root / "0/source", root / f"1/clone {number}")
            write(root / f"1/clone {number}", b"x" * 5000, chance.randrange(500_000))
    _, records, head = log_of(disk)
    assert len(records) > 50
    last = [*records[1:], head]
    begun = compared = 0
    for end in last if LONG else chance.sample(last, 12):
        shutil.copyfile(disk, copy)
        zero(copy, end, head)
        with closing(open_image(copy)) as system, as_the_kernel_shows(copy, tmp_path / "mnt") as shown:
            if shown is None:
                continue
            compared += 1
            if system.notes:
                begun += 1
                assert "began to change and did not end" in system.notes[0]
                assert refused(system, shown)
            else:
                assert differences(system, shown) == []
    print(f"{compared} moments, in {begun} something was begun and not ended")
    assert compared >= 10


def test_torn_records(tmp_path: Path) -> None:
    """Sectors that were being written when the power failed, in any order: what is behind the first counts not."""
    disk, copy, chance = make(tmp_path / "disk"), tmp_path / "copy", random.Random(6)
    with in_use(disk, tmp_path / "mnt") as root:
        change(root, chance, 500)
    _, records, head = log_of(disk)
    compared = tried = 0
    while compared < (50 if LONG else 8):
        tried += 1
        assert tried <= (200 if LONG else 40), "the kernel refuses most"
        shutil.copyfile(disk, copy)
        begin = records[-chance.randrange(1, 8)]
        for sector in range(begin, head):
            if chance.random() < chance.choice((0.02, 0.5)):
                zero(copy, sector, sector + 1)
        with closing(open_image(copy)) as system, as_the_kernel_shows(copy, tmp_path / "mnt") as shown:
            if shown is not None:
                assert (system.notes, differences(system, shown)) == ((), [])
                compared += 1


def test_a_damaged_log(tmp_path: Path) -> None:
    """A record that is wrong, with others behind it: Linux does not mount it, and nothing of it is shown."""
    disk, chance = make(tmp_path / "disk"), random.Random(5)
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "kept").write_bytes(b"kept" * 1000)
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        (root / "new").write_text("new")
        os.sync()
        change(root, chance, 3000)
    _, records, _ = log_of(disk)
    with disk.open("r+b") as file:
        file.seek((records[1] + 1) * SECTOR + 100)
        file.write(b"????")
    with closing(open_image(disk)) as system:
        assert "log was not replayed" in system.notes[0]
        assert "--scratch" in system.notes[0]
        with pytest.raises(GuestError, match="changed last in the log"):
            system.list(system.root)
    with as_the_kernel_shows(disk, tmp_path / "mnt") as shown:
        assert shown is None


def test_a_hostile_log(tmp_path: Path) -> None:
    """Without checksums it is taken for what it says: nothing but GuestError comes out, and nothing hangs."""
    disk, copy, chance = make(tmp_path / "disk"), tmp_path / "copy", random.Random(7)
    with in_use(disk, tmp_path / "mnt") as root:
        change(root, chance, 400)
    _, records, head = log_of(disk)
    opened = 0
    for _ in range(400 if LONG else 15):
        shutil.copyfile(disk, copy)
        with copy.open("r+b") as file:
            for record in records:
                file.seek(record * SECTOR + 32)
                file.write(bytes(4))
            for _ in range(chance.choice((1, 10, 100))):
                file.seek(chance.randrange(records[0] * SECTOR, head * SECTOR))
                file.write(chance.randbytes(chance.choice((1, 4, 8))))
        with suppress(GuestError), closing(open_image(copy)) as system:
            read_all(system, system.root, 6)
            opened += 1
    assert opened


def read_all(system: FileSystem, folder: int, depth: int) -> None:
    with suppress(GuestError):
        for entry in system.list(folder):
            for call in (
                lambda inode: system.read(inode, 0, MiB),
                system.readlink,
                system.xattrs,
                system.runs,
                lambda inode: list(system.extents(inode, 0, MiB)),
            ):
                with suppress(GuestError):
                    call(entry.stat.inode)
            if depth and entry.stat.mode & 0o170000 == 0o040000:
                read_all(system, entry.stat.inode, depth - 1)


def test_a_log_on_another_disk_or_of_no_length(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk")
    with closing(FileImage(disk)) as image:
        volume = Disk(image)
        volume.log_at = None
        with pytest.raises(UnreadableLogError):
            Log(volume)


def append(disk: Path, *items: bytes, end: int = 0x2) -> None:
    """Write a transaction with these items, one region each, behind the last one in the log. `end`: the last flag."""
    regions = [struct.pack("<IIII", 0x5452414E, 40, 77, len(items)), *items]
    operations = [(b"", 0x1), *((region, 0) for region in regions), (b"", end)]
    data = b"".join(struct.pack(">IIBBxx", 77, len(region), 0x69, flags) + region for region, flags in operations)
    data = data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")
    first, records, head = log_of(disk)
    with disk.open("r+b") as file:
        file.seek(records[-1] * SECTOR)
        before = file.read(SECTOR)
        (cycle,) = struct.unpack_from(">I", before, 4)
        record = bytearray(before)
        struct.pack_into(">I", record, 4, cycle)
        struct.pack_into(">IQ", record, 12, len(data), cycle << 32 | (head - first))
        struct.pack_into(">I", record, 40, len(operations))
        stamped = bytearray(data)
        for i in range(len(data) // SECTOR):
            record[44 + 4 * i : 48 + 4 * i] = data[i * SECTOR : i * SECTOR + 4]
            struct.pack_into(">I", stamped, i * SECTOR, cycle)
        struct.pack_into(
            "<I", record, 32, crc32c(bytes(stamped), crc32c(bytes(record[:32]) + bytes(4) + record[36:328]))
        )
        file.seek(head * SECTOR)
        file.write(record + stamped)


def mapping(number: int, *inodes: int) -> bytes:
    owners = (struct.pack("<QQQII", inode, 1, 0, 1, 1) for inode in inodes)
    return struct.pack("<HHIQ", 0x1244, 1, len(inodes), number) + b"".join(owners)


def test_what_was_begun_and_not_ended(tmp_path: Path) -> None:
    disk, copy, names = make(tmp_path / "disk"), tmp_path / "copy", [f"file {number}" for number in range(6)]
    with in_use(disk, tmp_path / "mnt", FLUSH_LOG) as root:
        for name in names:
            (root / name).write_text(name)
        os.sync()
        inodes = [(root / name).stat().st_ino for name in names]

    def refused_after(*items: bytes) -> set[str]:
        shutil.copyfile(disk, copy)
        append(copy, *items)
        with closing(open_image(copy)) as system:
            assert [entry.stat.inode for entry in system.list(system.root)] == inodes
            found = {name for name in names if not is_read(system, name)}
            assert [("inodes" in note) for note in system.notes] == [True] * bool(found)
            return found

    done = struct.pack("<HHIQ", 0x1245, 1, 0, 5)
    assert refused_after() == set()
    assert refused_after(mapping(5, inodes[1], inodes[3])) == {names[1], names[3]}
    assert refused_after(mapping(5, inodes[1]), mapping(6, inodes[2]), done) == {names[2]}
    assert refused_after(struct.pack("<HHIQQ", 0x1246, 1, 0, 9, inodes[4])) == {names[4]}
    assert refused_after(struct.pack("<HHIQQQ", 0x1248, 1, 0, 9, inodes[0], inodes[5])) == {names[0], names[5]}
    shutil.copyfile(disk, copy)
    append(copy, mapping(5, inodes[1]), end=0x20)  # ended without a commit
    with closing(open_image(copy)) as system, as_the_kernel_shows(copy, tmp_path / "mnt") as shown:
        assert shown
        assert system.notes == ()
        assert differences(system, shown) == []
    append(copy, struct.pack("<HHIQ", 0x12FF, 1, 0, 0))
    with closing(open_image(copy)) as system:  # of a kind that nobody knows
        assert "log was not replayed" in system.notes[0]


def is_read(system: FileSystem, name: str) -> bool:
    """Whether a file can be read; what is read is right."""
    try:
        assert system.read(look(system, name), 0, 100) == name.encode()
    except GuestError:
        return False
    return True


def test_more_than_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is replayed, and what the log changes is refused; what it does not is right."""
    disk, copy, chance = make(tmp_path / "disk"), tmp_path / "copy", random.Random(8)
    with mounted(disk, tmp_path / "mnt") as root:
        change(root, chance, 300)
        (root / "kept").mkdir()
        for number in range(300):
            (root / f"kept/{number}").write_bytes(b"%d" % number * 3000)
        os.sync()
        run("fsfreeze", "-f", root)  # writes everything to its place
        run("fsfreeze", "-u", root)
    with in_use(disk, tmp_path / "mnt") as root:
        change(root, chance, 100)
        (root / "kept/7").write_bytes(b"changed")
        os.sync()

    def put(*_: object) -> NoReturn:
        raise xfs_overlay.TooMuchError

    monkeypatch.setattr(xfs_overlay.Replayed, "put", put)
    shutil.copyfile(disk, copy)
    with (
        as_the_kernel_shows(copy, tmp_path / "mnt") as shown,
        closing(FileImage(disk)) as image,
        closing(XfsFileSystem(image)) as system,
    ):
        assert "log was not replayed" in system.notes[0]
        assert shown
        assert len(system.list((shown / "kept").stat().st_ino)) == 300
        missing = {number for number in range(300) if not is_same(system, shown, f"kept/{number}")}
        assert missing == {7}
        with pytest.raises(GuestError, match="changed last in the log"):
            system.read((shown / "kept/7").stat().st_ino, 0, 100)


def is_same(system: FileSystem, shown: Path, name: str) -> bool:
    """Whether a file can be read; what is read is right."""
    try:
        content = system.read((shown / name).stat().st_ino, 0, MiB)
    except GuestError:
        return False
    assert content == (shown / name).read_bytes()
    return True


def test_version_4_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"content")
    names = "".join(f"file{n} ---644 0 0 {tmp_path / 'content'}\n" for n in range(5))
    (tmp_path / "prototype").write_text(f"/dev/null\n0 0\nd--755 0 0\n{names}$\n")
    disk = make(tmp_path / "disk", "-m", "crc=0", "-p", str(tmp_path / "prototype"))
    with closing(open_image(disk)) as system:
        assert system.notes == ()
        inode = look(system, "file3")
    append(disk, struct.pack("<HHIHHIQ16xqii", 0x123B, 1, 1, 0, 0, 0, inode, 64, 16, 0))
    with closing(open_image(disk)) as system:
        assert "log was not replayed" in system.notes[0]
        for number in range(5):
            if number == 3:
                with pytest.raises(GuestError, match="changed last in the log"):
                    system.read(inode, 0, 100)
            else:
                assert system.read(look(system, f"file{number}"), 0, 100) == b"content"
