"""Guests' files as backupfs reads them, and as the kernel (for NTFS ntfs-3g) does: the same."""

import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_disks import put, put_pv
from images import FileImage
from servers import freeze, need, run

from backupfs.errors import BackupfsError, GuestError, NotFound
from backupfs.filesystem import FileSystem, Run
from backupfs.guest import child, messages
from backupfs.guest.detect import detect
from backupfs.guest.families import open_family
from backupfs.services import guest_process
from backupfs.services.guest_process import Crew, GuestFileSystem
from backupfs.units import KiB, MiB

LONG = bool(os.environ.get("BACKUPFS_LONG"))
SIZE = 64 * MiB
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, 2**32 - 1), (2, 6, 1000), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 4, 2**32 - 1))
)


@contextmanager
def mounted(image: Path, folder: Path, *, read_only: bool = False, ntfs: bool = False) -> Iterator[Path]:
    """Mount an image file by the kernel, or by ntfs-3g."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder.mkdir(exist_ok=True)
    options = "ro" if read_only else "rw"
    if ntfs:
        run("ntfs-3g", "-o", f"{options},streams_interface=xattr", image, folder)
    else:
        run("mount", "-o", f"loop,{options}", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def fill(root: Path, *, posix: bool) -> None:
    """Make files of many kinds; `posix`: also what NTFS and FAT don't have."""
    chance = random.Random(1)
    (root / "a/b/c").mkdir(parents=True)
    (root / "many").mkdir()
    for number in range(300):
        (root / f"many/file number {number}").write_text(f"file {number}\n" * number)
    (root / "a/big").write_bytes(chance.randbytes(3_000_001))
    (root / "a/tiny").write_bytes(b"x")
    (root / "a/empty").touch()
    (root / "a/ä ö ü").write_text("odd")
    with (root / "a/sparse").open("wb") as file:
        file.truncate(9 * MiB)
        file.seek(5 * MiB + 4096)
        file.write(chance.randbytes(8192))
    if not posix:
        return
    with (root / "a/unwritten").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, MiB)
        file.write(b"only this")
    (root / "a/link").symlink_to("tiny")
    (root / "a/long link").symlink_to("x" * 200)
    (root / "a/hard").hardlink_to(root / "a/tiny")
    os.mkfifo(root / "a/fifo")
    os.mknod(root / "a/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(root / "a/large", stat.S_IFBLK | 0o600, os.makedev(260, 70000))
    os.chown(root / "a/tiny", 70_000, 80_000)
    (root / "a/big").chmod(0o4755)
    Path(os.fsdecode(os.fsencode(root) + b"/a/odd\xff\x01\nname")).write_bytes(b"odd")
    os.setxattr(root / "a/tiny", "user.one", b"1")
    os.setxattr(root / "a/tiny", "user.big", b"y" * 700)
    os.setxattr(root / "a/b", "trusted.two", b"\0\xff")
    os.setxattr(root / "a/tiny", "system.posix_acl_access", ACL)
    os.setxattr(root / "a/b", "system.posix_acl_default", ACL)
    os.utime(root / "a/empty", ns=(-473_000_000_123_456_789, -473_000_000_987_654_321))
    os.utime(root / "a/big", ns=(4_102_444_800_000_000_001, 4_102_444_800_500_000_000))


def differences(system: FileSystem, root: Path, *ignored: str) -> list[str]:
    """Return in what a file system differs from its mount; `ignored`: what stat says."""
    found: list[str] = []

    def compare(path: bytes, inode: int) -> None:
        entries = {entry.name: entry.stat for entry in system.list(inode)}
        names = set(os.listdir(path))
        if names != set(entries):
            found.append(f"{path!r}: {names ^ set(entries)}")
        for name in sorted(names & set(entries)):
            ours, inside = entries[name], os.path.join(path, name)
            found.extend(f"{inside!r}: {words}" for words in differs(inside, ours))
            if stat.S_ISDIR(ours.mode):
                compare(inside, ours.inode)

    def differs(path: bytes, ours: Any) -> Iterator[str]:
        theirs = os.lstat(path)
        if system.stat(ours.inode) != ours:
            yield "stat and list differ"
        for field in ("mode", "nlink", "uid", "gid", "size", "atime_ns", "mtime_ns", "ctime_ns"):
            expected = getattr(theirs, f"st_{field}")
            if field not in ignored and getattr(ours, field) != expected:
                yield f"{field} {getattr(ours, field)}, not {expected}"
        if "allocated" not in ignored and ours.allocated != theirs.st_blocks * 512:
            yield f"allocated {ours.allocated}, not {theirs.st_blocks * 512}"
        if stat.S_ISLNK(theirs.st_mode):
            if system.readlink(ours.inode) != os.readlink(path):
                yield "another target"
            return
        names = os.listxattr(path, follow_symlinks=False)
        expected = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}
        if expected and not ours.has_xattrs:
            yield "no xattrs"
        if system.xattrs(ours.inode) != expected:
            yield f"xattrs {system.xattrs(ours.inode)}, not {expected}"
        if stat.S_ISCHR(theirs.st_mode) or stat.S_ISBLK(theirs.st_mode):
            if ours.rdev != theirs.st_rdev:
                yield "another device"
        elif stat.S_ISREG(theirs.st_mode):
            yield from content(path, ours)

    def content(path: bytes, ours: Any) -> Iterator[str]:
        expected = Path(os.fsdecode(path)).read_bytes()
        if system.read(ours.inode, 0, ours.size + 10) != expected:
            yield "another content"
        middle = ours.size // 3
        if system.read(ours.inode, middle, 5000) != expected[middle : middle + 5000]:
            yield "another content in the middle"
        runs = system.runs(ours.inode)
        if runs is not None and b"".join(lying_at(run) for run in runs) != expected:
            yield "another content on the volume"
        if any(e.flag and any(expected[e.offset : e.end]) for e in system.extents(ours.inode, 0, ours.size)):
            yield "a hole where there is data"

    def lying_at(run: Run) -> bytes:
        buffer = bytearray(run.length)
        if run.offset is not None:
            system._volume.readinto(run.offset, buffer)  # type: ignore[attr-defined]
        return bytes(buffer)

    compare(os.fsencode(root), system.root)
    return found


def open_image(path: Path) -> GuestFileSystem:
    image = FileImage(path)
    found = detect(image)
    if found.family is None:
        image.close()
    assert found.family is not None, found
    return GuestFileSystem("1", image, found.family, found.kind, Crew())


def look(system: FileSystem, path: str) -> int:
    """Return the inode of a path."""
    inode = system.root
    for name in path.encode().split(b"/"):
        inode = next(entry.stat.inode for entry in system.list(inode) if entry.name == name)
    return inode


def make_ext4(path: Path, *options: str) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", *options, path)
    return path


def detect_dirty(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(struct.unpack_from("<I", file.read(2048), 1024 + 96)[0] & 4)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[GuestFileSystem]:
    path = make_ext4(tmp_path / "disk")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content" * 100_000)
    run("mkfs.ext4", "-q", "-F", "-d", source, path)
    with closing(open_image(path)) as system:
        yield system


def pid(system: GuestFileSystem) -> int:
    assert system._child is not None
    assert system._child._process is not None
    return system._child._process.pid


def test_the_process_may_do_next_to_nothing(system: GuestFileSystem) -> None:
    look(system, "file")
    status = Path(f"/proc/{pid(system)}/status").read_text()
    limits = Path(f"/proc/{pid(system)}/limits").read_text()
    assert "NoNewPrivs:\t1\n" in status
    assert "Max open files            4  " in limits
    assert "Max processes             0  " in limits
    assert "Max file size             0  " in limits
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert os.readlink(f"/proc/{pid(system)}/ns/net") != os.readlink("/proc/self/ns/net")


def test_a_process_that_dies_costs_one_call_at_most(system: GuestFileSystem) -> None:
    inode = look(system, "file")
    os.kill(pid(system), signal.SIGKILL)
    with pytest.raises(GuestError, match="died"):
        system.stat(inode)
    assert system.read(inode, 0, 7) == b"content"


def test_a_process_that_hangs_is_killed(system: GuestFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    inode, hanging = look(system, "file"), pid(system)
    monkeypatch.setattr(guest_process, "_DEADLINE_S", 0.5)
    freeze(hanging)
    with pytest.raises(GuestError, match="took longer"):
        system.stat(inode)
    assert not Path(f"/proc/{hanging}").exists()
    monkeypatch.undo()
    assert system.read(inode, 0, 7) == b"content"


def test_a_process_that_asks_on_and_on_is_killed(system: GuestFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers each time before anybody waits long, a byte or a request for a part of the disk at a time."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(guest_process, "_DEADLINE_S", 0.3)
    assert system._line is not None
    system._line.close()
    system._line = ours

    def drip() -> None:
        with suppress(OSError), theirs:
            theirs.settimeout(5)
            for _ in range(3):
                messages.receive(theirs)
                messages.send(theirs, messages.Need(0, 512))
            for byte in struct.pack("<I", 1000) + bytes(1000):
                theirs.send(bytes([byte]))
                time.sleep(0.01)

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(GuestError, match="took longer"):
        system.stat(system.root)
    dripping.join(30)
    assert not dripping.is_alive()
    monkeypatch.undo()
    assert system.stat(system.root).inode == system.root


def test_a_process_that_lists_on_and_on_is_not_believed(system: GuestFileSystem) -> None:
    row = (5, stat.S_IFREG, 1, 0, 0, 0, 0, 0, 0, 0, 0, False)
    for entries in ([], [(b"name", row)]):
        ours, theirs = socket.socketpair()
        assert system.stat(system.root)
        assert system._line is not None
        system._line.close()
        system._line = ours
        with theirs:
            messages.send(theirs, messages.ListAnswer(entries, more=True))
            with pytest.raises(GuestError, match="nonsense"):
                system.list(system.root)


def test_what_a_process_says_does_nothing_to_a_terminal(system: GuestFileSystem) -> None:
    ours, theirs = socket.socketpair()
    assert system._line is not None
    system._line.close()
    system._line = ours
    with theirs:
        messages.send(theirs, messages.Failed(False, "\x1b[2J"))
        with pytest.raises(GuestError) as caught:
            system.stat(system.root)
    assert str(caught.value) == "1: \\x1b[2J"


def test_attributes_of_several_files(system: GuestFileSystem, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", tmp_path / "mnt") as root:
        for number in range(40):
            (root / f"file {number}").touch()
            os.setxattr(root / f"file {number}", "security.selinux", b"label %d" % number)
        inodes = [(root / f"file {number}").stat().st_ino for number in range(40)]
    system.rest()  # what it knows is older
    expected = [{b"security.selinux": b"label %d" % number} for number in range(40)]
    assert system.xattrs_of(inodes) == expected
    damage_inode(tmp_path / "disk", inodes[7], KiB)
    system.rest()
    assert system.xattrs_of([*inodes[:10], 10**9]) == [*expected[:7], None, *expected[8:10], None]
    with pytest.raises(GuestError, match="is damaged"):
        system.xattrs(inodes[7])


def test_attributes_of_several_files_are_bounded(system: GuestFileSystem, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", "-F", "-O", "ea_inode", tmp_path / "disk")
    with mounted(tmp_path / "disk", tmp_path / "mnt") as root:
        for number in range(60):
            (root / f"file {number}").touch()
            os.setxattr(root / f"file {number}", "user.large", b"%02d" % number * 25_000)
        for name in ("a", "b") * 12:
            os.setxattr(root / "file 0", "user." + name * 20 + str(len(os.listxattr(root / "file 0"))), bytes(50_000))
        inodes = [(root / f"file {number}").stat().st_ino for number in range(60)]
    system.rest()
    found = system.xattrs_of(inodes)
    assert found == [None], "more than a MiB of one file: for who asks for it alone"
    assert sum(map(len, system.xattrs(inodes[0]).values())) > MiB
    found = system.xattrs_of(inodes[1:])
    assert 20 <= len(found) <= 21
    assert found == [{b"user.large": b"%02d" % number * 25_000} for number in range(1, len(found) + 1)]


def test_attributes_that_take_long(system: GuestFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_TOGETHER_S", 0.0)
    assert child._xattrs_of(system, [look(system, "file")] * 3) == messages.XattrsOfAnswer([[]], [0])
    monkeypatch.undo()
    assert child._xattrs_of(system, [look(system, "file")] * 3) == messages.XattrsOfAnswer([[]], [0] * 3)


def test_a_process_that_tells_of_other_attributes_is_not_believed(system: GuestFileSystem) -> None:
    odd = [(b"a\0b", b"1"), (b"", b"2"), (b"user.x", bytes(70_000)), (b"user.y", b"3")]
    lies: tuple[list[int | None], ...] = ([], [0] * 4, [0, 1, 2], [-1], [0, None])
    for lie in lies:
        ours, theirs = socket.socketpair()
        assert system.stat(system.root)
        assert system._line is not None
        system._line.close()
        system._line = ours
        with theirs:
            messages.send(theirs, messages.XattrsOfAnswer([odd, []], lie))
            if lie == [0, None]:
                assert system.xattrs_of([12, 13, 14]) == [{b"user.y": b"3"}, None]
            else:
                with pytest.raises(GuestError, match="make no sense"):
                    system.xattrs_of([12, 13, 14])
        system.rest()


def test_idle_processes_go_away(system: GuestFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_process, "_MOST", 2)
    others = [GuestFileSystem("1", FileImage(tmp_path / "disk"), "ext", "ext4", system._crew) for _ in range(2)]
    assert [other._child is not None for other in (system, *others)] == [False, True, True]
    assert look(system, "file")
    assert sum(other._child is not None for other in (system, *others)) == 2
    for other in others:
        other.close()
    monkeypatch.setattr(guest_process, "_IDLE_S", 0.2)
    system.rest()
    assert look(system, "file")
    timer = system._timer
    assert timer is not None
    timer.join(10)
    while system._child is not None:
        assert system._timer is not None
        system._timer.join(10)
    assert look(system, "file")


def test_one_that_can_not_be_opened_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    crew = Crew()
    threads = threading.active_count()
    with pytest.raises(GuestError, match="can't be opened"):
        GuestFileSystem("1", FileImage(tmp_path / "disk"), "ntfs", "ntfs", crew)
    assert threading.active_count() == threads, "each process has a thread that waits for it"
    assert crew._working == {}


def test_what_is_not_there(system: GuestFileSystem) -> None:
    for inode in (0, 10**9, 2**63):
        with pytest.raises((NotFound, GuestError)):
            system.stat(inode)
    with pytest.raises(GuestError, match="no file"):
        system.read(system.root, 0, 10)
    assert system.read(look(system, "file"), 10**12, 10) == b""
    with pytest.raises(GuestError):
        system.readlink(look(system, "file"))


def _damaged_images(path: Path, rounds: int, use: Callable[[FileSystem], None]) -> tuple[int, int]:
    """Flip bytes, mostly where metadata is, and read all. Returns how many could not be opened, and what failed."""
    chance, original = random.Random(3), path.read_bytes()
    interesting = [block for block in range(0, len(original), 1024) if any(original[block : block + 1024])]
    closed = failed = 0
    for _ in range(rounds):
        damaged = bytearray(original)
        for _ in range(chance.choice([1, 3, 20, 200])):
            at = chance.choice(interesting) + chance.randrange(1024)
            damaged[at] = chance.choice([0, 255, damaged[at] ^ 1 << chance.randrange(8), chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            with closing(open_image(path)) as system:
                try:
                    use(system)
                except BackupfsError:
                    failed += 1
        except (GuestError, AssertionError):
            closed += 1
    return closed, failed


def _read_all(system: FileSystem) -> None:
    seen, left = set[int](), [system.root]
    while left and len(seen) < 2000:
        inode = left.pop()
        if inode in seen:
            continue
        seen.add(inode)
        for entry in system.list(inode):
            if stat.S_ISDIR(entry.stat.mode):
                left.append(entry.stat.inode)
            elif stat.S_ISREG(entry.stat.mode):
                assert len(system.read(entry.stat.inode, 0, 100_000)) <= 100_000
                list(system.extents(entry.stat.inode, 0, min(entry.stat.size, MiB)))
            system.xattrs(entry.stat.inode)


def make_small(tmp_path: Path, kind: str) -> Path:
    """Make a file system of 8 MiB with some files."""
    path, source = tmp_path / "disk", tmp_path / "source"
    with path.open("wb") as file:
        file.truncate(8 * MiB)
    source.mkdir()
    for number in range(20):
        (source / f"file {number}").write_bytes(b"content" * 100 * number)
    if kind == "ext4":
        run("mkfs.ext4", "-q", "-F", "-d", source, path)
    elif kind == "vfat":
        run("mkfs.fat", path)
        run("mcopy", "-i", path, "-s", source, "::")
    else:
        run("mkfs.ntfs", "-q", "-F", "-f", path)
        with mounted(path, tmp_path / "mnt", ntfs=True) as root:
            for file_ in source.iterdir():
                (root / file_.name).write_bytes(file_.read_bytes())
    return path


@pytest.mark.parametrize("kind", ["ext4", "ntfs", "vfat"])
def test_damaged_file_systems(tmp_path: Path, kind: str) -> None:
    """Nothing hangs, and nothing but GuestError comes out."""
    path = make_small(tmp_path, kind)
    rounds = 400 if LONG else 12
    closed, failed = _damaged_images(path, rounds, _read_all)
    print(f"{rounds} damaged images: {closed} can't be opened, in {failed} something can't be read")
    assert closed + failed < rounds, "some of what was flipped concerns nobody"


class FailingImage(FileImage):
    """A file of which a part can't be read, as the process that parses it is told of a damaged chunk."""

    bad = range(0)

    def readinto(self, offset: int, buffer: Any) -> None:
        if offset < self.bad.stop and self.bad.start < offset + len(buffer):
            raise GuestError(f"the disk can't be read at {offset}")
        super().readinto(offset, buffer)


def tree_of(system: FileSystem) -> dict[bytes, Any]:
    """Return all that there is, or GuestError where it can't be read."""

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except GuestError:
            return GuestError

    found, left = dict[bytes, Any](), [(b"", system.root)]
    while left:
        path, inode = left.pop()
        entries = attempt(lambda inode=inode: system.list(inode))
        found[path + b"/"] = entries if entries is GuestError else sorted(e.name for e in entries)
        for entry in () if entries is GuestError else entries:
            s, inside = entry.stat, path + b"/" + entry.name
            found[inside] = replace(s, has_xattrs=True) if s.mode else attempt(lambda s=s: system.stat(s.inode))
            found[inside + b" xattrs"] = attempt(lambda s=s: system.xattrs(s.inode))
            if stat.S_ISDIR(s.mode):
                left.append((inside, s.inode))
            elif stat.S_ISREG(s.mode):
                found[inside + b" content"] = attempt(lambda s=s: system.read(s.inode, 0, s.size))
                found[inside + b" extents"] = attempt(lambda s=s: list(system.extents(s.inode, 0, s.size)))
            elif stat.S_ISLNK(s.mode):
                found[inside + b" target"] = attempt(lambda s=s: system.readlink(s.inode))
    return found


@pytest.mark.parametrize("kind", ["ext4", "ntfs", "vfat"])
def test_what_can_not_be_read_is_not_taken_for_absent(tmp_path: Path, kind: str) -> None:
    """Of a disk with a damaged chunk, wherever it is, each answer is right or an error; then it is good again."""
    path = make_small(tmp_path, kind)
    with closing(FailingImage(path)) as image:
        assert _fail_everywhere(image, path.read_bytes()) > 5


def _fail_everywhere(image: FailingImage, content: bytes) -> int:
    """Return of how many blocks something was said when they could not be read."""
    found = detect(image)
    assert found.family is not None
    right = tree_of(open_family(image, found.family, found.kind))
    assert GuestError not in right.values()
    used = [at for at in range(0, len(content), 4 * KiB) if any(content[at : at + 4 * KiB])]
    errors = 0
    for at in used if LONG else random.Random(8).sample(used, min(60, len(used))):
        image.bad = range(0)
        system = open_family(image, found.family, found.kind)
        image.bad = range(at, at + 4 * KiB)
        damaged = tree_of(system)
        for key, value in damaged.items():
            assert value is GuestError or value == right[key], (at, key)
        errors += GuestError in damaged.values()
        image.bad = range(0)
        assert tree_of(system) == right, at
    return errors


def flip_bytes(path: Path, rounds: int, unsummed: tuple[bytes, ...]) -> int:
    """Flip a bit of a file system, again and again: all that is said of it is right, or it is an error.

    Args:
        unsummed: how the names of what has no checksum in it end, of `tree_of`.

    Returns:
        How often there was an error.
    """
    chance, content, errors = random.Random(5), path.read_bytes(), 0
    used = [at for at in range(0, len(content), 4 * KiB) if any(content[at : at + 4 * KiB])]
    with closing(FileImage(path)) as image:
        found = detect(image)
        assert found.family is not None
        right = tree_of(open_family(image, found.family, found.kind))
    assert GuestError not in right.values()
    for _ in range(rounds):
        at = chance.choice(used) + chance.randrange(4 * KiB)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << chance.randrange(8)]))
        with closing(FileImage(path)) as image:
            try:
                said = tree_of(open_family(image, found.family, found.kind))
            except GuestError:
                said = {b"opened": GuestError}
        for key, value in said.items():
            assert value is GuestError or value == right[key] or key.endswith(unsummed), (at, key)
        errors += GuestError in said.values()
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1])
    return errors


def damage_inode(disk: Path, inode: int, block: int) -> None:
    """Change a time in an inode, but not its checksum."""
    place = re.search(r"at block (\d+), offset (0x[0-9a-f]+)", run("debugfs", "-R", f"imap <{inode}>", disk))
    assert place is not None
    with disk.open("r+b") as file:
        file.seek(int(place[1]) * block + int(place[2], 16) + 8)
        file.write(b"?")


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MiB))
    subprocess.run(["mkswap", "-q", path], check=True, capture_output=True)
    with closing(FileImage(path)) as image:
        assert "swap" in str(detect(image).problem)
    path.write_bytes(bytes(MiB))
    with closing(FileImage(path)) as image:
        assert detect(image).problem == "nothing is on it, or nothing that is known"


def md_superblock(major: int, sector: int, level: int) -> bytes:
    """Make one of Linux' RAID. Source: include/uapi/linux/raid/md_p.h"""
    if not major:
        return struct.pack("<8I", 0xA92B4EFC, 0, 90, 0, 0, 0, 0, level).ljust(4096, b"\0")
    head = struct.pack("<4I16s32sQ2I", 0xA92B4EFC, 1, 0, 0, b"u" * 16, b"name", 0, level, 0)
    return head.ljust(144, b"\0") + struct.pack("<Q", sector).ljust(112, b"\0")


def with_md(disk: bytearray, at: int, major: int, level: int) -> None:
    put(disk, at, md_superblock(major, at // 512, level))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("a member of a Linux RAID", lambda disk: with_md(disk, 4 * KiB, 1, 1)),
        ("a member of a Linux RAID", lambda disk: with_md(disk, len(disk) - 8 * KiB, 1, 5)),
        ("a member of a Linux RAID", lambda disk: with_md(disk, len(disk) - 64 * KiB, 0, 0)),
        ("a physical volume of LVM2", lambda disk: put_pv(disk, 0, len(disk), 1)),
        ("encrypted by LUKS", lambda disk: put(disk, 0, b"LUKS\xba\xbe\0\2")),
        ("ext2", lambda disk: with_md(disk, len(disk) - 8 * KiB, 1, 1)),
        ("ext2", lambda disk: with_md(disk, len(disk) - 64 * KiB, 0, 1)),
        ("ext2", lambda disk: put(disk, 4 * KiB, md_superblock(1, 1234, 5))),
        ("ext2", lambda disk: put(disk, 512, b"LABELONE\1")),
    ],
)
def test_what_a_volume_was_before_it_became_a_part_of_something(
    tmp_path: Path, kind: str, change: Callable[[bytearray], None]
) -> None:
    """Nobody has to wipe it. A mirror that keeps its superblock at its end has the file system at its beginning."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MiB))
    run("mkfs.ext2", "-q", "-F", "-b", "1024", path)
    disk = bytearray(path.read_bytes())
    change(disk)
    path.write_bytes(disk)
    with closing(FileImage(path)) as image:
        assert detect(image).kind == kind


def test_the_end_of_a_volume_may_be_damaged_or_hold_what_was_before(tmp_path: Path) -> None:
    """Windows makes its file systems over what MD had there."""
    need("mkfs.ntfs")
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MiB))
    run("mkfs.ext2", "-q", "-F", "-b", "1024", path)
    with closing(FailingImage(path)) as image:
        image.bad = range(image.size - 64 * KiB, image.size)
        assert detect(image).kind == "ext2"
    run("mkfs.ntfs", "-q", "-F", "-f", path)
    disk = bytearray(path.read_bytes())
    with_md(disk, len(disk) - 8 * KiB, 1, 5)
    path.write_bytes(disk)
    with closing(FileImage(path)) as image:
        assert detect(image).kind == "ntfs"


def test_an_old_btrfs_below_a_new_ntfs(tmp_path: Path) -> None:
    """Whose making does not touch the superblock of the first."""
    need("mkfs.btrfs", "mkfs.ntfs")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(120 * MiB)
    run("mkfs.btrfs", "-q", path)
    with path.open("rb") as file:
        file.seek(64 * KiB)
        old = file.read(4096)
    run("mkfs.ntfs", "-q", "-F", "-f", path)
    with path.open("r+b") as file:
        file.seek(64 * KiB)
        file.write(old)  # in case it was; Windows leaves it
    with closing(FileImage(path)) as image:
        assert detect(image).kind == "ntfs"


@pytest.mark.parametrize("kind", ["uid16", "hurd"])
def test_ext_of_other_kinds(tmp_path: Path, kind: str) -> None:
    """Owners of 16 bits only, and the Hurd's attributes."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    run("mkfs.ext2", "-q", "-F", *(("-o", "hurd", "-I", "128") if kind == "hurd" else ()), path)
    if kind == "uid16":
        run("tune2fs", "-o", "uid16", path)
    with mounted(path, tmp_path / "mnt") as root:
        (root / "file").write_text("content")
        os.chown(root / "file", 7, 8)
        if kind == "hurd":
            os.setxattr(root / "file", "gnu.translator", b"/hurd/null\0")
    if kind == "uid16":
        run("debugfs", "-w", "-R", "set_inode_field /file uid 65543", path)
    with mounted(path, tmp_path / "mnt", read_only=True) as root, closing(open_image(path)) as system:
        assert differences(system, root) == []
        assert system.stat(look(system, "file")).uid == 7
        assert list(system.xattrs(look(system, "file"))) == ([b"gnu.translator"] if kind == "hurd" else [])
