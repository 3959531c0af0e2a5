"""kill -9 of a backup at random moments: the old set of points or the new one, and the next backup is right."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, children_of_backupfs
from repositories import add_point, read_point

from backupfs.repository.repository import Repository
from backupfs.units import MiB

ROUNDS = 200 if os.environ.get("BACKUPFS_LONG") else 9
SIZE = 24 * MiB


def test_kill_a_backup_at_random_moments(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init", "--chunk-size", "4KiB")
    rng = random.Random(7)
    data = bytearray(rng.randbytes(SIZE))
    disk.write_bytes(data)
    command = [*BACKUPFS, "-r", str(repo), "backup", "web01", f"vda={disk}"]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - started
    with Repository.open(str(repo)) as repository:
        points = {repository.resolve("web01", "latest"): bytes(data)}
    killed = 0
    for _ in range(ROUNDS):
        for _ in range(40):
            offset = rng.randrange(SIZE - MiB)
            data[offset : offset + 300_000] = rng.randbytes(300_000)
        disk.write_bytes(data)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, usual * 1.1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        with Repository.open(str(repo)) as repository:
            for point in repository.points("web01"):
                points.setdefault(point, bytes(data))
            latest = repository.resolve("web01", "latest")
            assert read_point(repository, latest) == points[latest]
    assert killed >= ROUNDS // 3
    backupfs(repo, "backup", "web01", f"vda={disk}")
    with Repository.open(str(repo)) as repository:
        assert read_point(repository, repository.resolve("web01", "latest")) == data
        for point, expected in points.items():
            assert read_point(repository, point) == expected
            repository.open_image("web01", point, "vda").check_map()
        repository.reindex()
        assert read_point(repository, repository.resolve("web01", "latest")) == data
    assert not list((repo / "tmp").iterdir())
    deadline = time.monotonic() + 5
    while any(str(disk) in c for c in children_of_backupfs()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [c for c in children_of_backupfs() if str(disk) in c]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_interrupt_at_each_file_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """A Ctrl-C in the moment in which a file is there and nobody has its descriptor yet leaves none of them."""
    repo = tmp_path / "repo"
    Repository.init(str(repo), codec_name=codec)
    made, create, interrupted_at = 0, os.open, 0

    def create_and_interrupt(path: str, flags: int, mode: int = 0o777, **rest: int) -> int:
        nonlocal made
        fd = create(path, flags, mode, **rest)
        if flags & os.O_CREAT and f"{repo}/tmp/" in path and not path.endswith(".json"):  # a command defers there
            made += 1
            if made == interrupted_at:
                os.kill(os.getpid(), signal.SIGINT)
        return fd

    monkeypatch.setattr(os, "open", create_and_interrupt)
    with Repository.open(str(repo)) as repository:
        while True:
            made, interrupted_at = 0, interrupted_at + 1
            try:
                add_point(repository, random.Random(9).randbytes(MiB))
            except KeyboardInterrupt:
                assert not list((repo / "tmp").iterdir())
            else:
                break
        assert len(repository.points("web01")) == 1
    assert interrupted_at > 2  # the layer, its rows; and the raw image


def test_interrupt_publishes_nothing(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init")
    disk.write_bytes(random.Random(8).randbytes(100 * MiB) * 4)
    for sent in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [*BACKUPFS, "-r", str(repo), "backup", "web01", f"vda={disk}"], stderr=subprocess.PIPE, text=True
        )
        while not list((repo / "tmp").iterdir()):
            time.sleep(0.01)
        process.send_signal(sent)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "interrupted" in said
        assert not list((repo / "tmp").iterdir())
    with Repository.open(str(repo)) as repository:
        assert repository.vms() == []
