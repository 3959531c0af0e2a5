"""Image files: their formats, names and bitmaps, and what becomes of the qemu-nbd child."""

import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from servers import need, run, storage_daemon

from backupfs.errors import ConnectError, UsageError
from backupfs.extents import Extent
from backupfs.sources import Source, open_source
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.usefixtures("tools")


@pytest.fixture
def tools() -> None:
    need("qemu-img", "qemu-nbd", "qemu-io", "setpriv")


def children(path: Path) -> list[int]:
    """Return the processes of qemu-nbd that serve an image."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[0].endswith(b"qemu-nbd") and os.fsencode(path) in arguments:
            found.append(int(entry.name))
    return found


def gone(path: Path, limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while children(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def folders() -> set[str]:
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "backupfs-*")))


def read_all(source: Source) -> bytes:
    buffer = bytearray(source.size)
    source.readinto(0, buffer)
    return bytes(buffer)


@pytest.mark.parametrize("size", [1, 511, 513, 64 * KiB + 1, MiB])
def test_a_raw_file_has_its_exact_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(size))
    source = open_source(str(path), timeout_s=10)
    assert source.size == size
    assert read_all(source) == path.read_bytes()
    assert sum(e.length for e in source.extents(0, size)) == size
    source.close()


def test_a_backing_chain_is_read_through(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"b" * MiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", top)
    run("qemu-io", "-c", "write -P 116 64k 64k", top)
    source = open_source(str(top), timeout_s=10)
    assert read_all(source) == b"b" * (64 * KiB) + b"t" * (64 * KiB) + b"b" * (MiB - 128 * KiB)
    source.close()


NAMES = [
    "-dash",
    "--help",
    "comma,in,it",
    " spaces ",
    "new\nline",
    "nbd:unix:x",
    "json:{}",
    "%41?&#",
    "é",
    "\udcff\udcfe",
    "a:b",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content = random.Random(2).randbytes(4096)
    (tmp_path / name).write_bytes(content)
    for spec in (name, str(tmp_path / name)):
        source = open_source(spec, timeout_s=10)
        assert read_all(source) == content
        source.close()


def test_a_long_or_odd_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(512))
    for name in ("x" * 120, "a b%&?#"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        open_source(str(path), timeout_s=10).close()
        assert list((tmp_path / name).iterdir()) == []


def test_what_is_no_image(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "empty").touch()
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + b"\xff" * 1000)
    for name, words in (
        ("missing", "No such file"),
        ("", "is a folder"),
        ("fifo", "neither a file"),
        ("empty", "is empty"),
        ("bad.qcow2", "luster size"),
        ("empty/x", "Not a directory"),
    ):
        with pytest.raises(ConnectError, match=words):
            open_source(str(tmp_path / name), timeout_s=10)
    with pytest.raises(UsageError):
        open_source("a\0b")


def test_a_damaged_qcow2_is_told_by_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as f:
        f.truncate(100)
    with pytest.raises(ConnectError, match=r"disk\.qcow2: "):
        open_source(str(path), timeout_s=10)
    assert gone(path)


def test_a_missing_backing_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "missing.raw", "-F", "raw", path, "1M")
    before = folders()
    with pytest.raises(ConnectError, match=r"missing\.raw"):
        open_source(str(path), timeout_s=10)
    assert gone(path)
    assert folders() <= before


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_in_use_is_refused(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", image_format, path, "1M")
    node = f"driver={image_format},node-name=n,file.driver=file,file.filename={path}"
    export = "type=nbd,id=e,node-name=n,name=disk,writable=on"
    with storage_daemon("--blockdev", node, "--export", export), pytest.raises(ConnectError, match="in use by another"):
        open_source(str(path), timeout_s=10)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_image_of_a_running_machine_is_refused(tmp_path: Path, image_format: str) -> None:
    need("qemu-system-x86_64")
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", image_format, path, "1M")
    machine = ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-m", "16", "-S", "-display", "none", "-daemonize"]
    pid = tmp_path / "pid"
    run(*machine, "-pidfile", pid, "-drive", f"file={path},format={image_format},if=virtio")
    try:
        with pytest.raises(ConnectError, match="in use by another"):
            open_source(str(path), timeout_s=10)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:  # a dying process keeps its locks a moment longer than it is to be seen
        try:
            return open_source(str(path), timeout_s=10).close()
        except ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_qemu_refuses_to_write_while_an_image_is_read(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", image_format, path, "1M")
    write = ["qemu-io", "-f", image_format, "-c", "write 0 512", str(path)]
    source = open_source(str(path), timeout_s=10)
    done = subprocess.run(write, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"Is another process using the image" in done.stderr
    other = open_source(str(path), timeout_s=10)
    other.close()
    source.close()
    run(*write)


# Bitmaps.


def make_bitmap(path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    run("qemu-img", "bitmap", "--add", path, "b 0")
    run("qemu-io", "-c", "write 1M 64k", path)


def test_a_persistent_bitmap(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_bitmap(path)
    source = open_source(str(path), "b 0", timeout_s=10)
    assert (source.bitmap, source.bitmap_problem, source.format) == ("b 0", None, "qcow2")
    assert [e for e in source.dirty(0, source.size) if e.flag] == [Extent(MiB, 64 * KiB, True)]
    source.close()
    source = open_source(str(path), "b 0", timeout_s=10)
    assert [e for e in source.dirty(0, source.size) if e.flag] == [Extent(MiB, 64 * KiB, True)]
    source.close()


def test_a_bitmap_that_can_not_be_used(tmp_path: Path) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    make_bitmap(path)
    raw.write_bytes(bytes(MiB))
    run("qemu-img", "bitmap", "--add", "--disable", path, "off")
    for image, bitmap, words in ((path, "b1", "no dirty bitmap"), (path, "off", "disabled"), (raw, "b0", "raw image")):
        source = open_source(str(image), bitmap, timeout_s=10)
        assert source.bitmap is None
        assert words in str(source.bitmap_problem)
        assert all(dirty.flag for _, dirty in source.status(0, source.size))
        source.close()


def test_a_bitmap_that_was_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_bitmap(path)
    node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={path}"
    with storage_daemon("--blockdev", node, "--export", "type=nbd,id=e,node-name=n,name=disk,writable=on") as server:
        server.process.kill()
        server.process.wait()
    assert "in-use" in json.dumps(json.loads(run("qemu-img", "info", "--output=json", path)))
    source = open_source(str(path), "b 0", timeout_s=10)
    assert source.bitmap is None
    assert "inconsistent" in str(source.bitmap_problem)
    assert len(read_all(source)) == 8 * MiB
    source.close()


# The child.


def test_the_child_lives_as_long_as_the_source(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    before = folders()
    source = open_source(str(path), timeout_s=10)
    assert len(children(path)) == 1
    assert folders() <= before
    source.close()
    assert children(path) == []
    source.close()


def test_a_child_that_dies_ends_the_source(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    source = open_source(str(path), timeout_s=10)
    os.kill(children(path)[0], signal.SIGKILL)
    with pytest.raises(ConnectError):
        list(source.read_many([(0, MiB)] * 1000))
    source.close()


def test_the_child_outlives_the_thread_that_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * MiB)
    sources: list[Source] = []
    thread = threading.Thread(target=lambda: sources.append(open_source(str(path), timeout_s=10)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert read_all(sources[0]) == b"x" * MiB
    sources[0].close()


def test_nothing_is_left_when_no_child_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    for name in ("qemu-img", "sh", "setpriv"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    before = folders()
    with pytest.raises(ConnectError, match="qemu-nbd"):
        open_source(str(path), timeout_s=10)
    (tmp_path / "setpriv").unlink()
    with pytest.raises(ConnectError, match="setpriv"):
        open_source(str(path), timeout_s=10)
    assert folders() <= before


def test_the_child_goes_when_the_parent_is_killed_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    program = (
        "import sys, time; from backupfs.sources import open_source\n"
        f"print(flush=True); s = open_source({str(path)!r}); time.sleep(60)\n"
    )
    before = folders()
    for delay_s in (0.001, 0.005, 0.008, 0.011, 0.014, 0.017, 0.02, 0.025, 0.3):
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(delay_s)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert gone(path)
    for folder in folders() - before:  # a kill between its making and its removal leaves it, empty but for the socket
        assert os.listdir(folder) in ([], ["nbd"])
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
