"""Where a benchmark works: its folder, and the servers, mounts and children that it starts. All of it goes at the end.

`Workplace` is a context manager; what is started through it is also stopped through it, last first, whatever happened.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.report import BACKUPFS

_NO_LANE = "BACKUPFS_NO_READ_LANE"
_START_S = 60.0  # a server has to answer by then
_IDLE_S = 3  # a process is idle when it has used less than this share of a processor for so many seconds
_IDLE_SHARE = 0.05


class Failed(Exception):
    """A command did not do what it should."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command took: time on the clock, time of processors, and the most memory of any one of its processes.

    `said` is what it printed.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    said: str


def run(*command: str | Path) -> str:
    """Run a command; return what it printed. Raises Failed."""
    words = [str(c) for c in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")
    return done.stdout


class Workplace:
    """A folder of its own below `parent`, and what runs in it.

    Attributes:
        folder: an empty folder.
    """

    def __init__(self, parent: str | None) -> None:
        if parent:
            os.makedirs(parent, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="backupfs-bench-", dir=parent)).resolve()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        # Apart, because the path of a UNIX socket is at most 107 bytes long.
        self._sockets = Path(tempfile.mkdtemp(prefix="bfsb-"))
        self._stack.callback(shutil.rmtree, self._sockets, ignore_errors=True)
        # The mount's log, and an index that can't be in the repository, are work files too.
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = str(self.folder / "state")
        os.environ.pop("BACKUPFS_REPOSITORY", None)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the tidying up
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            signal.signal(signal.SIGINT, before)

    def path(self, name: str) -> Path:
        """Return the path of a work file."""
        return self.folder / name

    def new_path(self, name: str) -> Path:
        """Return a path that nobody has had before, which ends in this name."""
        self._count += 1
        return self.path(f"{self._count}-{name}")

    def measure(self, *command: str | Path) -> Spent:
        """Run a command and return what it took; nobody's dirty pages are left for it to wait for. Raises Failed.

        Memory by time(1): what the kernel says of our own child includes this process, from before the exec.
        """
        os.sync()
        facts = self.path("spent")
        timed = ["/usr/bin/time", "--quiet", f"--output={facts}", "--format=%U %S %M"]
        started = time.monotonic()
        said = run(*timed, *command)
        seconds = time.monotonic() - started
        user, system, peak = facts.read_text().split()
        return Spent(seconds, float(user) + float(system), int(peak) << 10, said)

    @contextlib.contextmanager
    def serving(self, image: Path, image_format: str, *, writable: bool = False) -> Iterator[str]:
        """Export an image by qemu-nbd while the block runs; yield the URI. After it a writable image is complete."""
        address = self.new_socket()
        mode = ["--cache=writeback"] if writable else ["--read-only"]
        command = ["qemu-nbd", "--persistent", "--shared=8", f"--format={image_format}", f"--socket={address}", *mode]
        with self.child([*command, str(image)], lambda: accepts(address)):
            yield f"nbd+unix:///?socket={address}"

    @contextlib.contextmanager
    def mounted(self, repository: Path, *, read_lane: bool = True, passthrough: bool = True) -> Iterator["Mount"]:
        """Mount a repository by `backupfs mount` while the block runs; without the lane pyfuse3 answers reads."""
        place = self.new_path("mount")
        place.mkdir()
        options = ["--foreground", *([] if passthrough else ["--no-passthrough"])]
        command = [BACKUPFS, "-r", str(repository), "mount", *options, str(place)]
        try:
            with self.child(
                command, lambda: os.path.ismount(place), environment={} if read_lane else {_NO_LANE: "1"}
            ) as pid:
                try:
                    yield Mount(place, pid)
                finally:
                    unmount(place)  # before the process ends, which waits for who still has a file open
        finally:
            unmount(place)

    def new_socket(self) -> Path:
        """Return a path, short enough for the address of a UNIX socket, that nobody has had before."""
        self._count += 1
        return self._sockets / str(self._count)

    @contextlib.contextmanager
    def child(
        self, command: list[str], answered: Callable[[], bool], *, environment: Mapping[str, str] | None = None
    ) -> Iterator[int]:
        """Run a server while the block runs, from when it answers on; yield its id. Raises Failed.

        In a group of its own: Ctrl-C is ours to handle.
        """
        with tempfile.TemporaryFile() as words:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                process_group=0,
                env={**os.environ, **(environment or {})},
            )
            try:
                try:
                    _wait_until(child, answered)
                except Failed as e:
                    words.seek(0)
                    raise Failed(f"{command[0]}: {e}: {words.read().decode(errors='replace').strip()}") from e
                yield child.pid
            finally:
                child.terminate()
                try:
                    child.wait(_START_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted repository and the process that answers for it."""

    path: Path
    pid: int

    def disk(self, point: str, vm: str = "vm", disk: str = "vda") -> Path:
        """Return the path of a disk at a point."""
        return self.path / vm / point / f"{disk}.raw"

    def memory(self) -> dict[str, int]:
        """Return the process' memory now, by the kernel's names (VmRSS, VmHWM, RssAnon, RssFile), in bytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}

    def cpu_s(self) -> float:
        """Return the processor time that it has used, seconds."""
        return processor_s(self.pid)

    def wait_until_idle(self, limit_s: float = 1800) -> float:
        """Wait until it has nothing to do: the checks of the points that were opened are done. Returns the seconds."""
        started = time.monotonic()
        used, quiet = self.cpu_s(), 0
        while time.monotonic() - started < limit_s:
            time.sleep(1)
            before, used = used, self.cpu_s()
            quiet = quiet + 1 if used - before < _IDLE_SHARE else 0
            if quiet == _IDLE_S:
                return time.monotonic() - started - _IDLE_S
        raise Failed(f"the mount's process is still busy after {limit_s:.0f} s")


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used, all of its threads, seconds. Source: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def unmount(place: Path) -> None:
    """Take a mount away, also one whose process is dead."""
    if os.path.ismount(place) or _is_dead(place):
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


def _is_dead(place: Path) -> bool:
    try:
        os.stat(place)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def accepts(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(address)) == 0


def _wait_until(child: subprocess.Popen[bytes], answered: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while not answered():
        if child.poll() is not None:
            raise Failed(f"it ended with {child.returncode}")
        if time.monotonic() > deadline:
            raise Failed(f"no answer within {_START_S:g} s")
        time.sleep(0.02)
