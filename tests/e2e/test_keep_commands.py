"""delete, prune and gc as a user runs them."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from repositories import add_point, read_point

from backupfs.repository.repository import Repository
from backupfs.units import MiB


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Ten days of one point each of web01, and one of db01."""
    path = tmp_path / "repo"
    backupfs(path, "init", "--chunk-size", "4KiB")
    data = bytearray(random.Random(1).randbytes(MiB))
    with Repository.open(str(path)) as repository:
        for day in range(10):
            add_point(repository, bytes(data), day=day - 14)
            data[day * 8192 : day * 8192 + 20000] = random.Random(day).randbytes(20000)
        add_point(repository, b"x", vm="db01")
    return path


def ids(repo: Path, vm: str = "web01") -> list[str]:
    return [p["id"] for p in backupfs_json(repo, "points", vm)]


def test_delete(repo: Path) -> None:
    before = ids(repo)
    said = backupfs(repo, "delete", f"web01/{before[0]}", "web01/latest", f"web01/{before[0]}")
    assert said == f"web01/{before[0]} deleted\nweb01/{before[9]} deleted\n"
    assert ids(repo) == before[1:9]
    assert "no point" in backupfs(repo, "delete", f"web01/{before[1]}", f"web01/{before[0]}", code=10)
    backupfs(repo, "delete", "web01", code=2)
    backupfs(repo, "delete", code=2)
    assert ids(repo) == before[1:9]


def test_prune(repo: Path) -> None:
    before = ids(repo)
    assert "no rule" in backupfs(repo, "prune", code=2)
    assert "not a duration" in backupfs(repo, "prune", "--keep-within", "soon", code=2)
    backupfs(repo, "prune", "--keep-last", "0", code=2)
    backupfs(repo, "prune", "nobody", "--keep-last", "1", code=10)
    assert "not a name" in backupfs(repo, "prune", "", "--keep-last", "1", code=2)  # "$VM" of a script
    assert ids(repo) == before
    rules = ["--keep-last", "2", "--keep-weekly", "2", "--keep-within", "3d"]
    table = backupfs(repo, "prune", "web01", *rules, "--dry-run").splitlines()
    assert len(table) == 11
    assert table[1].split() == ["web01", before[0], "would", "go"]
    assert table[-1].split() == ["web01", before[9], "stays", "last,", "weekly,", "within"]
    assert ids(repo) == before
    verdicts = backupfs_json(repo, "prune", "web01", *rules)
    assert [v["id"] for v in verdicts] == before
    stays = [v["id"] for v in verdicts if v["kept"]]
    # 8 November 2026 is a Sunday: the weeks end with the first and the eighth day
    assert stays == before[6:]
    assert {v["id"]: v["rules"] for v in verdicts}[before[7]] == ["weekly", "within"]
    assert ids(repo) == stays
    backupfs(repo, "prune", "--keep-last", "1")
    assert ids(repo) == before[9:]
    assert len(ids(repo, "db01")) == 1


def test_gc(repo: Path) -> None:
    backupfs(repo, "prune", "--keep-last", "1")
    taken = sum(p.stat().st_blocks * 512 for p in repo.rglob("*.layer"))
    planned = backupfs_json(repo, "gc", "--dry-run")
    assert planned["dry_run"]
    assert planned["before"] == taken == sum(p.stat().st_blocks * 512 for p in repo.rglob("*.layer"))
    assert "freed" in backupfs(repo, "gc")
    left = sum(p.stat().st_blocks * 512 for p in repo.rglob("*.layer"))
    assert taken - left == pytest.approx(planned["freed"], abs=11 * 4096)
    assert planned["visible"] <= left < taken
    assert backupfs_json(repo, "gc")["freed"] == 0


def test_a_repository_whose_machines_are_missing_is_damaged(repo: Path) -> None:
    (repo / "vms").rename(repo / "away")
    for command in ("points", "verify", "gc", "status"):
        backupfs(repo, command, code=20)


def test_layers_of_a_machine_whose_points_are_missing_are_kept(repo: Path) -> None:
    (repo / "vms/web01/points").rename(repo / "away")
    before = sorted(repo.rglob("*.layer"))
    assert "points: damaged" in backupfs(repo, "gc", code=20)
    assert sorted(repo.rglob("*.layer")) == before
    (repo / "away").rename(repo / "vms/web01/points")
    for point in ids(repo):
        backupfs(repo, "delete", f"web01/{point}")
    backupfs(repo, "gc")
    assert [path for path in repo.rglob("*.layer") if "web01" in str(path)] == []


def test_no_wait_and_waiting(repo: Path) -> None:
    with Repository.open(str(repo)) as repository:
        with repository.exclusive():
            for words in (["gc"], ["prune", "--keep-last", "1"], ["delete", "web01/latest"]):
                assert "is writing" in backupfs(repo, *words, "--no-wait", code=11)
            waits = subprocess.Popen([*BACKUPFS, "-r", str(repo), "gc"], stderr=subprocess.PIPE, text=True)
            assert waits.stderr
            assert "waiting" in waits.stderr.readline()
        assert waits.wait(30) == 0
        waits.stderr.close()


def test_interrupt_and_kill_gc(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    backupfs(repo, "init", "--chunk-size", "4KiB", "--codec", "none")
    rng = random.Random(5)
    disk, points = bytearray(rng.randbytes(16 * MiB)), {}
    with Repository.open(str(repo)) as repository:
        for day in range(4):
            points[add_point(repository, bytes(disk), day=day, step=MiB).id] = bytes(disk)
            for _ in range(1500):
                offset = rng.randrange(len(disk) // 4096) * 4096
                disk[offset : offset + 4096] = rng.randbytes(4096)
    names = list(points)
    backupfs(repo, "delete", f"web01/{names[0]}", f"web01/{names[2]}")
    for sent, delay in [(signal.SIGINT, 0.5), *[(signal.SIGKILL, d / 20) for d in range(6, 20, 2)]]:
        process = subprocess.Popen(
            [*BACKUPFS, "-r", str(repo), "gc"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.send_signal(sent)
        # SIGINT may come before there is a handler, or when all is done.
        assert process.wait(30) in ((0, 130, -sent) if sent == signal.SIGINT else (0, -sent))
        with Repository.open(str(repo)) as repository:
            for name in (names[1], names[3]):
                assert read_point(repository, name) == points[name]
    backupfs(repo, "gc")
    with Repository.open(str(repo)) as repository:
        for name in (names[1], names[3]):
            assert read_point(repository, name) == points[name]
    assert os.listdir(repo / "tmp") == []
