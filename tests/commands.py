"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BACKUPFS = [sys.executable, "-m", "backupfs"]


def backupfs(repository: Path, *words: str | Path, code: int = 0, timeout: float = 120) -> str:
    """Run a command on a repository; return stdout, or stderr when a failure is expected.

    Args:
        code: the exit code that it has to end with.
    """
    environment = {**os.environ, "BACKUPFS_REPOSITORY": str(repository)}
    command = [*BACKUPFS, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stderr}\n{done.stdout}"
    assert "Traceback" not in done.stderr
    if code == 0:
        assert not done.stderr, done.stderr
    return done.stderr if code else done.stdout


def backupfs_json(repository: Path, *words: str | Path) -> Any:
    """Run a command with --json and return its document."""
    return json.loads(backupfs(repository, *words, "--json"))


def children_of_backupfs() -> list[str]:
    """Return the command lines of qemu-nbd processes that run now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"qemu-nbd"):
                found.append(b" ".join(words).decode(errors="replace"))
    return found
