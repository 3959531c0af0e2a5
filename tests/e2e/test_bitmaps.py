"""What a bitmap can get wrong, and what a source can: never a silent gap, never a half point."""

import fcntl
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import servers
from commands import BACKUPFS, backupfs, backupfs_json
from repositories import read_point

from backupfs.errors import ConnectError
from backupfs.repository.repository import Repository
from backupfs.services.backup import BackupRequest, backup
from backupfs.sources.given import GivenDisk, GivenDisks
from backupfs.units import KiB, MiB

SIZE = 64 * MiB


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    backupfs(tmp_path / "repo", "init")
    return tmp_path / "repo"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 with random data in its first half."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(random.Random(1).randbytes(SIZE // 2))
    os.truncate(raw, SIZE)
    servers.run("qemu-img", "convert", "-O", "qcow2", raw, path)
    return path


def write(image: Path, *commands: str) -> None:
    servers.run("qemu-io", "-f", "qcow2", *[w for c in commands for w in ("-c", c)], image)


def bitmap(image: Path, what: str, name: str = "b0") -> None:
    servers.run("qemu-img", "bitmap", what, image, name)


def assert_point_is(repo: Path, image: Path, point: str) -> None:
    copy = image.with_suffix(".copy")
    servers.run("qemu-img", "convert", "-O", "raw", image, copy)
    with Repository.open(str(repo)) as repository:
        assert read_point(repository, point) == copy.read_bytes()


def take(repo: Path, image: Path, *words: str) -> dict[str, object]:
    """Take a point, check that it is the image, and return its entry of the disk."""
    point = backupfs_json(repo, "backup", "web01", f"vda={image}", *words)
    assert_point_is(repo, image, point["id"])
    return dict(point["disks"][0])


def test_dirty_ranges_zeroes_and_what_did_not_change(repo: Path, image: Path) -> None:
    take(repo, image)
    bitmap(image, "--add")
    write(image, "write -P 7 1M 64k", "write -z 2M 1M", "discard 4M 1M", "write -P 9 40M 1", "read 5M 1M")
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert (entry["kind"], entry["read"], entry["reason"]) == ("delta", "dirty", "")
    assert entry["data_bytes"] == 2 * 64 * KiB
    again = take(repo, image, "--bitmap", "vda=b0")  # nobody cleared b0: all dirty still, and nothing new
    assert again["data_bytes"] == 0
    listed = servers.run("qemu-img", "info", "--output=json", image)
    assert '"name": "b0"' in listed


def test_no_such_bitmap(repo: Path, image: Path) -> None:
    take(repo, image)
    write(image, "write -P 7 1M 64k")
    entry = take(repo, image, "--bitmap", "vda=b7")
    assert (entry["kind"], entry["read"]) == ("delta", "all")
    assert "b7" in str(entry["reason"])
    with servers.qemu_nbd(image, image_format="qcow2") as server:
        point = backupfs_json(repo, "backup", "web01", f"vda={server.uri}", "--bitmap", "vda=b7")
    assert (point["disks"][0]["read"], "b7" in point["disks"][0]["reason"]) == ("all", True)


def test_an_inconsistent_bitmap(repo: Path, image: Path) -> None:
    take(repo, image)
    bitmap(image, "--add")
    node = f"driver=qcow2,node-name=vda,file.driver=file,file.filename={image}"
    export = "type=nbd,id=e,node-name=vda,name=disk,writable=on"
    with servers.storage_daemon("--blockdev", node, "--export", export) as server:
        write_through(server.uri, MiB, b"z" * 65536)
        server.process.kill()
        server.process.wait()
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert (entry["kind"], entry["read"]) == ("delta", "all")
    assert "inconsistent" in str(entry["reason"])


def write_through(uri: str, offset: int, data: bytes) -> None:
    script = (
        "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]);"
        "h.pwrite(sys.stdin.buffer.read(), int(sys.argv[2])); h.flush()"
    )
    subprocess.run([os.sys.executable, "-c", script, uri, str(offset)], input=data, check=True)


def test_a_bitmap_that_missed_changes_is_found_out(repo: Path, image: Path) -> None:
    take(repo, image)
    write(image, "write -P 7 0 24M")
    bitmap(image, "--add")  # too late
    write(image, "write -P 8 30M 64k")
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert (entry["kind"], entry["read"]) == ("delta", "all")
    assert "does not know of a change at offset" in str(entry["reason"])


def test_a_bitmap_that_missed_a_discard_is_found_out(repo: Path, image: Path) -> None:
    take(repo, image)
    write(image, "discard 0 32M")
    bitmap(image, "--add")
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert entry["read"] == "all"


def test_a_grown_disk_by_bitmap_and_a_shrunk_one_without(repo: Path, image: Path) -> None:
    take(repo, image)
    bitmap(image, "--add")
    servers.run("qemu-img", "resize", "-q", image, "70000128")
    write(image, "write -P 5 69000000 512k", "write -P 6 100k 1k")
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert (entry["kind"], entry["read"], entry["size"]) == ("delta", "dirty", 70000128)
    bitmap(image, "--remove")
    servers.run("qemu-img", "resize", "-q", "--shrink", image, "20000256")
    bitmap(image, "--add")
    entry = take(repo, image, "--bitmap", "vda=b0")
    assert (entry["read"], entry["size"]) == ("all", 20000256)
    assert "shrank" in str(entry["reason"])
    servers.run("qemu-img", "resize", "-q", image, "64M")
    take(repo, image)


def test_a_bitmap_is_not_trusted_when_a_point_was_taken_away(repo: Path, image: Path) -> None:
    """The bitmap was cleared at the point that is gone: what changed before that is in no bitmap."""
    take(repo, image)
    bitmap(image, "--add")
    write(image, "write -P 7 1M 64k")
    take(repo, image, "--bitmap", "vda=b0")
    bitmap(image, "--clear")
    last = backupfs_json(repo, "points")[-1]["id"]
    (repo / "vms/web01/points" / f"{last}.json").unlink()
    entry = take(repo, image, "--bitmap", "vda=b0", "--audit", "0")
    assert (entry["kind"], entry["read"], entry["data_bytes"]) == ("delta", "all", 65536)
    assert "taken away" in str(entry["reason"])


def test_a_disk_that_shrank_and_grew_again_between_two_points(repo: Path, image: Path) -> None:
    """Its size is what it was, and the bitmap is clean where the old bytes are gone."""
    write(image, "write -P 3 60M 4M")
    take(repo, image)
    bitmap(image, "--add")
    bitmap(image, "--remove")
    servers.run("qemu-img", "resize", "-q", "--shrink", image, "62M")
    servers.run("qemu-img", "resize", "-q", image, "64M")
    bitmap(image, "--add")
    take(repo, image, "--bitmap", "vda=b0", "--audit", "0")


def test_a_server_with_small_requests(repo: Path) -> None:
    options = ["--filter=blocksize-policy"]
    with servers.nbdkit(
        "pattern", "size=3M", "blocksize-maximum=32K", "blocksize-error-policy=error", options=options
    ) as server:
        backupfs(repo, "backup", "web01", f"vda={server.uri}")


def test_two_chains_with_bitmaps_of_their_own(repo: Path, image: Path) -> None:
    for chain in ("daily", "weekly"):
        take(repo, image, "--chain", chain)
        bitmap(image, "--add", chain)
    rng = random.Random(2)
    for number in range(6):
        offsets = [rng.randrange(SIZE // 65536) * 65536 for _ in range(3)]
        write(image, *[f"write -P {number + 1} {o} 64k" for o in offsets])
        chain = "weekly" if number == 3 else "daily"
        entry = take(repo, image, "--chain", chain, "--bitmap", f"vda={chain}")
        assert (entry["chain"], entry["read"]) == (chain, "dirty")
        bitmap(image, "--clear", chain)


def test_a_source_that_fails_half_way(repo: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    # nbdkit 1.32 with several threads now and then aborts when a client goes that has requests in flight.
    options = ["--filter=error", "--threads=1"]
    arguments = ["pattern", "size=64M", "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with servers.nbdkit(*arguments, options=options) as server:
        first = backupfs_json(repo, "backup", "web01", f"vda={server.uri}")
        trigger.touch()
        assert "offset" in backupfs(repo, "backup", "web01", f"vda={server.uri}", code=31)
        trigger.unlink()
        assert backupfs_json(repo, "points") == [first]
        backupfs(repo, "backup", "web01", f"vda={server.uri}")
    assert not list((repo / "tmp").iterdir())


def test_a_source_that_dies_half_way(repo: Path) -> None:
    with servers.nbdkit(
        "pattern",
        "size=4G",
        options=["--filter=rate"],
    ) as server:
        process = subprocess.Popen(
            [*BACKUPFS, "-r", str(repo), "backup", "web01", f"vda={server.uri}"], stderr=subprocess.PIPE, text=True
        )
        while not list((repo / "tmp").iterdir()):
            time.sleep(0.01)
        time.sleep(0.2)
        server.process.kill()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 30, said
    assert backupfs_json(repo, "points") == []
    assert not list((repo / "tmp").iterdir())


def test_a_source_that_stops_answering(repo: Path) -> None:
    with servers.nbdkit("pattern", "size=1G") as server, Repository.open(str(repo)) as repository:
        timer = threading.Timer(0.3, server.process.send_signal, [signal.SIGSTOP])
        timer.start()
        request = BackupRequest("web01", lambda: GivenDisks([GivenDisk("vda", server.uri, None)], timeout_s=1.0))
        started = time.monotonic()
        with pytest.raises(ConnectError, match="no answer"):
            backup(repository, request, lambda *_: None)
        timer.join()
        assert time.monotonic() - started < 20
        assert repository.vms() == []


def test_a_second_backup_waits_or_is_refused(repo: Path) -> None:
    command = [*BACKUPFS, "-r", str(repo), "backup", "web01"]
    with servers.nbdkit("pattern", "size=64M") as server:
        servers.freeze(server.process.pid)
        first = subprocess.Popen([*command, f"vda={server.uri}"], stdout=subprocess.DEVNULL)
        while "process" not in (repo / "lock").read_text():
            time.sleep(0.01)
        holder = f"process {first.pid} is writing to this repository"
        assert holder in backupfs(repo, "backup", "web01", "vda=x", "--no-wait", code=11)
        second = subprocess.Popen(
            [*command, f"vda={server.uri}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None
        assert f"{holder}; waiting" in second.stderr.readline()
        server.process.send_signal(signal.SIGCONT)
        assert (first.wait(30), second.wait(30)) == (0, 0)
        second.stderr.close()
    assert [p["disks"][0]["seq"] for p in backupfs_json(repo, "points")] == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_backup_that_waits_can_be_interrupted(repo: Path, number: signal.Signals) -> None:
    with open(repo / "lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [*BACKUPFS, "-r", str(repo), "backup", "web01", "vda=x"], stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None
        assert "waiting" in second.stderr.readline()
        second.send_signal(number)
        assert second.wait(30) == 130
        second.stderr.close()


class _Interrupted(GivenDisks):
    """Ctrl-C comes while what was set up is undone."""

    def close(self) -> None:
        super().close()
        raise KeyboardInterrupt


def test_a_ctrl_c_that_comes_too_late_does_not_call_a_published_point_unpublished(repo: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(MiB))
    with Repository.open(str(repo)) as repository:
        request = BackupRequest("web01", lambda: _Interrupted([GivenDisk("vda", str(disk), None)]))
        taken = backup(repository, request, lambda *_: None)
        assert repository.points("web01") == [taken.id]
