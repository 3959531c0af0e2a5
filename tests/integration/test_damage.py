"""Damage on disk: the right bytes or an error, never other bytes. And a repository that can't be opened says why."""

import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs
from repositories import add_point, read_point
from servers import need

from backupfs.errors import (
    BackupfsError,
    Corrupt,
    Locked,
    Missing,
    NotFound,
    RepositoryError,
    UnsupportedFormat,
    UsageError,
)
from backupfs.repository import manifest
from backupfs.repository.repository import Repository

CHUNK = 4096
SIZE = 300 * CHUNK + 77
RIGHT, REFUSED, WRONG, CRASHED = 0, 1, 2, 3
PAGE = 4096
LONG = bool(os.environ.get("BACKUPFS_LONG"))

pytestmark = pytest.mark.timeout(0 if LONG else 300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A repository of six points, with zstd, none and zero chunks, and what each holds."""
    path = tmp_path_factory.mktemp("damage") / "repo"
    Repository.init(str(path), chunk_size=CHUNK)
    rng = random.Random(4)
    disk = bytearray(rng.randbytes(SIZE // 2) + b"text " * (SIZE // 10 + 1))[:SIZE]
    points = {}
    with Repository.open(str(path)) as repository:
        for _ in range(6):
            points[add_point(repository, bytes(disk)).id] = bytes(disk)
            for _ in range(5):
                offset = rng.randrange(SIZE - 9000)
                disk[offset : offset + 8000] = rng.choice([rng.randbytes(8000), bytes(8000), b"abcdefgh" * 1000])
    return path, points


@pytest.fixture
def repo(built: tuple[Path, dict[str, bytes]], tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    shutil.copytree(built[0], tmp_path / "repo")
    return tmp_path / "repo", built[1]


def judge(path: Path, points: dict[str, bytes]) -> int:
    """Read every point; say how it went."""
    worst = RIGHT
    with Repository.open(str(path)) as repository:
        for point, data in points.items():
            try:
                found = read_point(repository, point)
            except BackupfsError:
                worst = max(worst, REFUSED)
                continue
            if found != data:
                worst = WRONG
    return worst


def judge_in_child(path: Path, points: dict[str, bytes]) -> int:
    """As `judge`, in a process of its own: LMDB may crash on a damaged file."""
    pid = os.fork()
    if pid == 0:
        code = CRASHED
        try:
            faulthandler.disable()  # pytest's
            signal.alarm(100)  # a hanging one ends with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = judge(path, points)
        except BackupfsError:
            code = REFUSED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def flip(path: Path, bit: int) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))
    path.chmod(mode)


def files(path: Path, pattern: str) -> Iterator[Path]:
    found = sorted(path.rglob(pattern))
    assert found
    yield from found


@pytest.mark.parametrize("pattern", ["*.layer", "points/*.json", "backupfs.json"])
def test_flipped_bits_in_immutable_files(repo: tuple[Path, dict[str, bytes]], pattern: str) -> None:
    path, points = repo
    rng = random.Random(5)
    outcomes = set()
    for file in files(path, pattern):
        for _ in range(400 if LONG else 12):
            bit = rng.randrange(8 * file.stat().st_size)
            flip(file, bit)
            with_index = judge_in_child(path, points)
            assert with_index in (RIGHT, REFUSED), f"bit {bit} of {file}"
            outcomes.add(with_index)
            flip(file, bit)
    assert REFUSED in outcomes
    assert judge(path, points) == RIGHT


def test_flipped_bits_in_the_index(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    assert judge(path, points) == RIGHT
    good = (path / "index" / "data.mdb").read_bytes()
    rng = random.Random(6)
    outcomes = {RIGHT: 0, REFUSED: 0}
    for _ in range(5000 if LONG else 80):
        shutil.rmtree(path / "index")
        (path / "index").mkdir()
        bit = rng.randrange(8 * len(good))
        (path / "index" / "data.mdb").write_bytes(good)
        flip(path / "index" / "data.mdb", bit)
        outcome = judge_in_child(path, points)
        if outcome < 0:  # LMDB crashed; the next one knows
            outcome = judge_in_child(path, points)
            assert outcome == RIGHT, f"bit {bit}"
        assert outcome in outcomes, f"bit {bit}: {outcome}"
        outcomes[outcome] += 1
    assert outcomes[REFUSED] > 0
    with Repository.open(str(path)) as repository:
        assert repository.reindex() == len(points)
    assert judge(path, points) == RIGHT


def test_lmdb_does_not_crash_twice(repo: tuple[Path, dict[str, bytes]]) -> None:
    """Flips in the headers of its pages: where its pointers end, and what kind of a page it is."""
    path, points = repo
    assert judge(path, points) == RIGHT
    data = path / "index" / "data.mdb"
    good = data.read_bytes()
    crashed = set()
    for page in range(2, len(good) // PAGE):
        for byte, bit in ((13, 0), (13, 4), (12, 7), (10, 2)):
            shutil.rmtree(path / "index")
            data.parent.mkdir()
            data.write_bytes(good)
            flip(data, 8 * (page * PAGE + byte) + bit)
            outcome = judge_in_child(path, points)
            assert outcome in (RIGHT, REFUSED, -signal.SIGBUS, -signal.SIGSEGV, -signal.SIGABRT)
            if outcome < 0:
                crashed.add(outcome)
                assert list(data.parent.glob("open-*"))
                assert judge_in_child(path, points) == RIGHT
                assert not list(data.parent.glob("open-*"))
    assert crashed
    for number in (signal.SIGKILL, signal.SIGBUS):
        child = subprocess.Popen(
            [sys.executable, "-c", _OPENS_AND_WAITS, str(path)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert child.stdout
        assert child.stdout.readline() == b"open\n"
        (mark,) = data.parent.glob("open-*")
        inode = data.stat().st_ino
        assert judge_in_child(path, points) == RIGHT
        assert data.stat().st_ino == inode
        assert mark.exists()
        child.send_signal(number)
        child.communicate()
        assert judge_in_child(path, points) == RIGHT
        assert not mark.exists()
        assert (data.stat().st_ino == inode) == (number == signal.SIGKILL)


_OPENS_AND_WAITS = """
import sys, time
from backupfs.repository.repository import Repository
repository = Repository.open(sys.argv[1])
repository.store
print("open", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "garbage", "of another repository"])
def test_an_index_that_is_gone_is_built_again(
    repo: tuple[Path, dict[str, bytes]], how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, points = repo
    data = path / "index" / "data.mdb"
    if how == "deleted":
        shutil.rmtree(path / "index")
    elif how == "emptied":
        data.write_bytes(b"")
    elif how == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 4096 * 4096 * 2 // 3])
    elif how == "garbage":
        data.write_bytes(os.urandom(100_000))
    else:
        other = tmp_path / "other"
        Repository.init(str(other))
        with Repository.open(str(other)) as repository:
            add_point(repository, b"x" * 70000)
        shutil.rmtree(path / "index")
        shutil.copytree(other / "index", path / "index")
    assert judge_in_child(path, points) == RIGHT
    assert judge(path, points) == RIGHT
    assert sorted(p.name for p in path.iterdir()) == ["backupfs.json", "index", "index.lock", "lock", "tmp", "vms"]


def test_many_may_build_the_index_at_once(repo: tuple[Path, dict[str, bytes]]) -> None:
    """Four open while a fifth goes on replacing the index: two files of different ones must never be paired."""
    path, points = repo
    (path / "index.new").mkdir()  # of a process that was killed
    reindex = (
        "import sys\nfrom backupfs.repository.repository import Repository\n"
        "for _ in range(30):\n  with Repository.open(sys.argv[1]) as r: r.reindex()\n"
    )
    read = (
        "import sys\nfrom backupfs.repository.repository import Repository\n"
        "for _ in range(30):\n"
        "  with Repository.open(sys.argv[1]) as r:\n"
        "    for p in r.points('web01'): r.open_image('web01', p, 'vda').check_map()\n"
    )
    shutil.rmtree(path / "index")
    programs = [reindex, *[read] * 4]
    children = [
        subprocess.Popen([sys.executable, "-c", p, str(path)], stderr=subprocess.PIPE, text=True) for p in programs
    ]
    assert [(child.communicate(timeout=100)[1], child.returncode) for child in children] == [("", 0)] * 5
    assert judge(path, points) == RIGHT
    assert not list(path.glob("index.new*"))


def test_a_cut_or_missing_layer_hurts_only_the_points_that_see_it(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    layer = path / "vms/web01/disks/vda/main/000003.layer"
    layer.chmod(0o600)
    os.truncate(layer, 5000)
    ids = list(points)
    with Repository.open(str(path)) as repository:
        for point in ids[:3]:
            assert read_point(repository, point) == points[point]
        with pytest.raises(Corrupt, match=r"000003\.layer"):
            read_point(repository, ids[3])
    layer.unlink()
    with Repository.open(str(path)) as repository, pytest.raises(Missing, match=r"000003\.layer"):
        read_point(repository, ids[3])


def test_a_missing_layer_is_damage_and_a_new_chain_the_way_on(
    repo: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """What a manifest names must be there; NotFound, 10, is for what the user named."""
    path, points = repo
    missing = path / "vms/web01/disks/vda/main" / f"{len(points) - 1:06d}.layer"
    missing.unlink()
    disk = tmp_path / "disk.raw"
    disk.write_bytes(points[max(points)])
    for words in (
        ("gc",),
        ("gc", "--dry-run"),
        ("verify",),
        ("restore", "web01/latest/vda", tmp_path / "restored.raw"),
        ("backup", "web01", f"vda={disk}"),
    ):
        said = backupfs(path, *words, code=20)
        assert str(missing) in said
        assert ("--full begins a new one" in said) == (words[0] == "backup")
    assert not list(tmp_path.glob("restored*"))
    backupfs(path, "backup", "web01", f"vda={disk}", "--full")
    backupfs(path, "restore", "web01/latest/vda", tmp_path / "restored.raw")
    assert (tmp_path / "restored.raw").read_bytes() == disk.read_bytes()


def test_what_one_may_not_read_is_not_damaged(repo: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """That is an error of the place where the program runs, which is named: nothing is to be repaired."""
    need("setpriv")
    path, points = repo
    cache = tmp_path / "cache"
    cache.mkdir()
    # Root reads everything, but for this.
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *BACKUPFS, "-r", str(path), "verify"]
    layer = path / "vms/web01/disks/vda/main/000003.layer"
    point = path / "vms/web01/points" / f"{max(points)}.json"

    def verify() -> tuple[int, str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "DAMAGED" not in done.stdout
        return done.returncode, done.stderr

    assert verify() == (0, "")
    for file in (path / "index/data.mdb", path / "index/lock.mdb", layer, point):
        mode = file.stat().st_mode
        file.chmod(0)
        code, said = verify()
        assert code == 1
        assert str(file) in said
        assert "Permission denied" in said
        file.chmod(mode)
    shutil.rmtree(path / "index")
    path.chmod(0o500)  # so the index has to be in the cache
    cache.chmod(0o500)
    code, said = verify()
    assert (code, f"{cache}/backupfs" in said) == (1, True)
    for folder in (path, cache):
        folder.chmod(0o700)
    assert verify() == (0, "")


@pytest.mark.parametrize("name", ["index/data.mdb", "index/lock.mdb", "index.lock", "lock"])
def test_links_are_not_written_through(repo: tuple[Path, dict[str, bytes]], tmp_path: Path, name: str) -> None:
    path, points = repo
    other = tmp_path / "other"
    if name == "index/data.mdb":
        (path / name).rename(other)  # one that could be opened
    else:
        (path / name).unlink(missing_ok=True)
        other.write_bytes(b"somebody else's")
    before = other.read_bytes()
    (path / name).symlink_to(other)
    refused = pytest.raises(RepositoryError, match=f"{name}: .*symbolic link")
    with Repository.open(str(path)) as repository, refused, repository.writer():
        read_point(repository, max(points))
    assert other.read_bytes() == before


def test_a_missing_layer_is_not_passed_over_by_reindex(
    repo: tuple[Path, dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, older versions of its chunks would show at the points after it."""
    path, points = repo
    (path / "vms/web01/disks/vda/main/000003.layer").unlink()
    ids = list(points)
    with Repository.open(str(path)) as repository:
        assert repository.reindex() == 3
        assert caplog.text.count("can't be indexed") >= 3
        for point in ids[:3]:
            assert read_point(repository, point) == points[point]
        for point in ids[3:]:
            with pytest.raises(Corrupt):
                read_point(repository, point)


def test_layers_in_each_others_places_are_refused(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    folder = path / "vms/web01/disks/vda/main"
    (folder / "000001.layer").rename(folder / "x")
    (folder / "000002.layer").rename(folder / "000001.layer")
    (folder / "x").rename(folder / "000002.layer")
    assert judge(path, points) == REFUSED
    shutil.rmtree(path / "index")
    assert judge(path, points) == REFUSED


def test_a_manifest_in_anothers_place_is_refused(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    folder = path / "vms/web01/points"
    first, second = sorted(folder.iterdir())[:2]
    shutil.copy(first, second)
    with Repository.open(str(path)) as repository, pytest.raises(Corrupt, match="another point"):
        read_point(repository, list(points)[1])


def test_the_digest_tells_a_wrong_index(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    other = path.parent / "other"
    shutil.copytree(path, other)
    ids = list(points)
    with Repository.open(str(path)) as repository:
        entry = repository.manifest("web01", ids[2])
        forged = manifest.seal(
            manifest.msgspec.structs.replace(
                entry, disks=[manifest.msgspec.structs.replace(entry.disks[0], digest="0" * 32)]
            )
        )
        (path / "vms/web01/points" / f"{ids[2]}.json").write_bytes(forged)
        with pytest.raises(Corrupt, match="reindex"):
            repository.open_image("web01", ids[2], "vda").check_map()


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not a repository"):
        Repository.open(str(tmp_path))
    with pytest.raises(NotFound):
        Repository.open(str(tmp_path / "missing"))


def test_a_later_version_or_codec_is_refused(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, _ = repo
    settings = manifest.decode_settings((path / "backupfs.json").read_bytes(), "x")
    for change in ({"format": 2}, {"codec": "lz77"}):
        (path / "backupfs.json").write_bytes(manifest.seal(manifest.msgspec.structs.replace(settings, **change)))
        with pytest.raises(UnsupportedFormat):
            Repository.open(str(path))


def test_init_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        Repository.init(str(tmp_path))
    fresh = tmp_path / "fresh"  # an ext4 that was just made has such a folder
    (fresh / "lost+found").mkdir(parents=True)
    (fresh / "lost+found/#12").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        Repository.init(str(fresh))
    (fresh / "lost+found/#12").unlink()
    Repository.init(str(fresh))
    with pytest.raises(UsageError, match="power of two"):
        Repository.init(str(tmp_path / "new"), chunk_size=5000)
    with pytest.raises(RepositoryError):
        Repository.init(str(tmp_path / "file" / "below"))
    assert not (tmp_path / "new").exists()


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_holder(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, _ = repo
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with Repository.open(str(path)) as repository, repository.writer():
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os.kill(os.getpid(), 9)
    os.read(ready[0], 1)
    with Repository.open(str(path)) as repository:
        with pytest.raises(Locked, match=f"process {pid}"), repository.writer():
            pass
        os.write(go[1], b"x")
        os.waitpid(pid, 0)
        with repository.writer():
            pass
    for fd in (*ready, *go):
        os.close(fd)


def test_a_dead_writers_files_are_removed_and_its_layers_never_count(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, points = repo
    (path / "tmp" / "dead.layer").write_bytes(b"x")
    orphan = path / "vms/web01/disks/vda/main/000006.layer"
    shutil.copy(path / "vms/web01/disks/vda/main/000005.layer", orphan)
    data = b"new" * 400000
    with Repository.open(str(path)) as repository:
        point = add_point(repository, data)
        assert point.disks[0].seq == 7
        assert read_point(repository, point.id) == data
        assert not list((path / "tmp").iterdir())
        repository.reindex()
        assert read_point(repository, point.id) == data
    assert judge(path, points) == RIGHT


def test_names_from_outside_never_leave_the_repository(repo: tuple[Path, dict[str, bytes]]) -> None:
    path, _ = repo
    with Repository.open(str(path)) as repository:
        for vm, point in (("../..", "x"), ("web01", "../../backupfs"), ("web01", "..")):
            with pytest.raises((NotFound, UsageError)):
                repository.manifest(vm, point)
