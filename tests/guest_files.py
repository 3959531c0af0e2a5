"""What a guest boots from: Debian's kernel, which tools/setup fetched, and an initramfs that is made here.

The initramfs holds busybox, the file systems' programs, and an agent: a shell loop that runs what it reads from the
virtio port named `shell`: an emulated serial port may lose bytes. The kernel's messages go to the second one of those.
`guest_files` may be called from several processes.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import need, run

_CACHE = Path(sys.prefix) / "guest"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_console")
_MODULES += ("sd_mod", "ata_piix", "ata_generic", "xfs", "vfat")
_PROGRAMS = ("mkfs.ext4", "mkfs.xfs")  # of Debian; all else is busybox's, whose shell takes its own of a name first

# A command comes as a line: a number, and the command in base64. What comes back: the number, the exit code, and what
# it printed in base64. Files, not pipes: a command may leave processes behind that run on.
_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ln -s /proc/mounts /etc/mtab
modprobe -a {modules}
until name=$(grep -lx shell /sys/class/virtio-ports/*/name); do sleep 0.1; done
exec 3<>/dev/$(basename $(dirname $name))
exec <&3 >&3 2>/dev/console 3>&-
echo ready
while read -r number command; do
  echo "$command" | base64 -d >/tmp/.command
  sh /tmp/.command </dev/null >/tmp/.output 2>&1
  echo "$number $? $(base64 -w 0 /tmp/.output)"
done
poweroff -f
"""


def guest_files() -> tuple[Path, Path]:
    """Return the paths of the kernel and the initramfs; boot with `KERNEL_OPTIONS` in QEMU's -append.

    Skips the test when there is no kernel; in CI fails.
    """
    need("busybox", *_PROGRAMS)
    kernel = _CACHE / "vmlinuz"
    if not kernel.exists():
        words = f"{kernel} is not there: run tools/setup"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    init = _INIT.format(modules=" ".join(_MODULES))
    contents = dict(_contents(init))
    state = hashlib.sha256(init.encode())
    for inside, outside in sorted(contents.items()):
        status = outside.stat()
        state.update(f"{inside} {outside} {status.st_size} {status.st_mtime_ns}\n".encode())
    initramfs = _CACHE / f"initramfs-{state.hexdigest()[:16]}"
    if not initramfs.exists():
        _make(initramfs, init, contents)
    return kernel, initramfs


KERNEL_OPTIONS = "console=ttyS1 panic=-1 quiet"  # a panic ends QEMU when it was started with -no-reboot


def _contents(init: str) -> Iterator[tuple[str, Path]]:
    """Yield (path inside, file) of what goes into the initramfs."""
    yield "bin/busybox", Path(shutil.which("busybox") or "")
    for program in _PROGRAMS:
        path = Path(shutil.which(program) or "")
        yield f"sbin/{path.name}", path
        for word in run("ldd", path).split():
            if word.startswith("/"):
                yield word[1:], Path(word)
    yield from _modules()


def _modules() -> Iterator[tuple[str, Path]]:
    (folder,) = (_CACHE / "lib/modules").iterdir()
    yield f"lib/modules/{folder.name}/modules.dep", folder / "modules.dep"
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).stem] = (path, [Path(other).stem for other in others.split()])
    # busybox's depmod lists what a module needs itself, not what those need.
    wanted, found = list(_MODULES), set[str]()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            path, others = needs[name]
            wanted += others
            yield f"lib/modules/{folder.name}/{path}", folder / path


def _make(initramfs: Path, init: str, contents: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        root = Path(folder) / "root"
        for name in ("proc", "sys", "dev", "tmp", "etc", "mnt"):
            (root / name).mkdir(parents=True)
        for inside, outside in contents.items():
            target = root / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(outside, target)
            target.chmod(0o755)
        (root / "init").write_text(init)
        (root / "init").chmod(0o755)
        names = "".join(sorted(f"{path.relative_to(root)}\n" for path in root.rglob("*")))
        packed = Path(folder) / "initramfs"
        with packed.open("wb") as out:
            cpio = ["busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"]
            subprocess.run(cpio, input=names.encode(), stdout=out, stderr=subprocess.PIPE, cwd=root, check=True)
        packed.rename(initramfs)
        for old in _CACHE.glob("initramfs-*"):
            if old != initramfs:
                old.unlink(missing_ok=True)
