"""--repair of headers, tables and trailers: the very bytes that were published, or nothing is written."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import backupfs
from damaging import check, flip, kept, layer, overwrite, repaired
from mounts import needs_fuse
from repositories import add_point, read_point

from backupfs.errors import Corrupt, RepositoryError
from backupfs.extents import Extent
from backupfs.repository.format import HEADER_SIZE, ROW
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services.gc import gc
from backupfs.units import KiB

CHUNK = 4 * KiB
CHUNKS = 900  # several regions and fences
SIZE = CHUNKS * CHUNK


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A base and two deltas that rewrite and zero; each chunk is compressed or not."""
    path = tmp_path_factory.mktemp("rebuild") / "repo"
    Repository.init(str(path), chunk_size=CHUNK)
    rng = random.Random(1)
    disk = bytearray(b"".join(rng.randbytes(CHUNK // 4) * rng.choice([4, 1, 4]) for _ in range(2 * CHUNKS))[:SIZE])
    states = []
    with Repository.open(str(path)) as repository:
        add_point(repository, bytes(disk))
        states.append(bytes(disk))
        for seed in (2, 3):
            rng = random.Random(seed)
            changed = []
            for first in range(seed, CHUNKS - 2, 3):
                disk[first * CHUNK : (first + 1) * CHUNK] = rng.randbytes(CHUNK // 2) * 2
                changed.append(Extent(first * CHUNK, CHUNK, False))
            zero = slice(200 * CHUNK * (seed - 1), 200 * CHUNK * seed)
            disk[zero] = bytes(zero.stop - zero.start)
            changed = [e for e in changed if not zero.start <= e.offset < zero.stop]
            changed.append(Extent(zero.start, zero.stop - zero.start, True))
            add_point(repository, bytes(disk), sorted(changed, key=lambda e: e.offset))
            states.append(bytes(disk))
    return path, states


@pytest.fixture
def repository(built: tuple[Path, list[bytes]], tmp_path: Path) -> Iterator[Repository]:
    shutil.copytree(built[0], tmp_path / "repo")
    with Repository.open(str(tmp_path / "repo")) as opened:
        yield opened


def check_all(repository: Repository, states: list[bytes]) -> None:
    repository.store.close()  # drops what is open
    assert list(check(repository).all_damage(CHUNK)) == []
    assert [read_point(repository, p) for p in repository.points("web01")] == states


@pytest.mark.parametrize("seq", [0, 1, 2])
def test_flipped_bits(repository: Repository, built: tuple[Path, list[bytes]], seq: int) -> None:
    path = layer(repository, seq)
    whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
    rng = random.Random(seq)
    places = [0, 9, 20, 70, 2000, HEADER_SIZE - 1, trailer.fences_offset, len(whole) - 72, len(whole) - 40]
    places += [len(whole) - 1, *(rng.randrange(trailer.table_offset, trailer.fences_offset) for _ in range(8))]
    for place in places:
        flip(path, place)
        assert all(d.repaired for d in repaired(repository)), place
        assert path.read_bytes() == whole, place
        assert path.stat().st_mode & 0o777 == 0o444
    assert len(kept(repository)) == len(places)
    check_all(repository, built[1])


@pytest.mark.parametrize("place", [HEADER_SIZE, HEADER_SIZE + 20, -1])
def test_the_trailer_of_a_layer_without_rows(tmp_path: Path, place: int) -> None:
    """Of a point that had nothing new."""
    Repository.init(str(tmp_path / "repo"), chunk_size=CHUNK)
    disk = random.Random(4).randbytes(SIZE)
    with Repository.open(str(tmp_path / "repo")) as repository:
        add_point(repository, disk)
        add_point(repository, disk, [])
        path = layer(repository, 1)
        whole = path.read_bytes()
        flip(path, place % len(whole))
        assert all(d.repaired for d in repaired(repository))
        assert path.read_bytes() == whole
        check_all(repository, [disk, disk])


def test_all_at_once(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    """Header, a row, fences and trailer of all layers; and, behind that, a chunk that another layer has too."""
    whole = {}
    for seq in (0, 1, 2):
        path = layer(repository, seq)
        whole[path], trailer = path.read_bytes(), Layer(str(path)).trailer()
        overwrite(path, 0, bytes(HEADER_SIZE))
        flip(path, trailer.table_offset + 3 * ROW.itemsize + 24)
        overwrite(path, trailer.fences_offset, bytes(len(whole[path]) - trailer.fences_offset))
    assert all(d.repaired for d in repaired(repository))
    assert {path: path.read_bytes() for path in whole} == whole
    check_all(repository, built[1])


def test_a_chunk_behind_a_damaged_table(repository: Repository) -> None:
    path = layer(repository, 2)
    flip(path, 0)
    flip(path, HEADER_SIZE + 7)
    (table, chunk) = repaired(repository)
    assert (table.kind, table.repaired is None) == ("layer", False)
    assert (chunk.kind, chunk.repaired, chunk.points) == ("chunk", None, repository.points("web01")[2:])


@pytest.mark.parametrize("trailer_too", [False, True])
def test_a_lost_sector_of_a_table(
    repository: Repository, built: tuple[Path, list[bytes]], *, trailer_too: bool
) -> None:
    for seq in (1, 2):
        path = layer(repository, seq)
        whole, trailer = path.read_bytes(), Layer(str(path)).trailer()
        for at in range(trailer.table_offset, trailer.fences_offset, 4 * KiB):
            overwrite(path, at, bytes(min(4 * KiB, trailer.fences_offset - at)))
            if trailer_too:
                overwrite(path, len(whole) - 72, bytes(72))
            (found,) = repaired(repository)
            assert found.repaired
            assert path.read_bytes() == whole
    check_all(repository, built[1])


def test_what_can_not_be_proven_is_left(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    first, second, third = repository.points("web01")
    states = built[1]

    def refused(seq: int, why: str, points: list[str]) -> None:
        path = layer(repository, seq)
        before = path.read_bytes() if path.exists() else None
        found = repaired(repository)
        assert [(d.file, d.repaired, d.points) for d in found] == [(str(path), None, points)]
        assert why in found[0].what
        assert (path.read_bytes() if path.exists() else None) == before
        assert not kept(repository)
        for point, data in zip((first, second, third), states, strict=True):
            repository.store.close()
            if point not in points:
                assert read_point(repository, point) == data
        with pytest.raises(RepositoryError, match="layer"):
            gc(repository)

    base, delta = layer(repository, 0), layer(repository, 1)
    whole = {path: path.read_bytes() for path in (base, delta)}
    table = Layer(str(base)).trailer().table_offset
    overwrite(base, table + 4 * KiB, bytes(4 * KiB))  # the index has no rows of a base
    refused(0, "not enough", [first, second, third])
    overwrite(base, 0, whole[base])

    delta.chmod(0o600)
    delta.write_bytes(layer(repository, 2).read_bytes())
    refused(1, "not enough", [second, third])
    delta.write_bytes(whole[delta][:-200])
    refused(1, "not enough", [second, third])
    delta.unlink()
    refused(1, "only a copy", [second, third])
    delta.write_bytes(whole[delta])

    check_all(repository, states)


def test_an_index_that_was_built_after_the_damage(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    """It keeps what was there before, until all points are indexed again; however often it is built."""
    path, old = layer(repository, 1), Path(repository.path) / "index.kept"
    whole, table = path.read_bytes(), Layer(str(path)).trailer().table_offset
    overwrite(path, table, bytes(4 * KiB))
    assert not old.exists()
    for _ in range(3):
        assert repository.reindex() == 1
        with pytest.raises(Corrupt, match=r"verify --repair"):
            repository.check_indexed()
        with pytest.raises(Corrupt, match=r"000001\.layer.*verify --repair"):
            read_point(repository, repository.points("web01")[2])
        assert [p.name for p in old.iterdir()] == ["1"]
    assert all(d.repaired for d in repaired(repository))
    assert path.read_bytes() == whole
    check_all(repository, built[1])
    repository.close()
    check_all(repository, built[1])
    repository.check_indexed()
    assert not old.exists()


@pytest.mark.parametrize("what", ["gone", "damaged", "half"])
def test_the_index_is_built_by_itself_after_the_damage(
    repository: Repository, built: tuple[Path, list[bytes]], what: str
) -> None:
    """As one that was killed left it; from one that is damaged in part; or that can't be opened: of no use to keep."""
    path, folder = layer(repository, 2), Path(repository.path) / "index"
    whole, table = path.read_bytes(), Layer(str(path)).trailer().table_offset
    _ = repository.store
    repository.close()
    overwrite(path, table, bytes(4 * KiB))
    if what == "gone":
        (folder.parent / "index.kept").mkdir()
        folder.rename(folder.parent / "index.kept" / "1")
    elif what == "damaged":
        overwrite(folder / "data.mdb", 0, bytes(8 * KiB))
    else:  # what it knows of another layer
        data = (folder / "data.mdb").read_bytes()
        layer_id = Layer(str(layer(repository, 1))).header.layer_id
        overwrite(folder / "data.mdb", 0, data.replace(layer_id, bytes(16)))
        repository.reindex()
    assert read_point(repository, repository.points("web01")[0]) == built[1][0]
    assert (folder.parent / "index.kept").exists() == (what != "damaged")
    assert all(bool(d.repaired) == (what != "damaged") for d in repaired(repository))
    if what == "damaged":
        overwrite(path, table, whole[table : table + 4 * KiB])
    assert path.read_bytes() == whole
    check_all(repository, built[1])


def test_a_second_loss_keeps_a_second_index(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    """What was published after the first loss only the second index knows."""
    states, old = list(built[1]), Path(repository.path) / "index.kept"
    delta = layer(repository, 1)
    whole = {delta: delta.read_bytes()}
    overwrite(delta, Layer(str(delta)).trailer().table_offset, bytes(4 * KiB))
    repository.reindex()
    disk = bytearray(states[-1])
    add_point(repository, bytes(disk), chain="weekly", full=True)
    states.append(bytes(disk))
    disk[: 300 * CHUNK] = random.Random(9).randbytes(300 * CHUNK)
    add_point(repository, bytes(disk), chain="weekly")
    states.append(bytes(disk))
    other = delta.parent.parent / "weekly" / "000001.layer"
    whole[other] = other.read_bytes()
    overwrite(other, Layer(str(other)).trailer().table_offset, bytes(4 * KiB))
    for _ in range(2):
        repository.reindex()
        assert sorted(p.name for p in old.iterdir()) == ["1", "2"]
    assert all(d.repaired for d in repaired(repository))
    assert {path: path.read_bytes() for path in whole} == whole
    repository.close()
    check_all(repository, states)
    assert not old.exists()


def test_reindex_says_what_it_left_out(repository: Repository) -> None:
    first, second, third = repository.points("web01")
    path = layer(repository, 1)
    repository.close()
    overwrite(path, Layer(str(path)).trailer().table_offset, bytes(4 * KiB))
    repo = Path(repository.path)
    said = backupfs(repo, "reindex", code=20)
    assert f"web01/{second}, web01/{third}" in said
    assert first not in said
    assert "run backupfs verify --repair" in said
    assert "backupfs reindex" not in said
    assert all(d.repaired for d in repaired(repository))
    assert backupfs(repo, "reindex") == "3 points indexed\n"


def test_a_backup_keeps_the_index_that_a_repair_needs(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    """A base with a damaged row, which another index does not help, and a delta whose rows are in the index alone."""
    base, delta = layer(repository, 0), layer(repository, 1)
    whole = {path: path.read_bytes() for path in (base, delta)}
    flip(base, Layer(str(base)).trailer().table_offset + 24)
    overwrite(delta, Layer(str(delta)).trailer().table_offset, bytes(4 * KiB))
    repository.store.close()
    with pytest.raises(Corrupt):
        add_point(repository, built[1][-1])
    assert all(d.repaired for d in repaired(repository))
    assert {path: path.read_bytes() for path in whole} == whole
    check_all(repository, built[1])


def test_the_parent_is_known_by_the_index(repository: Repository, built: tuple[Path, list[bytes]]) -> None:
    """The parent's point was deleted: its layer is still what the child stands on."""
    first, _, third = repository.points("web01")
    with repository.exclusive():
        repository.remove_points([("web01", repository.points("web01")[1])])
    path = layer(repository, 2)
    whole = path.read_bytes()
    overwrite(path, 0, bytes(100))
    assert all(d.repaired for d in repaired(repository))
    assert path.read_bytes() == whole
    assert read_point(repository, first) == built[1][0]
    assert read_point(repository, third) == built[1][2]


@needs_fuse
@pytest.mark.parametrize("what", ["header", "table", "trailer", "manifest"])
def test_every_command_goes_on_without_it(
    repository: Repository, built: tuple[Path, list[bytes]], tmp_path: Path, what: str
) -> None:
    first, second, third = repository.points("web01")
    repo, path = Path(repository.path), layer(repository, 1)
    trailer = Layer(str(path)).trailer()
    repository.close()
    if what == "manifest":
        flip(repo / "vms/web01/points" / f"{second}.json", 50)
        hurt = [second]
    else:
        flip(path, {"header": 100, "table": trailer.table_offset + 70, "trailer": trailer.length - 20}[what])
        hurt = [second, third]
    said = backupfs(repo, "verify", code=20)
    assert "damaged at offset" in said
    assert "damaged" in backupfs(repo, "gc", code=20)
    if what != "manifest":
        assert first in backupfs(repo, "points")
    place = tmp_path / "mnt"
    place.mkdir()
    backupfs(repo, "mount", place)
    try:
        for point, data in zip((first, second, third), built[1], strict=True):
            disk = place / "web01" / point / "vda.raw"
            if point in hurt and what in ("header", "manifest"):  # a delta's table is not read: the index has it
                with pytest.raises(OSError, match=r"Input/output error|No such file"):
                    disk.read_bytes()
            else:
                assert disk.read_bytes() == data
    finally:
        backupfs(repo, "umount", place)
    said = backupfs(repo, "verify", "--repair", code=20 if what == "manifest" else 0)
    if what != "manifest":
        assert "repaired from the manifest" in said
        backupfs(repo, "verify")
