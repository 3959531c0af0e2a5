"""Points of a running machine, taken without a repository: what a chain would hold, compared with what there was."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from guest import Machine
from qmp_client import Refused

from backupfs.sources.machine import Moment, Recorders, Track
from backupfs.sources.qmp import open_qmp
from backupfs.sources.source import Source

REPOSITORY = "0123456789abcdef0123456789abcdef"
_numbers = itertools.count()


def content(source: Source) -> bytes:
    """Read all of a source."""
    buffer = bytearray(source.size)
    source.readinto(0, buffer)
    return bytes(buffer)


class Chain:
    """A chain: what its last point holds of each disk, and what has recorded since.

    Args:
        scratch: a folder for backupfs.
    """

    def __init__(self, scratch: Path, name: str = "main", repository: str = REPOSITORY) -> None:
        self.scratch = scratch
        self.name = name
        self.repository = repository
        self.disks: dict[str, bytes] = {}
        self.recorders: dict[str, str] = {}
        self.reasons: Mapping[str, str] = {}

    def next(self) -> Recorders:
        """Return the names of the next point's recorders."""
        return Recorders(self.repository, self.name, f"20260101T{next(_numbers):06d}Z")

    def take(
        self,
        machine: Machine,
        during: Callable[[Moment], object] = lambda moment: None,
        *,
        wanted: Sequence[str] | None = None,
        publish: bool = True,
        timeout_s: float = 20.0,
    ) -> dict[str, bytes]:
        """Take a point, call `during` between the moment and the reading, and return what the disks held.

        What the chain would hold (its last point, and what is dirty since) has to be the same.
        """
        opened = open_qmp(machine.qmp_path, wanted, scratch=str(self.scratch), timeout_s=timeout_s)
        try:
            tracks = {d.name: Track(self.recorders.get(d.name), "no recorder yet") for d in opened.disks}
            recorders = self.next()
            planned = opened.plan(recorders, tracks)
            moment = opened.begin(recorders, tracks)
            try:
                during(moment)
                found = {name: content(source) for name, source in moment.sources.items()}
                self.reasons = {name: source.bitmap_problem or "" for name, source in moment.sources.items()}
                assert {name: bool(reason) for name, reason in planned.items()} == {
                    name: bool(reason) for name, reason in self.reasons.items()
                }
                for name, source in moment.sources.items():
                    assert self._patched(name, source, found[name]) == found[name], name
                moment.check()
                if publish:
                    moment.published()
                    self.disks.update(found)
                    self.recorders.update(moment.recorders)
            finally:
                moment.close()
        finally:
            opened.close()
        return found

    def _patched(self, name: str, source: Source, new: bytes) -> bytes:
        """Return the last point's content with what is dirty taken from `new`."""
        if source.bitmap is None:
            return new
        result = bytearray(self.disks[name].ljust(source.size, b"\0"))
        for extent in source.dirty(0, source.size):
            if extent.flag:
                result[extent.offset : extent.end] = new[extent.offset : extent.end]
        return bytes(result)


def assert_clean(machine: Machine, *chains: Chain) -> None:
    """Make sure that QEMU has nothing of ours but the recorders of these chains, and that the guest runs."""
    nodes = machine.qmp("query-named-block-nodes", flat=True)
    assert [n["node-name"] for n in nodes if n["node-name"].startswith("backupfs-")] == []
    assert machine.qmp("query-jobs") == []
    assert machine.qmp("query-block-exports") == []
    bitmaps = sorted(b["name"] for n in nodes for b in n.get("dirty-bitmaps", ()))
    assert bitmaps == sorted(r for chain in chains for r in chain.recorders.values())
    assert all(b["recording"] for n in nodes for b in n.get("dirty-bitmaps", ()))
    with pytest.raises(Refused, match="not running"):
        machine.qmp("nbd-server-stop")
    assert machine.qmp("query-status")["status"] == "running"
    for chain in chains:
        assert list(chain.scratch.iterdir()) == []
