"""Disks that the user names one by one, as a machine: files and exports whose moment is somebody else's care."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from backupfs.sources import Source, open_source
from backupfs.sources.machine import MachineDisk, Recorders, Track
from backupfs.sources.pushed import open_pushed


@dataclass(frozen=True, slots=True)
class GivenDisk:
    """A disk to take.

    Attributes:
        source: where it comes from, a path or an NBD URI.
        bitmap: the one that says what changed.
        pushed: `source` is a file that a push-mode backup wrote.
    """

    name: str
    source: str
    bitmap: str | None
    pushed: bool = False


@dataclass(slots=True)
class _Given:
    """The opened sources: a Moment that there is nothing to set up or to undo for."""

    sources: Mapping[str, Source]
    recorders: Mapping[str, str] = field(default_factory=dict)
    consistency: Literal["crash", "frozen"] = "crash"
    domain_xml: str | None = None

    def check(self) -> None:
        """See `Moment.check`."""

    def published(self) -> None:
        """See `Moment.published`."""

    def close(self) -> None:
        """See `Moment.close`: the machine closes the sources."""


class GivenDisks:
    """The sources, opened. A Machine.

    Args:
        disks: what to open.
        timeout_s: how long a source may be silent.

    Raises:
        SourceError: one can't be opened.
    """

    def __init__(self, disks: Sequence[GivenDisk], timeout_s: float = 30.0) -> None:
        sources: dict[str, Source] = {}
        with ExitStack() as undo:
            for disk in disks:
                source: Source
                if disk.pushed:
                    source = open_pushed(disk.source, timeout_s)
                else:
                    source = open_source(disk.source, disk.bitmap, timeout_s=timeout_s)
                sources[disk.name] = source
                undo.callback(source.close)
            self._undo = undo.pop_all()
        self._moment = _Given(sources)
        self.disks = [MachineDisk(name, source.size, source.description) for name, source in sources.items()]

    def plan(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Mapping[str, str]:
        """See `Machine.plan`."""
        return {name: _reason(source, tracks[name]) for name, source in self._moment.sources.items()}

    def begin(self, recorders: Recorders, tracks: Mapping[str, Track]) -> _Given:
        """See `Machine.begin`."""
        return self._moment

    def close(self) -> None:
        """See `Machine.close`."""
        self._undo.close()


def _reason(source: Source, track: Track) -> str:
    if source.bitmap_problem or source.bitmap is None:
        return source.bitmap_problem or "no bitmap was named"
    return ""
