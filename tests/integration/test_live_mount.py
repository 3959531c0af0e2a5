"""Live exports in a mount: beside the points, and no danger to them."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from exports import Export, readers_of
from mounts import fails_with, needs_fuse, pread, process_of, unmount_all, wait_until
from repositories import add_point

from backupfs.errors import UsageError
from backupfs.fuse import mountpoint
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(90), needs_fuse]

STORED = b"stored" * 20_000


@dataclass
class LiveMount:
    """A repository of one point of web01, a live disk of web01 and one of db01, and where they are to be mounted."""

    folder: Path
    web: Export
    db: Export

    def mount(self, **live: str) -> None:
        exports = {tuple(k.split("_")): uri for k, uri in (live or self.both).items()}
        options: dict[str, Any] = {"foreground": False, "allow_other": False, "options": []}
        service.mount(str(self.folder / "repo"), self.path, **options, live=exports)  # type: ignore[arg-type]

    @property
    def both(self) -> dict[str, str]:
        return {"web01_vda": self.web.uri, "db01_sda": self.db.uri}

    @property
    def path(self) -> str:
        return str(self.folder / "mnt")

    @property
    def web_disk(self) -> str:
        return f"{self.path}/web01/live/vda.raw"

    @property
    def db_disk(self) -> str:
        return f"{self.path}/db01/live/sda.raw"

    def stored(self) -> bytes:
        # Past the page cache: what was read once would come from there.
        return subprocess.run(
            ["dd", f"if={self.path}/web01/latest/vda.raw", "bs=1M", "iflag=direct", "status=none"],
            capture_output=True,
            check=True,
        ).stdout

    def process(self) -> int:
        return process_of(self.path)

    def said(self) -> str:
        return Path(background.log_path(self.path)).read_text()


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveMount]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Repository.init(str(tmp_path / "repo"))
    with Repository.open(str(tmp_path / "repo")) as repository:
        add_point(repository, STORED)
    (tmp_path / "mnt").mkdir()
    live = LiveMount(tmp_path, Export(tmp_path), Export(tmp_path))
    try:
        yield live
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(live.process(), signal.SIGKILL)
        unmount_all(live.path)
        live.web.clean()
        live.db.clean()


def direct(path: str, length: int, offset: int) -> bytes:
    buffer = mmap.mmap(-1, length)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        os.close(fd)


def test_what_is_shown(live: LiveMount) -> None:
    web, db = live.web.fill(1, 5 * MiB + 512), live.db.fill(2, 3 * MiB)
    with live.db.image.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 3 * MiB)
        subprocess.run(["fallocate", "-p", "-o", str(MiB), "-l", str(MiB), live.db.image], check=True)
    db = db[:MiB] + bytes(MiB) + db[2 * MiB :]
    live.web.start()
    live.db.start()
    live.mount()
    assert sorted(os.listdir(live.path)) == ["db01", "web01"]
    assert os.listdir(f"{live.path}/db01") == ["live"]
    point = os.readlink(f"{live.path}/web01/latest")
    assert sorted(os.listdir(f"{live.path}/web01")) == sorted([point, "latest", "live"])
    assert os.stat(f"{live.path}/web01").st_nlink == 4
    assert os.listdir(f"{live.path}/web01/live") == ["vda.raw"]
    for path, data in ((live.web_disk, web), (live.db_disk, db)):
        assert Path(path).read_bytes() == data
        assert b"".join(direct(path, MiB, o) for o in range(0, len(data), MiB)) == data
        assert pread(path, 5000, MiB - 7) == data[MiB - 7 :][:5000]
        assert pread(path, 100, len(data)) == b""
        copied = subprocess.run(["cp", "--sparse=always", path, live.folder / "copy"], check=True)
        assert copied.returncode == 0
        assert (live.folder / "copy").read_bytes() == data
        status = os.stat(path)
        assert (status.st_size, status.st_mode & 0o7777) == (len(data), 0o400)
        assert abs(status.st_mtime - time.time()) < 60
    assert os.stat(live.db_disk).st_blocks * 512 == 2 * MiB
    fd = os.open(live.web_disk, os.O_RDONLY)
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        os.close(fd)
        assert mapped[:] == web
    xattrs = {n: os.getxattr(live.web_disk, n) for n in os.listxattr(live.web_disk)}
    assert xattrs == {
        "user.backupfs.vm": b"web01",
        "user.backupfs.disk": b"vda",
        "user.backupfs.kind": b"live",
    }
    assert live.stored() == STORED
    fails_with(errno.ENOENT, os.stat, f"{live.path}/web01/live/sda.raw")
    fails_with(errno.ENOENT, os.stat, f"{live.path}/other/live")
    fails_with(errno.EROFS, os.open, live.web_disk, os.O_RDWR)
    assert "ERROR" not in live.said()


def test_many_readers_at_once(live: LiveMount) -> None:
    data = live.web.fill(1, 24 * MiB)
    live.web.start()
    live.mount(web01_vda=live.web.uri)

    def work(number: int) -> bool:
        fd = os.open(live.web_disk, os.O_RDONLY)
        try:
            start, step = number % 16 * MiB, (4096, 100_000, MiB)[number % 3]
            return all(os.pread(fd, step, o) == data[o : o + step] for o in range(start, start + 4 * MiB, step))
        finally:
            os.close(fd)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(32)))


def test_a_killed_server_hurts_nobody_else(live: LiveMount) -> None:
    old, db = live.web.fill(1, 8 * MiB), live.db.fill(2, 2 * MiB)
    live.web.start()
    live.db.start()
    live.mount()
    with open(live.web_disk, "rb", buffering=0) as first:
        assert first.read(MiB) == old[:MiB]
        inode = os.fstat(first.fileno()).st_ino
        live.web.stop()
        begun = time.monotonic()
        fails_with(errno.EIO, os.pread, first.fileno(), 4096, 7 * MiB)
        fails_with(errno.EIO, os.open, live.web_disk, os.O_RDONLY)
        assert time.monotonic() - begun < 5
        assert live.stored() == STORED
        assert Path(live.db_disk).read_bytes() == db
        assert os.listdir(f"{live.path}/web01/live") == ["vda.raw"]
        assert os.stat(live.web_disk).st_size == 8 * MiB

        new = live.web.fill(3, 9 * MiB)
        live.web.start()
        wait_until(lambda: readable(live.web_disk))
        with open(live.web_disk, "rb") as second:  # the size that a reader sees is that of what it has open
            assert os.fstat(second.fileno()).st_size == 9 * MiB
            assert second.read() == new
        fails_with(errno.EIO, os.pread, first.fileno(), 4096, 0)  # never the bytes of another moment
        assert (os.fstat(first.fileno()).st_ino, os.fstat(first.fileno()).st_size) == (inode, 8 * MiB)
        assert Path(live.web_disk).read_bytes() == new
    assert live.said().count("Traceback") == 0


def readable(path: str) -> bool:
    try:
        return len(pread(path, 1, 0)) == 1
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return False


def content(path: str) -> bytes | None:
    """Return what is in a file; None: it can't be read now."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return None


def test_another_moment_shows_at_once_and_whole(live: LiveMount) -> None:
    """The same size, so that nothing but the connection tells that it is another."""
    live.web.fill(0, 2 * MiB)
    live.web.start()
    live.mount(web01_vda=live.web.uri)
    for seed in range(1, 4):
        before = Path(live.web_disk).read_bytes()
        data = live.web.fill(seed, 2 * MiB)
        assert data != before
        live.web.start()
        wait_until(lambda: readable(live.web_disk))
        assert Path(live.web_disk).read_bytes() == data
        assert pread(live.web_disk, 4 * KiB, MiB) == data[MiB:][: 4 * KiB]


def test_a_server_that_hangs_hurts_nobody_else(live: LiveMount) -> None:
    data, db = live.web.fill(1, 64 * MiB), live.db.fill(2, 2 * MiB)
    live.web.start()
    live.db.start()
    live.mount()
    assert pread(live.web_disk, 10, 0) == data[:10]
    live.web.freeze()
    begun = time.monotonic()
    with ThreadPoolExecutor(40) as pool:
        hung = [pool.submit(pread, live.web_disk, 4096, (i + 1) * MiB) for i in range(40)]
        slowest = 0.0
        while not all(f.done() for f in hung):
            before = time.monotonic()
            assert live.stored() == STORED
            assert Path(live.db_disk).read_bytes() == db
            assert len(os.listdir(f"{live.path}/web01")) == 3
            assert os.stat(live.web_disk).st_size == 64 * MiB
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.05)
        took = time.monotonic() - begun
        assert all(isinstance(f.exception(), OSError) and f.exception().errno == errno.EIO for f in hung)  # type: ignore[union-attr]
    assert 8 < took < 15
    assert slowest < 4
    live.web.thaw()
    wait_until(lambda: readable(live.web_disk), 15)
    assert Path(live.web_disk).read_bytes() == data


def test_an_export_that_comes_late(live: LiveMount) -> None:
    live.mount(web01_vda=live.web.uri)
    assert os.listdir(f"{live.path}/web01/live") == []
    fails_with(errno.ENOENT, os.stat, live.web_disk)
    assert live.stored() == STORED
    wait_until(lambda: "web01/live/vda.raw" in live.said())
    assert "not there" in live.said()
    data = live.web.fill(1, MiB)
    live.web.start()
    wait_until(lambda: os.listdir(f"{live.path}/web01/live") == ["vda.raw"])
    assert Path(live.web_disk).read_bytes() == data


def test_a_killed_child_is_replaced(live: LiveMount) -> None:
    data = live.web.fill(1, 2 * MiB)
    live.web.start()
    live.mount(web01_vda=live.web.uri)
    assert Path(live.web_disk).read_bytes() == data
    (child,) = readers_of(live.process())
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: child not in readers_of(live.process()))

    def is_back() -> bool:
        found = content(live.web_disk)  # the first one after its end may be told of it
        assert found in (None, data)
        return found is not None

    wait_until(is_back)
    assert readers_of(live.process()).isdisjoint({child})


@pytest.mark.parametrize("how", ["unmounted", "killed", "unmounted while it hangs"])
def test_no_child_is_left(live: LiveMount, how: str) -> None:
    live.web.fill(1, 32 * MiB)
    live.db.fill(2, MiB)
    live.web.start()
    live.db.start()
    live.mount()
    pid = live.process()
    children = readers_of(pid)
    assert len(children) == 2
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(lambda: mountpoint.is_dead(live.path))
    elif how == "unmounted":
        service.unmount(live.path)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        live.web.freeze()
        reader = subprocess.Popen(["cat", live.web_disk], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: Path(f"/proc/{reader.pid}/wchan").exists() and reader.poll() is None)
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        reader.wait(15)
    wait_until(lambda: not any(os.path.exists(f"/proc/{child}/exe") for child in children))


def test_words_that_are_no_export_are_refused_before_anything_starts(live: LiveMount) -> None:
    for exports in (
        {("web01", "vda"): "/tmp/disk"},
        {("a/b", "vda"): live.web.uri},
        {("web01", ".."): live.web.uri},
        {("web01", "vda"): "nbd+unix:///?socket=here"},
    ):
        with pytest.raises(UsageError):
            service.mount(
                str(live.folder / "repo"), live.path, foreground=False, allow_other=False, options=[], live=exports
            )
    assert mountpoint.find(live.path) is None
