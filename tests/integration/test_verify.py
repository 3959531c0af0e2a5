"""verify and --repair: damage is found, told by point and range, and put right only by the right bytes."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import backupfs
from repositories import add_point, read_point

from backupfs.errors import BackupfsError, Corrupt
from backupfs.extents import Extent
from backupfs.repository.format import NO_LAYER
from backupfs.repository.layer import Layer
from backupfs.repository.records import encode_layer
from backupfs.repository.repository import Repository
from backupfs.services.damage import Damage, Report
from backupfs.services.repair import repair
from backupfs.services.verify import verify
from backupfs.units import KiB

CHUNK = 4 * KiB
SIZE = 40 * CHUNK + 100
DISK = Path("vms/web01/disks/vda")
CODECS = ["zstd", "none"]


def content(seed: int, size: int = SIZE) -> bytes:
    """Return bytes that zstd makes about a third shorter."""
    rng = random.Random(seed)
    return bytes(rng.choice(b"0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(size))


def changed(data: bytes, chunks: dict[int, int]) -> bytes:
    """Return `data` with chunks of other content: number to seed; 0 stands for zeroes."""
    found = bytearray(data)
    for number, seed in chunks.items():
        found[number * CHUNK : (number + 1) * CHUNK] = content(seed, CHUNK) if seed else bytes(CHUNK)
    return bytes(found)


BASE = content(1)
STATES = [BASE, changed(BASE, {3: 31, 4: 41, 9: 0}), changed(BASE, {3: 32, 4: 41, 9: 0, 20: 201})]


@pytest.fixture(params=CODECS)
def repository(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Repository]:
    path = str(tmp_path / "repo")
    Repository.init(path, chunk_size=CHUNK, codec_name=request.param)
    with Repository.open(path) as opened:
        for data in STATES:
            add_point(opened, data)
        yield opened


def check(repository: Repository, vm: str | None = None, point: str | None = None, sample: float = 1) -> Report:
    return verify(repository, vm, point, sample, lambda *_: None)


def damage_of(report: Report) -> list[Damage]:
    return list(report.all_damage(CHUNK))


def flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(0o400)


def layer(repository: Repository, seq: int, chain: str = "main") -> Path:
    return Path(repository.path) / DISK / chain / f"{seq:06d}.layer"


def payload(path: Path, chunk_no: int) -> tuple[Path, int]:
    """Return the file with the payload of a chunk, and an offset inside it."""
    layer = Layer(str(path))
    for rows in layer.rows():
        for row in rows:
            if row["chunk_no"] == chunk_no and row["codec"]:
                half = 50 if chunk_no == 40 else int(row["length"]) // 2  # that ends the disk
                return Path(layer.data.path), int(row["offset"]) + half
    raise AssertionError("no such chunk")


def bytes_or_error(repository: Repository, point: str) -> bytes | None:
    try:
        return read_point(repository, point)
    except Corrupt:
        return None


def test_nothing_is_wrong(repository: Repository) -> None:
    report = check(repository)
    assert damage_of(report) == []
    assert (report.points, report.layers, report.chunks) == (3, 3, 41 + 2 + 2)  # 9 is a ZERO record
    assert check(repository, "web01", repository.points("web01")[2]).chunks == 41 - 1
    assert check(repository, sample=0).chunks == 0


def test_a_chunk_hurts_the_points_that_see_it(repository: Repository) -> None:
    first, second, third = repository.points("web01")
    cases = [
        (0, 5, [first, second, third]),
        (0, 3, [first]),
        (0, 9, [first]),
        (0, 20, [first, second]),
        (1, 3, [second]),
        (1, 4, [second, third]),
        (2, 20, [third]),
        (0, 40, [first, second, third]),
    ]
    for seq, number, points in cases:
        path, offset = payload(layer(repository, seq), number)
        flip(path, offset)
        (found,) = damage_of(check(repository))
        assert (found.kind, found.vm, found.disk, found.points) == ("chunk", "web01", "vda", points)
        assert (found.offset, found.length) == (number * CHUNK, 100 if number == 40 else CHUNK)
        assert found.file == str(path)
        for point, data in zip((first, second, third), STATES, strict=True):
            expected = [point] if point in points else []
            assert [p for d in damage_of(check(repository, "web01", point)) for p in d.points] == expected
            repository.store.chunks.clear()
            repository.store.opened.clear()  # which chunks were found right is known while a layer is open
            assert bytes_or_error(repository, point) == (None if expected else data)
        flip(path, offset)
    assert damage_of(check(repository)) == []


def test_neighbours_are_told_as_one_range(repository: Repository) -> None:
    path = layer(repository, 0)
    for number in (10, 11, 12, 14, 20, 21):
        flip(*payload(path, number))
    found = damage_of(check(repository))
    if repository.settings.codec == "none":  # the order of the payloads is that of the chunks
        assert [(d.offset, d.length) for d in found] == [
            (10 * CHUNK, 3 * CHUNK),
            (14 * CHUNK, CHUNK),
            (20 * CHUNK, CHUNK),
            (21 * CHUNK, CHUNK),
        ]
    covered = sorted(
        n for d in found for n in range((d.offset or 0) // CHUNK, ((d.offset or 0) + (d.length or 0)) // CHUNK)
    )
    assert covered == [10, 11, 12, 14, 20, 21]


def test_every_byte_of_a_layer_counts(repository: Repository) -> None:
    """A flipped bit anywhere is found: in the header, a payload that is seen, the table, the fences, the trailer."""
    rng = random.Random(1)
    for seq in range(3):
        path = layer(repository, seq)
        opened = Layer(str(path))
        table, length = opened.trailer().table_offset, opened.length
        offsets = [0, 20, 70, 2000, 4095, table, table + 30, length - 80, length - 70, length - 30, length - 1]
        offsets += [rng.randrange(table, length) for _ in range(20)]
        for offset in offsets:
            flip(path, offset)
            found = damage_of(check(repository))
            assert found, offset
            assert {d.file for d in found} == {str(path)}, offset
            assert found[0].points == repository.points("web01")[seq:], offset
            flip(path, offset)


def test_a_layer_that_is_cut_off_missing_or_another(repository: Repository) -> None:
    first, second, third = repository.points("web01")
    path = layer(repository, 1)
    whole = path.read_bytes()
    for content_now in (None, b"", whole[:100], whole[:-1], whole + b"x", layer(repository, 2).read_bytes()):
        path.unlink()
        if content_now is not None:
            path.write_bytes(content_now)
        found = damage_of(check(repository))
        assert found[0].file == str(path)
        header = content_now is not None and content_now.startswith(whole[:100]) and len(content_now) > 4096
        assert found[0].kind == ("table" if header else "layer")
        assert found[0].points == [second, third]
        assert not [d for d in found if first in d.points]
        assert damage_of(check(repository, "web01", first)) == []
        path.write_bytes(whole)
    assert damage_of(check(repository)) == []


def test_a_damaged_manifest(repository: Repository) -> None:
    _, second, third = repository.points("web01")
    manifest = Path(repository.path) / "vms/web01/points" / f"{second}.json"
    flip(manifest, 100)
    (found,) = damage_of(check(repository))
    assert (found.kind, found.points, found.file) == ("manifest", [second], str(manifest))
    assert damage_of(check(repository, "web01", third)) == []
    flip(manifest, 100)


def test_a_damaged_index_is_told_and_built_again(repository: Repository) -> None:
    third = repository.points("web01")[2]
    index = repository.store.index
    chain_no = index.chain_no("web01", "vda", "main")
    assert chain_no is not None
    key = chain_no.to_bytes(4, "big") + bytes(4)
    with index._env.begin(write=True) as txn:  # as a lost page would
        assert txn.delete(key, db=index._chunks)
        assert txn.delete(key, db=index._regions)
    repository.store.regions.clear()
    found = damage_of(check(repository))
    assert {d.kind for d in found} == {"index"}
    assert third in [p for d in found for p in d.points]
    report = check(repository)
    repair(repository, report, [], None)
    assert all(d.repaired for d in damage_of(report))
    assert damage_of(check(repository)) == []
    assert read_point(repository, third) == STATES[2]


@pytest.mark.parametrize("repository", ["none"], indirect=True)
def test_what_the_index_is_wrong_about(repository: Repository) -> None:
    """Records with right checks and counts, but others than the table's; a layer with another parent."""
    points = repository.points("web01")
    index = repository.store.index
    chain_no = index.chain_no("web01", "vda", "main")
    assert chain_no is not None
    regions, records = index.records(chain_no, 0, 1)

    def put(kept: list[bool], change: int | None = None) -> None:
        new = records.copy()
        if change is not None:
            new["offset"][change] ^= np.uint64(CHUNK)
        with index._env.begin(write=True) as txn:
            index._replace(txn, chain_no, 0, regions[kept], new[kept])

    def found() -> list[tuple[str, list[str]]]:
        return [(d.kind, d.points) for d in damage_of(check(repository, sample=0))]

    everything = [True] * len(records)
    for place, seq in enumerate(records["seq"].tolist()):
        put([i != place for i in range(len(records))])
        assert found() == [("index", points[seq:])]
        put(everything, place)
        assert found() == [("index", points[seq:])]
        assert damage_of(check(repository, "web01", points[seq - 1])) == []
    put(everything)
    assert found() == []
    key = chain_no.to_bytes(4, "big") + (2).to_bytes(4, "big")
    with index._env.begin(write=True, db=index._layers) as txn:
        txn.put(key, encode_layer(key, index.layer_id(chain_no, 2) or NO_LAYER, 0, 0))
    assert found() == [("index", points[2:])]
    report = check(repository)
    repair(repository, report, [], None)
    assert [d.repaired for d in damage_of(report)] == ["built again from the layers"]
    assert found() == []


def damage_some(repository: Repository) -> dict[str, bytes]:
    """Flip bits in payloads of all three layers; return what the files were."""
    before = {}
    for seq, numbers in enumerate([(0, 5, 6, 40), (3, 4), (20,)]):
        path = layer(repository, seq)
        data = Path(Layer(str(path)).data.path)
        before[str(data)] = data.read_bytes()
        for number in numbers:
            flip(*payload(path, number))
    return before


def test_repair_from_another_chain(repository: Repository) -> None:
    add_point(repository, STATES[2], full=True)
    before = damage_some(repository)
    report = check(repository)
    repair(repository, report, [], None)
    found = damage_of(report)
    # What only the second point saw is nowhere else.
    (left,) = [d for d in found if d.repaired is None]
    assert (left.offset, left.points) == (3 * CHUNK, [repository.points("web01")[1]])
    assert all("main.2" in d.repaired for d in found if d.repaired)
    repository.store.chunks.clear()
    first, second, third, _ = repository.points("web01")
    assert read_point(repository, first) == STATES[0]
    assert bytes_or_error(repository, second) is None
    assert read_point(repository, third) == STATES[2]
    base = Path(Layer(str(layer(repository, 0))).data.path)
    assert base.read_bytes() == before[str(base)]
    kept = list((Path(repository.path) / "damaged").iterdir())
    assert len(kept) == len(before) + 3
    assert base.stat().st_mode & 0o777 == 0o400


def test_repair_from_sources(repository: Repository, tmp_path: Path) -> None:
    before = damage_some(repository)
    points = repository.points("web01")
    wrong, right = tmp_path / "wrong.raw", tmp_path / "right.qcow2"
    wrong.write_bytes(content(99))
    report = check(repository)
    damaged = {str(p): Path(p).read_bytes() for p in before}
    repair(repository, report, [(None, str(wrong)), ("vdb", str(tmp_path / "no such file"))], None)
    assert not any(d.repaired for d in damage_of(report))
    assert {p: Path(p).read_bytes() for p in before} == damaged
    for data in STATES:
        right.write_bytes(data)
        report = check(repository)
        repair(repository, report, [("vda", str(wrong)), ("vda", str(right))], None)
    assert damage_of(check(repository)) == []
    assert {p: Path(p).read_bytes() for p in before} == before
    repository.store.chunks.clear()
    assert [read_point(repository, p) for p in points] == STATES


@pytest.mark.parametrize("repository", ["zstd"], indirect=True)
def test_repair_when_the_compressor_is_another_one(repository: Repository, tmp_path: Path) -> None:
    """A payload that another version of the library made has another length than ours: the place is filled."""
    from backupfs.repository import codec

    source = tmp_path / "source.raw"
    for level in (3, -7):
        ours, codec._LEVEL = codec._LEVEL, level
        codec._per_thread.__dict__.clear()
        try:
            data = content(500 + level)
            point = add_point(repository, data, full=True)
        finally:
            codec._LEVEL = ours
            codec._per_thread.__dict__.clear()
        path = Path(repository.path) / DISK / point.disks[0].chain / "000000.layer"
        for number in range(40):
            flip(*payload(path, number))
        source.write_bytes(data)
        report = check(repository)
        repair(repository, report, [(None, str(source))], None)
        repository.store.chunks.clear()
        assert [d for d in damage_of(report) if not d.repaired] == []
        assert read_point(repository, point.id) == data
        assert damage_of(check(repository)) == []


def test_holes_of_gc_are_no_damage(repository: Repository) -> None:
    from backupfs.services.gc import gc

    first, second, third = repository.points("web01")
    with repository.exclusive():
        repository.remove_points([("web01", first), ("web01", second)])
    gc(repository, dry_run=False, waiting=None)
    report = check(repository)
    assert damage_of(report) == []
    assert report.chunks == 40
    assert read_point(repository, third) == STATES[2]


@pytest.mark.parametrize("repository", ["zstd"], indirect=True)
def test_the_command(repository: Repository, tmp_path: Path) -> None:
    repo = Path(repository.path)
    backupfs(repo, "verify")
    path = layer(repository, 0)
    flip(*payload(path, 5))
    said = backupfs(repo, "verify", "web01", "--json", code=20)
    assert "damaged at offset" in said
    status = json.loads(_output(repo, "status", "--json"))
    assert not status["ok"]
    assert [(d["offset"], d["length"]) for d in status["damage"]] == [(5 * CHUNK, CHUNK)]
    backupfs(repo, "verify", "--sample", "0%", code=2)
    backupfs(repo, "verify", "--sample", "0.0001%")
    assert json.loads(_output(repo, "status", "--json"))["vms"][0]["damaged"] == 1, "a sample forgets nothing"
    source = tmp_path / "disk.raw"
    source.write_bytes(BASE)
    backupfs(repo, "verify", "--repair", "--from", f"vda={source}")
    backupfs(repo, "verify")
    assert json.loads(_output(repo, "status", "--json"))["ok"]
    backupfs(repo, "verify", "--from", f"vda={source}", code=2)
    assert "no such disk; there are vda" in backupfs(repo, "verify", "--repair", "--from", f"vdz={source}", code=10)
    assert "missing.raw" in backupfs(repo, "verify", "--repair", "--from", f"vda={tmp_path}/missing.raw", code=30)
    assert json.loads(_output(repo, "status", "--json"))["ok"], "it did not begin"
    backupfs(repo, "verify", "--sample", "200%", code=2)
    backupfs(repo, "verify", "nobody", code=10)
    with pytest.raises(BackupfsError):
        check(repository, "nobody")


def _output(repo: Path, *words: str) -> str:
    import subprocess

    from commands import BACKUPFS

    environment = {**os.environ, "BACKUPFS_REPOSITORY": str(repo)}
    done = subprocess.run([*BACKUPFS, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_a_shrunk_and_grown_disk(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    Repository.init(path, chunk_size=CHUNK)
    with Repository.open(path) as repository:
        for data in (content(1, 30 * CHUNK), content(1, 10 * CHUNK), content(1, 10 * CHUNK) + bytes(20 * CHUNK)):
            add_point(repository, data)
        add_point(repository, bytes(300 * CHUNK), [Extent(0, 300 * CHUNK, True)])
        report = check(repository)
        assert damage_of(report) == []
        assert report.chunks == 30
