"""`backupfs backup --libvirt`, as a user runs it, against a real libvirtd and QEMU."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from domains import Web
from libvirtd import wait_until
from repositories import read_point
from servers import freeze

from backupfs.repository.repository import Repository

ROUNDS = 60 if os.environ.get("BACKUPFS_LONG") else 5


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    backupfs(tmp_path / "repo", "init")
    return tmp_path / "repo"


def words(web: Web, *more: str) -> list[str]:
    return ["backup", "web", "--libvirt", web.daemon.uri, "--scratch", str(web.scratch), *more]


def take(repo: Path, web: Web, *more: str) -> dict[str, dict[str, Any]]:
    """Take a point, and check it; return its disks' entries."""
    point = backupfs_json(repo, *words(web, *more))
    entries = {entry["name"]: entry for entry in point["disks"]}
    with Repository.open(str(repo)) as repository:
        for name in entries:
            assert read_point(repository, point["id"], vm="web", disk=name) == web.content[name]
    return entries


def test_points_of_a_domain(web: Web, repo: Path) -> None:
    rng = random.Random(1)
    web.start()
    web.write(rng)
    take(repo, web)
    for _ in range(2):
        web.write(rng)
        planned = backupfs_json(repo, *words(web, "--dry-run"))
        assert "dirty" in str(planned)
        assert {name: entry["read"] for name, entry in take(repo, web).items()} == {"vda": "dirty", "vdb": "dirty"}
        assert len(web.checkpoints()) == 1
    web.write(rng)
    web.domain.destroy()
    assert {name: entry["read"] for name, entry in take(repo, web).items()} == {"vda": "dirty", "vdb": "dirty"}
    web.domain.create()
    web.write(rng)
    assert {name: entry["read"] for name, entry in take(repo, web, "--disk", "vdb").items()} == {"vdb": "dirty"}
    with Repository.open(str(repo)) as repository:
        latest = repository.manifest("web", repository.resolve("web", "latest"))
    assert "<name>web</name>" in (latest.domain_xml or "")


def test_errors(web: Web, repo: Path) -> None:
    web.start()
    assert "knows no domain db; it knows web" in backupfs(repo, *words(web, "--domain", "db"), code=10)
    assert "it has vda, vdb" in backupfs(repo, *words(web, "--disk", "sda"), code=10)
    assert "no channel for a guest agent" in backupfs(repo, *words(web, "--freeze", "require"), code=30)
    assert backupfs_json(repo, "points") == []


def test_without_libvirts_module(web: Web, repo: Path) -> None:
    hidden = "import sys; sys.modules['libvirt'] = None; from backupfs.cli import main; main()"
    command = [sys.executable, "-c", hidden, "-r", str(repo), *words(web)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 30
    assert "python3-libvirt" in done.stderr


def test_kill_a_backup_at_random_moments(web: Web, repo: Path) -> None:
    rng = random.Random(2)
    web.start()
    web.write(rng)
    take(repo, web)
    command = [*BACKUPFS, "-r", str(repo), *words(web)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - started
    killed = 0
    for number in range(ROUNDS):
        web.write(rng)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.05) * usual)
        if process.poll() == 0:
            usual *= 0.8  # the machine was slower when that was measured
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if number % 3 == 2:
            web.write(rng)
            entries = take(repo, web, "--audit", "0")
            assert {name: entry["read"] for name, entry in entries.items()} == {"vda": "dirty", "vdb": "dirty"}
            assert len(web.checkpoints()) == 1
    assert killed >= ROUNDS // 3
    take(repo, web)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle(web: Web, repo: Path, sent: signal.Signals) -> None:
    rng = random.Random(3)
    web.start()
    web.write(rng)
    take(repo, web)
    before = web.checkpoints()
    for _ in range(2):
        web.write(rng)
        process = subprocess.Popen([*BACKUPFS, "-r", str(repo), *words(web)], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(web.checkpoints()) == 2)
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
        if process.returncode == 0:  # it was too late
            before = web.checkpoints()
            continue
        assert (process.returncode, "Traceback" in said) == (130, False), said
        assert web.checkpoints() == before
    web.write(rng)
    assert take(repo, web)["vda"]["read"] == "dirty"


def test_an_interrupt_while_libvirtd_hangs(web: Web, repo: Path) -> None:
    web.start()
    daemon = web.daemon.daemon()
    freeze(daemon)
    try:
        process = subprocess.Popen([*BACKUPFS, "-r", str(repo), *words(web)], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: "process" in (repo / "lock").read_text())
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, "Traceback" in said) == (130, False), said
    finally:
        os.kill(daemon, signal.SIGCONT)
    take(repo, web)
