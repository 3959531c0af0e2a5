"""Readers that cost little: fio(1). Two cores measure nothing if a reader in Python takes one of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from backupfs.units import KiB, MiB
from benchmarks.workplace import run

_COMMON = ("--name=bench", "--readonly", "--ioengine=psync", "--thread", "--group_reporting", "--output-format=json")
_RANDOM = ("--rw=randread", "--norandommap", "--randrepeat=0")


@dataclass(frozen=True, slots=True)
class Done:
    """What was read: how many times, bytes, and the seconds that it took."""

    reads: int
    bytes: int
    seconds: float


def read_randomly(path: Path, in_flight: int, seconds: float, *, direct: bool) -> Done:
    """Read 4 KiB at random places for so long, by so many threads; without O_DIRECT from the page cache as it is."""
    span = ("--time_based", f"--runtime={seconds * 1000:.0f}ms", f"--numjobs={in_flight}")
    return _read(path, *_RANDOM, f"--bs={4 * KiB}", *span, *_way(direct, keep=True))


def read_times(path: Path, count: int) -> float:
    """Read 4 KiB at random places so many times with O_DIRECT, one after the other; return the seconds."""
    count_ = f"--number_ios={count}"
    return _read(path, *_RANDOM, f"--bs={4 * KiB}", count_, *_way(True, keep=True)).seconds


def read_in_order(path: Path, limit_s: float, *, direct: bool, keep: bool) -> Done:
    """Read a file once from its beginning by 1 MiB, or as far as it goes in so many seconds.

    Args:
        path: the file.
        limit_s: the seconds.
        direct: O_DIRECT.
        keep: what the page cache has of this file may answer; otherwise it is dropped before.
    """
    return _read(path, "--rw=read", f"--bs={MiB}", f"--runtime={limit_s * 1000:.0f}ms", *_way(direct, keep=keep))


def _way(direct: bool, *, keep: bool) -> tuple[str, str]:
    return f"--direct={int(direct)}", f"--invalidate={int(not keep)}"


def _read(path: Path, *options: str) -> Done:
    # A colon separates files to fio.
    said = run("fio", *_COMMON, "--filename=" + str(path).replace(":", "\\:"), *options)
    read = json.loads(said[said.index("{") :])["jobs"][0]["read"]
    return Done(read["total_ios"], read["io_bytes"], read["runtime"] / 1000)
