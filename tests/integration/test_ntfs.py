"""NTFS as backupfs reads it, and as ntfs-3g does: the same."""

import os
import random
import struct
from contextlib import closing
from pathlib import Path

import pytest
import pytsk3
from servers import need, run
from test_guest_files import LONG, SIZE, differences, fill, look, mounted, open_image

from backupfs.errors import GuestError, NotFound
from backupfs.services.guest_copy import Copier, Report
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.timeout(300 if not LONG else 3600)


def make_ntfs(path: Path) -> Path:
    need("mkfs.ntfs", "ntfs-3g")
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ntfs", "-q", "-F", "-f", path)
    return path


def place(path: Path, number: int, offset: int) -> int:
    """Return where a byte of a file lies, by the number of its record in the master file table."""
    volume = pytsk3.FS_Info(pytsk3.Img_Info(str(path)))
    block = int(volume.info.block_size)
    kind = int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_DATA)
    for part in next(a for a in volume.open_meta(number) if int(a.info.type) == kind and not a.info.name):
        within = offset - int(part.offset) * block
        if 0 <= within < int(part.len) * block:
            return int(part.addr) * block + within
    raise AssertionError("it is not there")


def test_ntfs(tmp_path: Path) -> None:
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        fill(root, posix=False)
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        text = b"some text again and again " * 40_000
        (root / "compressed/file").write_bytes(text + random.Random(2).randbytes(100_000) + text)
        os.setxattr(root / "a/tiny", "user.stream", b"alternate")
        (root / "a/hard").hardlink_to(root / "a/tiny")
    with (
        mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root,
        closing(open_image(path)) as system,
    ):
        # Sizes of folders, and how much of a compressed or tiny file is stored, are told otherwise.
        found = [line for line in differences(system, root, "allocated") if ": size " not in line]
        assert found == []
        assert system.xattrs(look(system, "a/tiny")) == {b"user.stream": b"alternate"}
        holes = [e for e in system.extents(look(system, "a/sparse"), 0, 9 * MiB) if e.flag]
        assert sum(e.length for e in holes) >= 8 * MiB


def test_a_large_folder_of_ntfs(tmp_path: Path) -> None:
    path = make_ntfs(tmp_path / "disk")
    names = [f"{number} {'n' * (number % 200)}" for number in range(1500)]
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        (root / "folder").mkdir()
        for name in names:
            (root / "folder" / name).touch()
        for name in names[::3]:
            (root / "folder" / name).unlink()
        for number in range(1, 1500, 30):
            (root / "folder" / names[number]).rename(root / f"folder/renamed {number}")
        with (root / "one").open("wb") as one, (root / "other").open("wb") as other:  # in many pieces
            for number in range(400):
                for file in (one, other):
                    file.write(bytes([number % 251]) * 4096)
                    file.flush()
                    os.fsync(file.fileno())
        for number in range(30):
            os.setxattr(root / "one", f"user.stream{number}", b"x" * 3000)
    with (
        mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root,
        closing(open_image(path)) as system,
    ):
        assert [line for line in differences(system, root, "allocated") if ": size " not in line] == []


def test_names_that_are_no_whole_utf_16(tmp_path: Path) -> None:
    """Windows lets any program make them. The Sleuth Kit cuts them off there, and three of them are one then."""
    path, names = make_ntfs(tmp_path / "disk"), (b"a", b"a\xed\xa0\x80", b"a\xed\xa0\x81", b"\xed\xb0\x80", b"b^")
    streams = [b"user." + name for name in names]
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        odd = root / os.fsdecode(b"folder\xed\xa0\x80c")
        for folder in (root, odd, root / "many"):
            folder.mkdir(exist_ok=True)
            for name in names:
                Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"content of " + name)
            for stream in streams:
                os.setxattr(folder / "b^", stream, b"content of " + stream)
        os.setxattr(odd, streams[1], b"stream of a folder")
        for number in range(1000):
            (root / f"many/{number}").touch()
    with (
        mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root,
        closing(open_image(path)) as system,
    ):
        assert [line for line in differences(system, root, "allocated") if ": size " not in line] == []
        assert set(system.xattrs(look(system, "many/b^"))) == set(streams)
        assert system.stat(look(system, "many/b^")).size == len(b"content of b^")


def test_streams_that_are_no_attributes_are_named(tmp_path: Path) -> None:
    """What is too large for an extended attribute, or has too long a name; ls and the mount have the others."""
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        (root / "folder").mkdir()
        (root / "folder/file").write_bytes(b"content")
        for at in (root / "folder", root / "folder/file"):
            os.setxattr(at, "user.small", b"x" * 64 * KiB)
            os.setxattr(at, "user." + "ä" * 100, b"long name")
    add_stream(path, tmp_path, "folder", "large", b"large" * 20_000)
    add_stream(path, tmp_path, "folder/file", "large", b"large" * 20_000)
    add_stream(path, tmp_path, "folder/file", "ä" * 130, b"longer name")
    (tmp_path / "out").mkdir()
    report = Report()
    with closing(open_image(path)) as system:
        assert set(system.xattrs(look(system, "folder/file"))) == {b"user.small", b"user." + "ä".encode() * 100}
        with Copier(str(tmp_path / "out"), force=False, report=report, progress=print) as copier:
            copier.copy(system, "1", system.stat(system.root), "")
    assert sorted(report.streams) == [b"folder/file:large", f"folder/file:{'ä' * 130}".encode(), b"folder:large"]
    assert report.failed == []
    assert os.listxattr(tmp_path / "out/folder/file")


def add_stream(path: Path, tmp_path: Path, file: str, name: str, content: bytes) -> None:
    """Write a stream as Windows does: ntfs-3g shows it as FILE:NAME then."""
    folder = tmp_path / "windows"
    folder.mkdir(exist_ok=True)
    run("ntfs-3g", "-o", "streams_interface=windows", path, folder)
    try:
        Path(f"{folder}/{file}:{name}").write_bytes(content)
    finally:
        run("umount", folder)


def test_streams_that_can_not_be_told_apart(tmp_path: Path) -> None:
    """Of a file with a list of attributes The Sleuth Kit alone knows which is where: no wrong name, but an error."""
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        for file, last in (("good", b"user.last"), ("bad", b"user.last\xed\xa0\x80")):
            (root / file).write_bytes(b"content of " + file.encode())
            for number in range(30):
                os.setxattr(root / file, f"user.stream{number}", b"x" * 100)
            os.setxattr(root / file, last, b"last")
    with closing(open_image(path)) as system:
        assert len(system.xattrs(look(system, "good"))) == 31
        assert system.read(look(system, "good"), 0, 100) == b"content of good"
        (bad,) = (entry.stat for entry in system.list(system.root) if entry.name == b"bad")
        assert not bad.mode
        for call in (system.stat, system.xattrs):
            with pytest.raises(GuestError, match="the names of its streams can't be read"):
                call(bad.inode)


def test_a_name_that_leads_to_what_was_removed(tmp_path: Path) -> None:
    """Its record is another file's now, as after a crash: it does not have that one's content."""
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        (root / "file").write_bytes(b"content")
        (root / "other").write_bytes(b"other")
    with closing(open_image(path)) as system:
        inode = look(system, "file")
    with path.open("r+b") as file:
        file.seek(place(path, 0, inode * 1024) + 16)  # how often the record was used
        file.write(struct.pack("<H", 7))
    with closing(open_image(path)) as system:
        found = {entry.name: entry.stat for entry in system.list(system.root)}
        assert (found[b"file"].mode, found[b"other"].mode) == (0, 0o100777)
        with pytest.raises(GuestError, match=f"inode {inode} was removed"):
            system.stat(found[b"file"].inode)


def test_a_name_whose_record_is_damaged(tmp_path: Path) -> None:
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        fill(root, posix=False)
    with closing(open_image(path)) as system:
        folder, inode = look(system, "many"), look(system, "many/file number 7")
        names = {entry.name for entry in system.list(folder)}
    with path.open("r+b") as file:
        file.seek(place(path, 0, inode * 1024))
        assert file.read(4) == b"FILE"
        file.write(bytes(1020))
    with closing(open_image(path)) as system:
        found = {entry.name: entry.stat.mode for entry in system.list(folder)}
        assert set(found) == names
        assert [name for name, mode in found.items() if not mode] == [b"file number 7"]
        with pytest.raises((GuestError, NotFound)):
            system.stat(inode)
    with mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root:
        assert set(os.listdir(os.fsencode(root / "many"))) == names


def test_files_whose_content_is_elsewhere(tmp_path: Path) -> None:
    """What OneDrive has on demand only, or WOF compressed, would read as zeroes."""
    path, content = make_ntfs(tmp_path / "disk"), random.Random(4).randbytes(100_000)

    def make(name: str, tag: int, *, whole: bool) -> None:
        with (root / name).open("wb") as file:
            file.truncate(MiB)
            if whole:
                file.write(content)
                file.truncate(len(content))
        os.setxattr(root / name, "system.ntfs_reparse_data", struct.pack("<IHH", tag, 16, 0) + bytes(16))

    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        make("placeholder", 0x9000701A, whole=False)
        make("compressed", 0x80000017, whole=True)
        make("downloaded", 0x9000701A, whole=True)
    with closing(open_image(path)) as system:
        for name, words in (("placeholder", "is kept elsewhere"), ("compressed", "compressed by Windows")):
            inode = look(system, name)
            for call in (lambda inode=inode: system.read(inode, 0, 10), lambda inode=inode: system.runs(inode)):
                with pytest.raises(GuestError, match=words):
                    call()
        assert system.read(look(system, "downloaded"), 0, MiB) == content


def test_times_that_are_far_away(tmp_path: Path) -> None:
    """Before 1970 and after 2106, where The Sleuth Kit has none."""
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        for second in (-11_644_473_599, -620_434_677, -1, 0, 1, 1_700_000_000, 4_323_283_200, 32_503_680_000):
            (root / str(second)).touch()
            os.utime(root / str(second), ns=(second * 10**9, second * 10**9))
        os.utime(root / "1", ns=(0, 1_000_000_700))
    with (
        mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root,
        closing(open_image(path)) as system,
    ):
        assert [line for line in differences(system, root, "allocated") if ": size " not in line] == []
        assert system.stat(look(system, "-620434677")).mtime_ns == -620_434_677 * 10**9


def test_a_link_that_was_made_in_wsl(tmp_path: Path) -> None:
    path, target = make_ntfs(tmp_path / "disk"), "target/öf a\\link".encode()
    with mounted(path, tmp_path / "mnt", ntfs=True) as root:
        (root / "link").touch()
        content = struct.pack("<IHHI", 0xA000001D, 4 + len(target), 0, 2) + target
        os.setxattr(root / "link", "system.ntfs_reparse_data", content)
    with (
        mounted(path, tmp_path / "mnt", read_only=True, ntfs=True) as root,
        closing(open_image(path)) as system,
    ):
        assert system.readlink(look(system, "link")) == os.readlink(os.fsencode(root / "link")) == target
        assert [line for line in differences(system, root, "allocated") if ": size " not in line] == []


def test_an_ntfs_that_was_in_use(tmp_path: Path) -> None:
    """Its log is not replayed, which is said: a restart page as Windows writes it, with and without a client in use."""
    path = make_ntfs(tmp_path / "disk")
    at = place(path, 2, 0)

    def notes(*pages: tuple[int, int, int]) -> tuple[str, ...]:
        """Say what there is to be known with pages of newest LSN, client in use, flags."""
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\xff" * 8192)
            for number, (newest, in_use, flags) in enumerate(pages):
                head = struct.pack("<4sHHQIIH", b"RSTR", 0x1E, 9, 0, 4096, 4096, 0x30)
                file.seek(at + number * 4096)
                file.write(head.ljust(0x30, b"\0") + struct.pack("<QHHHH", newest, 1, 0, in_use, flags))
        with closing(open_image(path)) as system:
            return system.notes

    assert notes() == ()
    used, not_used, clean = (1, 0, 0), (2, 0xFFFF, 0), (3, 0, 2)
    assert notes(not_used, used) == ()
    assert notes(used, clean) == ()
    assert "($LogFile) is not replayed" in notes(used)[0]
    assert "($LogFile) is not replayed" in notes(not_used, (9, 0, 0))[0]


def test_a_file_longer_than_its_volume(tmp_path: Path) -> None:
    """The Sleuth Kit can't read the places of such a file, and lists it as an empty one."""
    path = make_ntfs(tmp_path / "disk")
    with mounted(path, tmp_path / "mnt", ntfs=True) as root, (root / "long").open("wb") as file:
        file.truncate(2**31)
        file.seek(2**31)
        file.write(b"end")
    with closing(open_image(path)) as system:
        (found,) = (entry.stat for entry in system.list(system.root) if entry.name == b"long")
        assert not found.mode
        with pytest.raises(GuestError, match="Run length"):
            system.stat(found.inode)
