"""An NBD server at a place of its own choosing, to be killed, stopped and started again there."""

import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from servers import freeze, need


class Export:
    """An NBD export of a raw file by qemu-nbd, at one URI, whatever becomes of the server.

    Not by nbdkit (1.32): it dies of an assertion now and then when a client goes while it is stopped.
    """

    def __init__(self, folder: Path) -> None:
        need("qemu-nbd", "setpriv")
        self.folder = Path(tempfile.mkdtemp(prefix="bfs-test-", dir=folder if len(str(folder)) < 60 else None))
        self.socket, self.image = self.folder / "nbd", self.folder / "image"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def fill(self, seed: int, size: int) -> bytes:
        """Give the disk new content."""
        content = random.Random(seed).randbytes(size)
        self.image.write_bytes(content)
        return content

    def start(self) -> None:
        """Start the server and wait until it listens."""
        self.stop()
        self.socket.unlink(missing_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-nbd", "--read-only", "--persistent", "--shared=16"]
        command += ["--format=raw", f"--socket={self.socket}", str(self.image)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self._listens():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as s:
            return s.connect_ex(str(self.socket)) == 0

    def freeze(self) -> None:
        """Stop the server's process, as SIGSTOP does."""
        assert self.process is not None
        freeze(self.process.pid)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the server."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def clean(self) -> None:
        """Leave nothing."""
        self.stop()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


@contextmanager
def talker(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listen at a UNIX socket and have every connection served by `talk`, in a thread; yield the URI."""
    with tempfile.TemporaryDirectory(prefix="bfs-test-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "nbd"
        listener.bind(str(path))
        listener.listen(4)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def readers() -> set[int]:
    """Return the processes that read live exports for somebody."""
    found = set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and b"backupfs.sources.live_child" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def readers_of(process: int) -> set[int]:
    """Return those that are children of a process."""
    found = set()
    for pid in readers():
        with suppress(OSError):
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == process and os.path.exists(f"/proc/{pid}/exe"):
                found.add(pid)
    return found
