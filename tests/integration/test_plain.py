"""Plain layers: full backups that are not compressed are raw images, with header and table beside them."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import backupfs, backupfs_json
from repositories import add_point, read_point

from backupfs.errors import Corrupt, Missing, RepositoryError, TargetError
from backupfs.extents import Extent
from backupfs.repository.format import PLAIN_VERSION, VERSION
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services.damage import Damage
from backupfs.services.gc import gc
from backupfs.services.hydrate import HydrateRequest, hydrate
from backupfs.services.prune import delete
from backupfs.services.repair import repair
from backupfs.services.verify import verify
from backupfs.units import KiB

CHUNK = 64 * KiB
FOLDER = "vms/web01/disks/vda/main"
DISK = random.Random(1).randbytes(5 * CHUNK) + bytes(200 * CHUNK) + random.Random(2).randbytes(CHUNK + 77)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    """A repository of one full point."""
    Repository.init(str(tmp_path / "repo"), codec_name="none")
    with Repository.open(str(tmp_path / "repo")) as repository:
        add_point(repository, DISK)
        yield repository


def image(repository: Repository) -> Path:
    return Path(repository.path) / FOLDER / "000000.raw"


def layer(repository: Repository) -> Path:
    return Path(repository.path) / FOLDER / "000000.layer"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    path.chmod(0o400)


def damage(repository: Repository, *, mend: bool = False) -> list[Damage]:
    report = verify(repository, None, None, 1, lambda *_: None)
    if mend:
        repair(repository, report, [], None)
    return list(report.all_damage(CHUNK))


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK, CHUNK + 1, 300 * CHUNK - 1])
def test_the_image_is_the_disk(tmp_path: Path, size: int) -> None:
    Repository.init(str(tmp_path / "repo"), codec_name="none")
    data = random.Random(size).randbytes(min(size, 2 * CHUNK)).ljust(size, b"\0")
    data = data[:-1] + b"!" if data else data
    with Repository.open(str(tmp_path / "repo")) as repository:
        point = add_point(repository, data)
        assert point.disks[0].raw == "000000.raw"
        found = image(repository)
        assert found.read_bytes() == data
        assert found.stat().st_mode & 0o7777 == 0o400
        assert found.stat().st_blocks * 512 <= 4 * CHUNK
        assert read_point(repository, point.id) == data
        assert damage(repository) == []
        assert repository.reindex() == 1
        assert read_point(repository, point.id) == data


def test_disks_that_grow_and_shrink(repository: Repository) -> None:
    """The last chunk of the raw image is cut off where the disk ended; a larger disk has zeroes behind it."""
    states = {repository.points("web01")[0]: DISK}
    grown = DISK + bytes(3 * CHUNK)
    for data in (grown, grown[:-CHUNK] + b"x" * CHUNK, DISK[: 3 * CHUNK + 5], DISK):
        states[add_point(repository, data).id] = data
    for point, data in states.items():
        assert read_point(repository, point) == data
        opened = repository.open_image("web01", point, "vda")
        for offset in (len(DISK) - 100, len(DISK) - 5000, 0):
            length = min(200, len(data) - offset)
            if length > 0:
                found = bytearray(length)
                for _ in range(2):  # from the disk; then from the kernel's memory
                    opened.readinto(offset, found)
                    assert found == data[offset : offset + length]
                at_once = bytearray(length)
                assert not opened.at_once(offset, [memoryview(at_once)]) or at_once == data[offset : offset + length]
        opened.close()
    assert damage(repository) == []
    for point in list(states)[:-1]:
        delete(repository, [("web01", point)])
        gc(repository)
        assert read_point(repository, list(states)[-1]) == DISK
        assert damage(repository) == []


def test_the_codec_of_one_backup(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "disk.raw"
    backupfs(repo, "init")
    text = b"text" * CHUNK
    contents = []
    for number, (arguments, raw, compressed) in enumerate(
        [
            (["--codec", "none"], True, False),
            ([], False, True),
            (["--codec", "none"], False, False),
            (["--full"], False, True),
            (["--full", "--codec", "none"], True, False),
        ]
    ):
        disk.write_bytes(bytes([number]) * CHUNK + text + random.Random(number).randbytes(CHUNK))
        contents.append(disk.read_bytes())
        backupfs(repo, "backup", "web01", f"vda={disk}", "--time", f"2026-01-0{number + 1}T00:00:00Z", *arguments)
        (facts,) = backupfs_json(repo, "show", "web01/latest")["disks"]
        assert (facts["raw"] is not None) == raw
        assert (facts["stored_bytes"] < facts["data_bytes"]) == compressed
    with Repository.open(str(repo)) as repository:
        for point, data in zip(repository.points("web01"), contents, strict=True):
            assert read_point(repository, point) == data
    backupfs(repo, "verify")
    assert "'gzip' is not one of" in backupfs(repo, "backup", "web01", f"vda={disk}", "--codec", "gzip", code=2)


def test_an_older_program_refuses_it(repository: Repository) -> None:
    header = layer(repository).read_bytes()[:4096]
    assert int.from_bytes(header[8:12], "little") == PLAIN_VERSION != VERSION


def test_a_flipped_bit_is_found_and_repaired(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("web01")[0]
    for offset in (0, 3 * CHUNK + 7, len(DISK) - 1):
        byte = DISK[offset]
        overwrite(image(repository), offset, bytes([byte ^ 1]))
        repository.close()
        with pytest.raises(Corrupt, match=r"000000\.raw: damaged at offset"):
            read_point(repository, point)
        (found,) = damage(repository)
        assert (found.kind, found.file, found.points) == ("chunk", str(image(repository)), [point])
        assert found.offset == offset // CHUNK * CHUNK
        source = tmp_path / "source.raw"
        source.write_bytes(DISK)
        report = verify(repository, None, None, 1, lambda *_: None)
        repair(repository, report, [(None, str(source))], None)
        assert all(d.repaired for d in report.all_damage(CHUNK))
        assert image(repository).read_bytes() == DISK
        assert read_point(repository, point) == DISK


def test_data_in_holes(repository: Repository) -> None:
    """No mount shows it, but who reads the file would see it."""
    point = repository.points("web01")[0]
    places = [5 * CHUNK, 100 * CHUNK + 4096, 205 * CHUNK - 1]
    for offset in places:
        overwrite(image(repository), offset, b"x")
    overwrite(image(repository), 150 * CHUNK, bytes(4096))  # not a hole, but zero
    assert read_point(repository, point) == DISK
    (found,) = damage(repository)
    assert (found.kind, found.points, found.repaired, found.file) == ("image", [], None, str(image(repository)))
    with pytest.raises(TargetError, match=r"damaged at offset 327680: the raw image is not"):
        hydrate(repository, HydrateRequest(vm="web01", point=point), lambda *_: None)
    (found,) = damage(repository, mend=True)
    assert found.repaired
    assert image(repository).read_bytes() == DISK
    assert image(repository).stat().st_mode & 0o777 == 0o400
    kept = sorted(int(path.name.split("-")[1]) for path in (Path(repository.path) / "damaged").iterdir())
    assert [offset // CHUNK for offset in kept] == [offset // CHUNK for offset in places]
    assert damage(repository) == []
    hydrate(repository, HydrateRequest(vm="web01", point=point), lambda *_: None)


@pytest.mark.parametrize("what", ["sector", "table", "header", "trailer"])
def test_the_table_follows_from_the_image(repository: Repository, what: str) -> None:
    whole, trailer = layer(repository).read_bytes(), Layer(str(layer(repository))).trailer()
    table = trailer.table_offset
    places = {
        "sector": (table, 56 * 3),
        "table": (table, trailer.fences_offset - table),
        "header": (0, 4096),
        "trailer": (len(whole) - 72, 72),
    }
    offset, length = places[what]
    overwrite(layer(repository), offset, bytes(length))
    found = damage(repository, mend=True)
    assert found
    assert all(d.repaired for d in found), found
    assert layer(repository).read_bytes() == whole
    assert damage(repository) == []


def test_an_image_that_is_missing_or_cut_off(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("web01")[0]
    other = add_point(repository, DISK[::-1], full=True).id
    whole = image(repository)
    aside = tmp_path / "aside.raw"
    shutil.copy(whole, aside)

    def short() -> None:
        overwrite(whole, 0, b"")
        os.truncate(whole, len(DISK) - 1)

    def longer() -> None:
        os.truncate(whole, len(DISK) + 1)

    by_hand = f"truncate -s {len(DISK)} {whole}"
    for change, error, advice in (
        (whole.unlink, Missing, "only a copy"),
        (short, Corrupt, by_hand),
        (longer, Corrupt, by_hand),
    ):
        change()
        repository.close()
        with pytest.raises(error, match=r"000000\.raw"):
            read_point(repository, point)
        assert read_point(repository, other) == DISK[::-1]
        found = damage(repository, mend=True)
        assert [(d.points, d.repaired) for d in found] == [([point], None)]
        assert advice in found[0].what
        with pytest.raises(RepositoryError, match=r"000000\.raw"):
            gc(repository)
        if whole.exists():
            os.truncate(whole, len(DISK))
            assert [d.kind for d in damage(repository)] == ["chunk"] * (change is short)
        whole.unlink(missing_ok=True)
        shutil.copy(aside, whole)
    assert damage(repository) == []


def test_what_is_no_file_of_ours(repository: Repository, tmp_path: Path) -> None:
    """A FIFO is an error, and nobody waits for a writer; what a symbolic link leads to is read, and never changes."""
    first = repository.points("web01")[0]
    second = bytes(2 * CHUNK) + DISK[2 * CHUNK :]
    add_point(repository, second, [Extent(0, 2 * CHUNK, True)])
    aside = tmp_path / "aside.raw"
    image(repository).rename(aside)
    os.mkfifo(image(repository))
    repository.close()
    for call in (lambda: read_point(repository, first), lambda: gc(repository)):
        with pytest.raises(RepositoryError, match="not a regular file"):
            call()
    assert [d.kind for d in damage(repository, mend=True)] == ["layer"]
    image(repository).unlink()
    image(repository).symlink_to(aside)
    assert read_point(repository, first) == DISK
    delete(repository, [("web01", first)])
    report = gc(repository)
    assert (report.freed, report.stuck) == (0, 2 * CHUNK)
    delete(repository, repository_points(repository))
    gc(repository)
    assert not os.path.lexists(image(repository))
    assert aside.read_bytes() == DISK


def repository_points(repository: Repository) -> list[tuple[str, str]]:
    return [("web01", point) for point in repository.points("web01")]


def test_gc(repository: Repository) -> None:
    """Holes where nobody sees anything; both files go when nobody stands on them, and images without a layer."""
    first = repository.points("web01")[0]
    changed = random.Random(3).randbytes(2 * CHUNK)
    second = changed + DISK[2 * CHUNK :]
    add_point(repository, second, [Extent(0, 2 * CHUNK, False)])
    add_point(repository, DISK, full=True)
    third = repository.points("web01")[2]
    stray = image(repository).with_name("000007.raw")
    stray.write_bytes(b"x" * CHUNK)
    foreign = image(repository).with_name("7.raw")
    foreign.write_bytes(b"x")
    delete(repository, [("web01", first)])
    promised = gc(repository, dry_run=True).freed
    before = image(repository).stat().st_blocks * 512
    report = gc(repository)
    assert report.freed == promised == 3 * CHUNK
    assert before - image(repository).stat().st_blocks * 512 == 2 * CHUNK
    assert not stray.exists()
    assert foreign.exists()
    assert read_point(repository, repository.points("web01")[0]) == second
    assert damage(repository) == []
    delete(repository, [("web01", repository.points("web01")[0])])
    gc(repository)
    assert not image(repository).exists()
    assert not layer(repository).exists()
    assert read_point(repository, third) == DISK
    assert gc(repository).freed == 0


def test_gc_promises_what_a_killed_writer_left(repository: Repository) -> None:
    """Killed between the two halves of a rename: the file has both names, and the temporary one goes first."""
    stray = image(repository).with_name("000003.raw")
    temporary = Path(repository.path) / "tmp" / "0.raw"
    temporary.write_bytes(b"x" * CHUNK)
    os.link(temporary, stray)
    assert gc(repository, dry_run=True).freed == CHUNK
    assert gc(repository).freed == CHUNK
    assert not temporary.exists()
    assert not stray.exists()
