"""kill -9 of what changes a repository, hundreds of times; BACKUPFS_LONG=1: ten thousand times. See kill_often.py."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

LONG = bool(os.environ.get("BACKUPFS_LONG"))
ROUNDS = 10_000 if LONG else 300
PROGRAM = str(Path(__file__).parent / "kill_often.py")
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.mark.timeout(0 if LONG else 300)
def test_kill_often() -> None:
    seed = random.SystemRandom().randrange(1 << 32) if LONG else 5
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        command = [sys.executable, PROGRAM, folder, str(ROUNDS), str(seed)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, f"seed {seed}: {ended.stderr[-3000:]}"
        done = json.loads(ended.stdout)
    assert done["rounds"] == ROUNDS
    assert done["killed"] > ROUNDS // 3
    assert done["points"] > ROUNDS // 3
