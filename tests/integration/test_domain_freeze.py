"""Freezing a real Linux guest's file systems for the moment. The agent in it is a shell script, which speaks what
libvirt asks for of QEMU's guest agent and does it with fsfreeze.
"""

import base64
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from domains import Web, two_disks
from guest_files import KERNEL_OPTIONS, guest_files
from libvirtd import Disk, Libvirt, libvirtd, wait_until

from backupfs.errors import ConnectError, SourceError
from backupfs.sources import domain_xml
from backupfs.units import MiB

_BOOT_S = 120.0
_AGENT = """\
for port in /sys/class/virtio-ports/*; do
  [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] && exec 3<>/dev/$(basename $port)
done
while :; do
  read -r line <&3 || { sleep 0.1; continue; }  # ends as long as libvirt has not opened its side
  case "$line" in
    *guest-sync*) id=${line##*'"id":'}; echo "{\\"return\\": ${id%%[!0-9]*}}" >&3 ;;
    *fsfreeze-freeze*) [ -e /tmp/slow ] && sleep 12
      fsfreeze --freeze /mnt && echo freeze >>/tmp/said; echo '{"return": 1}' >&3 ;;
    *fsfreeze-thaw*) fsfreeze --unfreeze /mnt && echo thaw >>/tmp/said; echo '{"return": 1}' >&3 ;;
  esac
done
"""


class Guest:
    """The guest's shell."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_BOOT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rwb")

    def boot(self) -> None:
        assert self._lines.readline() == b"ready\n"

    def run(self, command: str, limit_s: float = 60.0) -> str:
        self._socket.settimeout(limit_s)
        self._lines.write(b"1 %s\n" % base64.b64encode(command.encode()))
        self._lines.flush()
        _, code, *output = self._lines.readline().split()
        said = base64.b64decode(output[0]).decode() if output else ""
        assert int(code) == 0, said
        return said

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirt]:
    with libvirtd(small=True) as daemon:
        yield daemon


@contextmanager
def linux(daemon: Libvirt) -> Iterator[tuple[Web, Guest]]:
    """Boot a Linux with an ext4 at /mnt, on vda, and an agent."""
    kernel, initramfs = guest_files()
    boot = f"<kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>{KERNEL_OPTIONS}</cmdline>"
    with two_disks(daemon) as web:
        folder = web.scratch.parent
        (folder / "read-only").write_bytes(bytes(MiB))
        shell = f"<source mode='bind' path='{folder}/shell'/><target type='virtio' name='shell'/>"
        devices = (
            f"<serial type='null'/><serial type='null'/><channel type='unix'>{shell}</channel>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
        read_only = Disk("vdc", folder / "read-only", "raw").xml().replace("</disk>", "<readonly/></disk>")
        web.start(devices=devices + read_only, boot=boot)
        with closing(Guest(folder / "shell")) as guest:
            guest.boot()
            guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
            start_agent(web, guest)
            yield web, guest


def start_agent(web: Web, guest: Guest) -> None:
    guest.run(
        f"echo {base64.b64encode(_AGENT.encode()).decode()} | base64 -d >/tmp/agent; sh /tmp/agent & echo $! >/tmp/pid"
    )
    wait_until(lambda: domain_xml.agent_state(web.domain.XMLDesc()) == "connected")


def stop_agent(web: Web, guest: Guest) -> None:
    guest.run("kill -9 $(cat /tmp/pid)")
    wait_until(lambda: domain_xml.agent_state(web.domain.XMLDesc()) == "disconnected")


def frozen_and_thawed(guest: Guest) -> int:
    """Return how often it was frozen since the last time, and see that it is not now."""
    said = guest.run("echo alive >/mnt/alive; sync; touch /tmp/said; cat /tmp/said; rm /tmp/said").split()
    assert said == ["freeze", "thaw"] * (len(said) // 2)
    return len(said) // 2


def test_a_guest_is_frozen_for_the_moment_only(daemon: Libvirt) -> None:
    with linux(daemon) as (web, guest):
        with closing(web.open()) as machine:
            assert [disk.name for disk in machine.disks] == ["vda", "vdb"], "vdc can't be written to"
        secret = random.Random(1).randbytes(64).hex()
        guest.run(f"echo {secret} >/mnt/file")  # not synced: freezing writes it out
        with web.moment() as moment:
            assert moment.consistency == "frozen"
            assert frozen_and_thawed(guest) == 1
            assert secret.encode() in web.publish(moment)["vda"]
        with web.moment(freeze="never") as moment:
            assert (moment.consistency, frozen_and_thawed(guest)) == ("crash", 0)
        _the_backup_fails(web, guest)
        _the_guest_is_slow(web, guest)
        _backupfs_is_killed(web, guest)
        stop_agent(web, guest)
        with web.moment() as moment:
            assert moment.consistency == "crash"
        with pytest.raises(ConnectError, match="not connected"), web.moment(freeze="require"):
            pass
        assert frozen_and_thawed(guest) == 0


def _the_backup_fails(web: Web, guest: Guest) -> None:
    with closing(web.open()) as machine:
        domain = machine._domain  # type: ignore[attr-defined]
        begin = domain.begin_backup
        domain.begin_backup = lambda backup, *rest: begin(backup.replace("vdb", "vdz"), *rest)
        with pytest.raises(ConnectError, match="vdz"):
            machine.begin(web.recorders(), web.tracks(machine))
    assert frozen_and_thawed(guest) == 1


def _the_guest_is_slow(web: Web, guest: Guest) -> None:
    """It freezes when nobody waits for that any more: it must be thawed all the same."""
    guest.run("touch /tmp/slow")
    with closing(web.open(timeout_s=2.0)) as machine, pytest.raises(ConnectError, match="did not answer within 8 s"):
        machine.begin(web.recorders(), web.tracks(machine))
    guest.run("rm /tmp/slow")
    assert frozen_and_thawed(guest) == 1


def _backupfs_is_killed(web: Web, guest: Guest) -> None:
    child = os.fork()
    if child == 0:
        try:
            machine = web.open()
            library = type(machine._domain._domain)  # type: ignore[attr-defined]
            library.backupBegin = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
            machine.begin(web.recorders(), web.tracks(machine))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert guest.run("cat /tmp/said").split() == ["freeze"]
    with web.moment(freeze="never"):
        assert guest.run("echo alive >/mnt/alive; cat /tmp/said; rm /tmp/said").split() == ["freeze", "thaw"]


def test_a_scratch_that_fills_up_costs_the_backup_not_the_guest(daemon: Libvirt) -> None:
    with linux(daemon) as (web, guest):
        small = daemon.folder / "small"
        fill = "dd if=/dev/urandom of=/dev/vdb bs=1M count=8 conv=fsync"
        guest.run(fill)
        with web.moment(scratch=str(small)) as moment:
            guest.run(fill)
            with pytest.raises(SourceError, match=r"small.*filled up"):
                moment.check()
        assert not list(small.iterdir())
        guest.run("dd if=/dev/zero of=/dev/vdb bs=1M count=1 conv=fsync")
        with web.moment() as moment:
            web.publish(moment)
