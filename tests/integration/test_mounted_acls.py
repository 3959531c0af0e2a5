"""Guests' ACLs in a mount of root's: the kernel keeps them, and nothing gets unreadable by them."""

import contextlib
import errno
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BACKUPFS
from images import FileImage
from mounts import fails_with, needs_fuse, process_of
from servers import need, run
from test_guest_files import ACL, make_ext4, mounted
from test_mounted_files import Mounted
from test_xfs import make as make_xfs

from backupfs.guest.ext_inode import Inodes

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
pytestmark = [
    pytest.mark.timeout(120),
    needs_fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="only in a mount of root's"),
]


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mount = Mounted(tmp_path, lane=True)
    try:
        yield mount
    finally:
        mount.close()


def acl_for(user: int) -> bytes:
    return ACL.replace(struct.pack("<I", 1000), struct.pack("<I", user))


def on_disk(user: int) -> bytes:
    """Return the same ACL as ext4 writes it."""
    return struct.pack("<I2H2HI2H2H2H", 1, 1, 6, 2, 6, user, 4, 4, 16, 6, 32, 4)


def make_file(path: Path, acl: bytes | None) -> None:
    """Make a file of a user whose group may read it, so that the kernel looks for an ACL."""
    path.write_text(path.name)
    path.chmod(0o660)
    if acl is not None:
        os.setxattr(path, ACCESS, acl)
    os.chown(path, 1000, 1000)


def test_they_are_asked_for_once(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        make_file(root / "with", ACL)
        make_file(root / "without", None)
        (root / "folder").mkdir()
        os.setxattr(root / "folder", DEFAULT, ACL)
        listed = run("ls", "-lA", root)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    assert run("ls", "-lA", files) == listed
    assert os.getxattr(files / "with", ACCESS) == os.getxattr(files / "folder", DEFAULT) == ACL
    fails_with(errno.ENODATA, os.getxattr, files / "without", ACCESS)
    mine = process_of(shown.path)
    os.kill(mine, signal.SIGSTOP)
    try:
        command = ["getfattr", "--absolute-names", "-n", ACCESS, files / "with", files / "without"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    finally:
        os.kill(mine, signal.SIGCONT)
    assert said.stdout.count(f"{ACCESS}=") == 1
    assert "without" in said.stderr


DAMAGES = {
    "version": (0, 9),
    "unknown tag": (20, 64),
    "without a mask": (20, 4),
    "nobody's": (12, 0xFFFFFFFF),
    "cut off": (24, 2),
}


def test_a_damaged_one_does_not_make_the_file_unreadable(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk", "-O", "^metadata_csum")
    names = ["good", *DAMAGES]
    with mounted(disk, tmp_path / "mnt") as root:
        for number, name in enumerate(names):
            make_file(root / name, acl_for(5000 + number))
        os.setxattr(root, ACCESS, acl_for(4000))
        os.chown(root, 1000, 1000)
    content = disk.read_bytes()
    for name, (at, value) in {"": (20, 64), **DAMAGES}.items():
        acl = on_disk(5000 + names.index(name) if name else 4000)
        size = 4 if value > 0xFFFF else 2
        assert acl in content
        content = content.replace(acl, acl[:at] + value.to_bytes(size, "little") + acl[at + size :])
    disk.write_bytes(content)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    assert sorted(os.listdir(files)) == sorted([*names, "lost+found"])
    for _ in range(2):
        for name in names:
            assert (files / name).read_text() == name
        for path in (files, *(files / name for name in DAMAGES)):
            fails_with(errno.EACCES, os.getxattr, path, ACCESS)
        assert os.getxattr(files / "good", ACCESS) == acl_for(5000)
    log = shown.log()
    assert "an access control list is damaged" in log
    assert f"{ACCESS!r} is no ACL" in log.replace("b'", "'")


def test_damaged_attributes(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk", "-b", "4096")
    with mounted(disk, tmp_path / "mnt") as root:
        make_file(root / "file", ACL)
        os.setxattr(root / "file", "user.large", bytes(3000))
        inode = (root / "file").stat().st_ino
    with contextlib.closing(FileImage(disk)) as image:
        block = Inodes(image).get(inode).attributes
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"?", block * 4096 + 2000)
    shown.add(vda=disk)
    shown.mount()
    path = shown.at("vda.files", "0", "file")
    for _ in range(2):
        assert path.read_text() == "file"
        fails_with(errno.EACCES, os.getxattr, path, ACCESS)
        fails_with(errno.EIO, os.getxattr, path, "user.large")
    assert "extended attributes is damaged" in shown.log()


def test_one_for_which_the_kernel_has_no_room(shown: Mounted, tmp_path: Path) -> None:
    need("mkfs.xfs")
    entries = [
        (1, 6, 2**32 - 1),
        *((2, 6, user) for user in range(2000, 2600)),
        *((4, 4, 2**32 - 1), (16, 6, 2**32 - 1)),
    ]
    large = b"".join([struct.pack("<I", 2), *(struct.pack("<2HI", *e) for e in (*entries, (32, 4, 2**32 - 1)))])
    disk = make_xfs(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        make_file(root / "file", large)
        os.setxattr(root / "file", "user.other", b"1")
    shown.add(vda=disk)
    shown.mount()
    path = shown.at("vda.files", "0", "file")
    assert path.read_text() == "file"
    assert os.getxattr(path, "user.other") == b"1"
    fails_with(errno.EACCES, os.getxattr, path, ACCESS)
    run(*BACKUPFS, "-r", shown.repository, "cp", "web01/latest/vda:/file", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "file"


def test_a_root_without_all_permissions_reads_everything_too(shown: Mounted, tmp_path: Path) -> None:
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        make_file(root / "file", ACL)
        (root / "file").chmod(0o000)
    shown.add(vda=disk)
    less = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    path = shown.at("vda.files", "0", "file")
    run(*less, *BACKUPFS, "-r", shown.repository, "mount", shown.path)
    assert run(*less, "cat", path) == path.read_text() == "file"


def test_an_attribute_whose_inode_is_none(shown: Mounted, tmp_path: Path) -> None:
    """Damage in another attribute does not make a file or folder disappear when its ACL is asked for."""
    disk = make_ext4(tmp_path / "disk", "-O", "^metadata_csum")
    with mounted(disk, tmp_path / "mnt") as root:
        (root / "folder").mkdir()
        (root / "folder/inside").write_text("inside")
        (root / "file").write_text("file")
        for path in (root / "file", root / "folder"):
            path.chmod(0o770)
            os.setxattr(path, "user.large1", b"v" * 7)
            os.chown(path, 1000, 1000)
    content, entry, found = bytearray(disk.read_bytes()), b"\x06\x01", 0
    at = content.find(b"large1")
    while at >= 0:
        if content[at - 16 : at - 14] == entry:  # name_len, name_index; then value_offs, value_inum
            struct.pack_into("<I", content, at - 12, 0xFFFFFFF0)
            found += 1
        at = content.find(b"large1", at + 1)
    assert found
    disk.write_bytes(content)
    shown.add(vda=disk)
    shown.mount()
    files = shown.at("vda.files", "0")
    for _ in range(2):
        assert (files / "file").read_text() == "file"
        assert os.listdir(files / "folder") == ["inside"]
        assert (files / "folder/inside").read_text() == "inside"
        fails_with(errno.EACCES, os.getxattr, files / "file", ACCESS)
        fails_with(errno.EIO, os.getxattr, files / "file", "user.large1")


def test_what_belongs_to_nobody_that_can_be(shown: Mounted, tmp_path: Path) -> None:
    """To -1 not even root has all rights, so it is shown as the kernel shows users that there are none."""
    disk = make_ext4(tmp_path / "disk")
    with mounted(disk, tmp_path / "mnt") as root:
        for name in ("uid", "gid"):
            (root / name).mkdir()
            (root / name / "file").write_text(name)
            (root / name / "file").chmod(0o600)
            (root / name).chmod(0o700)
    for name in ("uid", "gid"):
        for path in (f"/{name}", f"/{name}/file"):
            run("debugfs", "-w", "-R", f"set_inode_field {path} {name} 4294967295", disk)
    shown.add(vda=disk)
    shown.mount()
    for name in ("uid", "gid"):
        folder = shown.at("vda.files", "0", name)
        assert os.listdir(folder) == ["file"]
        assert (folder / "file").read_text() == name
        assert getattr((folder / "file").stat(), f"st_{name}") == 65534
