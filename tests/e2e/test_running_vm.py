"""A real guest under `backupfs backup --qmp`: it writes, deletes and trims all the time, and never notices.

BACKUPFS_LONG=1 does more rounds.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from guest import Guest, GuestDisk, Machine, guest, machine
from moments import Chain, assert_clean
from repositories import read_point
from servers import need, run

from backupfs.repository.repository import Repository
from backupfs.sources import qmp
from backupfs.units import KiB, MiB

ROUNDS = 20 if os.environ.get("BACKUPFS_LONG") else 2
SIZE = 48 * MiB

# Each disk has a writer of its own, which says when something fails, ends when the file /tmp/end is there, and says so.
_WRITER = """
n=0
while [ ! -e /tmp/end ]; do
  n=$((n + 1))
  dd if=/dev/urandom of={folder}/$((n % 5)) bs=64k count=$((n % 20 + 1)) conv=fsync 2>/dev/null || echo dd >>/tmp/failed
  [ $((n % 3)) = 0 ] && rm -f {folder}/$((n % 4))
  [ $((n % 6)) = 0 ] && {{ fstrim {folder} >/dev/null 2>&1 || echo trim >>/tmp/failed; }}
done
echo >>/tmp/ended
"""


def make_disks(folder: Path) -> list[GuestDisk]:
    disks = []
    for name, image_format, attach in (("vda", "qcow2", "virtio-blk"), ("vdb", "raw", "scsi")):
        run("qemu-img", "create", "-q", "-f", image_format, folder / name, str(SIZE))
        disks.append(GuestDisk(folder / name, image_format, name, attach))
    return disks


def let_it_write(g: Guest) -> None:
    """Make file systems on both disks, and start the writers."""
    for device, folder in (("vda", "/mnt/a"), ("sda", "/mnt/b")):
        g.run(f"mkfs.ext4 -q /dev/{device} && mkdir -p {folder} && mount /dev/{device} {folder}")
        g.run("\n".join([f"cat >/tmp/{device} <<'END'", _WRITER.format(folder=folder), "END"]))
        g.run(f"(sh /tmp/{device} &) </dev/null >/dev/null 2>&1")


def assert_unharmed(g: Guest) -> None:
    """End the writers, and make sure that nothing failed in the guest."""
    # Not pgrep: busybox' misses processes now and then.
    g.run('touch /tmp/end; while [ "$(cat /tmp/ended 2>/dev/null | wc -l)" != 2 ]; do sleep 0.1; done')
    assert g.exec("cat /tmp/failed")[1] != 0
    assert "error" not in g.run("dmesg").lower().replace("error-", "")
    g.run("umount /mnt/a /mnt/b")


@pytest.mark.parametrize("method", ["filter", "job"])
def test_points_of_a_guest_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What a chain holds is what the disks held, at each moment; and file systems come out of it."""
    need("e2fsck")
    if method == "job":
        monkeypatch.setattr(qmp, "has_filter", lambda monitor, blocks: False)
    (tmp_path / "scratch").mkdir()
    chain = Chain(tmp_path / "scratch")
    with guest(make_disks(tmp_path)) as g:
        let_it_write(g)
        for number in range(ROUNDS):
            found = chain.take(g, publish=number != 1)
            assert [bool(reason) for reason in chain.reasons.values()] == [number == 0] * 2
            assert_clean(g, chain)
            for name, content in found.items():
                copy = tmp_path / f"copy-{name}"
                copy.write_bytes(content)
                # Its journal is played first, as after a power cut; then there is nothing to repair.
                subprocess.run(["e2fsck", "-p", copy], check=False, capture_output=True)
                checked = subprocess.run(["e2fsck", "-fn", copy], check=False, capture_output=True, text=True)
                assert checked.returncode == 0, checked.stdout
        assert_unharmed(g)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    backupfs(tmp_path / "repo", "init")
    return tmp_path / "repo"


def back_up(repo: Path, g: Machine, *words: str) -> Any:
    return backupfs_json(
        repo, "backup", "web01", "--qmp", g.qmp_path, "--scratch", str(repo.parent / "scratch"), *words
    )


def back_up_paused(repo: Path, g: Guest, disks: list[GuestDisk]) -> Any:
    """Take a point of the stopped guest, and compare it with its images."""
    g.qmp("stop")
    copies = {}
    for disk in disks:
        copy = disk.path.with_suffix(".copy")
        run("qemu-img", "convert", "-U", "-f", disk.image_format, "-O", "raw", disk.path, copy)
        copies[disk.name] = copy.read_bytes()
    point = back_up(repo, g)
    g.qmp("cont")
    with Repository.open(str(repo)) as repository:
        for name, copy in copies.items():
            assert read_point(repository, point["id"], disk=name) == copy, name
    return point


def test_killed_and_interrupted_backups(tmp_path: Path, repo: Path) -> None:
    """A backup dies at any time; the guest goes on, and the next point has all that it wrote."""
    chance = random.Random(7)
    (tmp_path / "scratch").mkdir()
    disks = make_disks(tmp_path)
    with guest(disks) as g:
        let_it_write(g)
        back_up_paused(repo, g, disks)
        for number in range(ROUNDS):
            command = [*BACKUPFS, "-r", str(repo), "backup", "web01", "--qmp", g.qmp_path]
            dying = subprocess.Popen(
                [*command, "--scratch", str(tmp_path / "scratch")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(chance.uniform(0.2, 1.6))  # the moment is what is random here
            dying.send_signal((signal.SIGKILL, signal.SIGINT)[number % 2])
            dying.wait(timeout=60)
            g.run("dd if=/dev/urandom of=/mnt/a/new bs=64k count=3 && sync")
            point = back_up_paused(repo, g, disks)
            assert {disk["read"] for disk in point["disks"]} == {"dirty"}, point
        assert_unharmed(g)
        nodes = g.qmp("query-named-block-nodes", flat=True)
        assert [n["node-name"] for n in nodes if n["node-name"].startswith("backupfs-")] == []
        assert sorted(len(n["dirty-bitmaps"]) for n in nodes if n.get("dirty-bitmaps")) == [1, 1]
        assert list((tmp_path / "scratch").iterdir()) == []


def test_dry_run_touches_nothing(tmp_path: Path, repo: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with machine(make_disks(tmp_path)) as m:
        plan = back_up(repo, m, "--dry-run")
        assert [(d["name"], d["read"]) for d in plan] == [("vda", "all"), ("vdb", "all")]
        assert all("dirty-bitmaps" not in n for n in m.qmp("query-named-block-nodes"))
        back_up(repo, m, "--disk", "vdb")
        plan = back_up(repo, m, "--dry-run")
        assert {d["name"]: d["read"] for d in plan} == {"vda": "all", "vdb": "dirty"}
        assert "no disk 'vdz'" in backupfs(
            repo, "backup", "web01", "--qmp", m.qmp_path, "--disk", "vdz", "--scratch", str(tmp_path), code=10
        )


def test_a_raw_disk_that_was_cut_and_grew_back(tmp_path: Path, repo: Path) -> None:
    """In the middle of a chunk, which no bitmap tells of. What is behind the cut is zero then."""
    (tmp_path / "scratch").mkdir()
    disk = make_disks(tmp_path)[1]
    with machine([disk]) as m:
        m.write(disk, 0, SIZE // 2, 0x11)
        m.write(disk, SIZE // 2, SIZE // 2, 0x22)
        back_up(repo, m)
        for cut, written in ((SIZE - 4 * KiB, None), (SIZE // 2 + 20 * KiB, SIZE - 8 * MiB)):
            for size in (cut, SIZE):
                m.qmp("block_resize", node_name=f"{disk.name}-fmt", size=size)
            if written is not None:
                m.write(disk, written, MiB, 0x33)
            point = back_up(repo, m, "--audit", "0")
            assert [d["read"] for d in point["disks"]] == ["all"]
            assert "does not know of a change" in point["disks"][0]["reason"]
            with Repository.open(str(repo)) as repository:
                assert read_point(repository, point["id"], disk=disk.name) == disk.path.read_bytes()
