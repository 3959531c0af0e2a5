"""A libvirt domain: the connection, and every call that is made of libvirt. The only `import libvirt`.

Each call is made by one thread, with a deadline (deadline.py): libvirt's calls wait for as long as libvirtd, or QEMU,
or the guest's agent, take to answer. (A keepalive would end only a connection whose libvirtd is gone.)
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from backupfs import interrupts
from backupfs.errors import ConnectError, NotFound
from backupfs.sources import domain_xml
from backupfs.sources.deadline import Caller
from backupfs.sources.domain_folder import Folder
from backupfs.sources.machine import Machine

T = TypeVar("T")
Freeze = Literal["auto", "never", "require"]
log = logging.getLogger(__name__)

_THAW_S = 600.0  # a guest with much to write takes its time to freeze
_LOCAL = ("", "localhost", "localhost.localdomain")


def open_domain(
    uri: str, domain: str, disks: Sequence[str] | None, *, freeze: Freeze, scratch: str, timeout_s: float
) -> Machine:
    """Open a domain, running or off.

    Args:
        uri: libvirt's connection URI, of this host's libvirt.
        domain: its name.
        disks: the wanted ones' targets; None: all that the guest can write to.
        freeze: whether the guest's file systems are frozen for the moment: where its agent answers, never, or always.
        scratch: a folder that QEMU's user can get to, for the blocks that the guest overwrites meanwhile.
        timeout_s: how long libvirt may take to answer, and QEMU's export be silent.

    Raises:
        NotFound: there is no such domain; `disks` names one that is not there.
        ConnectError: no connection, no libvirt module, or the domain can't be asked.
    """
    from backupfs.sources.domain_off import StoppedDomain  # noqa: PLC0415, these need Domain
    from backupfs.sources.domain_running import RunningDomain  # noqa: PLC0415

    found = Domain(uri, domain, timeout_s)
    try:
        wanted = _wanted(found, disks)
        if not found.is_active():
            sliced = [disk.name for disk in wanted if disk.sliced]
            if sliced:
                raise ConnectError(
                    f"domain {domain}: {', '.join(sliced)} is a part of its image: start the domain first"
                )
            return StoppedDomain(found, wanted, timeout_s)
        return RunningDomain(found, wanted, freeze=freeze, scratch=scratch, timeout_s=timeout_s)
    except BaseException:
        found.close()
        raise


def _wanted(domain: "Domain", names: Sequence[str] | None) -> list[domain_xml.DomainDisk]:
    there = domain_xml.disks(domain.xml())
    known = ", ".join(disk.name for disk in there) or "none that the guest can write to"
    missing = [name for name in names or () if name not in [disk.name for disk in there]]
    if missing:
        raise NotFound(f"domain {domain.name} has no disk {', '.join(missing)}; it has {known}")
    direct = [disk.name for disk in there if disk.passed_through and (not names or disk.name in names)]
    if direct:
        raise ConnectError(
            f"domain {domain.name}: {', '.join(direct)} is passed through to the guest (device='lun'): QEMU does not "
            "see what is written; name the other disks with --disk"
        )
    if not there:
        raise ConnectError(f"domain {domain.name} has no disk that the guest can write to")
    return [disk for disk in there if not names or disk.name in names]


def _library() -> Any:
    try:
        import libvirt  # noqa: PLC0415, the rest of backupfs works without
    except ImportError as e:
        raise ConnectError(
            "Python finds no module libvirt: install the package python3-libvirt, and make backupfs's environment "
            "with --system-site-packages"
        ) from e
    libvirt.registerErrorHandler(lambda context, error: None, None)  # else each error is printed to stderr, too
    return libvirt


class Domain:
    """A domain and the connection to it. Its methods raise ConnectError when libvirt refuses, or does not answer.

    Attributes:
        name: its name.
        uuid: as text.
    """

    def __init__(self, uri: str, name: str, timeout_s: float) -> None:
        self._libvirt = libvirt = _library()
        self.name = name
        host = urlsplit(uri).hostname or ""
        if host not in _LOCAL:
            raise ConnectError(f"{uri}: QEMU's export is a UNIX socket on {host}: run backupfs there")
        self._caller = Caller(f"libvirt at {uri}", timeout_s)
        try:
            self._connection = self._ask(f"connect to {uri}", lambda: libvirt.open(uri))
            self._domain = self._look_up(name)
            self.uuid = str(self._ask("ask for its UUID", self._domain.UUIDString))
        except BaseException:
            self.close()
            raise

    def _look_up(self, name: str) -> Any:
        try:
            return self._call(f"look up domain {name}", lambda: self._connection.lookupByName(name))
        except self._libvirt.libvirtError as e:
            if e.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN:
                raise ConnectError(f"domain {name}: {e}") from e
        there = self._ask("list the domains", lambda: [d.name() for d in self._connection.listAllDomains()])
        raise NotFound(f"libvirt knows no domain {name}; it knows {', '.join(sorted(there)) or 'none'}")

    def close(self) -> None:
        """End the connection. Waits for nothing."""

        def close() -> None:
            connection, self._connection, self._domain = getattr(self, "_connection", None), None, None
            if connection is not None:
                connection.close()

        self._caller.end(close)

    def _call(self, what: str, function: Callable[[], T], *, timeouts: float = 1) -> T:
        """Call libvirt; raises libvirtError."""
        return self._caller.call(f"domain {self.name}: {what}", function, timeouts=timeouts)

    def _ask(self, what: str, function: Callable[[], T], *, timeouts: float = 1) -> T:
        try:
            return self._call(what, function, timeouts=timeouts)
        except self._libvirt.libvirtError as e:
            raise ConnectError(f"domain {self.name}: can't {what}: {e}") from e

    def _unless(self, code: int, what: str, function: Callable[[], T]) -> T | None:
        """Ask; None when libvirt refuses with this code."""
        try:
            return self._call(what, function)
        except self._libvirt.libvirtError as e:
            if e.get_error_code() == code:
                return None
            raise ConnectError(f"domain {self.name}: can't {what}: {e}") from e

    def qemu_version(self) -> tuple[int, int]:
        """Return QEMU's major and minor version."""
        version = int(self._ask("ask for QEMU's version", self._connection.getVersion))
        return version // 1_000_000, version // 1000 % 1000

    def is_active(self) -> bool:
        """Whether it runs, or is paused. One that is gone does not."""
        code = self._libvirt.VIR_ERR_NO_DOMAIN
        return bool(self._unless(code, "ask whether it runs", self._domain.isActive))

    def xml(self) -> str:
        """Return its description as it is now, without secrets."""
        return str(self._ask("ask for its description", lambda: self._domain.XMLDesc(0)))

    def disk_size(self, disk: str) -> int:
        """Return the bytes that the guest sees."""
        return int(self._ask(f"ask for the size of {disk}", lambda: self._domain.blockInfo(disk))[0])

    def job(self) -> str | None:
        """Return what job, other than a backup, holds the domain up, in words; None: none does."""
        lv = self._libvirt
        stats = self._ask("ask for its job", self._domain.jobStats)
        if stats.get("type", lv.VIR_DOMAIN_JOB_NONE) == lv.VIR_DOMAIN_JOB_NONE:
            return None
        operations = {
            lv.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "it is being migrated to this host",
            lv.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "it is being migrated to another host",
            lv.VIR_DOMAIN_JOB_OPERATION_SAVE: "it is being saved",
            lv.VIR_DOMAIN_JOB_OPERATION_DUMP: "its memory is being dumped",
        }
        operation = stats.get("operation")
        if operation == lv.VIR_DOMAIN_JOB_OPERATION_BACKUP:
            return None
        return operations.get(operation, f"a job is at it (libvirt's operation {operation})")

    def is_stopped_by_an_error(self) -> bool:
        """Whether QEMU stopped the guest because a write failed."""
        lv = self._libvirt
        state = self._ask("ask for its state", self._domain.state)
        return list(state) == [lv.VIR_DOMAIN_PAUSED, lv.VIR_DOMAIN_PAUSED_IOERROR]

    def resume(self) -> None:
        """Let the guest go on. A write that failed is tried again."""
        self._ask("resume it", self._domain.resume)

    def has_block_job(self, disk: str) -> bool:
        """Whether a copy, commit, pull or backup of a disk goes on."""
        return bool(self._ask(f"ask for block jobs of {disk}", lambda: self._domain.blockJobInfo(disk, 0)))

    def backup_job(self) -> str | None:
        """Return the description of the backup job that goes on, or None."""
        code = self._libvirt.VIR_ERR_NO_DOMAIN_BACKUP
        return self._unless(code, "ask for its backup job", lambda: str(self._domain.backupGetXMLDesc(0)))

    def abort_job(self) -> None:
        """End the backup job. It goes on for a moment."""
        self._ask("end the backup job", self._domain.abortJob)

    def checkpoints(self) -> list[str]:
        """Return the names of its checkpoints, whoever made them."""
        return self._ask("list its checkpoints", lambda: [c.getName() for c in self._domain.listAllCheckpoints()])

    def checkpoint_disks(self, name: str) -> dict[str, bool]:
        """Return a checkpoint's disks, and of each whether its bitmap can be used: never while the domain is off."""
        lv = self._libvirt
        flags = lv.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        if self.is_active():
            flags |= lv.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        what = f"ask for checkpoint {name}"
        return domain_xml.checkpoint_disks(self._ask(what, lambda: self._checkpoint(name).getXMLDesc(flags)))

    def checkpoint_images(self, name: str) -> dict[str, str]:
        """Return the descriptions of the images that the disks had when a checkpoint was made."""
        what = f"ask for checkpoint {name}"
        return domain_xml.checkpoint_images(self._ask(what, lambda: self._checkpoint(name).getXMLDesc(0)))

    def tell_checkpoint(self, name: str, disks: Iterable[str]) -> None:
        """Tell libvirt of a checkpoint whose bitmaps are there. It believes it."""
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        description = domain_xml.known_checkpoint(name, sorted(disks), int(time.time()), self.xml())
        self._ask("tell libvirt of a checkpoint", lambda: self._domain.checkpointCreateXML(description, flags))

    def delete_checkpoint(self, name: str, *, bitmaps: bool) -> None:
        """Delete a checkpoint, with its bitmaps or without."""
        flags = 0 if bitmaps else self._libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        self._ask(f"delete checkpoint {name}", lambda: self._checkpoint(name).delete(flags))

    def _checkpoint(self, name: str) -> Any:
        return self._domain.checkpointLookupByName(name)

    def begin_backup(self, backup: str, checkpoint: str | None, freeze: Freeze, folder: Folder) -> bool:
        """Begin a backup job, with a checkpoint, and with the guest's file systems frozen for as long as that takes.

        Args:
            backup, checkpoint: their descriptions.
            freeze: `auto` is for a guest whose agent is connected.
            folder: where it is kept that the guest is frozen.

        Returns:
            Whether they were frozen.
        """
        broken_off = threading.Event()

        def begin() -> bool:
            frozen = freeze != "never" and self._freeze(required=freeze == "require", folder=folder)
            try:
                if not broken_off.is_set():
                    self._domain.backupBegin(backup, checkpoint, 0)
            finally:
                held = frozen and self._thaw(folder)
            return held

        try:
            return self._ask("begin a backup", begin, timeouts=4)
        except BaseException:
            broken_off.set()
            if folder.frozen:  # its thread would die with this process, and nobody thaw
                log.warning("domain %s: waiting until its file systems are thawed", self.name)
                with interrupts.deferred():
                    self._caller.finish(_THAW_S)
            raise

    def _freeze(self, *, required: bool, folder: Folder) -> bool:
        """Freeze the guest's file systems; return whether any are frozen. On the calling thread."""
        folder.frozen = True
        try:
            if self._domain.fsFreeze() > 0:
                return True
            problem = "the guest has no file system that can be frozen"
            folder.frozen = False
        except self._libvirt.libvirtError as e:
            problem = str(e)
            if e.get_error_code() == self._libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
                self._thaw(folder)  # the guest may have done it, and be slow to say so
            else:
                folder.frozen = False  # the agent undoes what it did before it says so
        if required:
            raise ConnectError(f"domain {self.name}: the guest's file systems can't be frozen: {problem}")
        log.warning("domain %s: the guest's file systems can't be frozen: %s", self.name, problem)
        return False

    def _thaw(self, folder: Folder) -> bool:
        """Thaw them; return whether they were still frozen. On the calling thread."""
        try:
            count = int(self._domain.fsThaw())
        except self._libvirt.libvirtError as e:
            # A Windows guest thaws by itself after 10 s, and says so by an error.
            log.warning("domain %s: the guest's file systems may be frozen still: %s", self.name, e)
            return False
        folder.frozen = False
        return count > 0

    def thaw(self) -> None:
        """Thaw what a backup that was killed left frozen."""
        self._ask("thaw the guest's file systems", self._domain.fsThaw)
