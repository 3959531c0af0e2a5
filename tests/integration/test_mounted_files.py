"""Guests' files in a real mount: DISK.files, beside what the kernel's own mount of the same disk shows."""

import contextlib
import ctypes
import errno
import hashlib
import os
import pickle
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from commands import BACKUPFS
from guest_disks import entry, put, table
from images import FileImage
from mounts import AS_NOBODY, LANES, choose_lane, fails_with, let_in, needs_fuse, process_of, unmount_all, wait_until
from repositories import MOMENT
from servers import freeze, need, run
from test_guest_files import ACL, SIZE, damage_inode, detect_dirty, fill, make_ext4, mounted
from test_ntfs import make_ntfs
from test_volume_files import holes
from test_xfs import make as make_xfs

from backupfs.guest.crc32c import crc32c
from backupfs.guest.ext_inode import Inodes
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(120), needs_fuse]

LONG = bool(os.environ.get("BACKUPFS_LONG"))


class Mounted:
    """A repository with one point of the disks, mounted."""

    def __init__(self, folder: Path, lane: bool) -> None:
        self.lane = lane
        self.repository, self.path = str(folder / "repo"), str(folder / "shown")
        os.mkdir(self.path)
        Repository.init(self.repository)

    def add(self, **disks: Path) -> None:
        """Add a point with these disks, an hour after the last."""
        with Repository.open(self.repository) as repository, repository.writer() as writer:
            number = len(repository.points("web01"))
            point = writer.begin("web01", MOMENT + timedelta(hours=number))
            for name, path in disks.items():
                target = point.add_disk(name, path.stat().st_size, f"chain{number}", None)
                with path.open("rb") as file:
                    while data := file.read(MiB):
                        if any(data):
                            target.write(file.tell() - len(data), data)
                point.finish_disk(target, read="all", reason="test")
            self.point = writer.commit(point, parent=None).id

    def mount(self, *, allow_other: bool = False, scratch: str | None = None) -> None:
        service.mount(
            self.repository, self.path, foreground=False, allow_other=allow_other, options=(), scratch=scratch
        )

    def at(self, *parts: str) -> Path:
        """Return a path in the point's folder."""
        return Path(self.path, "web01", self.point, *parts)

    def log(self) -> str:
        return Path(background.log_path(self.path)).read_text()

    def parsers(self) -> list[int]:
        """Return the processes that read file systems."""
        mine, found = process_of(self.path), []
        for path in Path(f"/proc/{mine}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has just ended
                found += [int(pid) for pid in path.read_text().split() if is_parser(pid)]
        return found

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            pid = process_of(self.path)
            for child in self.parsers():
                os.kill(child, signal.SIGCONT)
            unmount_all(self.path)
            wait_until(lambda: not Path(f"/proc/{pid}/cmdline").read_bytes(), 20)
        unmount_all(self.path)


def is_parser(pid: str) -> bool:
    try:
        return b"guest.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.fixture(params=LANES)
def shown(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    choose_lane(monkeypatch, request.param)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mount = Mounted(tmp_path, request.param == "lane")
    try:
        yield mount
    finally:
        mount.close()


FIELDS = ("mode", "nlink", "uid", "gid", "size", "blocks", "rdev", "atime_ns", "mtime_ns", "ctime_ns")


def differences(ours: Path, theirs: Path, *ignored: str) -> list[str]:
    """Return in what two trees differ that should be the same; `ignored`: fields of stat."""
    found: list[str] = []
    top = os.fsencode(theirs)
    for folder, folders, files in os.walk(top):
        other = os.path.join(os.fsencode(ours), os.path.relpath(folder, top))
        if sorted(os.listdir(other)) != sorted(folders + files):
            found.append(f"{folder!r}: {os.listdir(other)}")
        for name in (b".", *folders, *files):
            a, b = os.path.join(other, name), os.path.join(folder, name)
            found += (f"{b!r}: {words}" for words in differs(a, b, ignored))
    return found


def differs(ours: bytes, theirs: bytes, ignored: tuple[str, ...]) -> Iterator[str]:
    a, b = os.lstat(ours), os.lstat(theirs)
    for name in FIELDS:
        if name not in ignored and getattr(a, f"st_{name}") != getattr(b, f"st_{name}"):
            yield f"{name} {getattr(a, f'st_{name}')}, not {getattr(b, f'st_{name}')}"
    if xattrs(ours) != xattrs(theirs):
        yield f"attributes {xattrs(ours)}, not {xattrs(theirs)}"
    if stat.S_ISLNK(b.st_mode) and os.readlink(ours) != os.readlink(theirs):
        yield "another target"
    if stat.S_ISREG(b.st_mode) and Path(os.fsdecode(ours)).read_bytes() != Path(os.fsdecode(theirs)).read_bytes():
        yield "another content"


def xattrs(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


@pytest.mark.parametrize("options", [(), ("-O", "inline_data")], ids=["default", "inline"])
def test_ext4_is_what_the_kernel_shows(shown: Mounted, tmp_path: Path, options: tuple[str, ...]) -> None:
    need("rsync")
    disk = make_ext4(tmp_path / "disk", *options)
    with mounted(disk, tmp_path / "mnt") as root:
        fill(root, posix=True)
    shown.add(vda=disk)
    shown.mount()
    with mounted(disk, tmp_path / "mnt", read_only=True) as root:
        files = shown.at("vda.files", "0")
        assert os.listdir(shown.at("vda.files")) == ["0"]
        assert differences(files, root) == []
        assert os.stat(files / "a/hard").st_ino == os.stat(files / "a/tiny").st_ino
        if shown.lane:  # pyfuse3 alone knows no SEEK_HOLE
            assert holes(files / "a/sparse", 9 * MiB) == holes(root / "a/sparse", 9 * MiB)
        for a, b in ((files, root), (root, files)):
            assert run("rsync", "-naHAXi", "--checksum", "--delete", f"{a}/", f"{b}/") == ""
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        run("rsync", "-aHAX", f"{files}/", str(tmp_path / "copy"))
        assert differences(tmp_path / "copy", root, "atime_ns", "ctime_ns", "blocks", "size") == []
    assert shown.parsers()


def test_ntfs_is_what_ntfs_3g_shows(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ntfs(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt", ntfs=True) as root:
        fill(root, posix=False)
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        (root / "compressed/file").write_bytes(b"some text again and again " * 40_000)
        os.setxattr(root / "a/tiny", "user.stream", b"alternate")
    shown.add(vda=disk)
    shown.mount()
    with mounted(disk, tmp_path / "mnt", read_only=True, ntfs=True) as root:
        found = differences(shown.at("vda.files", "0"), root, "blocks", "nlink")
        # The sizes of folders are told otherwise.
        assert [line for line in found if ": size " not in line] == []
        found_holes = holes(shown.at("vda.files", "0", "a/sparse"), 9 * MiB)
        assert not shown.lane or sum(end - begin for begin, end in found_holes) >= 8 * MiB


def test_an_ext4_with_a_journal_to_replay(shown: Mounted, tmp_path: Path) -> None:
    disk, moment = make_ext4(tmp_path / "disk"), tmp_path / "moment"
    with mounted(disk, tmp_path / "mnt") as root:
        fill(root, posix=True)
        os.sync()
        for number in range(200):
            with (root / f"many/file number {number}").open("ab") as file:
                file.write(b"more")
                os.fsync(file.fileno())
        shutil.copyfile(disk, moment)
    assert detect_dirty(moment)
    shown.add(vda=moment)
    shown.mount()
    with mounted(moment, tmp_path / "mnt"):
        pass
    with mounted(moment, tmp_path / "mnt", read_only=True) as root:
        assert differences(shown.at("vda.files", "0"), root) == []


def without_journal(superblock: bytes) -> bytes:
    """Return the superblock of an ext4 that is to be replayed, from an inode that is no journal."""
    head = bytearray(superblock)
    struct.pack_into("<I", head, 96, struct.unpack_from("<I", head, 96)[0] | 4)
    struct.pack_into("<I", head, 0xE0, 7)
    struct.pack_into("<I", head, 1020, crc32c(bytes(head[:1020])))
    return bytes(head)


def test_volumes_that_can_and_that_can_not(shown: Mounted, tmp_path: Path) -> None:
    inside = make_ext4(tmp_path / "inside")
    with mounted(inside, tmp_path / "mnt") as root:
        (root / "hello").write_text("hello")
    journal = bytearray(inside.read_bytes())
    journal[1024:2048] = without_journal(journal[1024:2048])
    disk = bytearray(3 * SIZE)
    sectors = SIZE // 512
    put(
        disk,
        0,
        table(entry(0x83, 2048, sectors), entry(0x82, 2048 + sectors, 2048), entry(0x83, 4096 + sectors, sectors)),
    )
    put(disk, 2048 * 512, inside.read_bytes())
    put(disk, (2048 + sectors) * 512 + 4086, b"SWAPSPACE2")
    put(disk, (4096 + sectors) * 512, bytes(journal))
    (tmp_path / "disk").write_bytes(disk)
    shown.add(vda=tmp_path / "disk")
    shown.mount()
    assert sorted(os.listdir(shown.at("vda.files"))) == ["1", "2", "3"]
    assert shown.at("vda.files", "1", "hello").read_text() == "hello"
    assert os.listdir(shown.at("vda.files", "2")) == ["UNSUPPORTED.txt"]
    said = shown.at("vda.files", "2", "UNSUPPORTED.txt").read_text()
    assert "swap space" in said
    assert "mount" not in said
    said = shown.at("vda.files", "3", "UNSUPPORTED.txt").read_text()
    assert "journal is damaged" in said
    assert "e2fsck" in said
    assert "noload" in said
    assert "journal is damaged" in shown.log()
    for wrong in ("4", "1.NOT-REPLAYED.txt", "1/none"):
        fails_with(errno.ENOENT, os.stat, shown.at("vda.files", wrong))


def test_a_damaged_journal_can_be_repaired_in_the_view(shown: Mounted, tmp_path: Path) -> None:
    """As UNSUPPORTED.txt says."""
    need("e2fsck")
    if not shown.lane:
        pytest.skip("writes go through the lane")
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "hello").write_text("hello")
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), without_journal(os.pread(file.fileno(), 1024, 1024)), 1024)
    shown.add(vda=disk)
    (tmp_path / "scratch").mkdir()
    shown.mount(scratch=str(tmp_path / "scratch"))
    assert os.listdir(shown.at("vda.files", "0")) == ["UNSUPPORTED.txt"]
    assert "journal is damaged" in shown.at("vda.files", "0", "UNSUPPORTED.txt").read_text()
    repaired = subprocess.run(["e2fsck", "-fy", shown.at("vda.rw")], capture_output=True, text=True, check=False)
    assert repaired.returncode in {0, 1}, repaired.stdout + repaired.stderr
    with mounted(shown.at("vda.rw"), tmp_path / "mnt", read_only=True) as root:
        assert (root / "hello").read_text() == "hello"
    assert shown.at("vda.raw").read_bytes() == disk.read_bytes()


def small_files(tmp_path: Path) -> Path:
    """Return an ext4 with 600 files in three folders, of many sizes."""
    disk, chance = make_ext4(tmp_path / "disk"), random.Random(3)
    with mounted(disk, tmp_path / "mnt") as root:
        for number in range(600):
            folder = root / str(number % 3)
            folder.mkdir(exist_ok=True)
            (folder / f"{chance.randrange(10**9)}").write_bytes(
                chance.randbytes(chance.choice((0, 1, 700, 5000, 40_000)))
            )
    return disk


def digests(root: Path, order: Callable[[list[str]], list[str]]) -> dict[str, str]:
    found = {}
    for folder in sorted(os.listdir(root)):
        if folder != "lost+found":
            for name in order(os.listdir(root / folder)):
                found[f"{folder}/{name}"] = hashlib.sha256((root / folder / name).read_bytes()).hexdigest()
    return found


def test_small_files_read_in_any_order_at_once(shown: Mounted, tmp_path: Path) -> None:
    disk = small_files(tmp_path)
    with mounted(disk, tmp_path / "mnt", read_only=True) as root:
        expected = digests(root, list)
    shown.add(vda=disk)
    shown.mount()
    files, chance = shown.at("vda.files", "0"), random.Random(4)
    orders: list[Callable[[list[str]], list[str]]] = [
        list,
        sorted,
        lambda names: sorted(names, reverse=True),
        lambda names: chance.sample(names, len(names)),
    ]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda order: digests(files, order), [*orders, list, sorted]):
            assert found == expected
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert digests(files, sorted) == expected


@pytest.mark.timeout(0 if LONG else 120)
def test_small_files_opened_and_read_by_many_processes(shown: Mounted, tmp_path: Path) -> None:
    """The kernel is given contents, for which it waits for READs, while others READ: nobody waits for ever."""
    disk = small_files(tmp_path)
    with mounted(disk, tmp_path / "mnt", read_only=True) as root:
        contents = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(contents) > 100
    (tmp_path / "expected").write_bytes(pickle.dumps(contents))
    shown.add(vda=disk)
    shown.mount()
    seconds = "600" if LONG else "4"
    command = [sys.executable, Path(__file__).with_name("small_reader.py"), shown.at("vda.files", "0")]
    readers = [
        subprocess.Popen([*command, tmp_path / "expected", str(seed), seconds], stderr=subprocess.PIPE)
        for seed in range(8)
    ]
    try:
        for reader in readers:
            _, said = reader.communicate(timeout=float(seconds) + 30)
            assert (reader.returncode, said.decode()) == (0, "")
    finally:
        for reader in readers:
            reader.kill()


def test_a_listing_of_which_the_kernel_loses_a_part(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk")
    names = {f"{number:0150}" for number in range(2000)}
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "folder").mkdir()
        for name in names:
            (root / "folder" / name).touch()
    shown.add(vda=disk)
    shown.mount()
    folder = shown.at("vda.files", "0", "folder")
    for _ in range(2):
        assert set(os.listdir(folder)) == names
    with os.scandir(folder) as entries:  # it takes some hundreds at a time
        found = [next(entries).name]
        Path("/proc/sys/vm/drop_caches").write_text("1")
        found += [entry.name for entry in entries]
    assert sorted(found) == sorted(names)


def test_a_folder_in_which_an_inode_is_damaged(shown: Mounted, tmp_path: Path) -> None:
    disk = small_files(tmp_path)
    with mounted(disk, tmp_path / "mnt", read_only=True) as root:
        names = os.listdir(root / "0")
        inode, expected = (root / "0" / names[7]).stat().st_ino, digests(root, list)
    damage_inode(disk, inode, 4 * KiB if disk.stat().st_size >= 512 * MiB else KiB)
    shown.add(vda=disk)
    shown.mount()
    folder = shown.at("vda.files", "0", "0")
    assert sorted(os.listdir(folder)) == sorted(names)
    for call in (os.stat, os.open):
        fails_with(errno.EIO, call, folder / names[7], *([os.O_RDONLY] if call is os.open else []))
    assert f"inode {inode} is damaged" in shown.log()
    for name in set(names) - {names[7]}:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected[f"0/{name}"]
    done = subprocess.run(
        [*BACKUPFS, "-r", shown.repository, "ls", f"web01/{shown.point}/vda:0/0"], capture_output=True, check=False
    )
    assert done.returncode == 50
    assert len(done.stdout.splitlines()) == len(names)
    assert b"1 of 200 names" in done.stderr
    done = subprocess.run(
        [*BACKUPFS, "-r", shown.repository, "cp", f"web01/{shown.point}/vda:0/0", tmp_path / "copy"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 50
    assert names[7].encode() in done.stderr
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(set(names) - {names[7]})


def label(path: Path, number: int) -> None:
    os.setxattr(path, "security.selinux", b"system_u:object_r:%s_t:s0\0" % (b"etc", b"lib", b"usr")[number % 3])


def labelled(root: Path, largest: int) -> None:
    """Make a folder with 1,200 files of 0 to 3 kB with labels, ACLs, large attributes, several of these, or none."""
    chance, folder = random.Random(5), root / "folder"
    folder.mkdir()
    for number in range(1200):
        path = folder / f"{chance.randrange(10**9)}"
        path.write_bytes(chance.randbytes(chance.choice((0, 700, 3000))))
        if number % 7 != 3:
            label(path, number)
        if number % 5 == 1:
            os.setxattr(path, "system.posix_acl_access", ACL)
        if number % 11 == 1:
            os.setxattr(path, "user.some", b"%d" % number)
            os.setxattr(path, "user.empty", b"")
        if number % 50 == 2:
            os.setxattr(path, "user.large", chance.randbytes(largest))
    (folder / "link").symlink_to("nowhere")
    os.setxattr(folder / "link", "security.selinux", b"a link's", follow_symlinks=False)
    (folder / "inside").mkdir()
    os.setxattr(folder / "inside", "system.posix_acl_default", ACL)
    for path in (folder, root):
        label(path, 1)


def room_for(path: Path, name: str | None, size: int) -> tuple[int, int]:
    """Ask for an attribute, or for the names, with room for `size` bytes; return what the call returns, and errno."""
    libc, room = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(max(size, 1))
    ctypes.set_errno(0)
    if name is None:
        found = libc.llistxattr(os.fsencode(path), room, size)
    else:
        found = libc.lgetxattr(os.fsencode(path), name.encode(), room, size)
    return found, ctypes.get_errno()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_extended_attributes_of_many_files(shown: Mounted, tmp_path: Path, kind: str) -> None:
    need(f"mkfs.{kind}")
    disk = make_ext4(tmp_path / "disk", "-b", "4096") if kind == "ext4" else make_xfs(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        labelled(root, 3000 if kind == "ext4" else 60_000)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    with mounted(disk, tmp_path / "mnt", read_only=True) as root:
        listed = run("ls", "-lZ", root / "folder")
        assert run("ls", "-lZ", files / "folder") == listed
        assert differences(files, root) == []
        names = sorted(os.listdir(root / "folder"))
        assert {name: xattrs(os.fsencode(files / "folder" / name)) for name in names} == {
            name: xattrs(os.fsencode(root / "folder" / name)) for name in names
        }
        for name in names[:60]:
            for asked in (None, "security.selinux", "user.empty", "user.large", "system.posix_acl_access", "user.none"):
                for size in (0, 1, 8, 27, 28, 200, 65536):
                    ours = room_for(files / "folder" / name, asked, size)
                    assert ours == room_for(root / "folder" / name, asked, size), (name, asked, size)
        chance = random.Random(6)
        orders = [names, names[::-1], chance.sample(names, len(names)), os.listdir(root / "folder")] * 2
        expected = {name: xattrs(os.fsencode(root / "folder" / name)) for name in names}
    shown_again = shown.at("vda.files", "0", "folder")
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda o: {name: xattrs(os.fsencode(shown_again / name)) for name in o}, orders):
            assert found == expected


def test_no_labels_in_a_file_system_without(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        for name in ("bare", "other"):
            (root / name).touch()
        os.setxattr(root / "other", "user.other", b"1")
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    for name in ("bare", "other", ""):
        assert room_for(files / name, "security.selinux", 255) == (-1, errno.EOPNOTSUPP), name
        assert room_for(files / name, "security.capability", 255) == (-1, errno.ENODATA), name
    assert os.getxattr(files / "other", "user.other") == b"1"


def test_damaged_attributes_are_those_of_one_file(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk", "-b", "4096")
    with mounted(disk, tmp_path / "mnt") as root:
        labelled(root, 3000)
        names = os.listdir(root / "folder")
        expected = {name: xattrs(os.fsencode(root / "folder" / name)) for name in names}
        hit = [name for name in names if "user.large" in expected[name]][7]
        inode, content = (root / "folder" / hit).stat().st_ino, (root / "folder" / hit).read_bytes()
    with contextlib.closing(FileImage(disk)) as image:
        block = Inodes(image).get(inode).attributes
    assert block
    with disk.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, block * 4096 + 2000)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), block * 4096 + 2000)
    shown.add(vda=disk)
    shown.mount()
    folder = shown.at("vda.files", "0", "folder")
    for _ in range(2):
        for name in names:
            if name != hit:
                assert xattrs(os.fsencode(folder / name)) == expected[name]
        fails_with(errno.EIO, os.listxattr, folder / hit)
        for asked in ("security.selinux", "user.large", "user.none"):
            fails_with(errno.EIO, os.getxattr, folder / hit, asked)
        assert (folder / hit).read_bytes() == content
        assert (folder / hit).stat().st_ino % 2**32 == inode
    assert f"inode {inode}: its block of extended attributes is damaged" in shown.log()


def test_a_parser_that_dies_or_hangs(shown: Mounted, tmp_path: Path) -> None:
    disk = small_files(tmp_path)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    (child,) = (shown.at("vda.files", "0", "0").exists() and shown.parsers()) or ()
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: child not in shown.parsers())
    with contextlib.suppress(OSError):  # EIO: the question that found it dead
        os.listdir(files / "0")
    assert len(os.listdir(files / "0")) == 200
    (child,) = shown.parsers()
    freeze(child)
    reader = subprocess.Popen(["ls", "-l", files / "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with shown.at("vda.raw").open("rb") as raw:  # nobody else notices
        assert raw.read() == disk.read_bytes()
    assert "Input/output error" in reader.communicate(timeout=30)[1]
    assert "took longer" in shown.log()
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert len(os.listdir(files / "1")) == 200


def test_nothing_can_be_changed(shown: Mounted, tmp_path: Path) -> None:
    shown.add(vda=small_files(tmp_path))
    (tmp_path / "scratch").mkdir()
    shown.mount(scratch=str(tmp_path / "scratch"))
    files = shown.at("vda.files", "0", "0")
    one = files / os.listdir(files)[0]
    fails_with(errno.EROFS, os.open, one, os.O_RDWR)
    fails_with(errno.EROFS, os.truncate, one, 0)
    fails_with(errno.EROFS, os.unlink, one)
    fails_with(errno.EROFS, os.mkdir, files / "new")
    fails_with(errno.EROFS, os.chmod, one, 0o777)
    fails_with(errno.EROFS, os.setxattr, one, "user.new", b"1")


def test_everybody_who_is_let_in_reads_and_nobody_else_writes(shown: Mounted, tmp_path: Path) -> None:
    let_in(tmp_path)
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "secret").write_text("secret")
        (root / "secret").chmod(0o600)
        (root / "setuid").write_text("")
        (root / "setuid").chmod(0o4755)
    shown.add(vda=disk)
    (tmp_path / "scratch").mkdir()
    shown.mount(allow_other=True, scratch=str(tmp_path / "scratch"))
    secret, writable = shown.at("vda.files", "0", "secret"), shown.at("vda.rw")
    assert run(*AS_NOBODY, "cat", secret) == "secret"
    for how in ("if=/dev/null", "of=/dev/null"):
        other = f"{'of' if how.startswith('if') else 'if'}={writable}"
        done = subprocess.run(
            [*AS_NOBODY, "dd", how, other, "count=1", "conv=notrunc"], capture_output=True, text=True, check=False
        )
        assert "Permission denied" in done.stderr
    fails_with(errno.EACCES, os.execv, shown.at("vda.files", "0", "setuid"), ["setuid"])
    assert os.statvfs(secret).f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV


def test_latest_moves_and_folders_go(shown: Mounted, tmp_path: Path) -> None:
    """`latest` is kept by the kernel, and still another one when there is a newer point."""
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "file").write_text("first")
    shown.add(vda=disk)
    shown.mount()
    latest = Path(shown.path, "web01", "latest")
    assert (latest / "vda.files/0/file").read_text() == "first"
    first = shown.point
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "file").write_text("second")
    shown.add(vda=disk)
    wait_until(lambda: os.readlink(latest) == shown.point)
    assert (latest / "vda.files/0/file").read_text() == "second"
    assert Path(shown.path, "web01", first, "vda.files/0/file").read_text() == "first"
    assert (latest / "vda.files/0/file").stat().st_size == 6
