"""libvirt's XML: what it says about a domain, and what is written to it. Pure.

Source: libvirt.org, formatdomain, formatbackup, formatcheckpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

_AGENT = "org.qemu.guest_agent.0"
_SOURCES = {"file": "file", "block": "dev"}  # a disk's type: the attribute with its image's path


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk that the guest can write to.

    Attributes:
        name: the target: vda.
        path: of its image; None when that is neither a file nor a block device of this machine.
        description: the path, or what stands for it.
        image_format: raw, qcow2, ...
        below: the descriptions of its backing files, as far as libvirt tells: a running domain's.
        shared: other machines write to it too.
        passed_through: the guest's commands go to the device as they are.
        sliced: it is a part of its image.
        io_thread: its device, or its SCSI controller, runs in an I/O thread.
    """

    name: str
    path: str | None
    description: str
    image_format: str
    below: frozenset[str]
    shared: bool
    passed_through: bool
    sliced: bool
    io_thread: bool


def _parse(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314, libvirt formatted it


def disks(domain: str) -> list[DomainDisk]:
    """Return a domain's disks in its order, without CD-ROMs, floppies, and those the guest can't write to."""
    return _disks(_parse(domain))


def _disks(domain: ElementTree.Element) -> list[DomainDisk]:
    found = []
    threaded = {
        controller.get("index", "0")
        for controller in domain.iterfind("./devices/controller[@type='scsi']")
        if _has_io_thread(controller.find("driver"))
    }
    for disk in domain.iterfind("./devices/disk"):
        device = disk.get("device", "disk")
        target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
        if device not in ("disk", "lun") or disk.find("readonly") is not None or target is None or source is None:
            continue
        kind = disk.get("type", "")
        found.append(
            DomainDisk(
                name=target.get("dev", ""),
                path=source.get(_SOURCES[kind]) if kind in _SOURCES else None,
                description=_describe(kind, source),
                image_format=(driver.get("type") if driver is not None else None) or "raw",
                below=frozenset(
                    _describe(backing.get("type", ""), backing_source)
                    for backing in disk.iter("backingStore")
                    if (backing_source := backing.find("source")) is not None
                ),
                shared=disk.find("shareable") is not None,
                passed_through=device == "lun",
                sliced=source.find("slices") is not None,
                io_thread=_has_io_thread(driver) or (target.get("bus") == "scsi" and _controller(disk) in threaded),
            )
        )
    return found


def _has_io_thread(driver: ElementTree.Element | None) -> bool:
    return driver is not None and (driver.get("iothread") is not None or driver.find("iothreads") is not None)


def _controller(disk: ElementTree.Element) -> str:
    address = disk.find("address")
    return "0" if address is None else address.get("controller", "0")


def _describe(kind: str, source: ElementTree.Element) -> str:
    if kind in _SOURCES:
        return source.get(_SOURCES[kind], "")
    words = [source.get(a) for a in ("protocol", "pool", "name", "volume", "dev", "type", "path")]
    return ":".join([kind, *[w for w in words if w]])


def agent_state(domain: str) -> str | None:
    """Return what libvirt says of the guest agent's channel: connected, disconnected; None: there is no channel."""
    for target in _parse(domain).iterfind("./devices/channel/target"):
        if target.get("name") == _AGENT:
            return target.get("state", "disconnected")
    return None


def qemu_user(domain: str) -> tuple[int, int] | None:
    """Return the user and the group that a running domain's QEMU runs as, or None: the same as libvirt's."""
    for label in _parse(domain).iterfind("./seclabel[@model='dac']/label"):
        user, _, group = (label.text or "").partition(":")
        if user[:1] == group[:1] == "+" and user[1:].isdecimal() and group[1:].isdecimal():
            return int(user[1:]), int(group[1:])
    return None


def backup(socket: str, scratch: Mapping[str, str], incremental: Mapping[str, str], bitmap: str) -> str:
    """Return the description of a backup job in pull mode.

    Args:
        socket: where QEMU listens; the exports are called as the disks.
        scratch: by disk, the file for what the guest overwrites meanwhile.
        incremental: by disk, the checkpoint since which changes are asked for; the others are full.
        bitmap: what these changes are called in the export.
    """
    root = ElementTree.Element("domainbackup", mode="pull")
    ElementTree.SubElement(root, "server", transport="unix", socket=socket)
    listed = ElementTree.SubElement(root, "disks")
    for name, file in scratch.items():
        disk = ElementTree.SubElement(listed, "disk", name=name, backup="yes", type="file", exportname=name)
        if name in incremental:
            disk.set("backupmode", "incremental")
            disk.set("incremental", incremental[name])
            disk.set("exportbitmap", bitmap)
        else:
            disk.set("backupmode", "full")
        ElementTree.SubElement(disk, "scratch", file=file)
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint(name: str, recorded: Iterable[str]) -> str:
    """Return the description of a checkpoint that is to be made.

    Args:
        recorded: the disks whose changes it records. libvirt leaves out all that are not named.
    """
    return ElementTree.tostring(_checkpoint(name, recorded), encoding="unicode")


def known_checkpoint(name: str, recorded: Iterable[str], created: int, domain: str) -> str:
    """Return the description of a checkpoint that is there, and that libvirt does not know.

    Args:
        created: when, seconds since 1970.
        domain: its description.
    """
    root = _checkpoint(name, recorded)
    ElementTree.SubElement(root, "creationTime").text = str(created)
    root.append(_parse(domain))
    return ElementTree.tostring(root, encoding="unicode")


def _checkpoint(name: str, recorded: Iterable[str]) -> ElementTree.Element:
    root = ElementTree.Element("domaincheckpoint")
    ElementTree.SubElement(root, "name").text = name
    listed = ElementTree.SubElement(root, "disks")
    for disk in recorded:
        ElementTree.SubElement(listed, "disk", name=disk, checkpoint="bitmap", bitmap=name)
    return root


def checkpoint_disks(description: str) -> dict[str, bool]:
    """Return a checkpoint's disks, and of each whether its bitmap is there and sound.

    Args:
        description: as libvirt gives it when asked for sizes: a bitmap that can't be used has none.
    """
    listed = _parse(description).iterfind("./disks/disk[@checkpoint='bitmap']")
    return {disk.get("name", ""): disk.get("size") is not None for disk in listed}


def checkpoint_images(description: str) -> dict[str, str]:
    """Return the descriptions of the images that the domain's disks had when a checkpoint was made."""
    domain = _parse(description).find("./domain")
    return {} if domain is None else {disk.name: disk.description for disk in _disks(domain)}


def job_socket(job: str) -> str | None:
    """Return the path of the UNIX socket that a backup job is served at, or None."""
    server = _parse(job).find("./server[@transport='unix']")
    return None if server is None else server.get("socket")
