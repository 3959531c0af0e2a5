"""Flipped bits, one after another, in all that describes a repository: the right bytes or a BackupfsError.

The index is missing each time: what is read was built from the damaged files. With an index that is there, and random
places, see test_damage.py.
"""

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from repositories import add_point, read_point

from backupfs.errors import BackupfsError
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services.gc import gc

LONG = bool(os.environ.get("BACKUPFS_LONG"))
CHUNK = 4096
VM = "web01"
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Primes, so that each run of the short form meets every bit of a byte.
STEPS = {"settings": 7, "manifests": 17, "headers": 127, "footers": 17, "payloads": 311}


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A repository of three points, with zstd, none and zero chunks, and what each holds; without an index."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        path = Path(name) / "repo"
        Repository.init(str(path), chunk_size=CHUNK)
        rng = random.Random(3)
        disk = bytearray(rng.randbytes(2 * CHUNK) + b"text " * (CHUNK * 4 // 5) + bytes(CHUNK) + rng.randbytes(99))
        points = {}
        with Repository.open(str(path)) as repository:
            for number in range(3):
                points[add_point(repository, bytes(disk)).id] = bytes(disk)
                disk[number * CHUNK : number * CHUNK + CHUNK] = (bytes(CHUNK), b"abcdefgh" * 512)[number % 2]
        shutil.rmtree(path / "index")
        yield path, points


def places(path: Path, what: str) -> Iterator[tuple[Path, int, int]]:
    """Yield a file, and its first byte and the one after its last, of what is asked for."""
    if what == "settings":
        yield path / "backupfs.json", 0, (path / "backupfs.json").stat().st_size
    elif what == "manifests":
        for file in sorted(path.rglob("points/*.json")):
            yield file, 0, file.stat().st_size
    else:
        for file in sorted(path.rglob("*.layer")):
            table = Layer(str(file)).trailer().table_offset
            ends = {"headers": (0, CHUNK), "payloads": (CHUNK, table), "footers": (table, file.stat().st_size)}
            yield file, *ends[what]


@pytest.mark.timeout(0 if LONG else 300)
@pytest.mark.parametrize("what", STEPS)
def test_flipped_bits(built: tuple[Path, dict[str, bytes]], what: str, request: pytest.FixtureRequest) -> None:
    # pytest keeps each record, that its exception, and that the files that were open: thousands of them.
    logging.disable()
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    path, points = built
    refused = looked = 0
    for file, first, end in places(path, what):
        good = file.read_bytes()
        bad = bytearray(good)
        for bit in range(8 * first, 8 * end, (2 if what == "payloads" else 1) if LONG else STEPS[what]):
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            looked += 1
            try:
                refused += judge(path, points)
            except Exception as e:
                e.add_note(f"bit {bit} of {file}")
                raise
            finally:
                bad[bit // 8] = good[bit // 8]
                shutil.rmtree(path / "index", ignore_errors=True)
        file.write_bytes(good)
    print(f"{looked} bits, {refused} refused")
    assert refused == looked or what == "payloads"
    assert refused > looked // 2
    assert judge(path, points) == 0
    shutil.rmtree(path / "index")


def judge(path: Path, points: dict[str, bytes]) -> bool:
    """Read every point, and let gc look at it; return whether anything was refused."""
    refused = False
    try:
        with Repository.open(str(path)) as repository:
            for point, data in points.items():
                try:
                    found = read_point(repository, point)
                except BackupfsError:
                    refused = True
                else:
                    assert found == data
            try:
                gc(repository, dry_run=True)
            except BackupfsError:
                refused = True
    except BackupfsError:
        return True
    return refused
