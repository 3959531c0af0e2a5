"""NBD servers for tests: each a context manager that ends its server, whatever happens inside.

`uri` waits for no fixed time: the socket is listened on here, and handed over, where the server can take it.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Server:
    """A running server: where it listens, and its process."""

    uri: str
    process: "subprocess.Popen[bytes]"
    folder: Path


def need(*programs: str) -> None:
    """Skip the test when a program is not installed; in CI fail."""
    missing = [p for p in programs if shutil.which(p) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*command: str | Path | bytes) -> str:
    """Run a program; return what it prints. An error shows what it wrote to stderr."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


def freeze(pid: int) -> None:
    """Stop a process; none of its threads does anything any more when this returns.

    A signal that was sent is not one that came: a thread on another processor goes on for a moment.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while not all(_is_stopped(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _is_stopped(task: Path) -> bool:
    # proc(5), /proc/PID/stat: the state is behind the name in brackets.
    return (task / "stat").read_text().rpartition(") ")[2].startswith("T")


@contextmanager
def nbdkit(*arguments: str, options: Sequence[str] = ()) -> Iterator[Server]:
    """Run nbdkit with a plugin and its parameters; `options` come before the plugin's name."""
    need("nbdkit")
    with _folder() as folder:
        path = folder / "nbd"
        with _running(["nbdkit", "--foreground", "--unix", str(path), *options, *arguments], path) as process:
            yield Server(f"nbd+unix:///?socket={path}", process, folder)


@contextmanager
def qemu_nbd(image: Path, *options: str, image_format: str = "raw", writable: bool = False) -> Iterator[Server]:
    """Serve an image for any number of clients."""
    need("qemu-nbd")
    with _folder() as folder:
        path = folder / "nbd"
        mode = [] if writable else ["--read-only"]
        command = ["qemu-nbd", *mode, "--persistent", "--shared=8", f"--format={image_format}"]
        with _running([*command, f"--socket={path}", *options, str(image)], path) as process:
            yield Server(f"nbd+unix:///?socket={path}", process, folder)


@contextmanager
def storage_daemon(*options: str, export: str = "disk") -> Iterator[Server]:
    """Run qemu-storage-daemon with an NBD server; `options` add the nodes and the export of that name."""
    need("qemu-storage-daemon")
    with _folder() as folder:
        path, pid = folder / "nbd", folder / "pid"
        command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={path}", *options]
        with _running([*command, "--pidfile", str(pid)], pid) as process:
            yield Server(f"nbd+unix:///{export}?socket={path}", process, folder)


@contextmanager
def unreadable(path: Path, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Have reads of a file fail with EIO, as those of a medium with bad sectors do, while the block runs.

    A FUSE file system is mounted on the file. The kernel reads it by pages: a page that has a bad byte fails.

    Args:
        ranges: the bad ones: offset, length; rising.
    """
    need("nbdkit", "nbdfuse")
    with _folder() as folder:
        rescued, position = ["0 + 1"], 0
        for offset, length in ranges:
            rescued += [f"{position} {offset - position} +"] if offset > position else []
            rescued += [f"{offset} {length} -"]
            position = offset + length
        # ddrescue's map: only what is marked with + can be read. Source: nbdkit-ddrescue-filter(1)
        (folder / "map").write_text("\n".join([*rescued, f"{position} {path.stat().st_size - position} +", ""]))
        shutil.copy(path, folder / "file")
        server = ["nbdkit", "--exit-with-parent", "--filter=ddrescue", "file", str(folder / "file")]
        inner = ["[", *server, f"ddrescue-mapfile={folder / 'map'}", "]"]
        try:
            with _running(["nbdfuse", "-r", "-P", str(folder / "pid"), str(path), *inner], folder / "pid"):
                yield
        finally:
            subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False)


@contextmanager
def _folder() -> Iterator[Path]:
    # Not pytest's tmp_path: its names are too long for a UNIX socket now and then.
    folder = Path(tempfile.mkdtemp(prefix="bfs-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(command: list[str], ready: Path, limit_s: float = 20.0) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command until the end of the block; begin the block when the file `ready` is there."""
    with tempfile.TemporaryFile() as log:
        start = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        process = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + limit_s
            while not ready.exists() or (ready.is_socket() and not _accepts(ready)):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise AssertionError(f"{command[0]} does not start: {log.read().decode(errors='replace')}")
                time.sleep(0.005)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.wait()


def _accepts(path: Path) -> bool:
    """Say whether something listens: the file of a socket is there a moment before."""
    return any(line.split()[-1] == str(path) and line.split()[3] == "00010000" for line in _unix_sockets())


def _unix_sockets() -> list[str]:
    # Num RefCount Protocol Flags Type St Inode Path; flag 00010000: listening. Source: proc(5)
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]
    return [line for line in lines if len(line.split()) == 8]


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
