"""What QEMU says about its disks, taken apart."""

from typing import Any

import pytest

from backupfs.errors import NotFound, ProtocolError, UsageError
from backupfs.sources.vm_nodes import parse_blocks, pick


def node(name: str, driver: str = "qcow2", *, read_only: bool = False, **more: Any) -> dict[str, Any]:
    specific = {"format-specific": {"data": {"compat": more.pop("compat", "1.1")}}} if driver == "qcow2" else {}
    image = {"virtual-size": 4096, **specific}
    return {"node-name": name, "drv": driver, "file": f"/images/{name}", "ro": read_only, "image": image, **more}


def device(inserted: str | None, qdev: str = "", name: str = "", *, removable: bool = False) -> dict[str, Any]:
    medium = {"inserted": {"node-name": inserted}} if inserted else {}
    return {"device": name, "removable": removable, **({"qdev": qdev} if qdev else {}), **medium}


@pytest.mark.parametrize(
    ("qdev", "legacy", "inserted", "name", "path"),
    [
        ("/machine/peripheral/vda/virtio-backend", "", "n", "vda", "/machine/peripheral/vda/virtio-backend"),
        ("sda", "", "n", "sda", "/machine/peripheral/sda"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "virtio0", "#block1", "virtio0", None),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "root", "root", None),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "#block1", "", None),
        ("", "drive0", "n", "drive0", ""),
    ],
)
def test_a_disk_has_the_name_that_its_user_knows(
    qdev: str, legacy: str, inserted: str, name: str, path: str | None
) -> None:
    (found,) = parse_blocks([device(inserted, qdev, legacy)], [node(inserted)], None).devices
    assert (found.name, found.path) == (name, qdev if path is None else path)


def test_all_that_the_guest_can_write_is_picked() -> None:
    devices = [device("a", "vda"), device(None, "floppy"), device("c", "cd", removable=True), device("r", "vdr")]
    found = parse_blocks(devices, [node("a"), node("c"), node("r", read_only=True)], None)
    assert [d.name for d in pick(found, None)] == ["vda"]
    assert [d.name for d in pick(found, ["vda", "vda"])] == ["vda"]
    with pytest.raises(UsageError, match="'cd' is a removable medium"):
        pick(found, ["cd"])
    with pytest.raises(UsageError, match="'vdr' is read-only"):
        pick(found, ["vdr"])
    with pytest.raises(NotFound, match="there are: cd, vda, vdr"):
        pick(found, ["vda", "floppy"])


def test_two_disks_of_one_name() -> None:
    found = parse_blocks([device("a", "vda"), device("b", name="vda")], [node("a"), node("b")], None)
    for wanted in (None, ["vda"]):
        with pytest.raises(UsageError, match="two disks are called 'vda'"):
            pick(found, wanted)


def test_the_image_is_below_our_filter() -> None:
    graph = {
        "nodes": [{"id": 1, "name": "f"}, {"id": 2, "name": "a"}, {"id": 3, "name": "q"}],
        "edges": [{"parent": 1, "child": 3, "name": "target"}, {"parent": 1, "child": 2, "name": "file"}],
    }
    nodes = [node("f", "copy-before-write"), node("a"), node("q")]
    found = parse_blocks([device("f", "vda")], nodes, graph)
    assert found.image(found.devices[0]).name == "a"


@pytest.mark.parametrize("edges", [[], [{"parent": 1, "child": 1, "name": "file"}]])
def test_a_filter_that_leads_nowhere(edges: list[dict[str, Any]]) -> None:
    graph = {"nodes": [{"id": 1, "name": "f"}], "edges": edges}
    found = parse_blocks([device("f", "vda")], [node("f", "copy-before-write")], graph)
    with pytest.raises(ProtocolError, match="disk vda"):
        found.image(found.devices[0])


@pytest.mark.parametrize(
    ("described", "persistent"),
    [
        (node("a"), True),
        (node("a", compat="0.10"), False),
        (node("a", read_only=True), False),
        (node("a", "raw"), False),
        (node("a", "file"), False),
    ],
)
def test_where_bitmaps_are_kept(described: dict[str, Any], persistent: bool) -> None:
    assert parse_blocks([], [described], None).nodes["a"].persistent is persistent


def test_bitmaps() -> None:
    bitmap = {"name": "b", "granularity": 65536, "recording": True, "busy": False, "count": 0}
    nameless = {**bitmap, "name": ""}
    del (unnamed := dict(bitmap))["name"]
    listed = [bitmap, nameless, unnamed, {**bitmap, "name": "c", "inconsistent": True}]
    found = parse_blocks([], [node("a", **{"dirty-bitmaps": listed})], None).nodes["a"].bitmaps
    assert sorted(found) == ["b", "c"]
    assert found["b"].usable
    assert not found["c"].usable


@pytest.mark.parametrize(
    ("devices", "nodes", "graph"),
    [
        (None, [], None),
        ([{"inserted": {"node": 1}}], [], None),
        ([{"inserted": 7}], [], None),
        ([], [{"node-name": "a"}], None),
        ([], [node("a") | {"image": {"virtual-size": "big"}}], None),
        ([], [], {"nodes": []}),
        ([], [], {"nodes": [], "edges": [{"parent": 1, "child": 2, "name": "file"}]}),
        ("abc", [], None),
    ],
)
def test_nonsense(devices: Any, nodes: Any, graph: Any) -> None:
    with pytest.raises(ProtocolError, match="makes no sense"):
        parse_blocks(devices, nodes, graph)
