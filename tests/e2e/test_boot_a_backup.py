"""What writable disks are for: their file systems mounted, and a machine booted from its backup."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import accelerator
from guest_files import KERNEL_OPTIONS, guest_files
from mounts import needs_fuse, wait_until
from places import a_place
from servers import need, run

from backupfs.units import MiB

pytestmark = [pytest.mark.timeout(300), needs_fuse]

# The first stage is in the initramfs, as with any distribution; the second is on the disk itself.
_FIRST = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
modprobe -a virtio_pci virtio_blk
mkdir -p /root
mount -t ext4 -o rw /dev/vda /root && exec switch_root /root /sbin/init
poweroff -f
"""
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox dd if=/dev/zero of=/large bs=1M count=8
echo boot >>/boots
/bin/busybox cp /boots /boots-copy
/bin/busybox sync
echo "booted $(/bin/busybox wc -l </boots) times from $(/bin/busybox grep -c vda /proc/mounts) disk" >/dev/console
/bin/busybox mount -o remount,ro /
/bin/busybox poweroff -f
"""


@contextlib.contextmanager
def mounted_ext4(disk: str, folder: Path) -> Iterator[Path]:
    """Mount a disk by a loop device, to be written to; checks it afterwards."""
    folder.mkdir(exist_ok=True)
    loop = run("losetup", "--find", "--show", disk).strip()
    try:
        run("mount", "-t", "ext4", "-o", "rw,discard", loop, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
    finally:
        run("losetup", "--detach", loop)
    wait_until(lambda: disk not in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").split())
    run("e2fsck", "-f", "-n", disk)


def test_two_points_file_systems_are_written_to_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mkfs.ext4", "e2fsck", "losetup")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(64 * MiB)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image)
    data = image.read_bytes()
    with a_place(tmp_path, data, data) as place:
        before = place.hashes()
        place.mount(keep_scratch=True)
        content = random.Random(4).randbytes(12 * MiB)
        with contextlib.ExitStack() as stack:
            folders = [
                stack.enter_context(mounted_ext4(place.file(number), tmp_path / f"fs{number}")) for number in (0, 1)
            ]
            for number, folder in enumerate(folders):
                (folder / "gone").write_bytes(content)
                os.sync()
                (folder / "gone").unlink()
                (folder / "there").write_bytes(content[number:])
                shutil.copytree("/etc", folder / "etc", symlinks=True, ignore_dangling_symlinks=True)
                subprocess.run(["fstrim", folder], check=True)
        place.unmount()
        assert place.hashes() == before
        place.mount(keep_scratch=True)
        for number in (0, 1):
            with mounted_ext4(place.file(number), tmp_path / f"fs{number}") as folder:
                assert (folder / "there").read_bytes() == content[number:]
                assert os.listdir(folder / "etc")
            assert Path(place.file(number, "raw")).read_bytes() == data
        assert "ERROR" not in place.log()
        place.unmount()
        assert place.hashes() == before


def root_file_system(folder: Path) -> Path:
    """Make a disk that boots: an ext4 with busybox and an init."""
    need("mkfs.ext4", "e2fsck", "debugfs", "busybox")
    root, image = folder / "root", folder / "root.raw"
    for name in ("bin", "sbin", "proc", "dev", "lib64"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox") or ""
    shutil.copy(busybox, root / "bin")
    (root / "bin" / "sh").symlink_to("busybox")
    linked = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False).stdout
    for word in linked.split():
        if word.startswith("/"):
            (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, root / word[1:])
    (root / "sbin" / "init").write_text(_INIT)
    (root / "sbin" / "init").chmod(0o755)
    with image.open("wb") as file:
        file.truncate(48 * MiB)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", "-d", root, image)
    return image


def initramfs_that_switches(folder: Path, usual: Path) -> Path:
    """Return the tests' initramfs with another /init. Of two archives in a row the later one's files count."""
    inside = folder / "initramfs.d"
    inside.mkdir()
    (inside / "init").write_text(_FIRST)
    (inside / "init").chmod(0o755)
    cpio = ["busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"]
    packed = subprocess.run(cpio, input=b"init\n", capture_output=True, cwd=inside, check=True).stdout
    whole = folder / "initramfs"
    whole.write_bytes(usual.read_bytes() + packed)
    return whole


def boot(disk: str, initramfs: Path, kernel: Path, cache: str) -> str:
    """Boot from a disk until the machine powers itself off; return what it said."""
    drive = f"file={disk},format=raw,if=virtio,cache={cache},discard=unmap"
    command = ["qemu-system-x86_64", "-accel", accelerator(), "-m", "256", "-machine", "pc", "-nodefaults"]
    command += ["-display", "none", "-no-reboot", "-drive", drive, "-kernel", str(kernel), "-initrd", str(initramfs)]
    command += ["-append", KERNEL_OPTIONS.replace("ttyS1", "ttyS0"), "-serial", "stdio"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=150, check=False)
    said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    return said


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_machine_boots_from_its_backup_and_again_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    need("qemu-system-x86_64")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kernel, usual = guest_files()
    data = root_file_system(tmp_path).read_bytes()
    initramfs = initramfs_that_switches(tmp_path, usual)
    with a_place(tmp_path, data) as place:
        before = place.hashes()
        for number in (1, 2):
            place.mount(keep_scratch=True)
            assert f"booted {number} times from 1 disk" in boot(place.file(), initramfs, kernel, cache)
            run("e2fsck", "-f", "-n", place.file())
            assert run("debugfs", "-R", "cat /boots-copy", place.file()) == "boot\n" * number
            assert Path(place.file(kind="raw")).read_bytes() == data
            assert "ERROR" not in place.log()
            place.unmount()
        assert place.hashes() == before
