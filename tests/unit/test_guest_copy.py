"""Copying files that a guest made, into a folder of the host: whatever it made of them."""

import errno
import os
import pickle
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from backupfs.errors import GuestError, NotFound, TargetError
from backupfs.extents import Extent
from backupfs.filesystem import Entry, Stat, printable
from backupfs.services import guest_path
from backupfs.services.copy_parts import hold
from backupfs.services.guest_copy import Copier, Report
from backupfs.services.guest_path import look_up, walk
from backupfs.units import KiB, MiB

TIME = 1_700_000_000_123_456_789


@dataclass
class FakeFiles:
    """A FileSystem of what is put into it; 1 is its root."""

    kind: str = "fake"
    root: int = 1
    notes: tuple[str, ...] = ()
    stats: dict[int, Stat] = field(default_factory=dict)
    inside: dict[int, list[tuple[bytes, int]]] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    reads: int = 0
    asked: list[list[int]] = field(default_factory=list)  # for contents

    def __post_init__(self) -> None:
        self.put(1, stat.S_IFDIR | 0o755)

    def put(self, inode: int, mode: int, content: bytes = b"", *, nlink: int = 1, uid: int = 0) -> int:
        self.stats[inode] = Stat(inode, mode, nlink, uid, 0, len(content), len(content), TIME, TIME, TIME)
        self.content[inode] = content
        if stat.S_ISDIR(mode):
            self.inside.setdefault(inode, [])
        return inode

    def add(self, folder: int, name: bytes, inode: int, mode: int = stat.S_IFREG | 0o644, content: bytes = b"") -> int:
        self.inside[folder].append((name, inode if inode in self.stats else self.put(inode, mode, content)))
        return inode

    def stat(self, inode: int) -> Stat:
        if inode not in self.stats:
            raise NotFound(f"there is no inode {inode}")
        return self.stats[inode]

    def list(self, inode: int) -> list[Entry]:
        if inode in self.bad:
            raise GuestError("damaged")
        return [Entry(name, self.stats[number]) for name, number in self.inside[inode]]

    def read(self, inode: int, offset: int, length: int) -> bytes:
        self.reads += 1
        if inode in self.bad:
            raise GuestError("damaged")
        return self.content[inode][offset : offset + length]

    def contents(self, inodes: Sequence[int], largest: int) -> Sequence[bytes | None]:
        self.asked.append(list(inodes))
        return [None if n in self.bad or len(self.content[n]) > largest else self.content[n] for n in inodes]

    def extents(self, inode: int, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, self.content[inode] == bytes(len(self.content[inode])))

    def readlink(self, inode: int) -> bytes:
        return self.content[inode]

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        if self.stats[inode].uid == 5:
            return {b"trusted.label": b"x"}
        return {b"security.capability": b"\1\0\0\2" + bytes(16)} if self.stats[inode].uid == 4 else {}

    def xattrs_of(self, inodes: Sequence[int]) -> Sequence[Mapping[bytes, bytes] | None]:
        return [self.xattrs(inode) for inode in inodes]

    def left_out(self, inode: int) -> Sequence[bytes]:
        return [b"large\xff"] if self.stats[inode].uid == 4 else []

    def close(self) -> None:
        pass


def copied(
    system: FakeFiles, target: Path, *, force: bool = False, progress: Callable[[Report], None] = lambda _: None
) -> Report:
    report = Report()
    with Copier(str(target), force=force, report=report, progress=progress) as copier:
        copier.copy(system, "volume", system.stat(1), "")
    return report


NOBODY = 2**32 - 1  # in an ACL's entries that are of nobody by name
LINK, FOLDER = stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    """A guest has a link, and then a folder or file under the same name, or below it."""
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (outside / "precious").write_text("precious")
    for name, inode in ((b"way", 10), (b"file", 11)):
        there = outside if name == b"way" else outside / "precious"
        first = FakeFiles()
        first.add(1, name, inode, LINK, os.fsencode(there))
        assert copied(first, target).failed == []
    second = FakeFiles()
    second.add(1, b"way", 20, FOLDER)
    second.add(20, b"precious", 21, content=b"evil")
    second.add(1, b"file", 22, content=b"evil")
    report = copied(second, target)
    assert [path for path, _ in report.failed] == [b"way", b"file"]
    report = copied(second, target, force=True)
    assert [path for path, _ in report.failed] == [b"way"], "a link is replaced by a file, not by a folder"
    assert (target / "file").read_bytes() == b"evil"
    assert not (target / "file").is_symlink()
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("precious", "precious")]


def test_folders_inside_of_themselves_end(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"a", 2, FOLDER)
    system.add(2, b"b", 3, FOLDER)
    system.add(3, b"up", 2)
    system.add(3, b"root", 1)
    report = copied(system, tmp_path)
    assert sorted(path for path, _ in report.failed) == [b"a/b/root", b"a/b/up"]
    said: list[bytes] = []
    found = [path for path, _ in walk(system, system.stat(1), lambda path, _: said.append(path))]
    assert found == [b"/a", b"/a/b", b"/a/b/up", b"/a/b/root"]
    assert said == [b"/a/b/up", b"/a/b/root"]


def test_too_deep_folders_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backupfs.services.guest_copy.DEEPEST", 5)
    monkeypatch.setattr(guest_path, "DEEPEST", 5)
    system = FakeFiles()
    for inode in range(1, 20):
        system.add(inode, b"d", inode + 1, FOLDER)
    assert len(copied(system, tmp_path).failed) == 1
    said: list[bytes] = []
    assert len(list(walk(system, system.stat(1), lambda path, _: said.append(path)))) == 5
    assert said == [b"/d/d/d/d/d"], "that there is more is not kept secret"


def test_deep_folders(tmp_path: Path) -> None:
    system = FakeFiles()
    for inode in range(1, 480):
        system.add(inode, b"d", inode + 1, FOLDER)
    system.add(480, b"file", 1000, content=b"deep")
    assert copied(system, tmp_path).failed == []
    assert tmp_path.joinpath(*["d"] * 479, "file").read_bytes() == b"deep"


def test_a_folder_that_can_not_be_read_hides_no_other() -> None:
    system = FakeFiles()
    for inode, name in ((2, b"before"), (3, b"damaged"), (4, b"after")):
        system.add(1, name, inode, FOLDER)
        system.add(inode, b"file", 10 + inode)
    system.bad.add(3)
    said: list[bytes] = []
    found = {path for path, _ in walk(system, system.stat(1), lambda path, _: said.append(path))}
    assert found >= {b"/before/file", b"/after/file"}
    assert said == [b"/damaged"]


def test_a_file_in_many_pieces_is_read_in_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies near each other is read at once, and holes stay holes."""
    pieces = [(number * 8 * KiB, KiB) for number in range(3000)]  # 24 MiB
    pieces += [(40 * MiB, 5 * MiB // 2), (50 * MiB, 100)]
    content = bytearray(60 * MiB)
    for offset, length in pieces:
        content[offset : offset + length] = bytes([1 + offset % 251]) * length

    def extents(_: FakeFiles, inode: int, offset: int, length: int) -> Iterator[Extent]:
        position = 0
        for begin, size in [*pieces, (length, 0)]:
            yield Extent(position, begin - position, True)
            yield Extent(begin, size, False)
            position = begin + size

    monkeypatch.setattr(FakeFiles, "extents", extents)
    system = FakeFiles()
    system.add(1, b"file", 2, content=bytes(content))
    report = copied(system, tmp_path)
    assert (report.failed, report.bytes) == ([], sum(length for _, length in pieces))
    assert (tmp_path / "file").read_bytes() == content
    assert system.reads < 40
    with (tmp_path / "file").open("rb") as file:
        assert os.lseek(file.fileno(), 24 * MiB, os.SEEK_DATA) == 40 * MiB


def test_what_is_not_taken_over(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"setuid", 2, stat.S_IFREG | 0o6755, b"x")
    system.add(1, b"device", 3, stat.S_IFBLK | 0o666)
    system.add(1, b"socket", 4, stat.S_IFSOCK | 0o666)
    system.add(1, b"capable", 5, content=b"y")
    system.stats[5] = replace(system.stats[5], uid=4)
    report = copied(system, tmp_path)
    assert (report.files, report.left_out, report.harmless, report.failed) == (2, 2, 2, [])
    assert report.streams == [b"capable:large\xff"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capable", "setuid"]
    assert stat.S_IMODE((tmp_path / "setuid").stat().st_mode) == 0o755
    assert "security.capability" not in os.listxattr(tmp_path / "capable")


def test_links_keep_their_attributes(tmp_path: Path) -> None:
    """What a guest's SELinux gives them."""
    system = FakeFiles()
    system.put(2, LINK, b"x", uid=5)
    system.add(1, b"link", 2)
    report = copied(system, tmp_path)
    assert (report.files, report.failed) == (1, [])
    if os.geteuid() == 0:
        assert os.getxattr(tmp_path / "link", "trusted.label", follow_symlinks=False) == b"x"
        assert report.attributes == 0
    else:
        assert report.attributes == 1


def test_damage_costs_what_is_damaged(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"bad", 2, content=b"bad" * 1000)
    system.add(1, b"bad folder", 3, FOLDER)
    system.add(1, b"good", 4, content=b"good")
    system.bad = {2, 3}
    report = copied(system, tmp_path)
    assert [path for path, _ in report.failed] == [b"bad", b"bad folder"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad folder", "good"], "no part of a file is left"


def test_a_file_that_ends_early_is_not_taken_for_whole(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"short", 2, content=b"x" * 100)
    system.stats[2] = replace(system.stats[2], size=200)
    assert "ends at 100" in copied(system, tmp_path).failed[0][1]
    assert list(tmp_path.iterdir()) == []


def test_going_on(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"first", 2, content=b"1" * 10)
    system.add(1, b"second", 3, content=b"2" * (3 * MiB))
    system.add(1, b"another name", 3)
    system.stats[3] = replace(system.stats[3], nlink=2)
    system.bad = {3}
    assert len(copied(system, tmp_path).failed) == 2
    system.bad.clear()
    reads = system.reads
    report = copied(system, tmp_path)
    assert (report.files, report.there, report.failed) == (2, 1, [])
    assert system.reads == reads + 3, "three pieces of the second one, nothing of the first"
    assert (tmp_path / "second").samefile(tmp_path / "another name")
    assert (tmp_path / "second").stat().st_mtime_ns == TIME
    (tmp_path / "first").write_bytes(b"changed by somebody")
    report = copied(system, tmp_path)
    assert [path for path, _ in report.failed] == [b"first"]
    assert (tmp_path / "first").read_bytes() == b"changed by somebody"
    assert copied(system, tmp_path, force=True).failed == []
    assert (tmp_path / "first").read_bytes() == b"1" * 10


def test_an_interruption_leaves_no_part(tmp_path: Path) -> None:
    system = FakeFiles()
    system.add(1, b"file", 2, content=b"2" * (3 * MiB))

    def interrupt(report: Report) -> None:
        if report.bytes > MiB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copied(system, tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_target_ends_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeFiles()
    for number in range(5):
        system.add(1, b"%d" % number, 10 + number, content=b"x")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match=r"^0: No space left"):
        copied(system, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_copy_left_is_removed(tmp_path: Path) -> None:
    """But not what another one is making, nor a guest's file of such a name, nor what is named almost so."""
    system = FakeFiles()
    system.add(1, b"folder", 2, FOLDER)
    system.add(2, b"file", 3, content=b"x")
    system.add(2, b".backupfs-00000000000000aa.part", 4, content=b"guest's")
    left, held = ".backupfs-0123456789abcdef.part", ".backupfs-fedcba9876543210.part"
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path, tmp_path / "folder"):
        (folder / left).write_text("left")
        (folder / ".backupfs-0000000000000000.part").symlink_to("nowhere")
        (folder / ".backupfs-1.part").write_text("almost")
    making = os.open(tmp_path / "folder" / held, os.O_WRONLY | os.O_CREAT)
    hold(making)
    report = Report()
    with Copier(str(tmp_path), force=False, report=report, progress=lambda _: None) as copier:
        for volume in (1, 2):
            copier.copy(system, volume, system.stat(1), "")
    os.close(making)
    names = {p.name for p in (tmp_path / "folder").iterdir()}
    assert names == {"file", ".backupfs-00000000000000aa.part", held, ".backupfs-1.part"}
    assert {p.name for p in tmp_path.iterdir()} == {"folder", ".backupfs-1.part"}
    assert (report.files, report.there) == (2, 2)


def test_hard_links_of_several_sources(tmp_path: Path) -> None:
    """Files, symbolic links and FIFOs; not of another volume that has the same numbers."""
    system = FakeFiles()
    for number, (mode, content) in enumerate(
        ((stat.S_IFREG | 0o644, b"x"), (LINK, b"target"), (stat.S_IFIFO | 0o600, b""))
    ):
        for folder in (20, 30):
            system.put(folder, FOLDER)
            system.add(folder, b"%d" % number, 10 + number, mode, content)
        system.stats[10 + number] = replace(system.stats[10 + number], nlink=2)
    with Copier(str(tmp_path), force=False, report=Report(), progress=lambda _: None) as copier:
        for volume, folder, name in (("1", 20, "a"), ("1", 30, "b"), ("2", 30, "c")):
            copier.copy(system, volume, system.stat(folder), name)
    for number in range(3):
        numbers = [(tmp_path / name / str(number)).lstat().st_ino for name in "abc"]
        assert numbers[0] == numbers[1] != numbers[2]


def test_folders_that_their_owner_may_not_write_to(tmp_path: Path) -> None:
    """Copied by an ordinary user, twice: the modes are the guest's each time. What another owns is told apart."""
    system = FakeFiles()
    for inode, mode in ((2, 0), (3, 0o500), (4, 0o300)):
        system.add(1, b"%d" % inode, inode, stat.S_IFDIR | mode)
        system.add(inode, b"file", 10 + inode, stat.S_IFREG, content=b"x")
        system.add(inode, b"inner", 20 + inode, stat.S_IFDIR | mode)
    system.add(1, b"another's", 30, FOLDER)
    target = tmp_path / "target"
    target.mkdir()
    (target / "another's").mkdir(0o700)

    def copy_twice() -> list[tuple[int, int, list[tuple[str, str]]]]:
        # By a path from here on: folders above are root's alone.
        reports = [copied(system, Path()) for _ in range(2)]
        return [(report.files, report.there, report.failed) for report in reports]

    found = as_ordinary_user(target, copy_twice)
    denied = [(b"another's", "Permission denied")]
    assert found == [(3, 0, denied), (0, 3, denied)]
    modes = [stat.S_IMODE((target / name).stat().st_mode) for name in ("2", "3", "4", "2/inner", "3/inner")]
    assert modes == [0, 0o500, 0o300, 0, 0o500]


def as_ordinary_user(folder: Path, call: Callable[[], Any]) -> Any:
    """Return what a function returns in a process of somebody who is not root, and to whom `folder` belongs."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(folder, 65534, 65534)
    at = os.open(folder, os.O_RDONLY)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.fchdir(at)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(writing, pickle.dumps(call()))
        finally:
            os._exit(0)
    os.close(writing)
    os.close(at)
    with open(reading, "rb") as said:
        found = pickle.load(said)
    os.waitpid(child, 0)
    return found


def test_a_hard_link_to_what_was_replaced_is_none(tmp_path: Path) -> None:
    """The second source has a file of the name that the first one's has, and --force; the third is its other name."""
    system = FakeFiles()
    for folder, name, inode, content in ((20, b"x", 10, b"one"), (30, b"x", 11, b"another"), (40, b"y", 10, b"")):
        system.put(folder, FOLDER)
        system.add(folder, name, inode, content=content)
    system.stats[10] = replace(system.stats[10], nlink=2)
    with Copier(str(tmp_path), force=True, report=Report(), progress=lambda _: None) as copier:
        for folder in (20, 30, 40):
            copier.copy(system, "1", system.stat(folder), "")
    assert [(tmp_path / name).read_bytes() for name in "xy"] == [b"another", b"one"]


def test_acls_of_the_target_are_not_the_copys(tmp_path: Path) -> None:
    """A folder's default ACL goes to all that is made in it: the guest's modes would mean something else."""
    rows = ((1, 7, NOBODY), (2, 7, 1000), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("no ACLs here")
    system = FakeFiles()
    system.add(1, b"folder", 2, stat.S_IFDIR | 0o750)
    system.add(2, b"file", 3, stat.S_IFREG | 0o640, b"x")
    system.add(2, b"fifo", 4, stat.S_IFIFO | 0o640)
    report = copied(system, tmp_path)
    assert (report.failed, report.attributes) == ([], 0)
    for path, mode in (("folder", 0o750), ("folder/file", 0o640), ("folder/fifo", 0o640)):
        assert os.listxattr(tmp_path / path) == [], path
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode, path
    assert os.listxattr(tmp_path) == ["system.posix_acl_default"]


def test_a_file_named_as_a_part_is_a_file(tmp_path: Path) -> None:
    system = FakeFiles()
    name = b".backupfs-%d.part" % os.getpid()
    system.add(1, name, 2, content=b"guest's")
    system.add(1, b"other", 3, content=b"other")
    assert copied(system, tmp_path).failed == []
    assert {os.fsencode(p.name): p.read_bytes() for p in tmp_path.iterdir()} == {name: b"guest's", b"other": b"other"}


def test_paths_and_links_on_the_way() -> None:
    system = FakeFiles()
    system.add(1, b"usr", 2, FOLDER)
    system.add(2, b"lib", 3, FOLDER)
    system.add(3, b"file", 4, content=b"x")
    system.add(1, b"lib", 5, LINK, b"usr/lib")
    system.add(3, b"up", 6, LINK, b"../../../../lib")
    system.add(1, b"absolute", 7, LINK, b"/usr")
    system.add(1, b"circle", 8, LINK, b"circle/x")
    for path in (b"usr/lib/file", b"lib/file", b"/lib/up/file", b"absolute/lib/./file", b"usr/../lib/../lib/file"):
        assert look_up(system, path).stat.inode == 4, path
    assert look_up(system, b"lib").stat.inode == 5, "the last one is not followed"
    assert look_up(system, b"").stat.inode == 1
    with pytest.raises(GuestError, match="too many"):
        look_up(system, b"circle/y")
    for path in (b"nothing", b"usr/lib/file/below", b"lib/nothing"):
        with pytest.raises(NotFound):
            look_up(system, path)


def test_names_of_windows_in_any_case() -> None:
    """The one that is meant comes first; of several in other cases none is."""
    system = FakeFiles(kind="ntfs")
    system.add(1, b"Windows", 2, FOLDER)
    for inode, name in ((3, b"System.INI"), (4, "Größe".encode()), (5, b"a"), (6, b"A"), (7, b"bB"), (8, b"Bb")):
        system.add(2, name, inode)
    for path, inode in (("WINDOWS/system.ini", 3), ("windows/GRÖßE", 4), ("Windows/a", 5), ("windows/A", 6)):
        assert look_up(system, path.encode()).stat.inode == inode, path
    assert look_up(system, b"windows/SYSTEM.ini").name == b"System.INI"
    with pytest.raises(NotFound, match="in other cases: bB, Bb"):
        look_up(system, b"windows/BB")
    for path in ("windows/GRÖSSE", "windows/other"):
        with pytest.raises(NotFound):
            look_up(system, path.encode())
    system.kind = "ext4"
    with pytest.raises(NotFound):
        look_up(system, b"windows")


def test_names_do_nothing_to_a_terminal() -> None:
    assert printable(b"plain \xc3\xa4") == "plain ä"
    assert printable(b"\x1b[2J\n\xff\xe2\x80\xae") == "\\x1b[2J\\n\\xff\\u202e"


def test_small_files_are_asked_for_together(tmp_path: Path) -> None:
    system = FakeFiles()
    contents = {100 + number: b"content of %d" % number * (number + 1) for number in range(300)}
    contents[150], contents[160], contents[170] = b"", bytes(4096), b"x" * (200 * KiB)  # empty, a hole, large
    for inode, content in contents.items():
        system.add(1, b"%d" % inode, inode, content=content)
    system.bad.add(180)
    report = copied(system, tmp_path)
    assert report.failed == [(b"180", "damaged")]
    assert (report.files, report.bytes) == (299, sum(map(len, contents.values())) - len(contents[180]) - 4096)
    for inode, content in contents.items():
        if inode != 180:
            assert (tmp_path / str(inode)).read_bytes() == content
    assert (tmp_path / "160").stat().st_blocks == 0
    assert len(system.asked) < 30
    assert {inode for asked in system.asked for inode in asked} == set(contents) - {170}
    again = copied(system, tmp_path)
    assert (again.files, again.there) == (0, 299)
