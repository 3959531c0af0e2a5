"""A running QEMU as a machine to back up, by its monitor alone.

A point: what a killed backup left is taken over, the scratch is set up, the moment is made (fleecing.py), in which the
bitmaps are turned (recording.py), and the disks are read by NBD. After it everything is undone by what QEMU says is
there, not by what was done: so it does not matter where a command that was not answered got to. A chain's old recorder
goes when the point is published; otherwise what was recorded since goes back into it.
"""

import logging
import os
from collections.abc import Mapping, Sequence

from backupfs import interrupts
from backupfs.errors import Locked, NotFound, SourceError
from backupfs.sources import recording, scratch
from backupfs.sources.fleecing import (
    Fleeced,
    ask_blocks,
    ask_list,
    ask_status,
    dismantle,
    has_filter,
    has_iothread,
    sessions,
)
from backupfs.sources.machine import MachineDisk, Recorders, Track
from backupfs.sources.monitor import Monitor, Refused
from backupfs.sources.qmp_moment import QmpMoment, submit
from backupfs.sources.vm_nodes import Blocks, Device, Node, pick

log = logging.getLogger(__name__)

_MIGRATES = ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "colo")
_JOBS = ("commit", "stream", "mirror", "backup", "amend", "snapshot-load", "snapshot-save", "snapshot-delete")
_ENDED = ("concluded", "null")
# Before, QEMU aborted, and its guest with it, when a client left the NBD export of a disk in an I/O thread (seen with
# 7.2). Source: QEMU commit 075e7a5b, "nbd/server: only traverse NBDExport->clients from main loop thread"
_IOTHREADS = (9, 0, 0)


def open_qmp(socket_path: str, disks: Sequence[str] | None, *, scratch: str, timeout_s: float = 30.0) -> "QmpMachine":
    """Connect to a running QEMU. It serves nobody else at this socket until `close`.

    Args:
        socket_path: its QMP socket.
        disks: which; None: all that the guest can write and that are not removable.
        scratch: the folder for what the guest overwrites while it is backed up; not where the guest's disks are.
        timeout_s: how long QEMU may be silent.

    Raises:
        ConnectError: no QEMU answers there.
        NotFound: there is no such disk, or none at all.
        UsageError: a disk that is named can't be backed up.
        ProtocolError: what answers talks nonsense.
    """
    monitor = Monitor(socket_path, timeout_s)
    try:
        return QmpMachine(monitor, disks, scratch, timeout_s)
    except BaseException:
        monitor.close()
        raise


class QmpMachine:
    """A running QEMU. A Machine; see there. Made by `open_qmp`."""

    def __init__(self, monitor: Monitor, disks: Sequence[str] | None, scratch: str, timeout_s: float) -> None:
        self._monitor = monitor
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._begun: QmpMoment | None = None
        blocks = ask_blocks(monitor)
        devices = pick(blocks, disks)
        if not devices:
            raise NotFound(f"{monitor.path}: the machine has no disk that could be backed up")
        images = [(device.name, blocks.image(device)) for device in devices]
        self.disks: Sequence[MachineDisk] = [MachineDisk(name, image.size, image.file) for name, image in images]

    def plan(self, recorders: Recorders, tracks: Mapping[str, Track]) -> Mapping[str, str]:
        """See `Machine.plan`."""
        blocks = ask_blocks(self._monitor)
        self._refuse(blocks, tracks)
        return self._problems(blocks, recorders, tracks, held=bool(sessions(self._monitor, blocks)))

    def _problems(
        self, blocks: Blocks, recorders: Recorders, tracks: Mapping[str, Track], *, held: bool = False
    ) -> dict[str, str]:
        images = {blocks.image(device).name for device in blocks.devices}
        elsewhere = [node for name, node in blocks.nodes.items() if name not in images]
        return {
            device.name: recording.problem(image, recorders.of(device.name), tracks[device.name], elsewhere, held=held)
            for device, image in self._images(blocks, tracks)
        }

    @staticmethod
    def _images(blocks: Blocks, tracks: Mapping[str, Track]) -> list[tuple[Device, Node]]:
        return [(device, blocks.image(device)) for device in pick(blocks, list(tracks))]

    def _refuse(self, blocks: Blocks, tracks: Mapping[str, Track]) -> None:
        """Raise SourceError when the machine can't be backed up now."""
        path = self._monitor.path
        migration = ask_status(self._monitor, "query-migrate")
        if migration == "completed":  # on this host, or from this host: there it stays paused
            status = str(self._monitor.execute("query-status")["status"])
            migration = "completed, away" if status in ("postmigrate", "inmigrate") else "none"
        if migration in (*_MIGRATES, "completed, away") or migration.startswith("postcopy"):
            raise SourceError(
                f"{path}: the machine is being migrated, or has been ({migration}): back it up afterwards"
            )
        for job in ask_list(self._monitor, "query-jobs", "id", "type", "status"):
            if job["type"] in _JOBS and job["status"] not in _ENDED and not scratch.session_of(job["id"]):
                raise SourceError(
                    f"{path}: QEMU runs a {job['type']} job, {job['id']!r}, which is not ours: wait until it has ended"
                )
        if self._monitor.version < _IOTHREADS and self._monitor.execute("query-iothreads"):
            for device, _ in self._images(blocks, tracks):
                if has_iothread(self._monitor, device):
                    raise SourceError(
                        f"{path}: disk {device.name} runs in an I/O thread; QEMU before 9.0 crashes when a backup of "
                        "such a disk ends: nothing was done. Leave the disk out, or its device's iothread"
                    )

    def begin(self, recorders: Recorders, tracks: Mapping[str, Track]) -> QmpMoment:
        """See `Machine.begin`. Raises Locked, too: another backup of this machine is running."""
        self._refuse(ask_blocks(self._monitor), tracks)
        self._take_over()
        return self._moment(recorders, tracks, self._gather(recorders, tracks))

    def view(self) -> QmpMoment:
        """Make one moment of all disks that is only looked at: no bitmap is touched. Raises as `begin`."""
        tracks = {disk.name: Track(None, "nothing is recorded") for disk in self.disks}
        self._refuse(ask_blocks(self._monitor), tracks)
        self._take_over()
        return self._moment(None, tracks, {name: track.reason for name, track in tracks.items()})

    def _moment(
        self, recorders: Recorders | None, tracks: Mapping[str, Track], problems: Mapping[str, str]
    ) -> QmpMoment:
        blocks = ask_blocks(self._monitor)
        disks = [
            Fleeced(number, device, image, None if problems[device.name] else tracks[device.name].recorder)
            for number, (device, image) in enumerate(self._images(blocks, tracks))
        ]
        moment = self._begun = QmpMoment(self._monitor, disks, recorders, problems, self._timeout_s)
        if has_filter(self._monitor, blocks) and all(disk.device.path for disk in disks):
            try:
                return moment.begin(self._scratch, "filter")
            except Refused as e:
                log.warning("%s: a backup job takes the filter's place: %s", self._monitor.path, e)
        return moment.begin(self._scratch, "job")

    def _take_over(self) -> None:
        """Undo what killed backups, of whichever repository, left in QEMU. Their bitmaps stay.

        Raises:
            Locked: one of them lives.
            SourceError: something is still there.
        """
        blocks = ask_blocks(self._monitor)
        found = sessions(self._monitor, blocks)
        for session, path in found.items():
            try:
                folder = scratch.take(path or os.path.join(self._scratch, session))
            except scratch.Alive as e:
                raise Locked(f"{self._monitor.path}: {e} ({path})") from e
            if folder is None or folder.name != session:
                folder = scratch.Scratch(os.path.join(self._scratch, session), None)
            log.info("%s: taking over what the killed backup %s left", self._monitor.path, session)
            with interrupts.deferred():
                dismantle(self._monitor, folder)
        for folder in scratch.forgotten(self._scratch, self._monitor.pid, set(found)):
            if folder.orphaned:
                folder.discard()
            else:
                dismantle(self._monitor, folder)
        if left := sessions(self._monitor, ask_blocks(self._monitor)):
            raise SourceError(
                f"{self._monitor.path}: what a killed backup left in QEMU can't be removed: {', '.join(left)}"
            )

    def _gather(self, recorders: Recorders, tracks: Mapping[str, Track]) -> dict[str, str]:
        """Put what backups that were broken off recorded into the old recorders; return `plan`'s answers."""
        blocks = ask_blocks(self._monitor)
        problems = self._problems(blocks, recorders, tracks)
        parts = {}
        for device, image in self._images(blocks, tracks):
            old = tracks[device.name].recorder
            if old is not None and not problems[device.name]:
                parts[device.name] = recording.fold(
                    image, recorders.of(device.name), old, keep=recording.is_full(image)
                )
            else:  # nobody knows of one that has this point's name
                parts[device.name] = recording.remove(image, [recorders.of(device.name).new])
        for name, reason in submit(self._monitor, parts).items():
            problems[name] = problems[name] or f"the bitmaps of a broken off backup can't be put together: {reason}"
        return problems

    def close(self) -> None:
        """See `Machine.close`."""
        if self._begun is not None:
            self._begun.close()
        self._monitor.close()
