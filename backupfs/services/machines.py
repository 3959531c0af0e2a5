"""Which machine a backup is taken from, by what the user named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from backupfs.errors import UsageError
from backupfs.repository import names
from backupfs.sources.given import GivenDisk, GivenDisks
from backupfs.sources.machine import Machine

TIMEOUT_S = 30.0  # how long a source may be silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user named: disks one by one, or a QMP socket, or a domain of libvirt's.

    Attributes:
        disks: sources, by the disk's name.
        bitmaps: by the disk's name.
        qmp: the path of a QMP socket.
        libvirt: a connection URI.
        domain: its name.
        only: the disks of a running machine that are wanted; none: all.
        freeze: whether the guest's file systems are frozen for the moment.
        scratch: a folder, for what the guest overwrites meanwhile.
        push: `disks` are files that a push-mode backup wrote.
    """

    disks: Mapping[str, str]
    bitmaps: Mapping[str, str]
    qmp: str | None
    libvirt: str | None
    domain: str
    only: Sequence[str]
    freeze: Literal["auto", "never", "require"]
    scratch: str
    push: bool


def opener(wanted: Wanted) -> Callable[[], Machine]:
    """Return what opens the machine.

    Raises:
        UsageError: what was named does not fit together.
    """
    ways = [
        way
        for way, named in (("DISK=SOURCE", wanted.disks), ("--qmp", wanted.qmp), ("--libvirt", wanted.libvirt))
        if named
    ]
    if len(ways) != 1:
        found = f"both {' and '.join(ways)}" if ways else "nothing"
        raise UsageError(
            f"name what to back up, in one way: DISK=SOURCE…, --qmp SOCKET or --libvirt URI; {found} is named"
        )
    if wanted.freeze == "require" and not wanted.libvirt:
        raise UsageError("--freeze require is for --libvirt: it asks the guest agent; by another way nothing is frozen")
    if wanted.disks:
        return _given(wanted)
    if wanted.push:
        raise UsageError("--push is for files, as DISK=SOURCE")
    if wanted.bitmaps:
        raise UsageError("--bitmap is for DISK=SOURCE: a running machine's bitmaps are kept by backupfs itself")
    qmp, uri = wanted.qmp, wanted.libvirt
    if qmp is not None:
        from backupfs.sources.qmp import open_qmp  # noqa: PLC0415, asyncio is not needed for files

        return lambda: open_qmp(qmp, wanted.only or None, scratch=wanted.scratch, timeout_s=TIMEOUT_S)
    assert uri is not None, "the third way"
    from backupfs.sources.domain import open_domain  # noqa: PLC0415, libvirt is not needed for the others

    return lambda: open_domain(
        uri, wanted.domain, wanted.only or None, freeze=wanted.freeze, scratch=wanted.scratch, timeout_s=TIMEOUT_S
    )


def _given(wanted: Wanted) -> Callable[[], Machine]:
    if wanted.only:
        raise UsageError("--disk is for --qmp and --libvirt; name only the disks that you want as DISK=SOURCE")
    for disk in wanted.bitmaps.keys() - wanted.disks.keys():
        raise UsageError(f"--bitmap {disk}=…: no such disk in this backup")
    if wanted.push and wanted.bitmaps:
        raise UsageError("--push and --bitmap do not go together: a pushed file says itself what changed")
    given = [
        GivenDisk(names.check_name(d, "disk"), s, wanted.bitmaps.get(d), wanted.push) for d, s in wanted.disks.items()
    ]
    return lambda: GivenDisks(given, TIMEOUT_S)
