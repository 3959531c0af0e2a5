"""Volume groups: which logical volumes there are on the physical volumes of a point's disks, and where each lies.

Linear and striped segments are read. Whatever else a visible logical volume is made of, or what of it is missing, it is
a problem with its name. The volumes that others are made of, which LVM hides, are left out.

Of several texts of a group the one with the highest number counts, as for LVM.

Source: LVM2, lib/format_text/import_vsn1.c, lib/striped/striped.c; lvmraid(7), lvmthin(7).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote

from backupfs.errors import BackupfsError
from backupfs.guest import lvm_text
from backupfs.guest.lvm import LARGEST_TEXT, UUID, PhysicalVolume
from backupfs.guest.lvm_text import BadText, Scalar, Section
from backupfs.guest.volumes import Leg, Run, Volume, joined

_SECTOR = 512
_SMALLEST_STRIPE = 4096
_LONGEST_NAME = 240  # bytes of a file's name, without its suffix
_LARGEST = 1 << 62  # bytes of a volume
_MOST_TEXT = 2 * LARGEST_TEXT  # bytes that are read of all groups together: some seconds
_LINEAR_OR_STRIPED = ("striped", "linear")
_HARMLESS = ("READ", "WRITE", "VISIBLE", "FIXED_MINOR", "LOCKED")  # of a logical volume's states


@dataclass(frozen=True, slots=True)
class VolumeGroup:
    """What a volume group comes to.

    Args:
        disks: names of those that have a part of the group, each once.
        volumes: the logical volumes that can be read.
        problems: why others can't, each in a line.
    """

    disks: tuple[str, ...]
    volumes: tuple[Volume, ...]
    problems: tuple[str, ...]


class Refused(BackupfsError):
    """A logical volume, or a group, can't be read right."""


def read_groups(found: Sequence[PhysicalVolume]) -> list[VolumeGroup]:
    """Return the volume groups of the physical volumes that a point's disks have."""
    by_uuid: dict[str, list[PhysicalVolume]] = {}
    texts: dict[bytes, list[PhysicalVolume]] = {}
    for volume in found:
        by_uuid.setdefault(volume.uuid, []).append(volume)
        for text in volume.texts:
            texts.setdefault(text, []).append(volume)
    groups: list[VolumeGroup] = []
    newest: dict[str, list[_Group]] = {}
    unread = {volume.uuid for volume in found if volume.unread}
    room = _MOST_TEXT
    for text, holders in texts.items():
        room -= len(text)
        try:
            if room < 0:
                raise BadText("there is too much of it")
            group = _Group(text, by_uuid)
        except BackupfsError as e:
            unread |= {holder.uuid for holder in holders}
            groups.append(VolumeGroup(_disks(holders), (), (f"the metadata of an LVM volume group is not read: {e}",)))
            continue
        if not {holder.uuid for holder in holders} & group.uuids:
            continue  # left on a physical volume that has been taken out of the group
        rivals = newest.setdefault(group.uuid, [])
        if not rivals or group.number > rivals[0].number:
            newest[group.uuid] = [group]
        elif group.number == rivals[0].number and group.content != rivals[0].content:
            rivals.append(group)
    groups += [_read_group(rivals, unread) for rivals in newest.values()]
    return _told_apart(groups)


def _read_group(rivals: list["_Group"], unread: set[str]) -> VolumeGroup:
    disks = dict.fromkeys(disk for group in rivals for disk in group.disks)
    if len(rivals) > 1:
        problem = "two texts, different and with one number, describe it"
    elif rivals[0].uuids & unread:
        problem = "there may be a newer text of its metadata, which is not read"
    else:
        return rivals[0].read()
    return VolumeGroup(tuple(disks), (), (f"{rivals[0].shown}: {problem}",))


def _told_apart(groups: list[VolumeGroup]) -> list[VolumeGroup]:
    """Refuse the logical volumes that would have the name of another one in a disk's folder."""
    count = Counter((disk, volume.name) for group in groups for volume in group.volumes for disk in volume.disks)
    told = []
    for group in groups:
        twice = {v.name for v in group.volumes if any(count[disk, v.name] > 1 for disk in v.disks)}
        problems = (f"{name}: several logical volumes have that name" for name in sorted(twice))
        volumes = tuple(v for v in group.volumes if v.name not in twice)
        told.append(VolumeGroup(group.disks, volumes, (*group.problems, *problems)))
    return told


class _Group:
    """One text of a volume group.

    Raises:
        BackupfsError: it is not read.
    """

    def __init__(self, text: bytes, by_uuid: Mapping[str, list[PhysicalVolume]]) -> None:
        # Latin 1 takes any byte; names with other characters than LVM allows are escaped.
        root = lvm_text.parse(text.rstrip(b"\0").decode("latin-1"))
        sections = [(name, value) for name, value in root.items() if isinstance(value, dict)]
        if root.get("contents") != "Text Format Volume Group" or root.get("version") != 1 or len(sections) != 1:
            raise BadText("it is not that of a volume group, version 1")
        self.name, self.content = sections[0]
        self.shown = escape(self.name)
        self.number = _number(self.content, "seqno")
        self.uuid = _uuid(self.content)
        self._extent = _number(self.content, "extent_size") * _SECTOR
        self._members = _sections(self.content, "physical_volumes")
        self._logical = _sections(self.content, "logical_volumes")
        self._found = {name: by_uuid.get(_uuid(member), []) for name, member in self._members.items()}
        self.uuids = {_uuid(member) for member in self._members.values()}
        self.disks = _disks(volume for volumes in self._found.values() for volume in volumes)
        if self.content.get("format", "lvm2") != "lvm2" or not self._extent:
            raise BadText("it is of another format than lvm2")

    def read(self) -> VolumeGroup:
        """Return what there is in it."""
        volumes, problems = [], []
        copies = self._snapshots()
        for name, logical in self._logical.items():
            try:
                states = _list(logical, "status")
                if "VISIBLE" not in states:
                    continue
                strange = [state for state in states if state not in _HARMLESS]
                if strange:
                    raise Refused(f"its state {escape(str(strange[0]))[:60]} is not supported")
                if name in copies:
                    raise Refused(f"{copies[name]} are not supported")
                volumes.append(Volume(volume_name(self.name, name), joined(self._runs(logical))))
            except BackupfsError as e:
                problems.append(f"{self.shown}/{escape(name)}: {e}")
        return VolumeGroup(self.disks, tuple(volumes), tuple(problems))

    def _snapshots(self) -> dict[str, str]:
        """Return what a snapshot has made of logical volumes that look like others, by their names."""
        found: dict[str, str] = {}
        for logical in self._logical.values():
            for segment in _segments(logical):
                if segment.get("type") == "snapshot":
                    found |= {str(segment.get(key)): "snapshots" for key in ("cow_store", "merging_store")}
                    if "merging_store" in segment:
                        found[str(segment.get("origin"))] = "volumes that a snapshot is being merged into"
        return found

    def _runs(self, logical: Section) -> Iterator[Run]:
        segments = sorted(_segments(logical), key=lambda segment: _number(segment, "start_extent"))
        end = 0
        for segment in segments:
            kind = segment.get("type", "striped")
            if kind not in _LINEAR_OR_STRIPED:
                raise Refused(f"logical volumes of type {escape(str(kind))[:60]} are not supported")
            count = _number(segment, "extent_count")
            if _number(segment, "start_extent") != end or not count:
                raise Refused("its segments do not follow each other without a gap")
            end += count
            yield self._run(segment, count)
        if not end or len(segments) != _number(logical, "segment_count"):
            raise Refused("segments are missing")
        if end * self._extent > _LARGEST:
            raise Refused("it is too large")

    def _run(self, segment: Section, count: int) -> Run:
        areas = _list(segment, "stripes")
        legs = len(areas) // 2
        if not legs or len(areas) != 2 * _number(segment, "stripe_count") or count % legs:
            raise Refused("a segment's stripes do not fit its length")
        stripe = _number(segment, "stripe_size") * _SECTOR if legs > 1 else 0
        each = count // legs
        if legs > 1 and (stripe < _SMALLEST_STRIPE or each * self._extent % stripe):
            raise Refused(f"a segment has stripes of {stripe} bytes")
        places = tuple(self._leg(areas[i], areas[i + 1], each) for i in range(0, len(areas), 2))
        return Run(count * self._extent, places, stripe)

    def _leg(self, name: Scalar, first: Scalar, count: int) -> Leg:
        if not isinstance(name, str) or not isinstance(first, int) or first < 0:
            raise Refused("a segment names no place")
        if name not in self._members:
            raise Refused(f"it lies on the logical volume {escape(name)[:60]}, not on a physical one")
        member, found = self._members[name], self._found[name]
        if not found:
            raise Refused(f"its physical volume {escape(name)} ({_uuid(member)}) is on no disk of this point")
        if len(found) > 1:
            raise Refused(f"its physical volume {escape(name)} ({_uuid(member)}) is on several disks or partitions")
        offset = _number(member, "pe_start") * _SECTOR + first * self._extent
        if first + count > _number(member, "pe_count") or offset + count * self._extent > found[0].length:
            raise Refused(f"it reaches beyond the end of its physical volume {escape(name)}")
        return Leg(found[0].disk, found[0].offset + offset)


def volume_name(group: str, logical: str) -> str:
    """Return what /dev/mapper calls a logical volume, escaped.

    Raises:
        Refused: that is too long.
    """
    name = f"{_escape_mapped(group)}-{_escape_mapped(logical)}"
    if len(name) > _LONGEST_NAME:
        raise Refused("its name is too long")
    return name


def escape(name: str) -> str:
    """Return a name that the guest made up so that it can be printed: all but what LVM allows is percent-encoded."""
    return quote(name.encode("latin-1", errors="replace"), safe="+")


def _escape_mapped(name: str) -> str:
    return escape(name).replace("-", "--")


def _disks(volumes: Iterable[PhysicalVolume]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(volume.disk for volume in volumes))


def _number(section: Section, key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or value < 0:
        raise BadText(f"there is no number {key}")
    return value


def _list(section: Section, key: str) -> list[Scalar]:
    value = section.get(key)
    if not isinstance(value, list):
        raise BadText(f"there is no list {key}")
    return value


def _sections(section: Section, key: str) -> dict[str, Section]:
    inner = section.get(key, {})
    if not isinstance(inner, dict) or not all(isinstance(value, dict) for value in inner.values()):
        raise BadText(f"{key} is not made of sections")
    return cast(dict[str, Section], inner)


def _segments(logical: Section) -> list[Section]:
    return [value for value in logical.values() if isinstance(value, dict)]


def _uuid(section: Section) -> str:
    value = section.get("id")
    uuid = value.replace("-", "") if isinstance(value, str) else ""
    if not UUID.fullmatch(uuid):
        raise BadText("there is no id")
    return uuid
