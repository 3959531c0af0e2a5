"""A backup of a running QEMU that fails at every one of its commands in turn: refused, cut off, interrupted, killed.

Afterwards the guest runs, nothing of ours is left in QEMU, and the next point covers all that was written.
BACKUPFS_LONG=1 tries every command, else every fifteenth.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from guest import GuestDisk, Machine, machine
from moments import Chain, assert_clean
from servers import run

from backupfs.errors import ConnectError, SourceError
from backupfs.sources import qmp
from backupfs.sources.monitor import Monitor, Refused
from backupfs.units import KiB

STRIDE = 1 if os.environ.get("BACKUPFS_LONG") else 15
STEP = 64 * KiB
STEPS = 64
METHODS = ("filter", "job")


class Fault:
    """What goes wrong at the command with number `at`, counted from when the fault is put in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, at: int) -> None:
        self.came: str | None = None
        self._kind = kind
        self._left = at
        self._execute = Monitor.execute
        monkeypatch.setattr(Monitor, "execute", lambda *words: self._run(*words))  # noqa: PLW0108, a function takes `monitor`

    def _run(self, monitor: Monitor, *words: Any) -> Any:
        self._left -= 1
        if self._left != 0:
            return self._execute(monitor, *words)
        self.came = words[0]
        if self._kind == "refused":
            raise Refused(words[0], "says the test")
        if self._kind != "cut before":
            answer = self._execute(monitor, *words)
            if self._kind == "interrupted":
                signal.raise_signal(signal.SIGINT)
                return answer
        monitor.lost = ConnectError("cut off by the test")
        raise monitor.lost


def write_somewhere(m: Machine, disks: list[GuestDisk], chance: random.Random) -> None:
    for disk in disks:
        for _ in range(3):
            m.write(disk, chance.randrange(STEPS) * STEP, chance.choice((512, STEP)), chance.randrange(1, 256))


@contextmanager
def two_disks(folder: Path) -> Iterator[tuple[Machine, list[GuestDisk]]]:
    disks = []
    for name, image_format, attach in (("a", "qcow2", "virtio-blk"), ("b", "raw", "scsi")):
        path = folder / name
        run("qemu-img", "create", "-q", "-f", image_format, path, str(STEPS * STEP))
        disks.append(GuestDisk(path, image_format, name, attach))
    with machine(disks) as m:
        yield m, disks


def chain_by(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> Chain:
    """Return a chain whose points are taken by the filter or by the job."""
    if method == "job":
        monkeypatch.setattr(qmp, "has_filter", lambda monitor, blocks: False)
    (folder / "scratch").mkdir()
    return Chain(folder / "scratch")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["refused", "cut before", "cut after", "interrupted"])
def test_every_command_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, method: str) -> None:
    chance = random.Random(f"{kind} {method}")
    chain = chain_by(tmp_path, monkeypatch, method)
    with two_disks(tmp_path) as (m, disks):
        chain.take(m)
        for at in range(1 + chance.randrange(STRIDE), 1000, STRIDE):
            write_somewhere(m, disks, chance)
            with monkeypatch.context() as patch:
                fault = Fault(patch, kind, at)
                with suppress(SourceError, KeyboardInterrupt):
                    chain.take(m, lambda moment: write_somewhere(m, disks, chance), publish=bool(chance.randrange(2)))
            # A command that is refused while everything is undone leaves something to the next backup.
            if kind != "refused":
                assert_clean(m, chain)
            assert m.qmp("query-status")["status"] == "running"
            write_somewhere(m, disks, chance)
            chain.take(m, lambda moment: write_somewhere(m, disks, chance))
            assert_clean(m, chain)
            assert chain.reasons == {"a": "", "b": ""}, f"at {fault.came}"
            if fault.came is None:
                break
        assert at > 30


# Takes a point as its arguments say, and kills itself before or after a command.
_KILLED = """
import json, os, signal, sys
from backupfs.sources import qmp
from backupfs.sources.machine import Recorders, Track
from backupfs.sources.monitor import Monitor

path, scratch, method, names, recorders, at, after = json.loads(sys.argv[1])
execute = Monitor.execute

def run(monitor, *words):
    global at
    at -= 1
    if at == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    answer = execute(monitor, *words)
    if at == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

Monitor.execute = run
if method == "job":
    qmp.has_filter = lambda monitor, blocks: False
machine = qmp.open_qmp(path, None, scratch=scratch)
moment = machine.begin(Recorders(*names), {d.name: Track(recorders.get(d.name), "none") for d in machine.disks})
for source in moment.sources.values():
    source.readinto(0, bytearray(source.size))
moment.check()
moment.close()
machine.close()
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool) -> None:
    chance = random.Random(f"{after} {method}")
    chain = chain_by(tmp_path, monkeypatch, method)
    with two_disks(tmp_path) as (m, disks):
        chain.take(m)
        for at in range(1 + chance.randrange(STRIDE), 1000, STRIDE):
            write_somewhere(m, disks, chance)
            names = chain.next()
            words = [m.qmp_path, str(chain.scratch), method, [names.repository, names.chain, names.point]]
            arguments = json.dumps([*words, chain.recorders, at, after])
            killed = subprocess.run(
                [sys.executable, "-c", _KILLED, arguments], capture_output=True, timeout=60, check=False
            )
            write_somewhere(m, disks, chance)
            chain.take(m, lambda moment: write_somewhere(m, disks, chance))
            assert_clean(m, chain)
            assert chain.reasons == {"a": "", "b": ""}
            if killed.returncode != -signal.SIGKILL:
                assert killed.returncode == 0, killed.stderr
                break
        assert at > 30
