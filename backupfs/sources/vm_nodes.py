"""What QEMU says about its block devices, as values. Pure.

Devices are what the guest has; each has a node, QEMU's word for an image that is open (driver, file, bitmaps); nodes
lie on one another in a graph. Source: QEMU qapi/block-core.json, BlockInfo, BlockDeviceInfo, XDbgBlockGraph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backupfs.errors import NotFound, ProtocolError, UsageError

_PERIPHERAL = "/machine/peripheral/"
_FILTER = "copy-before-write"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a node. Attributes as QEMU's BlockDirtyInfo; `granularity` in bytes."""

    name: str
    granularity: int
    recording: bool
    busy: bool
    inconsistent: bool

    @property
    def usable(self) -> bool:
        """Whether QEMU lets it be merged, enabled and removed."""
        return not self.busy and not self.inconsistent


@dataclass(frozen=True, slots=True)
class Node:
    """An image that is open in QEMU.

    Attributes:
        name: QEMU's node-name; made up by QEMU (`#block123`) unless the user gave one.
        file: what QEMU calls its file.
        size: bytes of the disk in it.
        persistent: its file can keep bitmaps over QEMU's end.
        bitmaps: by name.
    """

    name: str
    driver: str
    file: str
    size: int
    read_only: bool
    persistent: bool
    bitmaps: Mapping[str, Bitmap]


@dataclass(frozen=True, slots=True)
class Device:
    """A disk of the guest that something is inserted in.

    Attributes:
        name: as the user knows it: the device's id, else the legacy drive's or the node's name.
        path: of the device in QEMU's object tree; empty when it has none.
        node: the name of the node that the guest writes to.
    """

    name: str
    path: str
    node: str
    removable: bool


@dataclass(frozen=True, slots=True)
class Blocks:
    """All block devices and nodes of a machine, at one time.

    Attributes:
        devices: in QEMU's order.
        nodes: by name.
        children: by (node's name, edge's name), the name of the node below.
    """

    devices: Sequence[Device]
    nodes: Mapping[str, Node]
    children: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def image(self, device: Device) -> Node:
        """Return the node with a device's image and its bitmaps: what is below a copy-before-write filter.

        Raises:
            ProtocolError: QEMU names a node and does not list it.
        """
        name = device.node
        for _ in range(len(self.nodes) + 1):
            node = self.nodes.get(name)
            if node is None:
                break
            if node.driver != _FILTER:
                return node
            name = self.children.get((name, "file"), "")
        raise ProtocolError(f"disk {device.name}: QEMU does not say what node {device.node!r} is")


def parse_blocks(devices: Any, nodes: Any, graph: Any) -> Blocks:
    """Take the answers of query-block, query-named-block-nodes and x-debug-query-block-graph apart.

    Args:
        graph: None where QEMU can't tell it.

    Raises:
        ProtocolError: they are not what QEMU's documentation says.
    """
    try:
        return Blocks(
            [_device(d) for d in devices if d.get("inserted")],
            {n["node-name"]: _node(n) for n in nodes if n.get("node-name")},
            _children(graph) if graph else {},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ProtocolError(f"QEMU's list of its disks makes no sense: {e!r}") from e


def _device(info: Mapping[str, Any]) -> Device:
    node = str(info["inserted"]["node-name"])
    qdev = str(info.get("qdev", ""))
    # QEMU gives the device's id, or where it has none its path. virtio's disks are always a part of the device with
    # the id: /machine/peripheral/vda/virtio-backend.
    name = qdev.removeprefix(_PERIPHERAL).split("/")[0] if qdev.startswith(_PERIPHERAL) else ""
    if qdev and not qdev.startswith("/"):
        name = qdev
    path = qdev if qdev.startswith("/") or not qdev else _PERIPHERAL + qdev
    name = name or str(info["device"]) or ("" if node.startswith("#") else node)
    return Device(name, path, node, bool(info["removable"]))


def _node(info: Mapping[str, Any]) -> Node:
    image = info["image"]
    specific = image.get("format-specific", {}).get("data", {})
    read_only = bool(info["ro"])
    bitmaps = [_bitmap(b) for b in info.get("dirty-bitmaps", []) if b.get("name")]
    return Node(
        name=str(info["node-name"]),
        driver=str(info["drv"]),
        file=str(info["file"]),
        size=int(image["virtual-size"]),
        read_only=read_only,
        # Version 2 of qcow2 (compat 0.10) has no place for bitmaps.
        persistent=info["drv"] == "qcow2" and specific.get("compat") not in (None, "0.10") and not read_only,
        bitmaps={b.name: b for b in bitmaps},
    )


def _bitmap(info: Mapping[str, Any]) -> Bitmap:
    return Bitmap(
        str(info["name"]),
        int(info["granularity"]),
        recording=bool(info["recording"]),
        busy=bool(info["busy"]),
        inconsistent=bool(info.get("inconsistent", False)),
    )


def _children(graph: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    names = {node["id"]: str(node["name"]) for node in graph["nodes"]}
    return {(names[e["parent"]], str(e["name"])): names[e["child"]] for e in graph["edges"]}


def pick(blocks: Blocks, wanted: Sequence[str] | None) -> list[Device]:
    """Return the disks that can be backed up: `wanted`, or all that have a medium that the guest can write.

    Raises:
        NotFound: there is none of that name.
        UsageError: it can't be taken.
    """
    known: dict[str, Device] = {}
    doubled = set[str]()
    for device in blocks.devices:
        if device.name in known:
            doubled.add(device.name)
        known.setdefault(device.name, device)
    names = [n for n in known if not _unfit(blocks, known[n])] if wanted is None else list(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            there = ", ".join(sorted(n for n in known if n)) or "none"
            raise NotFound(f"there is no disk {name!r} with a medium; there are: {there}")
        if name in doubled:
            raise UsageError(f"two disks are called {name!r}; give their devices ids (-device …,id=)")
        if unfit := _unfit(blocks, known[name]):
            raise UsageError(f"disk {name!r} {unfit}")
    return [known[name] for name in names]


def _unfit(blocks: Blocks, device: Device) -> str:
    if not device.name:
        return "has no name"
    if device.removable:
        return "is a removable medium"
    if blocks.image(device).read_only:
        return "is read-only: the guest can't change it"
    return ""
