"""A virtual machine as a source: its disks, and one moment of all of them. Pure: types and names only.

A machine is asked in three steps. `disks` says what there is; `plan` how each would be read, and touches nothing;
`begin` makes the moment. What changed since a chain's last point is known by what *recorded* it: a dirty bitmap of
QEMU's, or a checkpoint of libvirt's. The moment starts a new recorder, reads by the old one, and lets the old one go
only when told that the point is published. In every other case the new one's record goes back into the old one.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from backupfs.sources.source import Source

PREFIX = "backupfs-"
_POINT = re.compile(r"\d{8}T\d{6}Z(-|$)", re.ASCII)  # what no chain's name goes on with


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of a machine.

    Attributes:
        name: as the point will call it: the target of libvirt's, the device's id of QEMU's.
        size: bytes.
        description: for messages and the plan: its image's path or node.
    """

    name: str
    size: int
    description: str


@dataclass(frozen=True, slots=True)
class Track:
    """One disk's chain, as far as a machine needs to know it.

    Attributes:
        recorder: the name of what has recorded since the chain's last point, out of its manifest; None when there is
            no last point, when nothing recorded since, or when all of the disk is to be read anyway.
        reason: why `recorder` is None, in words.
        domain_xml: libvirt's description of the machine at that point, if it was kept.
    """

    recorder: str | None
    reason: str
    domain_xml: str | None = None


@dataclass(frozen=True, slots=True)
class Recorders:
    """The names of one repository's chain's recorders: `backupfs-<repository>-<chain>-<point>-<token>`.

    Attributes:
        repository: the repository's id.
        chain: its name, as the user knows it.
        point: the id of the point that is being taken.
        disk: where each disk has a recorder of its own, its name, which is appended: two disks that changed places
            must not take each other's for their own.
        token: makes the name unique: two copies of a repository may take a point at the same time.
    """

    repository: str
    chain: str
    point: str
    disk: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    def of(self, disk: str) -> "Recorders":
        """Return the names of a disk's own recorders."""
        return replace(self, disk=disk)

    @property
    def new(self) -> str:
        """What records from this moment on."""
        return f"{self._prefix}{self.point}-{self.token}" + (f"-{self.disk}" if self.disk else "")

    @property
    def _prefix(self) -> str:
        return f"{PREFIX}{self.repository[:8]}-{self.chain}-"

    def owns(self, name: str) -> bool:
        """Say whether a recorder is this chain's, of whichever disk. A chain's name may have dashes in it."""
        return name.startswith(self._prefix) and bool(_POINT.match(name[len(self._prefix) :]))


class Moment(Protocol):
    """One moment of a machine, from `Machine.begin` to `close`.

    Attributes:
        sources: by disk. A source's `bitmap` is the old recorder's, or None with a `bitmap_problem` that says why all
            of the disk has to be read. Closed by `close`.
        recorders: by disk, the name of what records from this moment on; a disk where nothing does is not in it.
        consistency: `frozen` when the guest's file systems were.
        domain_xml: libvirt's description of the machine.
    """

    @property
    def sources(self) -> Mapping[str, Source]: ...
    @property
    def recorders(self) -> Mapping[str, str]: ...
    @property
    def consistency(self) -> Literal["crash", "frozen"]: ...
    @property
    def domain_xml(self) -> str | None: ...

    def check(self) -> None:
        """Called before the point is published, after everything was read.

        Raises:
            SourceError: the moment did not hold, so the point must not be published.
        """

    def published(self) -> None:
        """The point is there: `close` retires the old recorders. Does nothing else, and never raises."""

    def close(self) -> None:
        """Undo everything that `begin` set up; retire the old recorders, or, unless `published`, put the new ones'
        records back into them. Does as much as can be done, logs what could not, and never raises for that.
        """


class Machine(Protocol):
    """A virtual machine, running or not.

    Attributes:
        disks: what can be backed up, in the machine's order.
    """

    @property
    def disks(self) -> Sequence[MachineDisk]: ...

    def plan(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Mapping[str, str]:
        """Say for each disk in `tracks` why all of it has to be read; "" where the old recorder can be used.

        Touches nothing.

        Raises:
            SourceError: the machine can't be asked, or can't be backed up now (a migration, another's backup job).
        """

    def begin(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Moment:
        """Make one moment of all disks in `tracks`.

        Takes over first what a killed backup of the same chain left behind: its nodes, jobs and exports are removed,
        and its recorder's record goes into the one that is named in `tracks`.

        Raises:
            Locked: another backup of this machine is running.
            SourceError: it can't be made. Nothing is left behind, and nothing that was recorded is lost.
        """

    def close(self) -> None:
        """Let the connection to the machine go; first close the moment, if that was not done."""
