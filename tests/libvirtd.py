"""A libvirtd of the tests' own, in namespaces of its own: the host's libvirt, if it has one, sees nothing of it.

Its /etc, /run and /var are folders of the test. Whatever it starts dies with it: they are in one PID namespace.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import servers
from namespaces import LET_MOUNTS_GO, in_a_new_one

_LIMIT_S = 60.0

# libvirtd is started again whenever it ends. It is no PID 1: that one would have to reap QEMU's processes.
_START = f"""
set -e
{LET_MOUNTS_GO}
for folder in etc run var/lib var/cache var/log; do mount --bind "$1/$folder" "/$folder"; done
while :; do libvirtd || :; done
"""
_QEMU_CONF = """
user = "{user}"
group = "{user}"
security_driver = "none"
dynamic_ownership = {dynamic_ownership}
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
_USER = "libvirt-qemu"  # has to be there, whoever QEMU runs as


@dataclass(frozen=True)
class Disk:
    """A disk of a domain."""

    name: str
    path: Path
    image_format: str = "qcow2"
    more: str = ""

    def xml(self) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{self.image_format}' discard='unmap'/>"
            f"<source file='{self.path}'/><target dev='{self.name}' bus='virtio'/>{self.more}</disk>"
        )


class Libvirt:
    """A libvirtd that runs.

    Attributes:
        uri: what to connect to.
        folder: holds its /etc, /run and /var, and is the place for images: QEMU's user can get into it.
        connection: one, that is made anew after a restart.
    """

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder = folder
        self.uri = f"qemu:///system?socket={folder}/run/libvirt/libvirt-sock"
        self._process = process
        self.connection = self._connect()

    def _connect(self) -> Any:
        import libvirt

        libvirt.registerErrorHandler(lambda context, error: None, None)
        deadline = time.monotonic() + _LIMIT_S
        while True:
            try:
                return libvirt.open(self.uri)
            except libvirt.libvirtError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self.folder / "log").read_text(errors="replace")) from None
                time.sleep(0.02)

    def start(
        self, name: str, disks: Sequence[Disk], devices: str = "", boot: str = "", *, persistent: bool = True
    ) -> Any:
        """Define and start a domain; return libvirt's object."""
        domain = self.define(name, disks, devices, boot) if persistent else None
        if domain is None:
            return self.connection.createXML(self._xml(name, disks, devices, boot), 0)
        domain.create()
        return domain

    def define(self, name: str, disks: Sequence[Disk], devices: str = "", boot: str = "", uuid: str = "") -> Any:
        """Define a domain, anew when its `uuid` is given; return libvirt's object."""
        described = self._xml(name, disks, devices, boot)
        if uuid:
            described = described.replace("<memory", f"<uuid>{uuid}</uuid><memory", 1)
        return self.connection.defineXML(described)

    @staticmethod
    def _xml(name: str, disks: Sequence[Disk], devices: str, boot: str) -> str:
        return (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>{256 if boot else 32}</memory>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os><features><acpi/></features><devices>"
            f"<emulator>/usr/bin/qemu-system-x86_64</emulator>{''.join(d.xml() for d in disks)}{devices}"
            "<memballoon model='none'/></devices></domain>"
        )

    def restart(self, change: Callable[[], None] = lambda: None) -> None:
        """Kill libvirtd, not its domains, and wait until it is there again; `change` is called while it is stopped."""
        self.connection.close()
        daemon = self._child(b"libvirtd")
        servers.freeze(daemon)
        change()
        os.kill(daemon, signal.SIGKILL)
        while self._child_or_none(b"libvirtd") in (daemon, None):
            time.sleep(0.01)
        self.connection = self._connect()

    def daemon(self) -> int:
        """Return libvirtd's PID."""
        return self._child(b"libvirtd")

    def kill_qemu(self, domain: Any) -> None:
        """Kill a domain's QEMU and wait until libvirt knows."""
        os.kill(self._child(f"guest={domain.name()},".encode()), signal.SIGKILL)
        wait_until(lambda: not domain.isActive())

    def forget_checkpoint(self, domain: Any, name: str) -> None:
        """Have libvirt know nothing of a checkpoint."""
        (self.folder / f"var/lib/libvirt/qemu/checkpoint/{domain.name()}/{name}.xml").unlink()

    def _child(self, word: bytes) -> int:
        found = self._child_or_none(word)
        assert found is not None, word
        return found

    def _child_or_none(self, word: bytes) -> int | None:
        for init in _children(self._process.pid):
            for pid in _children(init):
                with suppress(OSError):
                    if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return pid
        return None

    def clear(self) -> None:
        """Stop and forget all domains."""
        import libvirt

        for domain in self.connection.listAllDomains():
            try:
                if domain.isActive():
                    domain.destroy()
            except libvirt.libvirtError as e:
                # A guest powers off by itself when its shell's channel is closed.
                if e.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or domain.isActive():
                    raise
            with suppress(libvirt.libvirtError):  # a transient one is gone now
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)


def write(domain: Any, disk: str, *commands: str) -> None:
    """Make a guest's writes, by qemu-io's commands through the device."""
    import libvirt_qemu

    alias = f"virtio-disk{ord(disk[-1]) - ord('a')}"
    for command in commands:
        words = f'qemu-io -d /machine/peripheral/{alias}/virtio-backend "{command}"'
        said = libvirt_qemu.qemuMonitorCommand(domain, words, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        assert not said.strip(), said


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def libvirtd(*, user: str = "root", dynamic_ownership: bool = False, small: bool = False) -> Iterator[Libvirt]:
    """Run a libvirtd; skip the test where there is none, and fail in CI.

    Args:
        user: whom QEMU runs as.
        dynamic_ownership: whether libvirt gives that user what QEMU opens.
        small: whether there is to be a file system of 4 MiB in the folder `small`.
    """
    servers.need("libvirtd", "unshare", "qemu-system-x86_64")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = Path(tempfile.mkdtemp(prefix="bfs-lv-"))
    folder.chmod(0o755)
    try:
        _fill(folder, user, dynamic_ownership)
        if small:
            (folder / "small").mkdir()
            servers.run("mount", "-t", "tmpfs", "-o", "size=4m", "small", folder / "small")
        own = in_a_new_one("--pid", "--fork", "--kill-child", "--mount-proc", from_here=small)
        command = [*own, "sh", "-c", _START, "sh"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            found = Libvirt(folder, process)
            try:
                yield found
            finally:
                with suppress(Exception):
                    found.connection.close()
        finally:
            inits = _children(process.pid)
            process.kill()
            process.wait()
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inits))
    finally:
        if (folder / "small").is_mount():
            servers.run("umount", folder / "small")
        shutil.rmtree(folder)


def _fill(folder: Path, user: str, dynamic_ownership: bool) -> None:
    for name in ("etc/libvirt", "run", "var/lib", "var/cache", "var/log"):
        (folder / name).mkdir(parents=True)
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", folder / "etc")
    for name, line in (("passwd", f"{_USER}:x:64055:64055::/:/bin/false\n"), ("group", f"{_USER}:x:64055:\n")):
        with (folder / "etc" / name).open("a") as file:
            file.write(line)
    configuration = _QEMU_CONF.format(user=user, dynamic_ownership=int(dynamic_ownership))
    (folder / "etc/libvirt/qemu.conf").write_text(configuration)
    (folder / "etc/libvirt/libvirtd.conf").write_text(
        'auth_unix_rw = "none"\nunix_sock_rw_perms = "0700"\nunix_sock_group = "root"\n'
    )


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError):
                # The command is in parentheses, and may hold any character. Source: proc(5)
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found
