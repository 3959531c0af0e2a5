"""Starts readers (reader.py) at once, and adds up what they did."""

import random
import subprocess
from pathlib import Path

from benchmarks.workplace import Failed

_READER = str(Path(__file__).parent / "reader.py")


def reads_per_second(path: Path, in_flight: int, seconds: float) -> float:
    """Return how many random 4 KiB reads of a file a second are answered, `in_flight` processes asking."""
    return sum(done / took for done, took in _read(path, in_flight, str(seconds)))


def read_times(path: Path, count: int) -> float:
    """Read so many times, one after the other; return the seconds."""
    return _read(path, 1, f"{count}x")[0][1]


def _read(path: Path, in_flight: int, span: str) -> list[tuple[int, float]]:
    readers = [
        subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", _READER, str(path), str(random.getrandbits(32)), span],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(in_flight)
    ]
    try:
        return _collect(readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def _collect(readers: list["subprocess.Popen[str]"]) -> list[tuple[int, float]]:
    for reader in readers:
        assert reader.stdout is not None
        if reader.stdout.readline() != "ready\n":
            raise Failed(f"a reader did not start: {reader.communicate()[1].strip()}")
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    results = []
    for reader in readers:
        assert reader.stdout is not None
        words = reader.stdout.readline().split()
        if len(words) != 2:
            raise Failed(f"a reader failed: {reader.communicate()[1].strip()}")
        results.append((int(words[0]), float(words[1])))
    return results
