"""Making and keeping hydrated disks: what is verified, what a failure leaves, the limit, shared blocks."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from mounts import wait_until
from repositories import add_point

from backupfs.errors import Corrupt, Locked, NotFound, TargetError, UsageError
from backupfs.extents import Extent
from backupfs.repository import files
from backupfs.repository.repository import Repository
from backupfs.services import hydrate as service
from backupfs.services import hydrated
from backupfs.services.hydrate import HydrateRequest, dehydrate, hydrate, list_hydrated
from backupfs.services.prune import delete
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.timeout(120)

FIRST = random.Random(1).randbytes(1 * MiB) + bytes(2 * MiB) + random.Random(2).randbytes(1 * MiB)
SECOND = FIRST[: 64 * KiB] + bytes(64 * KiB) + b"text" * (48 * KiB) + FIRST[320 * KiB :]


def make(folder: Path, codec: str = "zstd", tail: bytes = b"") -> dict[str, bytes]:
    """Make a repository of two points; return what each holds."""
    Repository.init(str(folder), codec_name=codec)
    with Repository.open(str(folder)) as repository:
        changed = [Extent(0, 320 * KiB, False)]
        first, second = add_point(repository, FIRST + tail).id, add_point(repository, SECOND + tail, changed).id
    return {first: FIRST + tail, second: SECOND + tail}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    make(tmp_path / "repo", tail=b"the end")
    with Repository.open(str(tmp_path / "repo")) as repository:
        yield repository


def points(repository: Repository) -> dict[str, bytes]:
    return dict(zip(repository.points("web01"), (FIRST + b"the end", SECOND + b"the end"), strict=True))


def run(repository: Repository, point: str, limit: int | None = None) -> service.HydratedDisk:
    request = HydrateRequest(vm="web01", point=point, limit=limit)
    (done,) = hydrate(repository, request, lambda *_: None)
    return done


def overwrite(path: Path, offset: int, data: bytes) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    path.chmod(0o400)


def left(repository: Repository) -> list[str]:
    """Return the points that are hydrated, after a look at what lies in the folder."""
    found = list_hydrated(repository)
    names = {"lock"}
    for disk in found:
        name = Path(disk.path).stem
        names |= {f"{name}.raw", f"{name}.json"}
    assert set(os.listdir(hydrated.folder(repository.settings.id))) == names
    return [disk.point for disk in found]


def test_a_private_sparse_equal_file(repository: Repository, cache: Path) -> None:
    for point, data in points(repository).items():
        done = run(repository, point)
        path = Path(done.path)
        assert path.is_relative_to(cache / "backupfs" / "hydrated" / repository.settings.id)
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o7777 == 0o400
        assert path.parent.stat().st_mode & 0o7777 == 0o700
        assert done.allocated == path.stat().st_blocks * 512 <= 2 * MiB + 128 * KiB
        assert run(repository, point).shared is None  # nothing was done
    assert left(repository) == list(points(repository))
    assert [disk.point for disk in dehydrate(repository, None)] == list(points(repository))
    assert left(repository) == []


def test_a_damaged_point_leaves_nothing(tmp_path: Path) -> None:
    made = make(tmp_path / "repo", "none")
    overwrite(tmp_path / "repo/vms/web01/disks/vda/main/000000.raw", 900 * KiB, b"damage")
    said = backupfs(tmp_path / "repo", "hydrate", "web01/latest", code=20)
    assert "000000.raw: damaged at offset" in said
    with Repository.open(str(tmp_path / "repo")) as repository:
        assert left(repository) == []
        with pytest.raises(Corrupt):
            run(repository, next(iter(made)))
        assert left(repository) == []


@pytest.mark.parametrize("at", [100 * KiB, 200 * KiB, 2 * MiB, 4 * MiB + 3])
def test_other_bytes_that_come_back(repository: Repository, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A disk that keeps something else than what it was given."""

    def corrupt(fd: int, *_: int) -> None:
        os.pwrite(fd, b"?", at)

    monkeypatch.setattr(os, "posix_fadvise", corrupt)
    with pytest.raises(TargetError, match="other bytes came back"):
        run(repository, repository.points("web01")[1])
    assert left(repository) == []


def test_a_file_that_somebody_changes_meanwhile(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = hydrated.publish

    def late(repository_id: str, record: hydrated.Hydrated, part: str) -> None:
        os.utime(part)
        publish(repository_id, record, part)

    monkeypatch.setattr(hydrated, "publish", late)
    with pytest.raises(Corrupt, match="has changed it meanwhile"):
        run(repository, repository.points("web01")[1])
    assert list_hydrated(repository) == []
    monkeypatch.undo()


def test_the_limit(tmp_path: Path) -> None:
    make(tmp_path / "repo")
    with Repository.open(str(tmp_path / "repo")) as repository:
        data = random.Random(9).randbytes(3 * MiB)
        third = add_point(repository, data, vm="db").id
        first, second = repository.points("web01")
        for at, point in enumerate((first, second)):
            record = Path(run(repository, point).path).with_suffix(".json")
            os.utime(record, (1000 + at, 1000 + at))
        entry = repository.manifest("web01", first).disk("vda")
        assert entry
        fd = hydrated.open_verified(repository, "web01", entry)  # a mount uses it
        assert fd is not None
        os.close(fd)
        request = HydrateRequest(vm="db", point=third, limit=2 * MiB)
        with pytest.raises(UsageError, match="3 MiB, more than the limit of 2 MiB"):
            hydrate(repository, request, lambda *_: None)
        assert left(repository) == [first, second]
        request = HydrateRequest(vm="db", point=third, limit=6 * MiB)
        (done,) = hydrate(repository, request, lambda *_: None)
        assert Path(done.path).read_bytes() == data
        assert left(repository) == [third, first]
        # What is there already counts, too.
        hydrate(repository, HydrateRequest(vm="db", point=third, limit=4 * MiB), lambda *_: None)
        assert left(repository) == [third]


def test_deleted_points_and_what_crashes_left_go(repository: Repository) -> None:
    first, second = points(repository)
    run(repository, first)
    folder = Path(hydrated.folder(repository.settings.id))
    for name in ("0.raw.part", "1.raw", "2.json", "3.json.part"):
        (folder / name).write_text("left")
    delete(repository, [("web01", first)])
    run(repository, second)
    assert left(repository) == [second]
    with pytest.raises(NotFound, match="is not hydrated"):
        dehydrate(repository, [("web01", first), ("web01", second)])
    assert left(repository) == []


def test_killed(tmp_path: Path) -> None:
    """Killed while it writes: what is left does not count, and the next one takes it away."""
    Repository.init(str(tmp_path / "repo"))
    with Repository.open(str(tmp_path / "repo")) as repository:
        point = add_point(repository, random.Random(4).randbytes(MiB) * 96).id
        folder = Path(hydrated.folder(repository.settings.id))
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
            command = [*BACKUPFS, "-r", str(tmp_path / "repo"), "hydrate", f"web01/{point}"]
            process = subprocess.Popen(command, stderr=subprocess.PIPE)
            wait_until(lambda: list(folder.glob("*.part")), 30)
            process.send_signal(number)
            assert process.wait(30) == status
            assert process.stderr
            process.stderr.close()
            assert len(list(folder.glob("*.part"))) == (number == signal.SIGKILL)
            assert list_hydrated(repository) == []
            assert dehydrate(repository, None) == []
            assert left(repository) == []


@pytest.mark.parametrize("step", range(4))
def test_interrupted_at_its_end(repository: Repository, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Neither the file stays, which may be large, nor a part of its record."""
    left_to_do = [step]

    def interrupted(path: str, *data: bytes) -> None:
        if not left_to_do[0]:
            raise KeyboardInterrupt
        left_to_do[0] -= 1
        (files.write_new if data else files.fsync_folder)(path, *data)
        if not left_to_do[0] and data:
            raise KeyboardInterrupt

    monkeypatch.setattr(hydrated, "write_new", interrupted)
    monkeypatch.setattr(hydrated, "fsync_folder", interrupted)
    point = repository.points("web01")[0]
    if step < 3:
        with pytest.raises(KeyboardInterrupt):
            run(repository, point)
        assert left(repository) == []
    else:
        run(repository, point)
        assert left(repository) == [point]


def test_one_at_a_time(repository: Repository) -> None:
    with hydrated.lock(repository), pytest.raises(Locked, match="at work"):
        run(repository, repository.points("web01")[0])
    fd = os.open(Path(hydrated.folder(repository.settings.id)) / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free
    os.close(fd)


def test_the_commands(tmp_path: Path) -> None:
    first, second = make(tmp_path / "repo")
    repo = tmp_path / "repo"
    assert backupfs(repo, "hydrate", "--list") == ""
    (done,) = backupfs_json(repo, "hydrate", f"web01/{first}", "--disk", "vda", "--limit", "1GiB")
    assert Path(done.pop("path")).read_bytes() == FIRST
    assert done.pop("allocated") == 2 * MiB
    assert done.pop("seconds") > 0
    assert done == {"vm": "web01", "point": first, "disk": "vda", "size": 4 * MiB, "in_place": False, "shared": 0}
    assert "was there" in backupfs(repo, "hydrate", f"web01/{first}")
    assert f"web01/{second}/vda: " in backupfs(repo, "hydrate", "web01/latest")
    assert backupfs(repo, "hydrate", "--list").split("\n")[1].startswith(f"web01/{first}/vda  2 MiB")
    assert "no disk 'vdb'" in backupfs(repo, "hydrate", "web01/latest", "--disk", "vdb", code=10)
    assert "has no point" in backupfs(repo, "hydrate", "web01/20200101T000000Z", code=10)
    backupfs(repo, "hydrate", code=2)
    backupfs(repo, "dehydrate", code=2)
    backupfs(repo, "dehydrate", "web01/latest", "--all", code=2)
    assert f"web01/{second}/vda: " in backupfs(repo, "dehydrate", "web01/latest")
    assert "is not hydrated" in backupfs(repo, "dehydrate", "web01/latest", code=10)
    assert [disk["point"] for disk in backupfs_json(repo, "dehydrate", "--all")] == [first]
    assert backupfs_json(repo, "hydrate", "--list") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_no_space(repository: Repository, cache: Path) -> None:
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=65M", "backupfs-test", cache], check=True)
    try:
        with pytest.raises(TargetError, match=r"needed, .* free; `backupfs dehydrate`"):
            run(repository, repository.points("web01")[0])
        assert left(repository) == []
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares blocks between files."""
    if os.geteuid() != 0 or not shutil.which("mkfs.xfs"):
        pytest.skip("takes root and mkfs.xfs")
    image, folder = tmp_path / "xfs.img", tmp_path / "xfs"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 * MiB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def shared_bytes(path: Path) -> int:
    """Return how much of a file's blocks other files have, too. Source: xfs_io's fiemap, flag 0x2000 is shared."""
    out = subprocess.run(["xfs_io", "-r", "-c", "fiemap -v", path], check=True, capture_output=True, text=True).stdout
    found = 0
    for line in out.splitlines()[2:]:
        words = line.split()
        if words[-1].startswith("0x") and int(words[-1], 16) & 0x2000:
            found += int(words[-2]) * 512
    return found


@pytest.mark.parametrize(("codec", "tail"), [("none", b""), ("none", b"the end"), ("zstd", b"")])
def test_shared_blocks(xfs: Path, monkeypatch: pytest.MonkeyPatch, codec: str, tail: bytes) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(xfs / "cache"))
    made = make(xfs / "repo", codec, tail)
    with Repository.open(str(xfs / "repo")) as repository:
        for point, data in made.items():
            done = run(repository, point)
            assert Path(done.path).read_bytes() == data
            entry = repository.manifest("web01", point).disk("vda")
            assert entry
            # Not what is compressed, the text, nor the last piece of a chunk.
            compressed = 192 * KiB if codec == "zstd" and b"text" * 100 in data else 0
            cut = 64 * KiB if tail else 0
            if entry.raw:
                assert (done.in_place, done.shared, done.allocated) == (True, 0, 0)
                continue
            assert done.shared == shared_bytes(Path(done.path)) == entry.allocated_bytes - compressed - cut


def test_a_shared_chunk_is_checked_too(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(xfs / "cache"))
    make(xfs / "repo", "none")
    overwrite(xfs / "repo/vms/web01/disks/vda/main/000000.raw", 900 * KiB, b"damage")
    with Repository.open(str(xfs / "repo")) as repository:
        with pytest.raises(Corrupt, match="damaged at offset"):
            run(repository, repository.points("web01")[1])
        assert left(repository) == []
