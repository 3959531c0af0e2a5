"""The tree over a fake catalogue: names, numbers, attributes; no mount."""

import os
import stat
import threading
from collections.abc import Mapping, Sequence

import pytest

from backupfs.errors import NotFound
from backupfs.fuse.catalogue import DiskFile, Folder, PointEntry, TextFile
from backupfs.fuse.nodes import (
    FILE_TIMEOUT_S,
    FRESH_TIMEOUT_S,
    ROOT_INODE,
    Inodes,
    PointFolder,
    Stale,
    VmFolder,
    component,
    hash_node,
)
from backupfs.fuse.tree import LATEST, Tree
from backupfs.image import ZeroImage

S = 10**9


class FakeCatalogue:
    """VMs as {vm: {point: (time, version, note)}}; counts the calls."""

    def __init__(self, vms: dict[str, dict[str, tuple[int, str, str]]]) -> None:
        self.content = vms
        self.listed = 0

    def vms(self) -> Sequence[str]:
        return list(self.content)

    def points(self, vm: str) -> Mapping[str, int]:
        self.listed += 1
        return {point: time_ns for point, (time_ns, _, _) in self.content.get(vm, {}).items()}

    def point(self, vm: str, point: str) -> PointEntry:
        try:
            time_ns, version, note = self.content[vm][point]
        except KeyError:
            raise NotFound(f"no {vm}/{point}") from None
        disk = DiskFile("vda.raw", 10_000, 4096, version, {"user.backupfs.vm": vm.encode()}, lambda: ZeroImage(10_000))
        return PointEntry(time_ns, [disk, TextFile("point.json", note.encode())])

    def usage(self) -> os.statvfs_result:
        return os.statvfs("/")


@pytest.fixture
def catalogue() -> FakeCatalogue:
    return FakeCatalogue({"web": {"p1": (1 * S, "v1", "note"), "p2": (2 * S, "v2", "note")}, "db": {}})


@pytest.fixture
def tree(catalogue: FakeCatalogue) -> Tree:
    return Tree(catalogue)


def walk(tree: Tree, *names: str) -> int:
    inode = ROOT_INODE
    for name in names:
        inode = tree.lookup(inode, name.encode()).inode
    return inode


def names(tree: Tree, *path: str) -> list[bytes]:
    return [e.name for e in tree.entries(walk(tree, *path))]


def test_names_of_every_folder(tree: Tree) -> None:
    assert names(tree) == [b".", b"..", b"web", b"db"]
    assert names(tree, "web") == [b".", b"..", LATEST, b"p1", b"p2"]
    assert names(tree, "db") == [b".", b".."]
    assert names(tree, "web", "p1") == [b".", b"..", b"vda.raw", b"point.json"]


def test_latest_is_the_newest_and_moves(tree: Tree, catalogue: FakeCatalogue) -> None:
    link = walk(tree, "web", "latest")
    assert tree.target(link) == b"p2"
    catalogue.content["web"]["p3-longer"] = (3 * S, "v3", "")
    assert tree.target(walk(tree, "web", "latest")) == b"p3-longer"
    assert tree.target(link) == b"p2", "the kernel keeps it: another number for another target"
    assert tree.attributes(walk(tree, "web", "latest")).size == len("p3-longer")
    assert stat.S_ISLNK(tree.attributes(link).mode)
    with pytest.raises(NotFound):
        tree.lookup(walk(tree, "db"), LATEST)


def test_attributes_of_a_disk(tree: Tree) -> None:
    a = tree.attributes(walk(tree, "web", "p1", "vda.raw"))
    assert (a.mode, a.nlink, a.size, a.allocated) == (stat.S_IFREG | 0o400, 1, 10_000, 4096)
    assert (a.time_ns, a.timeout_s) == (1 * S, FILE_TIMEOUT_S)


def test_attributes_of_folders(tree: Tree) -> None:
    root, vm, point = (tree.attributes(walk(tree, *p)) for p in ((), ("web",), ("web", "p1")))
    assert [a.nlink for a in (root, vm, point)] == [4, 4, 1]  # of a point's folder nobody has counted
    assert [a.time_ns for a in (root, vm, point)] == [2 * S, 2 * S, 1 * S]
    assert {a.mode for a in (root, vm, point)} == {stat.S_IFDIR | 0o500}
    assert {a.timeout_s for a in (root, vm, point)} == {FRESH_TIMEOUT_S}
    assert tree.attributes(walk(tree, "db")).time_ns == 0


def test_modes_when_all_may_read(catalogue: FakeCatalogue) -> None:
    tree = Tree(catalogue, readable_by_all=True)
    assert stat.S_IMODE(tree.attributes(ROOT_INODE).mode) == 0o555
    assert stat.S_IMODE(tree.attributes(walk(tree, "web", "p1", "vda.raw")).mode) == 0o444


def test_a_listing_and_a_lookup_say_the_same(tree: Tree) -> None:
    for path in ((), ("web",), ("web", "p1")):
        folder = walk(tree, *path)
        dots, rest = tree.entries(folder)[:2], tree.entries(folder)[2:]
        assert [tree.lookup(folder, e.name).inode for e in dots] == [e.attributes.inode for e in dots]
        for entry in rest:
            assert tree.lookup(folder, entry.name) == entry.attributes


def test_inodes_are_stable_unique_and_the_same_in_another_mount(catalogue: FakeCatalogue) -> None:
    def everything(tree: Tree) -> list[int]:
        paths = [(), ("web",), ("db",), ("web", "latest"), ("web", "p1"), ("web", "p2")]
        paths += [("web", p, f) for p in ("p1", "p2") for f in ("vda.raw", "point.json")]
        return [walk(tree, *p) for p in paths]

    tree = Tree(catalogue)
    numbers = everything(tree)
    assert len(set(numbers)) == len(numbers)
    assert everything(tree) == numbers == everything(Tree(catalogue))
    assert all(ROOT_INODE <= n < 1 << 52 for n in numbers)


def test_colliding_numbers_are_told_apart() -> None:
    last = (1 << 52) - 1  # the next one wraps, past the root's
    inodes = Inodes(lambda _: last)
    nodes = [VmFolder(str(i)) for i in range(50)]
    numbers = [inodes.number(node) for node in nodes]
    assert len({ROOT_INODE, *numbers}) == 51
    assert [inodes.number(node) for node in nodes] == numbers
    assert [inodes.node(n) for n in numbers] == nodes
    assert numbers[1] == ROOT_INODE + 1


def test_numbers_given_by_many_threads_at_once() -> None:
    inodes = Inodes(lambda node: 2 + hash_node(node) % 100)
    nodes = [VmFolder(str(i)) for i in range(200)]
    given: list[list[int]] = []
    threads = [threading.Thread(target=lambda: given.append([inodes.number(n) for n in nodes])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert given == [given[0]] * 4
    assert len(set(given[0])) == 200


def test_a_point_made_again_has_another_number(tree: Tree, catalogue: FakeCatalogue) -> None:
    old = walk(tree, "web", "p1", "vda.raw")
    catalogue.content["web"]["p1"] = (1 * S, "v1-again", "note")
    with pytest.raises(Stale):
        tree.file(old)
    new = walk(tree, "web", "p1", "vda.raw")
    assert new != old
    assert tree.file(new).version == "v1-again"


def test_an_edited_point_json_has_another_number_and_the_disk_has_not(tree: Tree, catalogue: FakeCatalogue) -> None:
    text, disk = walk(tree, "web", "p1", "point.json"), walk(tree, "web", "p1", "vda.raw")
    catalogue.content["web"]["p1"] = (1 * S, "v1", "a longer note")
    assert walk(tree, "web", "p1", "vda.raw") == disk
    edited = tree.lookup(walk(tree, "web", "p1"), b"point.json")
    assert (edited.inode != text, edited.size, edited.timeout_s) == (True, len("a longer note"), FRESH_TIMEOUT_S)
    with pytest.raises(Stale):
        tree.file(text)


def test_points_come_and_go(tree: Tree, catalogue: FakeCatalogue) -> None:
    folder, disk = walk(tree, "web", "p1"), walk(tree, "web", "p1", "vda.raw")
    snapshot = tree.entries(walk(tree, "web"))
    del catalogue.content["web"]["p1"]
    catalogue.content["web"]["p3"] = (3 * S, "v3", "")
    assert [e.name for e in snapshot][3:] == [b"p1", b"p2"]
    assert names(tree, "web")[3:] == [b"p2", b"p3"]
    with pytest.raises(NotFound):
        tree.attributes(folder)
    with pytest.raises(NotFound):
        tree.entries(folder)
    with pytest.raises(Stale):
        tree.file(disk)
    assert tree.attributes(disk).size == 10_000  # who has it open may go on


@pytest.mark.parametrize("name", [b"nothing", b"\xff\xfe", b"", b"p1\n", b"..\\", "latest".encode("utf-16")])
def test_unknown_names(tree: Tree, name: bytes) -> None:
    for path in ((), ("web",), ("web", "p1")):
        with pytest.raises(NotFound):
            tree.lookup(walk(tree, *path), name)


def test_a_file_is_no_folder_and_a_folder_no_file(tree: Tree) -> None:
    disk = walk(tree, "web", "p1", "vda.raw")
    with pytest.raises(NotFound):
        tree.lookup(disk, b"x")
    with pytest.raises(Stale):
        tree.file(walk(tree, "web"))
    with pytest.raises(NotFound):
        tree.target(disk)


def test_dots_lead_up(tree: Tree) -> None:
    disk = walk(tree, "web", "p1", "vda.raw")
    assert walk(tree, "web", "p1", "vda.raw", "..") == walk(tree, "web", "p1")
    assert walk(tree, "web", "p1", "..") == walk(tree, "web")
    assert walk(tree, "web", "..", "..") == ROOT_INODE
    assert tree.lookup(disk, b".").inode == disk


def test_a_number_of_an_earlier_mount_is_stale(tree: Tree) -> None:
    with pytest.raises(Stale):
        tree.attributes(hash_node(PointFolder("web", "p1")))


@pytest.mark.parametrize("name", ["ü", "日本", "💾 disk", "a b", "-x", "%41", "back\\slash", "x" * 250])
def test_odd_names_are_shown(name: str) -> None:
    tree = Tree(FakeCatalogue({name: {name: (1, "v", "")}}))
    assert names(tree)[2:] == [name.encode()]
    assert names(tree, name, name)[2:] == [b"vda.raw", b"point.json"]
    assert tree.describe(walk(tree, name, name, "vda.raw")) == f"{name}/{name}/vda.raw"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "\udcff"])
def test_names_that_no_folder_can_hold_are_left_out(name: str) -> None:
    assert component(name) is None
    tree = Tree(FakeCatalogue({name: {}, "good": {name: (1, "v", ""), "p": (2, "v", "")}}))
    assert names(tree)[2:] == [b"good"]
    assert names(tree, "good")[2:] == [LATEST, b"p"]


def test_looking_at_a_point_does_not_list_its_vm() -> None:
    catalogue = FakeCatalogue({"vm": {f"p{i:05}": (i, "v", "") for i in range(1000)}})
    tree = Tree(catalogue)
    points = [e.attributes.inode for e in tree.entries(walk(tree, "vm"))[3:]]
    before = catalogue.listed
    for inode in points[:100]:
        tree.attributes(inode)
        tree.entries(inode)
        disk = tree.lookup(inode, b"vda.raw").inode
        tree.file(disk)
    assert catalogue.listed == before
    assert len(points) == 1000


class Divided(FakeCatalogue):
    """Points whose disk has a folder of volumes; counts how often one is looked into."""

    looked = 0

    def point(self, vm: str, point: str) -> PointEntry:
        entry = super().point(vm, point)

        def volumes() -> list[DiskFile | TextFile]:
            self.looked += 1
            version = self.content[vm][point][1]
            return [
                DiskFile("1.raw", 5000, 512, version, {}, lambda: ZeroImage(5000)),
                DiskFile("../x", 1, 1, "", {}, lambda: ZeroImage(1)),
                TextFile("ERROR.txt", b"no"),
            ]

        return PointEntry(entry.time_ns, entry.files, [Folder("vda.parts", volumes), Folder("a/b", volumes)])


def test_folders_in_a_points_folder() -> None:
    catalogue = Divided({"web": {"p1": (1 * S, "v1", "note"), "p2": (2 * S, "v1", "note")}})
    tree = Tree(catalogue)
    assert names(tree, "web", "p1") == [b".", b"..", b"vda.raw", b"point.json", b"vda.parts"]
    folder = tree.attributes(walk(tree, "web", "p1", "vda.parts"))
    assert (stat.S_ISDIR(folder.mode), folder.nlink, folder.time_ns, folder.timeout_s) == (
        True,
        2,
        1 * S,
        FRESH_TIMEOUT_S,
    )
    assert tree.describe(folder.inode) == "web/p1/vda.parts"
    assert tree.lookup(folder.inode, b"..").inode == walk(tree, "web", "p1")
    assert catalogue.looked == 0
    entries = {e.name: e.attributes for e in tree.entries(folder.inode)}
    assert list(entries) == [b".", b"..", b"1.raw", b"ERROR.txt"]
    volume = tree.lookup(folder.inode, b"1.raw")
    assert volume == entries[b"1.raw"]
    assert (volume.size, volume.allocated, volume.time_ns, volume.timeout_s) == (5000, 512, 1 * S, FILE_TIMEOUT_S)
    assert tree.describe(volume.inode) == "web/p1/vda.parts/1.raw"
    assert tree.file(volume.inode).name == "1.raw"
    assert volume.inode != walk(tree, "web", "p2", "vda.parts", "1.raw")
    for path in (("p1", "a/b"), ("p1", "vdb.parts"), ("p1", "vda.parts", "vda.raw"), ("p1", "1.raw")):
        with pytest.raises(NotFound):
            walk(tree, "web", *path)
    catalogue.content["web"]["p1"] = (1 * S, "v2", "note")
    with pytest.raises(Stale):
        tree.file(volume.inode)
    del catalogue.content["web"]["p1"]
    with pytest.raises(NotFound):
        tree.attributes(folder.inode)
    with pytest.raises(Stale):
        tree.file(volume.inode)
