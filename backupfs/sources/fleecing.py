"""Reading a disk as it was at one moment while the guest goes on writing, by QEMU's own means; setting that up and
taking it down.

With the *filter*, copy-before-write is put between the device and its image. It copies what the guest is about to
overwrite into the scratch first; the scratch, over the image, is read.

    device -> {session}-f0 copy-before-write -file-> the disk's image <-backing- {session}-q0
                  ^  ^   `-target-> {session}-q0 qcow2 -> {session}-s0 scratch file
                  |  `- {session}-a0 snapshot-access
                  `- backing - {session}-g0 qcow2, empty
    NBD exports: {session}-e0 of {session}-q0, {session}-w0 of {session}-a0

A scratch that is full, or slow for 30 s, breaks the snapshot, not the guest's write: q0 shows what the guest wrote
from then on, and every request to a0 fails. So a0 is the *witness*: what was read of q0 counts when a0 answers
afterwards. The disk itself is not read through a0: QEMU 7.2 looks into the image for a range of which only the
beginning was copied, and so hands out zeroes for what the guest has discarded since (10.0 does not).
Source: hbitmap_status() of QEMU 7.2, util/hbitmap.c; tests/integration/test_fleecing.py shows it.

g0 is read by nobody. QEMU neither resizes what another node is backed by, nor puts a snapshot over it: what a shorter
disk loses no filter copies, and a filter below a snapshot can't be taken out.

All filters go in while the guest is stopped, for a few milliseconds: one moment of all disks.

With the *job* (QEMU < 7.1, and devices that take no filter), a backup job that copies nothing of its own accord does
the same, all disks in one transaction; there a full scratch stops the guest until the backup ends.

    device -> the disk's image <-backing- {session}-q0 qcow2 -> scratch file       NBD export -> {session}-q0
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from backupfs import interrupts
from backupfs.errors import ConnectError, ProtocolError, SourceError
from backupfs.sources.monitor import Monitor, Refused
from backupfs.sources.recording import Action
from backupfs.sources.scratch import Scratch, session_of
from backupfs.sources.vm_nodes import Blocks, Device, Node, parse_blocks

log = logging.getLogger(__name__)

_WRITE_TIMEOUT_S = 30  # how long a guest's write waits for the scratch before the snapshot breaks
_GONE_S = 10.0
Method = Literal["filter", "job"]


@dataclass(frozen=True, slots=True)
class Fleeced:
    """A disk of a session; `number` is its place in the names of what is made for it.

    Attributes:
        old: the recorder that is read by, which has to be stopped by then; or None.
    """

    number: int
    device: Device
    node: Node
    old: str | None


def ask_blocks(monitor: Monitor) -> Blocks:
    """Ask for all block devices and nodes. Raises ProtocolError, ConnectError."""
    try:
        graph = monitor.execute("x-debug-query-block-graph")
    except Refused:
        graph = None  # unstable commands may be switched off
    nodes = monitor.execute("query-named-block-nodes", {"flat": True})
    return parse_blocks(monitor.execute("query-block"), nodes, graph)


def ask_list(monitor: Monitor, command: str, *keys: str) -> list[dict[str, str]]:
    """Return what a command lists, each with words for `keys`. Raises ProtocolError, ConnectError."""
    try:
        return [{key: str(entry[key]) for key in keys} for entry in monitor.execute(command)]
    except (KeyError, TypeError) as e:
        raise ProtocolError(f"{monitor.path}: QEMU's answer to {command} makes no sense: {e!r}") from e


def ask_status(monitor: Monitor, command: str = "query-status") -> str:
    """Return a status, `none` if there is no word of one. Raises ProtocolError, ConnectError."""
    answer = monitor.execute(command)
    return str(answer.get("status", "none")) if isinstance(answer, dict) else "none"


def has_filter(monitor: Monitor, blocks: Blocks) -> bool:
    """Say whether this QEMU has a filter that can break instead of the guest's write, and can be taken out again."""
    if not blocks.children:
        return False
    schema = monitor.execute("query-qmp-schema")
    try:
        members = {m.get("name") for entity in schema for m in entity.get("members", ())}
        drivers = {value for entity in schema for value in entity.get("values", ())}
    except (TypeError, AttributeError) as e:
        raise ProtocolError(f"{monitor.path}: QEMU's description of its commands makes no sense: {e!r}") from e
    return "on-cbw-error" in members and "snapshot-access" in drivers


def has_iothread(monitor: Monitor, device: Device) -> bool:
    """Say whether a device, or what it is plugged into, has an I/O thread; yes when that can't be told."""
    if not device.path:
        return True
    try:
        bus = str(monitor.execute("qom-get", {"path": device.path, "property": "parent_bus"}))
    except Refused:
        bus = ""
    for path in (device.path, bus.rpartition("/")[0]):
        # A path of our own making: the thread is the device's, or that of the controller which has the bus.
        try:
            if path and monitor.execute("qom-get", {"path": path, "property": "iothread"}):
                return True
        except Refused:
            continue  # it can't have one
    return False


class Session:
    """What one backup sets up in QEMU. `dismantle` undoes it, from any state."""

    def __init__(self, monitor: Monitor, scratch: Scratch, disks: Sequence[Fleeced], method: Method) -> None:
        self._monitor = monitor
        self._scratch = scratch
        self._disks = disks
        self._method = method

    def _name(self, kind: str, disk: Fleeced) -> str:
        return f"{self._scratch.name}-{kind}{disk.number}"

    def prepare(self) -> None:
        """Add the scratch and the server. The guest does not notice.

        Raises:
            SourceError: it can't be done.
        """
        for disk in self._disks:
            scratch, path = self._name("s", disk), self._scratch.image(disk.number)
            self._add(driver="file", node_name=scratch, filename=path, discard="unmap")
            self._add(driver="qcow2", node_name=self._name("q", disk), file=scratch, backing=disk.node.name)
            if self._method == "filter":
                # Without discard the guest's fstrim would end at the filter.
                options = {"on-cbw-error": "break-snapshot", "cbw-timeout": _WRITE_TIMEOUT_S, "discard": "unmap"}
                target = self._name("q", disk)
                node = self._name("f", disk)
                self._add(driver="copy-before-write", node_name=node, file=disk.node.name, target=target, **options)
        address = {"type": "unix", "data": {"path": self._scratch.socket}}
        try:
            self._monitor.execute("nbd-server-start", {"addr": address})
        except Refused as e:
            raise SourceError(
                f"{self._monitor.path}: QEMU can't serve the disks: {e.reason} (a server that is running there is not "
                "backupfs': stop it with nbd-server-stop)"
            ) from e

    def _add(self, **options: Any) -> None:
        named = {name.replace("_", "-"): value for name, value in options.items()}
        self._monitor.execute("blockdev-add", named)

    def freeze(self, actions: Mapping[str, list[Action]]) -> None:
        """Make the moment: everything that is written from now on is copied before; the bitmaps are turned.

        Args:
            actions: for the bitmaps, by disk.

        Raises:
            SourceError: it can't be done.
        """
        together = [action for disk in actions.values() for action in disk]
        if self._method == "job":
            self._monitor.execute("transaction", {"actions": together + [self._backup(d) for d in self._disks]})
            return
        running = ask_status(self._monitor) == "running"
        with interrupts.deferred():
            if not running:
                self._insert(together)
                return
            with self._scratch.paused():
                self._monitor.execute("stop")
                self._insert(together)
                self._monitor.execute("cont")

    def _backup(self, disk: Fleeced) -> Action:
        job, target = self._name("j", disk), self._name("q", disk)
        data = {"job-id": job, "device": disk.node.name, "target": target, "sync": "none"}
        return {"type": "blockdev-backup", "data": data}

    def _insert(self, actions: list[Action]) -> None:
        self._monitor.execute("transaction", {"actions": actions})
        for disk in self._disks:
            _set_drive(self._monitor, disk.device, self._name("f", disk))

    def export(self, disk: Fleeced) -> str:
        """Serve a disk as it was at the moment; return the export's name on the server.

        Raises:
            SourceError: it can't be done.
        """
        bitmaps = [{"node": disk.node.name, "name": disk.old}] if disk.old else []
        return self._serve("e", disk, self._name("q", disk), f"disk{disk.number}", bitmaps)

    def witness(self, disk: Fleeced) -> str | None:
        """Serve what answers as long as the moment holds; return the export's name. None: it holds always.

        Raises:
            SourceError: it can't be done.
        """
        if self._method == "job":
            return None
        node = self._name("a", disk)
        self._add(driver="snapshot-access", node_name=node, file=self._name("f", disk))
        return self._serve("w", disk, node, f"witness{disk.number}", [])

    def guard(self) -> None:
        """See to it that QEMU resizes no disk and puts nothing over a filter from now on, as it does with the job.

        Raises:
            SourceError: it can't be done, or a disk was resized or something put over its filter just now.
        """
        if self._method == "filter":
            empty = {"driver": "file", "filename": self._scratch.empty, "read-only": True}
            for disk in self._disks:
                node, backing = self._name("g", disk), self._name("f", disk)
                self._add(driver="qcow2", node_name=node, file=empty, backing=backing, read_only=True)
            self.check()
        nodes = ask_blocks(self._monitor).nodes
        for disk in self._disks:
            if disk.node.name not in nodes or nodes[disk.node.name].size != disk.node.size:
                raise SourceError(f"{self._monitor.path}: disk {disk.device.name} was resized just now")

    def _serve(self, kind: str, disk: Fleeced, node: str, name: str, bitmaps: list[dict[str, str]]) -> str:
        export = {"type": "nbd", "id": self._name(kind, disk), "node-name": node, "name": name, "writable": False}
        self._monitor.execute("block-export-add", {**export, "bitmaps": bitmaps})
        return name

    def check(self) -> None:
        """Make sure that everything that was written since the moment was copied before.

        Raises:
            SourceError: it was not.
        """
        if self._method == "job":
            jobs = ask_list(self._monitor, "query-jobs", "id", "status")
            running = {job["id"] for job in jobs if job["status"] == "running"}
            lost = next((d for d in self._disks if self._name("j", d) not in running), None)
        else:
            above = {device.path: device.node for device in ask_blocks(self._monitor).devices}
            lost = next((d for d in self._disks if above.get(d.device.path) != self._name("f", d)), None)
        if lost is not None:
            raise SourceError(
                f"disk {lost.device.name}: somebody took away in QEMU what kept the moment: the point is dropped"
            )


def _set_drive(monitor: Monitor, device: Device, node: str) -> None:
    monitor.execute("qom-set", {"path": device.path, "property": "drive", "value": node})


def sessions(monitor: Monitor, blocks: Blocks) -> dict[str, str | None]:
    """Return the sessions that QEMU has something of, and the paths of their folders as far as QEMU knows them."""
    found: dict[str, str | None] = {}
    others = [*ask_list(monitor, "query-jobs", "id"), *ask_list(monitor, "query-block-exports", "id")]
    for name in (*(other["id"] for other in others), *blocks.nodes):
        session = session_of(name)
        if session is not None:
            node = blocks.nodes.get(name)
            folder = node.file.rpartition("/")[0] if node is not None and node.driver == "file" else None
            found[session] = found.get(session) or folder
    return found


def dismantle(monitor: Monitor, scratch: Scratch) -> None:
    """Undo all that a session set up in QEMU, as far as it is there, and remove its folder when all is undone.

    What can't be done is tried once more, then logged.

    Raises:
        ConnectError: the monitor was lost.
    """
    if _dismantle(monitor, scratch):
        for failure in (failures := _dismantle(monitor, scratch)):
            log.warning("%s: %s", monitor.path, failure)
        if failures:
            scratch.release()
            return
    scratch.discard()


def _dismantle(monitor: Monitor, scratch: Scratch) -> list[str]:
    """Return what could not be done."""
    prefix = f"{scratch.name}-"
    failures: list[str] = []

    def attempt(what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except ConnectError:
            raise
        except SourceError as e:
            failures.append(f"can't {what}: {e}")

    # The guest first. Filters that are half in do it no harm.
    attempt("let the guest go on", partial(_go_on, monitor, scratch))
    attempt("end the exports", partial(_end_exports, monitor, prefix))
    attempt("stop the NBD server", partial(_stop_server, monitor, scratch))
    attempt("end the backup jobs", partial(_end_jobs, monitor, prefix))
    attempt("remove the nodes", partial(_remove_nodes, monitor, prefix, attempt))
    return failures


def _go_on(monitor: Monitor, scratch: Scratch) -> None:
    if scratch.was_paused and ask_status(monitor) == "paused":
        monitor.execute("cont")
    scratch.resumed()


def _stop_server(monitor: Monitor, scratch: Scratch) -> None:
    if scratch.serves():
        monitor.execute("nbd-server-stop")


def _remove_nodes(monitor: Monitor, prefix: str, attempt: Callable[[str, Callable[[], object]], None]) -> None:
    blocks = ask_blocks(monitor)

    def delete(kind: str) -> None:
        for name in sorted(n for n in blocks.nodes if n.startswith(prefix + kind)):
            attempt(f"remove {name}", partial(monitor.execute, "blockdev-del", {"node-name": name}))

    # Before their filters. As long as a0 reads there, nobody else may write below.
    for kind in "ag":
        delete(kind)
    for device in blocks.devices:
        if device.node.startswith(prefix):
            below = blocks.children.get((device.node, "file"), "")
            attempt(f"take the filter out of {device.name}", partial(_set_drive, monitor, device, below))
    for kind in "fqs":
        delete(kind)


def _ours(monitor: Monitor, command: str, prefix: str) -> list[str]:
    return [entry["id"] for entry in ask_list(monitor, command, "id") if entry["id"].startswith(prefix)]


def _end_exports(monitor: Monitor, prefix: str) -> None:
    def there() -> list[str]:
        return _ours(monitor, "query-block-exports", prefix)

    for name in there():
        monitor.execute("block-export-del", {"id": name, "mode": "hard"})
    _wait_until_gone(there)


def _end_jobs(monitor: Monitor, prefix: str) -> None:
    def there() -> list[str]:
        return _ours(monitor, "query-jobs", prefix)

    jobs = there()
    for name in jobs:
        monitor.execute("block-job-cancel", {"device": name, "force": True})
    _wait_until_gone(there)
    if jobs and ask_status(monitor) == "io-error":
        # A full scratch stopped the guest; its write is tried again now.
        monitor.execute("cont")


def _wait_until_gone(there: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + _GONE_S
    while names := there():
        if time.monotonic() > deadline:
            raise SourceError(f"{', '.join(names)} did not end within {_GONE_S:g} s")
        time.sleep(0.01)
