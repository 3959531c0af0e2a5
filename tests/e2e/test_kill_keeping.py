"""kill -9 of backup, delete and gc commands, in turn, at random moments: every remaining point is right."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from commands import BACKUPFS, backupfs
from repositories import add_point, read_point

from backupfs.repository.repository import Repository
from backupfs.units import MiB

ROUNDS = 300 if os.environ.get("BACKUPFS_LONG") else 10
VM = "web01"


def test_kill_what_changes_a_repository(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init", "--chunk-size", "4KiB")
    rng = random.Random(11)
    data = bytearray(rng.randbytes(4 * MiB))
    points: dict[str, bytes] = {}
    killed = 0
    usual = 0.5
    for number in range(ROUNDS):
        with Repository.open(str(repo)) as repository:
            while len(points) < 4:
                offset = rng.randrange(3 * MiB)
                data[offset : offset + 300_000] = rng.randbytes(300_000)
                points[add_point(repository, bytes(data), day=len(points) + 10 * number).id] = bytes(data)
        what = ("backup", "delete", "gc")[number % 3]
        doomed = rng.sample(sorted(points), 2)
        data[: MiB // 2] = rng.randbytes(MiB // 2)
        disk.write_bytes(data)
        words = {"backup": [VM, f"vda={disk}"], "delete": [f"{VM}/{point}" for point in doomed], "gc": []}[what]
        process = subprocess.Popen(
            [*BACKUPFS, "-r", str(repo), what, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        began = time.monotonic()
        try:
            code = process.wait(rng.uniform(0.3, 1.1) * usual)
            usual = time.monotonic() - began
            assert code == 0, what
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
            killed += 1
            usual *= 1.05
        with Repository.open(str(repo)) as repository:
            there = set(repository.points(VM))
            new, gone = there - set(points), set(points) - there
            assert len(new) <= (what == "backup")
            assert gone <= (set(doomed) if what == "delete" else set())
            assert code or what != "delete" or gone == set(doomed)
            assert code or what != "backup" or len(new) == 1
            points = {point: points.get(point, bytes(data)) for point in there}
            for point, held in points.items():
                assert read_point(repository, point) == held, f"round {number}: {what}"
    assert killed >= ROUNDS // 4
    backupfs(repo, "gc")
    with Repository.open(str(repo)) as repository:
        repository.reindex()
        for point, held in points.items():
            assert read_point(repository, point) == held
            repository.open_image(VM, point, "vda").check_map()
    assert not list((repo / "tmp").iterdir())
