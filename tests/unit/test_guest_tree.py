"""Guests' files in the tree, over folders of this host; no mount."""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from folder_files import FolderFiles, FolderVolume

from backupfs.errors import BackupfsError, NotFound
from backupfs.filesystem import Entry
from backupfs.fuse.catalogue import GuestFolder, GuestVolume, PointEntry
from backupfs.fuse.guest_volume import Unsound
from backupfs.fuse.nodes import ROOT_INODE, GuestFile
from backupfs.fuse.tree import Tree
from backupfs.guest import containers, detect
from backupfs.services.by_hand import how


class Catalogue:
    """One point with one disk."""

    def __init__(self, volumes: Mapping[str, GuestVolume]) -> None:
        self._volumes = volumes
        self.open = 0

    def vms(self) -> Sequence[str]:
        return ["web"]

    def points(self, vm: str) -> Mapping[str, int]:
        return {"p": 1}

    def point(self, vm: str, point: str) -> PointEntry:
        if (vm, point) != ("web", "p"):
            raise NotFound(point)
        return PointEntry(1, [], guests=[GuestFolder("vda.files", "1", self.volumes, partial(how, "vda.parts"))])

    @contextlib.contextmanager
    def volumes(self) -> Iterator[Mapping[str, GuestVolume]]:
        self.open += 1
        yield self._volumes
        self.open -= 1

    def usage(self) -> os.statvfs_result:
        return os.statvfs("/")


@pytest.fixture
def files(tmp_path: Path) -> FolderFiles:
    root = tmp_path / "guest"
    (root / "etc/deep").mkdir(parents=True)
    (root / "etc/hosts").write_bytes(b"127.0.0.1")
    os.link(root / "etc/hosts", root / "etc/deep/again")
    os.symlink("../etc/hosts", root / "link")
    (root / os.fsdecode(b"odd\xff\n")).write_bytes(b"odd")
    return FolderFiles(root, "the journal was not replayed")


def walk(tree: Tree, *names: bytes) -> int:
    inode = ROOT_INODE
    for name in (b"web", b"p", b"vda.files", *names):
        inode = tree.lookup(inode, name).inode
    return inode


def names(tree: Tree, *path: bytes) -> list[bytes]:
    return sorted(e.name for e in tree.entries(walk(tree, *path))[2:])


def test_names_numbers_and_attributes(files: FolderFiles) -> None:
    tree = Tree(Catalogue({"1": FolderVolume(files)}))
    assert names(tree) == [b"1", b"1.NOT-REPLAYED.txt"]
    assert names(tree, b"1") == [b"etc", b"link", b"odd\xff\n"]
    hosts, again = walk(tree, b"1", b"etc", b"hosts"), walk(tree, b"1", b"etc", b"deep", b"again")
    assert hosts == again < 2**53
    node = tree.inodes.node(hosts)
    assert isinstance(node, GuestFile)
    found = tree.attributes(hosts)
    assert (found.mode, found.nlink, found.size) == (stat.S_IFREG | 0o644, 2, 9)
    assert found.guest == files.stat(node.inode)
    assert tree.target(walk(tree, b"1", b"link")) == b"../etc/hosts"
    assert tree.guests.read(hosts, 4, 100) == b"0.0.1"
    listed = {e.name: e.attributes for e in tree.entries(walk(tree, b"1", b"etc"))}
    assert listed[b"hosts"] == found
    for wrong in ((b"2",), (b"1", b"none"), (b"1", b"etc", b"hosts", b"x")):
        with pytest.raises((BackupfsError, NotADirectoryError)):
            walk(tree, *wrong)


def test_notices(files: FolderFiles) -> None:
    volumes = {"1": FolderVolume(files), "2": FolderVolume(None, "exFAT is not supported", "exFAT")}
    tree = Tree(Catalogue(volumes))
    note = tree.file(walk(tree, b"1.NOT-REPLAYED.txt"))
    assert note.content == b"the journal was not replayed\n"  # type: ignore[union-attr]
    assert names(tree, b"2") == [b"UNSUPPORTED.txt"]
    said = tree.file(walk(tree, b"2", b"UNSUPPORTED.txt")).content  # type: ignore[union-attr]
    assert b"exFAT is not supported" in said
    assert b"mount -o ro,loop vda.parts/2.raw /mnt" in said


def test_what_can_be_done_by_hand() -> None:
    """Nothing is advised that can't work: what is encrypted or a part of something has to be opened first."""
    raw = "vda.parts/2.raw"

    def said(kind: str | None, *others: str) -> str:
        return how("vda.parts", "2", kind, ["1", *others])

    for kind in (detect.SWAP, detect.JOURNAL, containers.LVM):
        assert raw not in said(kind)
    for kind in (containers.LUKS, containers.BITLOCKER, containers.RAID, detect.REFS, detect.SWAP, containers.LVM):
        assert f"loop {raw}" not in said(kind)
    assert f"cryptsetup open --readonly {raw} guest\n" in said(containers.LUKS)
    assert f"--type bitlk {raw} guest\n" in said(containers.BITLOCKER)
    assert "beside this folder: see vg0-root, vg1-a--b." in said(containers.LVM, "vg0-root", "vg1-a--b")
    assert "vda.parts/ERROR.txt says why" in said(containers.LVM)
    assert f"mount -o ro,loop,noload {raw} /mnt\n" in said("ext4")
    assert f"mount -o ro,loop {raw} /mnt\n" in said(None)


def test_a_disk_is_closed_when_nobody_looks(files: FolderFiles) -> None:
    catalogue = Catalogue({"1": FolderVolume(files)})
    tree = Tree(catalogue)
    hosts = walk(tree, b"1", b"etc", b"hosts")
    tree.guests.disks.close_idle()
    assert (catalogue.open, files.closed) == (1, False)
    tree.guests.disks.close_idle(0)
    assert (catalogue.open, files.closed) == (0, True)
    assert tree.guests.read(hosts, 0, 9) == b"127.0.0.1"  # by its number


def test_what_a_damaged_file_system_says_is_refused(files: FolderFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(Catalogue({"1": FolderVolume(files)}))
    hosts, root = walk(tree, b"1", b"etc", b"hosts"), files.stat(files.root)
    monkeypatch.setattr(files, "read", lambda *_: b"12")
    with pytest.raises(Unsound):
        tree.guests.read(hosts, 0, 9)
    for name in (b"", b"..", b"a/b", b"a\0b", b"x" * 1025):
        tree.guests.disks.close_idle(0)
        monkeypatch.setattr(files, "list", lambda _, name=name: [Entry(name, root)])
        with pytest.raises(Unsound):
            tree.entries(walk(tree, b"1"))


def test_a_volume_that_hangs_while_it_is_opened_is_nobody_elses_matter(files: FolderFiles) -> None:
    class Hanging(FolderVolume):
        def open(self) -> FolderFiles:
            begun.set()
            go_on.wait(20)
            return super().open()

    begun, go_on = threading.Event(), threading.Event()
    tree = Tree(Catalogue({"1": FolderVolume(files), "2": Hanging(files)}))
    hosts = walk(tree, b"1", b"etc", b"hosts")
    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(walk, tree, b"2")
        try:
            assert begun.wait(10)
            found = pool.submit(tree.guests.read, hosts, 0, 9)
            assert found.result(5) == b"127.0.0.1"
            assert tree.guest_part(hosts) == tree.guest_part(walk(tree, b"1"))
        finally:
            go_on.set()
        assert tree.guest_part(hanging.result(5)) != tree.guest_part(hosts)
