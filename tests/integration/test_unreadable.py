"""Media that can't be read: verify says which points and ranges that costs, goes on, and the rest stays readable."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs
from mounts import needs_fuse
from repositories import add_point, read_point
from servers import unreadable

from backupfs.errors import Corrupt
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services.gc import gc
from backupfs.services.verify import verify
from backupfs.units import KiB

CHUNK = 64 * KiB
PAGE = 4 * KiB
SIZE = 40 * CHUNK
pytestmark = needs_fuse


@pytest.fixture(params=["none", "zstd"])
def repo(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "repo"
    Repository.init(str(path), chunk_size=CHUNK, codec_name=request.param)
    with Repository.open(str(path)) as repository:
        for data in disks():
            add_point(repository, data)
    return path


def disks() -> list[bytes]:
    first = b"".join(f"{i:9}".encode() * 8192 for i in range(40))[:SIZE]
    second = first[: 3 * CHUNK] + b"second" * 40000
    return [first, second[:SIZE].ljust(SIZE, b"x")]


def layer_of(repo: Path, seq: int) -> Path:
    return repo / "vms/web01/disks/vda/main" / f"{seq:06d}.layer"


def hit(layer: Path, ranges: list[tuple[int, int]]) -> set[int]:
    """Return the chunks of a layer whose payloads are in a page with an unreadable byte."""
    pages = {p for offset, length in ranges for p in range(offset // PAGE, (offset + length - 1) // PAGE + 1)}
    found = set()
    for rows in Layer(str(layer)).rows():
        for row in rows:
            first, end = int(row["offset"]) // PAGE, (int(row["offset"]) + int(row["length"]) - 1) // PAGE + 1
            if row["codec"] and pages.intersection(range(first, end)):
                found.add(int(row["chunk_no"]))
    return found


def test_unreadable_sectors(repo: Path) -> None:
    layer = layer_of(repo, 0)
    with Repository.open(str(repo)) as repository:
        first, second = repository.points("web01")
    opened = Layer(str(layer))
    end = opened.data_range[1]
    bad = [(PAGE, 512), (end // 2 // PAGE * PAGE + 1024, 1024)]
    chunks = hit(layer, bad)
    assert 1 < len(chunks) < 40
    with unreadable(Path(opened.data.path), bad):
        command = [*BACKUPFS, "-r", str(repo), "verify", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 20, done.stderr
        document = json.loads(done.stdout)
        found = document["damage"]
        told = {n for d in found for n in range(d["offset"] // CHUNK, (d["offset"] + d["length"]) // CHUNK)}
        assert told == chunks
        assert {(d["kind"], d["disk"], d["file"]) for d in found} == {("chunk", "vda", opened.data.path)}
        assert all("Input/output error" in d["what"] for d in found)
        assert "second time" not in done.stderr
        for d in found:
            seen_by_both = d["offset"] < 3 * CHUNK
            assert d["points"] == ([first, second] if seen_by_both else [first])
        with Repository.open(str(repo)) as repository:
            image = repository.open_image("web01", first, "vda")
            for number in range(40):
                chunk = bytearray(CHUNK)
                if number in chunks:
                    with pytest.raises(Corrupt, match="Input/output error"):
                        image.readinto(number * CHUNK, chunk)
                else:
                    image.readinto(number * CHUNK, chunk)
                    assert chunk == disks()[0][number * CHUNK : (number + 1) * CHUNK]
            image.close()
    backupfs(repo, "verify")


@pytest.mark.parametrize("what", ["header", "table", "trailer"])
def test_an_unreadable_header_or_table(repo: Path, what: str) -> None:
    layer = layer_of(repo, 1)
    opened = Layer(str(layer))
    where = {"header": 0, "table": opened.trailer().table_offset, "trailer": opened.length - 10}[what]
    with unreadable(layer, [(where, 10)]), Repository.open(str(repo)) as repository:
        first, second = repository.points("web01")
        report = verify(repository, None, None, 1, lambda *_: None)
        assert report.chunks >= 40
        assert {(d.file, *d.points) for d in report.all_damage(CHUNK)} == {(str(layer), second)}
        assert "Input/output error" in next(report.all_damage(CHUNK)).what
        assert read_point(repository, first) == disks()[0]
        with pytest.raises(Corrupt, match="Input/output error"):
            gc(repository)
    backupfs(repo, "verify")
