"""Taking one point of a VM: one moment of all its disks, read, stored and published. Whatever fails, nothing is
published, and whatever had recorded what changed goes on recording.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from backupfs import interrupts
from backupfs.errors import Corrupt, Missing, UsageError
from backupfs.repository import names
from backupfs.repository.manifest import DiskEntry, Manifest
from backupfs.repository.repository import Repository, Writer
from backupfs.repository.writer import ChainEnd
from backupfs.services.ingest import DiskBackup, Progress
from backupfs.sources import Source
from backupfs.sources.given import GivenDisks
from backupfs.sources.machine import Machine, Recorders, Track
from backupfs.sources.pushed import Overlay, PushedSource

AUDIT = 64  # chunks


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What the user asked for.

    Attributes:
        open: opens the machine; called when nobody else writes to the repository.
        moment: the point's time; None: now.
        since: the point that the bitmaps have recorded since; None: the chain's last one.
        audit: how many chunks that a bitmap calls clean are compared.
        full: start a new chain.
        chain: the chain's name as the user knows it.
        codec: what the chunks are tried with; None: the repository's.
    """

    vm: str
    open: Callable[[], Machine]
    moment: datetime | None = None
    since: str | None = None
    audit: int = AUDIT
    full: bool = False
    chain: str = "main"
    codec: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """What a backup would do with a disk: `reason` says why all of it is read, or why a chain begins; or is empty."""

    name: str
    size: int
    source: str
    kind: str
    read: str
    reason: str


def backup(
    repository: Repository, request: BackupRequest, progress: Progress, waiting: Callable[[str], None] | None = None
) -> Manifest:
    """Take and publish one point. Returns its manifest.

    Args:
        waiting: called once, with a message, when another process writes to the repository, and then this one waits;
            None: it is refused.

    Raises:
        UsageError: `since` is not where the chain ends.
        Locked: another process writes to the repository.
        SourceError: a disk can't be read; nothing was published.
        Corrupt: a disk's chain can't go on; nothing was published.
        RepositoryError: it can't be written; nothing was published.
    """
    published: list[Manifest] = []
    try:
        _backup(repository, request, progress, waiting, published)
    except KeyboardInterrupt:
        if not published:
            raise
        # Too late to break off: the point is there.
    return published[0]


def _backup(
    repository: Repository,
    request: BackupRequest,
    progress: Progress,
    waiting: Callable[[str], None] | None,
    published: list[Manifest],
) -> None:
    with repository.writer(waiting) as writer, contextlib.ExitStack() as stack:
        machine = request.open()
        stack.callback(machine.close)
        disks = _names(machine)
        ends = dict.fromkeys(disks) if request.full else _ends(writer, request, disks)
        _check_since(request, {d: end.point if end else None for d, end in ends.items()})
        tracks = {d: _track(repository, request, (end.point, end.entry) if end else None) for d, end in ends.items()}
        point = writer.begin(request.vm, request.moment or datetime.now(UTC), request.codec)
        stack.callback(point.abandon)
        recorders = Recorders(repository.settings.id, request.chain, point.id)
        moment = machine.begin(recorders, tracks)
        stack.callback(moment.close)
        point.consistency, point.domain_xml = moment.consistency, moment.domain_xml
        for disk in disks:
            end, source, audit = ends[disk], moment.sources[disk], request.audit
            # A machine's bitmap carries its point's id, and it knows its images' formats; else it is the user's word.
            known_since = tracks[disk].recorder is not None and disk in moment.recorders
            probed = isinstance(machine, GivenDisks)
            if isinstance(source, PushedSource):
                probed = False
                if not source.complete:
                    source, audit, known_since = _laid_over(request, source, end), 0, True
            taken = DiskBackup(
                disk,
                source,
                end,
                progress,
                known_since=known_since,
                probed=probed,
                audit=audit,
                new=tracks[disk].reason,
            )
            taken.take(writer, point, request.chain, moment.recorders.get(disk))
        moment.check()
        parents = [end.point for end in ends.values() if end]
        parent = max(parents, key=repository.points(request.vm).index, default=None)
        with interrupts.deferred():  # in between, the point is there and what records since it is not safe
            published.append(writer.commit(point, parent=parent))
            moment.published()


def plan(repository: Repository, request: BackupRequest) -> list[PlannedDisk]:
    """Say what `backup` would do. Touches neither the repository nor the machine. Raises as `backup`."""
    with contextlib.closing(request.open()) as machine:
        disks = _names(machine)
        ends = {d: None if request.full else repository.chain_end(request.vm, d, request.chain) for d in disks}
        _check_since(request, {d: end[0] if end else None for d, end in ends.items()})
        tracks = {d: _track(repository, request, end) for d, end in ends.items()}
        point = names.point_id(request.moment or datetime.now(UTC), 1)
        reasons = machine.plan(Recorders(repository.settings.id, request.chain, point), tracks)
        return [
            PlannedDisk(
                name=d.name,
                size=d.size,
                source=d.description,
                kind="delta" if ends[d.name] else "full",
                read="all" if reasons[d.name] or not ends[d.name] else "dirty",
                reason=reasons[d.name] if ends[d.name] else tracks[d.name].reason,
            )
            for d in machine.disks
        ]


def _laid_over(request: BackupRequest, pushed: PushedSource, end: ChainEnd | None) -> Source:
    """Return a disk after a pushed increment. Which moment that goes on from, nothing in the file says.

    Raises:
        UsageError: the caller does not say it either, or there is no such moment.
    """
    if end is None:
        raise UsageError(
            f"{pushed.description} does not hold all of the disk, so no chain can begin with it. If it is a full "
            "backup with holes, take it without --push; if it is an incremental one, take those before it first"
        )
    if request.since is None:
        raise UsageError(
            f"{pushed.description} is incremental: --since POINT has to say which point it goes on from. The chain "
            f"ends at {end.point}"
        )
    return Overlay(pushed, end.image)


def _names(machine: Machine) -> list[str]:
    return [names.check_name(disk.name, "disk") for disk in machine.disks]


def _ends(writer: Writer, request: BackupRequest, disks: list[str]) -> Mapping[str, ChainEnd | None]:
    """Return where the disks' chains end. Raises Corrupt."""
    try:
        return writer.chain_ends(request.vm, disks, request.chain)
    except Corrupt as e:
        # Nothing can be compared with what can't be read; but tonight's backup need not wait until that is put right.
        what = f"{e.what}. The chain can't go on from there; --full begins a new one"
        raise (Missing(e.file, what) if isinstance(e, Missing) else Corrupt(e.file, e.offset, what)) from e


def _track(repository: Repository, request: BackupRequest, end: tuple[str, DiskEntry] | None) -> Track:
    """Say what has recorded since the chain's last point."""
    if end is None:
        return Track(None, "a new chain was asked for" if request.full else "the first point of its chain")
    point, entry = end
    if not entry.recorder:
        return Track(None, "nothing has recorded since the chain's last point")
    return Track(entry.recorder, "", repository.manifest(request.vm, point).domain_xml)


def _check_since(request: BackupRequest, ends: Mapping[str, str | None]) -> None:
    """Refuse when a chain ends elsewhere than at `request.since`. `ends`: by disk, the last point's id."""
    if request.since is None:
        return
    for disk, end in ends.items():
        if end != request.since:
            where = f"ends at {end}" if end else "has no point yet"
            raise UsageError(
                f"--since {request.since}: chain {request.chain} of {request.vm}/{disk} {where}; what a bitmap "
                "recorded since another point can't continue it"
            )
