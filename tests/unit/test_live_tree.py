"""Live disks in the tree: beside the points, another file for each connection; no mount."""

import os
from collections.abc import Mapping, Sequence

import pytest

from backupfs.errors import NotFound
from backupfs.fuse.catalogue import LIVE, DiskFile, PointEntry
from backupfs.fuse.nodes import LIVE_TIMEOUT_S, ROOT_INODE, Stale
from backupfs.fuse.tree import LATEST, Tree
from backupfs.image import ZeroImage


class LiveCatalogue:
    """`web` has points and live disks, `db` live disks only; `away` holds what there is of them: version and size."""

    def __init__(self) -> None:
        self.disks: dict[str, tuple[str, int]] = {"vda.raw": ("1", 1000)}

    def vms(self) -> Sequence[str]:
        return ["db", "web"]

    def points(self, vm: str) -> Mapping[str, int]:
        return {LIVE: 9} if vm == "db" else {"p1": 1, LIVE: 9, "p2": 2}

    def point(self, vm: str, point: str) -> PointEntry:
        if point != LIVE:
            return PointEntry(self.points(vm)[point], [])
        return PointEntry(9, [self.file(name, *disk) for name, disk in self.disks.items()])

    def usage(self) -> os.statvfs_result:
        return os.statvfs("/")

    def file(self, name: str, version: str, size: int) -> DiskFile:
        return DiskFile(name, size, 512, version, {}, lambda: ZeroImage(size), time_ns=int(version), live=True)


@pytest.fixture
def catalogue() -> LiveCatalogue:
    return LiveCatalogue()


@pytest.fixture
def tree(catalogue: LiveCatalogue) -> Tree:
    return Tree(catalogue)


def walk(tree: Tree, *names: str) -> int:
    inode = ROOT_INODE
    for name in names:
        inode = tree.lookup(inode, name.encode()).inode
    return inode


def test_the_folder_stands_beside_the_points(tree: Tree) -> None:
    assert {e.name for e in tree.entries(walk(tree, "web"))[2:]} == {b"p1", b"p2", b"live", LATEST}
    assert [e.name for e in tree.entries(walk(tree, "db"))[2:]] == [b"live"]
    assert tree.target(walk(tree, "web", "latest")) == b"p2"
    with pytest.raises(NotFound):
        tree.lookup(walk(tree, "db"), LATEST)
    assert [tree.attributes(walk(tree, vm)).nlink for vm in ("web", "db")] == [5, 3]
    assert [tree.attributes(walk(tree, vm)).time_ns for vm in ("web", "db")] == [2, 0]


def test_a_listing_and_a_lookup_say_the_same(tree: Tree) -> None:
    for path in (("web",), ("web", "live")):
        folder = walk(tree, *path)
        for entry in tree.entries(folder)[2:]:
            assert tree.lookup(folder, entry.name) == entry.attributes


def test_each_connection_is_another_file(tree: Tree, catalogue: LiveCatalogue) -> None:
    old = walk(tree, "web", "live", "vda.raw")
    attributes = tree.attributes(old)
    assert (attributes.size, attributes.time_ns, attributes.timeout_s) == (1000, 1, LIVE_TIMEOUT_S)
    assert tree.file(old).version == "1"
    catalogue.disks["vda.raw"] = "2", 1000
    with pytest.raises(Stale):
        tree.file(old)
    assert walk(tree, "web", "live", "vda.raw") != old
    assert tree.attributes(old).size == 1000
    catalogue.disks.clear()
    with pytest.raises(NotFound):
        walk(tree, "web", "live", "vda.raw")
    assert [e.name for e in tree.entries(walk(tree, "web", "live"))] == [b".", b".."]
