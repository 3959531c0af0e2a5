"""The main job on real file systems: written through a real QEMU with a bitmap, backed up, mounted, compared."""

import contextlib
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from commands import backupfs, backupfs_json
from namespaces import in_a_new_one

from backupfs.units import GiB, MiB

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-K"],
    "ntfs": ["mkfs.ntfs", "-q", "-F", "-Q"],
}
READ_ONLY = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid", "ntfs": "ro"}
TYPE = {"ext4": "ext4", "xfs": "xfs", "ntfs": "ntfs-3g"}


@contextlib.contextmanager
def mounted_repository(repo: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount the repository in the background; take it away whatever happens."""
    mountpoint.mkdir(exist_ok=True)
    backupfs(repo, "mount", mountpoint)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=False)


@contextlib.contextmanager
def file_system(disk: Path, kind: str, options: str, mountpoint: Path) -> Iterator[Path]:
    """Mount a disk's file system through a loop device."""
    mountpoint.mkdir(exist_ok=True)
    read_only = ["-r"] if options.startswith("ro") else []
    loop = servers.run("losetup", "--find", "--show", *read_only, disk).strip()
    try:
        servers.run("mount", "-t", TYPE[kind], "-o", options, loop, mountpoint)
        try:
            yield mountpoint
        finally:
            servers.run("umount", mountpoint)
    finally:
        servers.run("losetup", "--detach", loop)
        deadline = time.monotonic() + 10
        while Path(loop).name in os.listdir("/sys/block") and disk_of(loop) and time.monotonic() < deadline:
            time.sleep(0.02)


def disk_of(loop: str) -> str:
    """Return the file behind a loop device; empty when it is free."""
    backing = Path("/sys/block") / Path(loop).name / "loop" / "backing_file"
    with contextlib.suppress(OSError):
        return backing.read_text().strip()
    return ""


@contextlib.contextmanager
def running(image: Path, folder: Path) -> Iterator[Path]:
    """Run a qcow2 with its bitmaps in qemu-storage-daemon; yields it as a writable raw file. Ends it cleanly."""
    disk = folder / "running.raw"
    disk.touch()
    node = f"driver=qcow2,node-name=vda,discard=unmap,file.driver=file,file.discard=unmap,file.filename={image}"
    export = f"type=fuse,id=e,node-name=vda,mountpoint={disk},writable=on"
    with servers.storage_daemon("--blockdev", node, "--export", export) as server:
        try:
            yield disk
        finally:
            server.process.terminate()
            server.process.wait(20)
    disk.unlink()


def work(root: Path, rng: random.Random, number: int) -> None:
    """Write, change, empty and delete files."""
    folder = root / f"round-{number}"
    folder.mkdir()
    for i in range(40):
        (folder / f"file {i}").write_bytes(rng.randbytes(rng.randrange(60_000)))
    (root / "big").write_bytes(rng.randbytes(rng.randrange(1, 12 * MiB)))
    with (root / "sparse").open("ab") as file:
        file.seek(rng.randrange(20 * MiB))
        file.write(b"here")
    if number >= 2:
        shutil.rmtree(root / f"round-{number - 2}")


def tree(root: Path) -> dict[str, str]:
    """Return the path and content hash of every file."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("kind", ["ext4", "xfs", "ntfs"])
def test_every_point_holds_the_disk_of_its_moment(tmp_path: Path, kind: str) -> None:
    servers.need("qemu-storage-daemon", "qemu-img", "losetup", MAKE[kind][0])
    rng = random.Random(kind)
    repo, image, copies = tmp_path / "repo", tmp_path / "disk.qcow2", tmp_path / "copies"
    copies.mkdir()
    backupfs(repo, "init")
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "400M")
    servers.run("qemu-img", "bitmap", "--add", image, "b0")
    with running(image, tmp_path) as disk:
        servers.run(*MAKE[kind], disk)
    trees = {}
    for number in range(5):
        with running(image, tmp_path) as disk, file_system(disk, kind, "discard", tmp_path / "fs") as root:
            work(root, rng, number)
            if kind != "ntfs" and number == 3:
                servers.run("fstrim", root)
            content = tree(root)
        # In turn by the file with the bitmap in it, and by an export with the bitmap.
        bitmap = ["--bitmap", "vda=b0"] if number else []
        if number % 2:
            point = backupfs_json(repo, "backup", "web01", f"vda={image}", *bitmap)
        else:
            with servers.qemu_nbd(image, "--bitmap=b0", image_format="qcow2") as server:
                point = backupfs_json(repo, "backup", "web01", f"vda={server.uri}", *bitmap)
        entry = point["disks"][0]
        assert (entry["kind"], entry["read"]) == (("delta", "dirty") if number else ("full", "all")), entry
        servers.run("qemu-img", "convert", "-O", "raw", image, copies / point["id"])
        servers.run("qemu-img", "bitmap", "--clear", image, "b0")
        trees[point["id"]] = content
    with mounted_repository(repo, tmp_path / "mnt") as mountpoint:
        for point_id, content in trees.items():
            disk = mountpoint / "web01" / point_id / "vda.raw"
            servers.run("cmp", disk, copies / point_id)
            servers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, copies / point_id)
            with file_system(disk, kind, READ_ONLY[kind], tmp_path / "fs") as root:
                assert tree(root) == content
        assert os.readlink(mountpoint / "web01" / "latest") == max(trees)
        backupfs(repo, "umount", mountpoint)


def test_points_appear_without_a_remount(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init")
    data = random.Random(1).randbytes(3 * MiB + 1000)
    disk.write_bytes(data)
    with mounted_repository(repo, tmp_path / "mnt") as mountpoint:
        assert os.listdir(mountpoint) == []
        seen = []
        for number in range(3):
            data = data[:1000] + bytes([number]) * 70_000 + data[71_000:]
            disk.write_bytes(data)
            seen.append(backupfs_json(repo, "backup", "web01", f"vda={disk}")["id"])
            deadline = time.monotonic() + 5
            while not (mountpoint / "web01" / seen[-1]).is_dir() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert (mountpoint / "web01" / seen[-1] / "vda.raw").read_bytes() == data
        time.sleep(1.1)  # how long a folder's listing may be kept
        assert sorted(os.listdir(mountpoint / "web01")) == [*seen, "latest"]
        assert (mountpoint / "web01" / "latest" / "vda.raw").read_bytes() == data
        attributes = {
            n: os.getxattr(mountpoint / "web01/latest/vda.raw", n)
            for n in os.listxattr(mountpoint / "web01/latest/vda.raw")
        }
        assert attributes["user.backupfs.vm"] == b"web01"
        assert attributes["user.backupfs.point"] == seen[-1].encode()
        assert set(attributes) == {
            f"user.backupfs.{n}" for n in ("vm", "point", "disk", "kind", "chain", "data_bytes", "digest")
        }
        backupfs(repo, "umount", mountpoint)


def test_damage_is_eio_and_hurts_nothing_else(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init", "--codec", "none")
    data = random.Random(1).randbytes(4 * MiB)
    disk.write_bytes(data)
    first = backupfs_json(repo, "backup", "web01", f"vda={disk}")["id"]
    disk.write_bytes(bytes(65536) + data[65536:-65536] + b"y" * 65536)
    second = backupfs_json(repo, "backup", "web01", f"vda={disk}")["id"]
    base = repo / "vms/web01/disks/vda/main/000000.raw"
    base.chmod(0o600)
    with base.open("r+b") as file:  # in the disk's first chunk, which only the first point shows
        file.seek(100)
        file.write(b"\xff\x00\xff\x00")
    with mounted_repository(repo, tmp_path / "mnt") as mountpoint:
        assert (mountpoint / "web01" / second / "vda.raw").read_bytes()[65536:] == disk.read_bytes()[65536:]
        with (mountpoint / "web01" / first / "vda.raw").open("rb", buffering=0) as file:
            fd = file.fileno()
            with pytest.raises(OSError, match="Input/output"):
                os.pread(fd, 4096, 0)
            assert os.pread(fd, 4096, MiB) == data[MiB : MiB + 4096]
        backupfs(repo, "umount", mountpoint)


def test_a_sparse_disk_of_10_tib(tmp_path: Path) -> None:
    repo, image = tmp_path / "repo", tmp_path / "disk.qcow2"
    backupfs(repo, "init")
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "10T")
    places = [0, 3 << 40, (7 << 40) + 12345 * 512, (10 << 40) - MiB]
    writes = [w for p in places for w in ("-c", f"write -P {p % 251 + 1} {p} 1M")]
    servers.run("qemu-io", "-f", "qcow2", *writes, image)
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    point = backupfs_json(repo, "backup", "big", f"vda={image}")
    assert point["disks"][0]["size"] == 10 << 40
    again = backupfs_json(repo, "backup", "big", f"vda={image}")
    assert again["disks"][0]["data_bytes"] == 0
    with mounted_repository(repo, tmp_path / "mnt") as mountpoint:
        disk = mountpoint / "big" / "latest" / "vda.raw"
        assert disk.stat().st_size == 10 << 40
        assert disk.stat().st_blocks * 512 < 16 * MiB
        with disk.open("rb", buffering=0) as file:
            for place in places:
                file.seek(place)
                assert file.read(MiB) == bytes([place % 251 + 1]) * MiB
            file.seek(5 << 40)
            assert not any(file.read(MiB))
        backupfs(repo, "umount", mountpoint)
    assert time.monotonic() - started < 60
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib == before or peak_kib * 1024 < GiB // 2
    assert sys.maxsize > 10 << 40


def test_fstab_and_mount_8(tmp_path: Path) -> None:
    """`mount -t fuse.backupfs REPO MOUNTPOINT` runs `backupfs REPO MOUNTPOINT -o OPTIONS`."""
    repo, disk, mountpoint = tmp_path / "repo", tmp_path / "disk.raw", tmp_path / "mnt"
    backupfs(repo, "init")
    disk.write_bytes(b"x" * 10_000)
    backupfs(repo, "backup", "web01", f"vda={disk}")
    mountpoint.mkdir()
    program = tmp_path / "bin" / "backupfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m backupfs "$@"\n')
    program.chmod(0o755)
    # mount(8)'s helper looks in the system's folders only: in a mount namespace of the test's own, ours is there.
    script = """
        set -e
        mount --bind "$1" /usr/local/bin
        mount -t fuse.backupfs -o ro,noauto,allow_other "$2" "$3"
        cat "$3/web01/latest/vda.raw"
        backupfs umount "$3"
    """
    words = [*in_a_new_one(), "bash", "-c", script, "bash", str(program.parent), str(repo), str(mountpoint)]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"x" * 10_000), done.stderr
