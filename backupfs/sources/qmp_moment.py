"""One moment of a running QEMU: made, read from, and undone."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal
from urllib.parse import quote

from backupfs import interrupts
from backupfs.errors import ConnectError, ProtocolError, SourceError
from backupfs.extents import Extent
from backupfs.sources import recording, scratch
from backupfs.sources.export import NbdSource
from backupfs.sources.fleecing import Fleeced, Method, Session, ask_blocks, dismantle
from backupfs.sources.machine import Recorders
from backupfs.sources.monitor import Monitor, Refused, owner
from backupfs.sources.recording import Action
from backupfs.sources.witness import Witness
from backupfs.units import format_size

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_RECONNECT_S = 10.0
_NOBODY = "0" * 32  # in the place of a repository's id
_PATIENCE_S = 300.0  # while a guest waits for us


class QmpMoment:
    """One moment of a running QEMU. A Moment; see there. Made by `QmpMachine.begin`.

    Args:
        disks: what to read.
        recorders: the chain's; None: nothing is recorded, the moment is only looked at.
        problems: by disk, why its old recorder can't be used, or "".
    """

    consistency: Literal["crash", "frozen"] = "crash"
    domain_xml: str | None = None

    def __init__(
        self,
        monitor: Monitor,
        disks: Sequence[Fleeced],
        recorders: Recorders | None,
        problems: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self._sources: dict[str, FleecedSource] = {}
        self.sources: Mapping[str, FleecedSource] = self._sources
        self.recorders: Mapping[str, str] = {d.device.name: recorders.of(d.device.name).new for d in disks if recorders}
        self._monitor = monitor
        self._disks = disks
        self._names = recorders
        self._problems = problems
        self._timeout_s = timeout_s
        self._folder: scratch.Scratch | None = None
        self._session: Session | None = None
        self._failure: str | None = None
        self._published = False
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._breaking = threading.Lock()
        self._on_broken: Callable[[], None] = lambda: None

    def begin(self, folder: str, method: Method) -> "QmpMoment":
        """Make the moment, and open the sources; `folder`: for the scratch.

        Raises:
            SourceError: it can't be made; everything was undone.
        """
        self._over.clear()
        try:
            self._begin(folder, method)
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self, folder: str, method: Method) -> None:
        self._folder = scratch.make(folder, self._names.repository if self._names else _NOBODY, self._monitor.pid)
        if self._folder.free() <= 0:
            raise ConnectError(f"{folder}: there is no space for what the guest overwrites during the backup")
        uid = owner(self._monitor.pid)
        self._folder.create_images({d.number: d.node.size for d in self._disks}, uid, self._timeout_s)
        self._folder.hand_over(uid)
        self._session = Session(self._monitor, self._folder, self._disks, method)
        self._session.prepare()
        turns = {}
        if self._names is not None:
            for disk in self._disks:
                own = self._names.of(disk.device.name)
                turns[disk.device.name] = recording.rotate(disk.node, own, disk.old)
        self._session.freeze(turns)
        self._session.guard()
        for disk in self._disks:
            name = disk.device.name
            description = f"{self._monitor.path}: disk {name}"
            uri = self._uri(self._session.export(disk))
            source = FleecedSource(uri, disk.old, self._timeout_s, description, self._explain)
            self._sources[name] = source
            if (witness := self._session.witness(disk)) is not None:
                source.witness = Witness(self._uri(witness), description, self._timeout_s)
            source.format = disk.node.driver
            source.bitmap_problem = self._problems[name] or source.bitmap_problem
        self._watch = threading.Thread(target=self._watch_scratch, args=(self._folder,), name="scratch", daemon=True)
        self._watch.start()

    def _uri(self, export: str) -> str:
        assert self._folder is not None
        return f"nbd+unix:///{export}?socket={quote(self._folder.socket)}"

    def _watch_scratch(self, folder: scratch.Scratch) -> None:
        """End the reading before the scratch fills its file system, and when a moment was lost all the same.

        Our connections are closed, not QEMU's exports: it would wait for whoever does not read on at once.
        """
        while not self._over.wait(_LOOK_S):
            problem = self._problem(folder)
            if problem is not None:
                with self._breaking:
                    self._failure, call = problem, self._on_broken
                for source in list(self._sources.values()):
                    source.close()
                call()
                return

    def _problem(self, folder: scratch.Scratch) -> str | None:
        """Return what ends the moment, if anything does. What QEMU does not answer now it may answer later."""
        with contextlib.suppress(SourceError):
            if folder.free() <= 0:
                return (
                    f"{folder.path}: too little space is left for what the guest overwrites during the backup; "
                    "give it another folder with --scratch, or back up while the guest writes less"
                )
        for source in list(self._sources.values()):
            with contextlib.suppress(ConnectError):
                if lost := self._lost(source, folder):
                    return lost
        return None

    @staticmethod
    def _lost(source: "FleecedSource", folder: scratch.Scratch) -> str | None:
        """Say whether a disk's moment was lost, and why. Raises ConnectError when QEMU does not answer."""
        try:
            source.hold()
        except ProtocolError as e:
            with contextlib.suppress(SourceError):
                left = format_size(max(folder.free(), 0))
                return f"{e} ({left} are left in {folder.path}); give it another folder with --scratch"
            return str(e)
        return None

    def call_when_broken(self, call: Callable[[], None]) -> None:
        """Have `call` called, in a thread, when the moment can't be kept; at once if that has happened."""
        with self._breaking:
            self._on_broken, late = call, self._failure is not None
        if late:
            call()

    def _explain(self, error: SourceError) -> SourceError:
        """Return what to tell instead of an error while reading."""
        if self._failure is not None:
            return SourceError(self._failure)
        if isinstance(error, ProtocolError) and self._folder is not None:
            with contextlib.suppress(SourceError):
                left = format_size(max(self._folder.free(), 0))
                return ProtocolError(
                    f"{error}; the disk can't be read, or {self._folder.path} was full or too slow to keep what the "
                    f"guest overwrote ({left} are left there)"
                )
        return error

    def check(self) -> None:
        """See `Moment.check`."""
        if self._failure is None:
            assert self._session is not None
            assert self._folder is not None
            self._session.check()
            for source in self._sources.values():
                try:
                    lost = self._lost(source, self._folder)
                except ConnectError:
                    if self._failure is None:
                        raise
                    break  # closed by who watches
                if lost is not None:
                    raise SourceError(lost)
        if self._failure is not None:
            raise SourceError(self._failure)

    def published(self) -> None:
        """See `Moment.published`."""
        self._published = True

    def close(self) -> None:
        """See `Moment.close`."""
        with interrupts.deferred():
            self._over.set()
            for source in self._sources.values():
                source.close()  # the thread that watches may wait for one
            if self._watch is not None:
                self._watch.join()
                self._watch = None
            self._sources.clear()
            folder, self._folder, self._session = self._folder, None, None
            if folder is not None:
                limit_s = _PATIENCE_S if folder.was_paused else min(self._timeout_s, _RECONNECT_S)
                try:
                    settle(self._monitor, lambda: self._undo(folder), limit_s)
                except SourceError as e:
                    if folder.orphaned:
                        folder.discard()  # all else ended with QEMU
                    else:
                        log.warning("what the backup set up in QEMU was not all undone; the next one will: %s", e)
                folder.release()

    def _undo(self, folder: scratch.Scratch) -> None:
        dismantle(self._monitor, folder)
        if self._names is not None:
            self._settle_bitmaps(self._names)

    def _settle_bitmaps(self, names: Recorders) -> None:
        nodes = ask_blocks(self._monitor).nodes
        parts: dict[str, list[Action]] = {}
        for disk in self._disks:
            node = nodes.get(disk.node.name)
            if node is None:
                continue
            own = names.of(disk.device.name)
            full = recording.is_full(node)
            old = node.bitmaps.get(disk.old) if disk.old else None
            if self._published:
                parts[disk.device.name] = [] if full else recording.retire(node, own)
            elif old is not None and old.usable:
                parts[disk.device.name] = recording.fold(node, own, old.name, keep=full)
            else:
                parts[disk.device.name] = recording.remove(node, [own.new])
        for name, reason in submit(self._monitor, parts).items():
            log.warning("%s: the bitmaps of disk %s stay as they are: %s", self._monitor.path, name, reason)


class FleecedSource(NbdSource):
    """A disk at its moment; `explain` makes a better error of one that came while reading.

    Attributes:
        witness: says whether the moment holds; None: it does.
    """

    witness: Witness | None = None

    def __init__(
        self,
        uri: str,
        bitmap: str | None,
        timeout_s: float,
        description: str,
        explain: Callable[[SourceError], SourceError],
    ) -> None:
        super().__init__(uri, bitmap, timeout_s, description=description)
        self._explain = explain

    def hold(self) -> None:
        """Make sure that all that was read so far is of the moment.

        Raises:
            ProtocolError: it was lost; anything may have been read.
            ConnectError: QEMU does not answer.
        """
        if self.witness is not None:
            self.witness.check()

    def close(self) -> None:
        """See `Image.close`. Waits for nothing."""
        if self.witness is not None:
            self.witness.close()
        super().close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SourceError as e:
            raise self._explain(e) from e

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """See `Source.read_many`."""
        with self._explained():
            yield from super().read_many(ranges)

    def status(self, offset: int, length: int) -> Iterator[tuple[Extent, Extent]]:
        """See `Source.status`."""
        with self._explained():
            yield from super().status(offset, length)


def submit(monitor: Monitor, parts: Mapping[str, list[Action]]) -> dict[str, str]:
    """Change bitmaps, all disks' together; if that is refused, disk by disk. Returns what was refused, and why.

    Raises:
        ConnectError: the monitor was lost.
    """
    together = [action for actions in parts.values() for action in actions]
    if not together:
        return {}
    try:
        monitor.execute("transaction", {"actions": together})
        return {}
    except Refused:
        refused = {}
    for disk, actions in parts.items():
        if actions:
            try:
                monitor.execute("transaction", {"actions": actions})
            except Refused as e:
                refused[disk] = e.reason
    return refused


def settle(monitor: Monitor, work: Callable[[], object], limit_s: float) -> None:
    """Do what has to be done in QEMU, over a new connection if the old one was lost or gets lost.

    Raises:
        SourceError: it could not be done.
    """
    if monitor.lost is None:
        with contextlib.suppress(ConnectError):
            work()
            return
    monitor.reconnect(limit_s)
    work()
