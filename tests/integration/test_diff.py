"""diff against a comparison of bytes, with points that hypothesis makes; map and diff as one JSON document."""

import json
import tempfile
from pathlib import Path

import pytest
from commands import backupfs, backupfs_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repositories import add_point

from backupfs.errors import NotFound
from backupfs.extents import Extent
from backupfs.repository.repository import Repository
from backupfs.services.diff import differences
from backupfs.units import KiB

CHUNK = 4 * KiB
# A disk: what each chunk is filled with (0: zeroes), and how many bytes its last chunk lacks.
disks = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.integers(0, CHUNK - 1))


def bytes_of(disk: tuple[list[int], int]) -> bytes:
    chunks, lacking = disk
    data = b"".join(bytes([c]) * CHUNK for c in chunks)
    return data[: len(data) - lacking]


def chunks_that_differ(a: bytes, b: bytes) -> list[tuple[int, int]]:
    """Return (offset, length) by comparing bytes: chunks of what both have, and then what only one has."""
    common, longer = sorted((len(a), len(b)))
    marks = bytearray(longer)
    for offset in range(0, common, CHUNK):
        end = min(offset + CHUNK, common)
        # The last common chunk is one chunk in either point: what follows in the longer one counts with it.
        if a[offset : offset + CHUNK].ljust(CHUNK, b"\0") != b[offset : offset + CHUNK].ljust(CHUNK, b"\0"):
            marks[offset:end] = b"\1" * (end - offset)
    marks[common:] = b"\1" * (longer - common)
    found, offset = [], marks.find(1)
    while offset >= 0:
        end = marks.find(0, offset)
        end = longer if end < 0 else end
        found.append((offset, end - offset))
        offset = marks.find(1, end)
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states=st.lists(st.tuples(disks, st.booleans()), min_size=2, max_size=4))
def test_against_bytes(states: list[tuple[tuple[list[int], int], bool]]) -> None:
    """Each state is a disk and whether it begins a new chain."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/repo"
        Repository.init(path, chunk_size=CHUNK)
        with Repository.open(path) as repository:
            points = {}
            for disk, full in states:
                data = bytes_of(disk)
                points[add_point(repository, data, full=full).id] = data
            for left, a in points.items():
                for right, b in points.items():
                    found = list(differences(repository, ("web01", left), ("web01", right), None))
                    assert [(d["offset"], d["length"]) for d in found] == chunks_that_differ(a, b)
                    assert {d["disk"] for d in found} <= {"vda"}


def test_across_regions_and_machines(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    Repository.init(path, chunk_size=CHUNK)
    size = 3000 * CHUNK
    with Repository.open(path) as repository:
        data = bytearray(size)
        add_point(repository, bytes(data), [Extent(0, size, True)])
        expected = []
        for chunk in (0, 255, 256, 1023, 1024, 2999):
            data[chunk * CHUNK] = 1
            expected.append(Extent(chunk * CHUNK, CHUNK, True))
        other = add_point(repository, bytes(data), vm="web02")
        left = ("web01", repository.points("web01")[0])
        found = list(differences(repository, left, ("web02", other.id), "vda"))
        assert [(d["offset"], d["length"]) for d in found] == [
            (0, CHUNK),
            (255 * CHUNK, 2 * CHUNK),
            (1023 * CHUNK, 2 * CHUNK),
            (2999 * CHUNK, CHUNK),
        ]
        with pytest.raises(NotFound, match="neither"):
            list(differences(repository, left, ("web02", other.id), "vdb"))
        add_point(repository, b"x" * 100, vm="web03", disk="vdb")
        only = list(differences(repository, left, ("web03", repository.points("web03")[0]), None))
        assert only == [{"disk": "vda", "offset": 0, "length": size}, {"disk": "vdb", "offset": 0, "length": 100}]


def test_the_commands(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    Repository.init(str(repo), chunk_size=CHUNK)
    with Repository.open(str(repo)) as repository:
        a, b = (add_point(repository, bytes([i]) * (5 * CHUNK + i)).id for i in (1, 2))
    assert backupfs_json(repo, "diff", f"web01/{a}", f"web01/{b}") == [
        {"disk": "vda", "offset": 0, "length": 5 * CHUNK + 2}
    ]
    assert json.loads(backupfs(repo, "diff", f"web01/{a}", f"web01/{a}", "--json")) == []
    assert backupfs(repo, "diff", f"web01/{a}", "web01/latest", "--disk", "vda").split() == [
        "vda",
        "0",
        str(5 * CHUNK + 2),
    ]
    backupfs(repo, "diff", f"web01/{a}", "web01/latest", "--disk", "vdb", code=10)
    assert backupfs_json(repo, "map", f"web01/{a}/vda") == [
        {"offset": 0, "length": 5 * CHUNK + 1, "zero": False, "point": a}
    ]
