"""A running domain: libvirt's backup job in pull mode, and the checkpoints that record what changes.

A checkpoint is a bitmap of its own name on each of its disks. All of them record at all times, so deleting one takes
nothing from another (libvirt >= 6.10), and several chains and other programs' checkpoints live side by side. What a
disk changed since its chain's last point is in that point's checkpoint until a later point is published.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.parse import quote

from backupfs import interrupts
from backupfs.errors import BackupfsError, ConnectError, Locked, SourceError
from backupfs.sources import domain_folder, domain_xml
from backupfs.sources.domain_checkpoints import Checkpoints
from backupfs.sources.domain_folder import Folder
from backupfs.sources.domain_moment import DomainMoment
from backupfs.sources.export import NbdSource
from backupfs.sources.machine import MachineDisk, Recorders, Track
from backupfs.sources.source import Source

if TYPE_CHECKING:
    from backupfs.sources.domain import Domain, Freeze

log = logging.getLogger(__name__)

_BITMAP = "changed"  # the export's name for the changes; it is on the scratch file's node, where no other bitmap is
_POLL_S = 0.02
_WATCH_S = 0.25


class RunningDomain:
    """A domain that runs, or is paused. A Machine. Made by `open_domain` only."""

    def __init__(
        self,
        domain: "Domain",
        disks: Sequence[domain_xml.DomainDisk],
        *,
        freeze: "Freeze",
        scratch: str,
        timeout_s: float,
    ) -> None:
        self._domain = domain
        self._freeze = freeze
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._begun: DomainMoment | None = None
        self._formats = {disk.name: disk.image_format for disk in disks}
        self._io_thread = {disk.name: disk.io_thread for disk in disks}
        self._checkpoints = Checkpoints(domain, disks, timeout_s)
        self.disks = [MachineDisk(d.name, domain.disk_size(d.name), d.description) for d in disks]

    def plan(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Mapping[str, str]:
        """See `Machine.plan`. libvirt is told of a checkpoint that it lost, asked about it, and made to forget it."""
        self._refuse_if_busy(tracks)
        self._agent()
        return self._checkpoints.problems(recorders, tracks, keep=False)

    def begin(self, recorders: Recorders, tracks: Mapping[str, Track]) -> DomainMoment:
        """See `Machine.begin`."""
        self._refuse_if_busy(tracks)
        freeze = self._agent()
        self._take_over(recorders, tracks)
        problems = self._checkpoints.problems(recorders, tracks, keep=True)
        recorded = [name for name in tracks if self._checkpoints.can_record(name)]
        with ExitStack() as undo:
            new = _New(self._checkpoints, recorders, list(tracks))
            undo.callback(new.settle)
            description = self._domain.xml()
            folder = Folder.make(self._scratch, self._domain.uuid, domain_xml.qemu_user(description))
            job = _Job(self._domain, folder, self._timeout_s)
            undo.callback(job.end)
            old = {name: t.recorder for name, t in tracks.items() if t.recorder and not problems[name]}
            backup = domain_xml.backup(
                folder.socket, {name: folder.scratch_file(n) for n, name in enumerate(tracks)}, old, _BITMAP
            )
            checkpoint = domain_xml.checkpoint(recorders.new, recorded) if recorded else None
            frozen = self._domain.begin_backup(backup, checkpoint, freeze, folder)
            sources: dict[str, Source] = {}
            for name in tracks:
                source = sources[name] = self._open(folder, name, incremental=name in old)
                undo.callback(source.close)
                source.bitmap_problem = problems[name] or source.bitmap_problem
            job.watch(list(sources.values()))
            self._begun = DomainMoment(
                sources=sources,
                recorders=dict.fromkeys(recorded, recorders.new),
                consistency="frozen" if frozen else "crash",
                domain_xml=description,
                holds=job.check,
                publish=new.publish,
                undo=undo.pop_all(),
            )
            return self._begun

    def _open(self, folder: Folder, name: str, *, incremental: bool) -> NbdSource:
        uri = f"nbd+unix:///{quote(name, safe='')}?socket={quote(folder.socket)}"
        bitmap = _BITMAP if incremental else None
        try:
            source = NbdSource(uri, bitmap, self._timeout_s, description=f"{self._domain.name}/{name}")
        except ConnectError as e:
            raise ConnectError(f"{e} (does this libvirt run on this host, and see {self._scratch}?)") from e
        source.format = self._formats[name]
        return source

    def close(self) -> None:
        """See `Machine.close`."""
        if self._begun is not None:
            self._begun.close()
        self._domain.close()

    def _refuse_if_busy(self, disks: Iterable[str]) -> None:
        """Refuse while something goes on that a backup can't go with; another program's backup, for one."""
        domain = self._domain
        threaded = [disk for disk in disks if self._io_thread[disk]]
        if threaded and domain.qemu_version() < (9, 0):
            raise ConnectError(
                f"domain {domain.name}: {', '.join(threaded)} runs in an I/O thread; QEMU before 9.0 crashes when a "
                "backup of such a disk ends: nothing was done. Leave the disk out with --disk, or its device's iothread"
            )
        problem = domain.job()
        if problem:
            raise ConnectError(f"domain {domain.name}: {problem}: try again when that is over")
        job = domain.backup_job()
        if job is not None:
            gone = domain_folder.owner_is_gone(domain_xml.job_socket(job) or "")
            if gone is None:
                raise ConnectError(
                    f"domain {domain.name}: another program's backup goes on (virsh backup-dumpxml shows it): "
                    "try again when it is over"
                )
            if not gone:
                raise Locked(f"domain {domain.name}: another backupfs takes a backup of it: try again later")
            return
        for disk in disks:
            if domain.has_block_job(disk):
                raise ConnectError(f"domain {domain.name}: a block job goes on at {disk}: try again when it is over")

    def _agent(self) -> "Freeze":
        """Return how to freeze: `auto` becomes `never` where no agent is connected."""
        if self._freeze == "never":
            return "never"
        state = domain_xml.agent_state(self._domain.xml())
        if state == "connected":
            return self._freeze
        if self._freeze == "auto":
            return "never"
        problem = "has no channel for a guest agent" if state is None else "has a guest agent that is not connected"
        raise ConnectError(f"domain {self._domain.name} {problem}: its file systems can't be frozen")

    def _take_over(self, recorders: Recorders, tracks: Mapping[str, Track]) -> None:
        """End what a backup that was killed left behind, and delete its checkpoints."""
        places = {self._scratch}
        job = self._domain.backup_job()
        socket = domain_xml.job_socket(job) if job is not None else None
        if socket is not None and domain_folder.owner_is_gone(socket):
            log.info("domain %s: ending the job of a backup that was killed", self._domain.name)
            end_job(self._domain, self._timeout_s)
            places.add(domain_folder.place_of(socket))
        for place in places:
            for folder in domain_folder.abandoned(place, self._domain.uuid):
                if folder.frozen:
                    _attempt(self._domain.thaw)
                folder.remove()
        # Of a disk that is read in full nobody says which checkpoint its chain may still need.
        known = {name: track.recorder for name, track in tracks.items() if track.recorder}
        self._checkpoints.retire(recorders, known, set(known.values()))


def end_job(domain: "Domain", timeout_s: float) -> None:
    """End the backup job, wait until it is over, and let a guest that it stopped go on.

    No client may be connected to QEMU's export: QEMU 7.2 with Debian's fix of CVE-2024-7409 hangs for ever, and the
    guest with it, when one is in the middle of the handshake.
    """
    domain.abort_job()
    deadline = time.monotonic() + timeout_s
    while domain.backup_job() is not None:
        if time.monotonic() > deadline:
            raise ConnectError(f"domain {domain.name}: the backup job did not end within {timeout_s:g} s")
        time.sleep(_POLL_S)
    if domain.is_stopped_by_an_error():
        log.warning("domain %s: resuming it: a write failed for want of space for the backup", domain.name)
        domain.resume()


class _Job:
    """The backup job, its folder, and a thread that ends the job before the scratch files fill the file system."""

    def __init__(self, domain: "Domain", folder: Folder, timeout_s: float) -> None:
        self._domain = domain
        self._folder = folder
        self._timeout_s = timeout_s
        self._problem = ""
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self, sources: Sequence[Source]) -> None:
        """Begin to watch the space; the sources are closed when it is gone."""
        self._watcher = threading.Thread(target=self._watch, args=(sources,), name="scratch space", daemon=True)
        self._watcher.start()

    def _watch(self, sources: Sequence[Source]) -> None:
        while not self._over.wait(_WATCH_S):
            if self._folder.free() > 0:
                continue
            self._problem = f"{self._folder.path} filled up: name a larger place with --scratch"
            log.warning("domain %s: ending the backup: %s", self._domain.name, self._problem)
            for source in sources:
                source.close()
            _attempt(lambda: end_job(self._domain, self._timeout_s))
            return

    def check(self) -> None:
        """See `Moment.check`."""
        if self._problem or not self.is_on():
            problem = self._problem or "the backup job ended before everything was read"
            raise SourceError(f"domain {self._domain.name}: {problem}")

    def is_on(self) -> bool:
        """Whether this job goes on, and no other."""
        if not self._domain.is_active():
            return False
        job = self._domain.backup_job()
        return job is not None and domain_xml.job_socket(job) == self._folder.socket

    def end(self) -> None:
        """End it and remove the folder. When that can't be done, the folder is left for the next backup to find."""
        with interrupts.deferred():
            self._over.set()
            if self._watcher is not None:
                self._watcher.join()
            try:
                if self.is_on():
                    end_job(self._domain, self._timeout_s)
            except BackupfsError as e:
                log.warning("%s: the next backup will end this one's job", e)
                self._folder.leave()
                return
            if self._folder.frozen:
                self._folder.leave()  # the next backup thaws
            else:
                self._folder.remove()


class _New:
    """The new checkpoint, until it is known whether it or the old ones stay."""

    def __init__(self, checkpoints: Checkpoints, recorders: Recorders, disks: Sequence[str]) -> None:
        self._checkpoints = checkpoints
        self._recorders = recorders
        self._disks = disks
        self._published = False

    def publish(self) -> None:
        """Say that the point is there."""
        self._published = True

    def settle(self) -> None:
        """Delete the old ones when the point is published, else the new one."""
        with interrupts.deferred():
            self._settle()

    def _settle(self) -> None:
        if self._published:
            _attempt(lambda: self._checkpoints.retire(self._recorders, self._disks, {self._recorders.new}))
        else:
            _attempt(lambda: self._checkpoints.delete(self._recorders.new))


def _attempt(function: Callable[[], None]) -> None:
    try:
        function()
    except BackupfsError as e:
        log.warning("%s", e)
