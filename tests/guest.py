"""Virtual machines for tests: a real Linux guest, or a machine without a guest whose writes the test makes itself."""

import base64
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from guest_files import KERNEL_OPTIONS, guest_files
from qmp_client import QmpClient
from servers import need

_BOOT_S = 120.0  # TCG takes 6 s on an idle core


@dataclass(frozen=True)
class GuestDisk:
    """A disk.

    Attributes:
        path: its image.
        image_format: raw or qcow2. The format node is called `{name}-fmt`, the file's `{name}-file`.
        attach: virtio-blk, scsi or ide, with `name` as the device's id; or drive, for the legacy `-drive if=virtio`.
    """

    path: Path
    image_format: str = "qcow2"
    name: str = "vda"
    attach: str = "virtio-blk"

    @property
    def device(self) -> str:
        """What QEMU calls the device that the guest writes to."""
        if self.attach == "drive":
            return self.name
        return f"/machine/peripheral/{self.name}/virtio-backend" if self.attach == "virtio-blk" else self.name

    def options(self) -> list[str]:
        """Return QEMU's words for it."""
        if self.attach == "drive":
            file = f"file={self.path},format={self.image_format},discard=unmap"
            return ["-drive", f"if=virtio,id={self.name},{file}"]
        file = f"driver=file,node-name={self.name}-file,filename={self.path},discard=unmap"
        image = f"driver={self.image_format},node-name={self.name}-fmt,file={self.name}-file,discard=unmap"
        device = {"virtio-blk": "virtio-blk-pci", "scsi": "scsi-hd,bus=scsi.0", "ide": "ide-hd"}[self.attach]
        words = ["-blockdev", file, "-blockdev", image]
        return [*words, "-device", f"{device},id={self.name},drive={self.name}-fmt"]


class Machine:
    """A QEMU that runs.

    Attributes:
        process: QEMU.
        qmp_path: the QMP socket for backupfs.
        qmp: the test's own monitor.
        folder: where its sockets are, and its output in `log`; removed at the end.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, qmp: QmpClient) -> None:
        self.process = process
        self.folder = folder
        self.qmp_path = str(folder / "qmp")
        self.qmp = qmp

    def write(self, disk: GuestDisk, offset: int, length: int, pattern: int) -> None:
        """Write as the guest would: through the device's own BlockBackend."""
        self.io(disk, f"write -P {pattern} {offset} {length}", f"wrote {length}/{length} bytes")

    def discard(self, disk: GuestDisk, offset: int, length: int) -> None:
        """Discard as the guest would."""
        self.io(disk, f"discard {offset} {length}", f"discard {length}/{length} bytes")

    def io(self, disk: GuestDisk, command: str, expected: str) -> None:
        """Run a command of qemu-io's on the guest's device; it has to print what is expected."""
        log = self.folder / "log"
        before = log.stat().st_size
        option = "" if disk.attach == "drive" else "-d "
        refused = self.qmp.human(f'qemu-io {option}{disk.device} "{command}"')
        said = refused + log.read_bytes()[before:].decode(errors="replace")  # QEMU prints the result to its stdout
        assert expected in said, f"{command}: {said}"

    def quit(self) -> None:
        """Shut QEMU down cleanly, as an operator's `quit`; bitmaps are saved."""
        with suppress(ConnectionError):
            self.qmp("quit")
        self.process.wait(timeout=30)


class Guest(Machine):
    """A machine with Linux in it, which does what `exec` says, as root."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", folder: Path, qmp: QmpClient, channel: socket.socket
    ) -> None:
        super().__init__(process, folder, qmp)
        self._channel = channel
        self._lines = channel.makefile("rwb")
        self._number = 0

    def wait(self, limit_s: float) -> None:
        """Wait until it has booted."""
        self._channel.settimeout(limit_s)
        try:
            line = self._lines.readline()
        except TimeoutError:
            line = b""
        assert line == b"ready\n", (line, (self.folder / "console").read_text(errors="replace")[-3000:])

    def exec(self, command: str, limit_s: float = 120.0) -> tuple[str, int]:
        """Run a shell command; return what it prints and its exit code. What it leaves in the background runs on."""
        self.start(command)
        return self.finish(limit_s)

    def start(self, command: str) -> None:
        """Begin a shell command, for `finish` to wait for."""
        self._number += 1
        self._lines.write(b"%d %s\n" % (self._number, base64.b64encode(command.encode())))
        self._lines.flush()

    def finish(self, limit_s: float = 120.0) -> tuple[str, int]:
        """Wait for what was begun; return what it printed and its exit code."""
        self._channel.settimeout(limit_s)
        number, code, *output = self._lines.readline().split()
        assert int(number) == self._number
        return base64.b64decode(output[0] if output else b"").decode(errors="replace"), int(code)

    def run(self, command: str, limit_s: float = 120.0) -> str:
        """Run a shell command that has to succeed; return what it prints."""
        output, code = self.exec(command, limit_s)
        assert code == 0, f"{command}: {code}\n{output}"
        return output

    def close(self) -> None:
        """Let the channel go."""
        self._lines.close()
        self._channel.close()


@contextmanager
def machine(disks: Sequence[GuestDisk], *options: str) -> Iterator[Machine]:
    """Run a machine that finds nothing to boot. It is there at once."""
    with _qemu(["-accel", "tcg", *_disk_options(disks), *options]) as (process, folder, qmp):
        yield Machine(process, folder, qmp)


@contextmanager
def guest(disks: Sequence[GuestDisk], *options: str) -> Iterator[Guest]:
    """Boot Linux. Disks of virtio-blk are /dev/vda, vdb, …, the others /dev/sda, sdb, …, in their order."""
    kernel, initramfs = guest_files()
    boot = ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", KERNEL_OPTIONS, "-no-reboot"]
    agent = ["-chardev", "socket,id=agent,path=agent,server=on,wait=off", "-device", "virtio-serial-pci"]
    agent += ["-device", "virtserialport,chardev=agent,name=shell", "-serial", "null"]
    words = ["-accel", accelerator(), "-m", "256", *boot, *agent, "-serial", "file:console"]
    with _qemu([*words, *_disk_options(disks), *options]) as (process, folder, qmp):
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(str(folder / "agent"))
        running = Guest(process, folder, qmp, channel)
        try:
            running.wait(_BOOT_S)
            yield running
        finally:
            running.close()


def _disk_options(disks: Sequence[GuestDisk]) -> list[str]:
    scsi = ["-device", "virtio-scsi-pci,id=scsi"] if any(disk.attach == "scsi" for disk in disks) else []
    return [*scsi, *(word for disk in disks for word in disk.options())]


@contextmanager
def _qemu(options: Sequence[str]) -> Iterator[tuple["subprocess.Popen[bytes]", Path, QmpClient]]:
    need("qemu-system-x86_64")
    folder = Path(tempfile.mkdtemp(prefix="bfs-vm-"))
    command = ["qemu-system-x86_64", "-machine", "pc", "-nodefaults", "-display", "none"]
    command += ["-qmp", "unix:qmp,server=on,wait=off", "-qmp", "unix:test,server=on,wait=off"]
    start = ["setpriv", "--pdeathsig", "KILL", "--", "stdbuf", "-oL", *command, *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:
        try:
            qmp = QmpClient(folder / "test", 90)  # a guest under TCG beside other tests
        except (OSError, AssertionError) as e:
            raise AssertionError(f"QEMU does not start: {(folder / 'log').read_text(errors='replace')}") from e
        try:
            yield process, folder, qmp
        finally:
            qmp.close()
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def accelerator() -> str:
    """Return kvm where Linux really runs by it, else tcg: in some machines /dev/kvm opens, and boots nothing."""
    kernel, _ = guest_files()
    # Without a root the kernel panics, resets, and so ends QEMU. One that works says its first words in half a second.
    boot = ["-kernel", str(kernel), "-append", "console=ttyS0 earlyprintk=serial panic=-1", "-no-reboot"]
    command = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-nodefaults", "-display", "none", *boot]
    with tempfile.NamedTemporaryFile() as said:
        console = ["-serial", f"file:{said.name}"]
        process = subprocess.Popen([*command, *console], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for limit_s in (3.0, 10.0):
                try:
                    process.wait(limit_s)
                    break
                except subprocess.TimeoutExpired:
                    if b"Linux version" not in said.read():
                        break
            said.seek(0)
            return "kvm" if b"Kernel panic" in said.read() else "tcg"
        finally:
            process.kill()
            process.wait()
