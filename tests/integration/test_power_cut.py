"""A power cut after any step of any command: the points before it or those after it, and all of them right.

Every change to a repository's folder is recorded (powercut.py). For every place in the record, and every kind of
loss, the folder is made again as it would be found, with an index that is missing, of before the command, or newer.
"""

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from powercut import KINDS, SOME, Disk, Op, Recorder, lay_down
from repositories import MOMENT, add_point, read_point

from backupfs.errors import BackupfsError, NotFound
from backupfs.repository.amend import amend
from backupfs.repository.repository import Repository
from backupfs.services.gc import gc
from backupfs.services.prune import delete, prune
from backupfs.services.retention import KeepRules

LONG = bool(os.environ.get("BACKUPFS_LONG"))
LIVES = range(300) if LONG else (1, 2)
CHUNK = 4096
VM = "web01"
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
INDEXES = ("missing", "before", "newest")

Points = dict[str, dict[str, bytes]]  # point -> disk -> bytes


@dataclass(frozen=True)
class Step:
    """One command: what it did, the points before and after it, and the index then."""

    name: str
    ops: list[Op]
    before: Points
    after: Points
    index_before: Path | None
    index_after: Path | None


def changed(rng: random.Random, data: bytes) -> bytes:
    disk = bytearray(data)
    for _ in range(3):
        offset = rng.randrange(len(disk))
        new = rng.choice([rng.randbytes(6000), bytes(9000), b"text " * 2000])
        disk[offset : offset + len(new)] = new[: len(disk) - offset]
    length = rng.choice([len(disk), len(disk), 9 * CHUNK + 100, 14 * CHUNK])
    return bytes(disk[:length].ljust(length, b"\0"))


def take(repository: Repository, disks: dict[str, bytes], hour: int, *, full: bool = False) -> str:
    """Add a point of several disks."""
    with repository.writer() as writer:
        ends = dict.fromkeys(disks) if full else writer.chain_ends(VM, disks, "main")
        point = writer.begin(VM, MOMENT + timedelta(hours=hour))
        try:
            for disk, data in disks.items():
                end = ends[disk]
                chain = end.entry.chain if end else writer.next_chain(VM, disk, "main")
                target = point.add_disk(disk, len(data), chain, end)
                for offset in range(0, len(data), 4 * CHUNK):
                    target.write(offset, memoryview(data)[offset : offset + 4 * CHUNK])
                point.finish_disk(target, read="all", reason="test")
            return writer.commit(point, parent=None).id
        finally:
            point.abandon()


def live(folder: Path, seed: int) -> Iterator[Step]:
    """Yield the commands of one repository's life, from its first on."""
    rng = random.Random(seed)
    path = folder / "repo"
    path.mkdir()
    recorder = Recorder(path)
    points: Points = {}
    disks = {disk: rng.randbytes(rng.randrange(1, 12 * CHUNK)) for disk in ("vda", "vdb")[: rng.randrange(1, 3)]}
    saved: Path | None = None
    hour = 0

    def back_up() -> None:
        nonlocal hour
        hour += 1
        for disk, data in disks.items():
            disks[disk] = changed(rng, data)
        with Repository.open(str(path)) as repository:
            points[take(repository, disks, hour, full=rng.random() < 0.15)] = dict(disks)

    def make() -> None:
        Repository.init(str(path), chunk_size=CHUNK, codec_name=("none", "zstd")[seed % 2])

    def remove() -> None:
        doomed = rng.sample(sorted(points), min(rng.randrange(1, 3), len(points) - 1))
        with Repository.open(str(path)) as repository:
            delete(repository, [(VM, point) for point in doomed])
        for point in doomed:
            del points[point]

    def prune_some() -> None:
        with Repository.open(str(path)) as repository:
            prune(repository, VM, KeepRules(last=2), dry_run=False)
        for point in sorted(points)[:-2]:
            del points[point]

    def collect() -> None:
        with Repository.open(str(path)) as repository:
            gc(repository)

    def edit() -> None:
        with Repository.open(str(path)) as repository, repository.exclusive():
            amend(repository, VM, rng.choice(sorted(points)), {"note": rng.randbytes(9).hex()})

    commands: list[Callable[[], None]] = [make, back_up, back_up]
    commands += [back_up, edit, remove, collect, back_up, back_up]
    commands += [*rng.choices([back_up, back_up, edit, remove, collect], k=3), prune_some, collect, back_up]
    for number, command in enumerate(commands):
        before, start = dict(points), len(recorder.ops)
        with recorder.recording():
            command()
        index = None
        if (path / "index").exists():
            index = folder / f"index{number}"
            shutil.copytree(path / "index", index)
        yield Step(command.__name__, recorder.ops[start:], before, dict(points), saved, index)
        saved = index


def check(path: Path, step: Step, *, done: bool, go_on: int | None) -> None:
    """Look at a state. `done`: the command had returned; `go_on`: the seed of what is done next, None: nothing."""
    try:
        repository = Repository.open(str(path))
    except NotFound:
        assert not done
        assert step.name == "make", "only while it is made may there be none"
        return
    with repository:
        there = set(repository.points(VM))
        if done:
            assert there == set(step.after)
        elif set(step.before) <= set(step.after):
            assert there in (set(step.before), set(step.after))
        else:
            assert set(step.after) <= there <= set(step.before)
        points = {point: (step.before | step.after)[point] for point in there}
        read_all(repository, points)
        if go_on is None:
            return
        rng = random.Random(go_on)
        disk = changed(rng, rng.choice([d["vda"] for d in points.values()] or [rng.randbytes(40000)]))
        new = add_point(repository, disk, disk="vda", day=9).id
        if points and rng.random() < 0.5:
            gone = rng.choice(sorted(points))
            delete(repository, [(VM, gone)])
            del points[gone]
        read_all(repository, points | {new: {"vda": disk}})
        gc(repository)
        read_all(repository, points | {new: {"vda": disk}})
    assert not list((path / "tmp").iterdir())


def read_all(repository: Repository, points: Points) -> None:
    for point, disks in points.items():
        for disk, data in disks.items():
            assert read_point(repository, point, disk=disk) == data, f"{point}/{disk}"
            image = repository.open_image(VM, point, disk)
            image.check_map()
            image.close()


def digest_of(state: dict[str, bytes | None], *more: object) -> bytes:
    digest = hashlib.blake2b(repr(more).encode())
    for path, data in sorted(state.items()):
        digest.update(repr((path, None if data is None else len(data))).encode())
        digest.update(data or b"")
    return digest.digest()


@pytest.mark.timeout(0 if LONG else 300)
@pytest.mark.parametrize("seed", LIVES)
def test_a_power_cut_after_any_step(seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        place = folder / "state"
        disk, states, looked_at = Disk(), 0, set()
        for step in live(folder, seed):
            for done in range(1, len(step.ops) + 1):
                disk.apply(step.ops[done - 1])
                for kind in (*KINDS, *[SOME] * (9 if LONG else 0)):
                    state = disk.state(kind, rng)
                    states += 1
                    index = rng.choice(INDEXES)
                    digest = digest_of(state, index, step.name, done == len(step.ops))
                    if digest in looked_at:
                        continue
                    looked_at.add(digest)
                    lay_down(state, place)
                    saved = {"before": step.index_before, "newest": step.index_after}.get(index)
                    if saved:
                        shutil.copytree(saved, place / "index")
                    go_on = rng.randrange(1 << 32) if rng.random() < (0.1 if LONG else 0.04) else None
                    try:
                        check(place, step, done=done == len(step.ops), go_on=go_on)
                    except (AssertionError, BackupfsError, OSError) as e:
                        e.add_note(
                            f"seed {seed}, {step.name}, after {step.ops[done - 1][:2]} ({done}), {kind}, {index}"
                        )
                        raise
                    shutil.rmtree(place)
    print(f"{states} states, {len(looked_at)} of them different")  # -s or -rP shows it
    assert len(looked_at) > 300
