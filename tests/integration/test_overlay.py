"""A writable view against a bytearray: any sequence of writes, discards, flushes, new mounts and crashes."""

import errno
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from images import BytesImage

from backupfs.errors import Corrupt, MountError
from backupfs.extents import coalesce
from backupfs.image import Buffer, ZeroImage, seek
from backupfs.services.blockmap import BLOCK, PAGE, POINTS, WRITTEN, ZERO, BlockMap
from backupfs.services.overlay import OverlayImage
from backupfs.services.scratch import KEPT, Disk, Refused, ScratchFolder
from backupfs.units import MiB

SIZE = 20 * BLOCK + 1234
LONG = bool(os.environ.get("BACKUPFS_LONG"))
DATA = random.Random(5).randbytes(SIZE)
DISK = Disk("web01", "20260101T000000Z", "vda", "v1", SIZE)


def scratch_in(folder: Path, *, keep: bool, repository_id: str = "r1") -> ScratchFolder:
    return ScratchFolder(str(folder), str(folder / "no repository"), repository_id, "/nowhere", keep=keep)


def view(folder: ScratchFolder, disk: Disk = DISK, data: bytes = DATA) -> OverlayImage:
    return OverlayImage(BytesImage(data), folder.changes(disk), lambda _: None)


def content(image: OverlayImage) -> bytes:
    data = bytearray(image.size)
    image.readinto(0, data)
    return bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 6 * BLOCK)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))
aligned = st.tuples(st.integers(0, 20), st.integers(1, 8)).map(
    lambda r: (r[0] * BLOCK, min(r[1] * BLOCK, SIZE - r[0] * BLOCK))
)


class Model(RuleBasedStateMachine):
    """One disk in a kept scratch. What was flushed is in `safe`; a crash may lose what came later, block by block."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bfs-overlay-"))
        self.scratch = scratch_in(self.folder, keep=True)
        self.image = view(self.scratch)
        self.now = bytearray(DATA)
        self.versions: list[set[bytes]] = [set() for _ in range(21)]  # that a block may have after a crash
        self.flushed()

    def flushed(self) -> None:
        self.versions = [{bytes(self.now[b * BLOCK : (b + 1) * BLOCK])} for b in range(21)]
        self.safe = self.data().read_bytes() if self.data().exists() else bytes(SIZE)

    def data(self) -> Path:
        return self.folder.joinpath(KEPT, *DISK.folders, "data")

    def note(self, offset: int, length: int) -> None:
        for b in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            self.versions[b].add(bytes(self.now[b * BLOCK : (b + 1) * BLOCK]))

    @rule(where=ranges | aligned, seed=st.integers(0, 1 << 30))
    def write(self, where: tuple[int, int], seed: int) -> None:
        offset, length = where
        data = random.Random(seed).randbytes(length)
        self.image.write(offset, data)
        self.now[offset : offset + length] = data
        self.note(offset, length)

    @rule(where=ranges | aligned)
    def discard(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.image.zero(offset, length)
        self.now[offset : offset + length] = bytes(length)
        self.note(offset, length)

    @rule(where=ranges)
    def read(self, where: tuple[int, int]) -> None:
        offset, length = where
        if length:
            expected = bytes(self.now[offset : offset + length])
            assert b"".join(map(bytes, self.image.gather(offset, length))) == expected
            memory = memoryview(bytearray(length))
            if self.image.at_once(offset, [memory]):
                assert bytes(memory) == expected

    @rule()
    def flush(self) -> None:
        self.image.flush()
        self.flushed()

    @rule()
    def mount_again(self) -> None:
        self.image.close()
        self.scratch.close(all_returned=True)
        self.flushed()
        self.open()

    @rule(lost=st.none() | st.integers(0, 1 << 21))
    def crash(self, lost: int | None) -> None:
        """The process is killed: what it had in memory is gone, what it wrote is in the files.

        Or the power goes, and blocks of the data are `lost` (a bit each) that were written since the last flush.
        """
        killed = self.folder.with_name(self.folder.name + "-killed")
        shutil.copytree(self.folder, killed)
        self.scratch.close(all_returned=True)
        shutil.rmtree(self.folder)
        killed.rename(self.folder)
        if lost and self.data().exists():
            with self.data().open("r+b") as file:
                for b in range(21):
                    if lost >> b & 1:
                        file.seek(b * BLOCK)
                        file.write(self.safe[b * BLOCK : (b + 1) * BLOCK])
        self.open()
        self.now = bytearray(content(self.image))
        for b in range(21):
            assert bytes(self.now[b * BLOCK : (b + 1) * BLOCK]) in self.versions[b]
        self.flushed()

    def open(self) -> None:
        self.scratch = scratch_in(self.folder, keep=True)
        self.image = view(self.scratch)

    @invariant()
    def all_is_right(self) -> None:
        if hasattr(self, "image"):
            assert content(self.image) == self.now
            extents = list(self.image.extents(0, SIZE))
            assert [e.offset for e in extents] + [SIZE] == [0] + [e.end for e in extents]
            assert all(not any(self.now[e.offset : e.end]) for e in coalesce(extents) if e.flag)

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            self.scratch.close(all_returned=True)
            shutil.rmtree(self.folder)


Model.TestCase.settings = settings(max_examples=400 if LONG else 20, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


def test_a_map_covers_each_range_with_the_runs_that_were_set() -> None:
    size = (2 * PAGE + 100) * BLOCK - 7
    block_map = BlockMap(size)
    states = [POINTS] * block_map.blocks
    rng = random.Random(3)
    for _ in range(60):
        first = rng.randrange(block_map.blocks)
        end, state = min(first + rng.choice((1, 7, PAGE, 2 * PAGE)), block_map.blocks), rng.choice((WRITTEN, ZERO))
        block_map.set(first, end, state)
        states[first:end] = [state] * (end - first)
        offset = rng.randrange(size)
        length = rng.randrange(size - offset) + 1
        runs = list(block_map.runs(offset, length))
        assert [r[1] for r in runs] + [offset + length] == [offset] + [r[2] for r in runs]
        assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))
        for state, begin, stop in runs:
            assert set(states[begin // BLOCK : -(-stop // BLOCK)]) == {state}
    kept = BlockMap(size)
    assert all(kept.load(number, page) for number, page in block_map.take_changed().items())
    assert [kept.state(b) for b in range(kept.blocks)] == states
    assert not block_map.take_changed()


def test_a_map_takes_no_page_that_can_be_none() -> None:
    block_map = BlockMap(100 * BLOCK)
    for page in (b"\3" + bytes(PAGE - 1), bytes(PAGE - 1), bytes(100) + b"\1" + bytes(PAGE - 101)):
        assert not block_map.load(0, page)
    assert block_map.load(0, b"\1" * 100 + bytes(PAGE - 100))


def test_discarding_a_large_disk_takes_no_memory() -> None:
    size = 10 << 40
    block_map = BlockMap(size)
    block_map.set(0, block_map.blocks, ZERO)
    pages = block_map.take_changed()
    assert len({id(page) for page in pages.values()}) == 1
    assert list(block_map.runs(0, 1 << 30)) == [(ZERO, 0, 1 << 30)]


def test_without_keep_nothing_is_left_and_nothing_is_seen_meanwhile(folder: Path) -> None:
    scratch = scratch_in(folder, keep=False)
    image = view(scratch)
    image.write(5, b"hello")
    image.flush()
    assert list(folder.iterdir()) == []
    image.close()
    assert content(view(scratch))[:10] == DATA[:5] + b"hello"
    scratch.close(all_returned=True)
    assert list(folder.iterdir()) == []
    scratch = scratch_in(folder, keep=False)
    assert content(view(scratch)) == DATA
    scratch.close(all_returned=True)


def test_two_opens_share_one_view_and_other_disks_are_others(folder: Path) -> None:
    scratch = scratch_in(folder, keep=False)
    one, two = view(scratch), view(scratch)
    other = view(scratch, Disk("web01", "20260102T000000Z", "vda", "v2", SIZE))
    one.write(100, b"x" * 10_000)
    assert content(two) == content(one) != DATA
    assert content(other) == DATA
    scratch.close(all_returned=True)


def test_seeking_in_what_was_written(folder: Path) -> None:
    scratch = scratch_in(folder, keep=False)
    image = OverlayImage(BytesImage(bytes(SIZE)), scratch.changes(DISK), lambda _: None)
    image.zero(0, SIZE)
    with pytest.raises(OSError, match="no more data"):
        seek(image, 0, os.SEEK_DATA)
    image.write(3 * BLOCK, b"x")
    assert seek(image, 0, os.SEEK_DATA) == 3 * BLOCK
    assert seek(image, 3 * BLOCK, os.SEEK_HOLE) == 4 * BLOCK
    scratch.close(all_returned=True)


class Damaged(BytesImage):
    """Its blocks 4 to 7 can't be read."""

    def readinto(self, offset: int, buffer: Buffer) -> None:
        if offset < 8 * BLOCK and offset + len(buffer) > 4 * BLOCK:
            raise Corrupt("layer", 0, "the chunk's checksum does not match")
        super().readinto(offset, buffer)


def test_a_damaged_chunk_takes_whole_blocks_only(folder: Path) -> None:
    scratch = scratch_in(folder, keep=False)
    image = OverlayImage(Damaged(DATA), scratch.changes(DISK), lambda _: None)
    with pytest.raises(Corrupt):
        image.write(5 * BLOCK + 1, b"x")
    with pytest.raises(Corrupt):
        content(image)
    image.write(4 * BLOCK, b"y" * 4 * BLOCK)
    assert content(image) == DATA[: 4 * BLOCK] + b"y" * 4 * BLOCK + DATA[8 * BLOCK :]
    scratch.close(all_returned=True)


def test_nothing_of_a_disk_that_fails_its_check_gets_into_the_view(folder: Path) -> None:
    checks = []

    def check(_: object) -> None:
        checks.append(1)
        if len(checks) == 1:
            raise Corrupt("index", 0, "another map")

    scratch = scratch_in(folder, keep=False)
    image = OverlayImage(BytesImage(DATA), scratch.changes(DISK), check)
    image.write(0, b"x" * BLOCK)
    assert not checks
    with pytest.raises(Corrupt):
        image.write(BLOCK, b"x")
    image.write(BLOCK, b"x")
    image.write(3 * BLOCK, b"x")
    assert len(checks) == 2
    scratch.close(all_returned=True)


def fail(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Have os.NAME fail."""

    def call(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, call)


def test_a_full_disk_leaves_each_block_old_or_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = scratch_in(folder, keep=False)
    image = view(scratch)
    image.write(10 * BLOCK, b"a" * BLOCK)
    real, room = os.pwritev, 3 * BLOCK + 100

    def pwritev(fd: int, pieces: list[memoryview], offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = pieces[0][:room]
        room -= len(part)
        return real(fd, [part], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(OSError, match="No space") as raised:
        image.write(8 * BLOCK + 10, b"n" * 8 * BLOCK)
    assert raised.value.errno == errno.ENOSPC
    now = content(image)
    assert now[8 * BLOCK :][: 3 * BLOCK] == DATA[8 * BLOCK :][:10] + b"n" * (3 * BLOCK - 10)
    assert now[11 * BLOCK :] == DATA[11 * BLOCK :]
    scratch.close(all_returned=True)


def test_data_that_did_not_reach_the_disk_is_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = scratch_in(folder, keep=True)
    image = view(scratch)
    image.write(0, b"a" * BLOCK)
    image.flush()
    image.write(BLOCK, b"b" * BLOCK)
    with monkeypatch.context() as patch:
        fail(patch, "fdatasync", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            image.flush()
    for call in (lambda: content(image), lambda: image.write(0, b"x"), image.flush):
        with pytest.raises(Exception, match="could not be put on the disk"):
            call()
    scratch.close(all_returned=True)
    scratch = scratch_in(folder, keep=True)
    assert content(view(scratch)) == b"a" * BLOCK + DATA[BLOCK:]
    scratch.close(all_returned=True)


def test_a_map_that_found_no_room_is_written_by_the_next_flush(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = scratch_in(folder, keep=True)
    image = view(scratch)
    image.write(0, b"a" * BLOCK)
    with monkeypatch.context() as patch:
        fail(patch, "pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            image.flush()
    image.flush()
    kept = next(folder.glob(f"{KEPT}/web01/*/vda/map")).read_bytes()
    assert kept == b"\1" + bytes(PAGE - 1)
    scratch.close(all_returned=True)


def test_a_full_file_system_keeps_what_it_took(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The map has its space from the beginning, so what was written before there was no more room is kept."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (small := folder / "small").mkdir()
    disk = Disk("web01", "20260101T000000Z", "vda", "v1", 256 * MiB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400K,mode=0700", "none", small], check=True)
    try:
        scratch = scratch_in(small, keep=True)
        image = OverlayImage(ZeroImage(disk.size), scratch.changes(disk), lambda _: None)
        written = 0
        with suppress(OSError):
            for number in range(128):  # over several pages of the map
                image.write(number * 2 * MiB, b"a" * BLOCK)
                written += 1
        assert 10 < written < 128
        image.close()
        scratch.close(all_returned=True)
        scratch = scratch_in(small, keep=True)
        image = OverlayImage(ZeroImage(disk.size), scratch.changes(disk), lambda _: None)
        for number in range(written):
            assert b"".join(map(bytes, image.gather(number * 2 * MiB, BLOCK))) == b"a" * BLOCK
        image.close()
        scratch.close(all_returned=True)
        assert caplog.messages == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_no_room_for_a_map(folder: Path) -> None:
    """Who writes is told, and nothing is left."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (small := folder / "small").mkdir()
    disk = Disk("web01", "20260101T000000Z", "vda", "v1", 4096 * MiB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400K,mode=0700", "none", small], check=True)
    try:
        scratch = scratch_in(small, keep=True)
        image = OverlayImage(ZeroImage(disk.size), scratch.changes(disk), lambda _: None)
        with pytest.raises(OSError, match="No space left"):
            image.write(0, b"a" * BLOCK)
        image.close()
        scratch.close(all_returned=True)
        assert list(small.glob(f"{KEPT}/web01/*/vda/*")) == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_closing_says_what_could_not_be_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a line: who closes a file can't be told."""
    scratch = scratch_in(folder, keep=True)
    image = view(scratch)
    image.write(0, b"a" * BLOCK)
    with monkeypatch.context() as patch:
        fail(patch, "pwrite", errno.ENOSPC)
        image.close()
    assert caplog.messages == ["what was written last could not be kept: No space left on device"]
    caplog.clear()
    scratch.close(all_returned=True)
    scratch = scratch_in(folder, keep=True)
    assert content(view(scratch))[:BLOCK] == b"a" * BLOCK
    scratch.close(all_returned=True)


def test_a_mount_that_is_about_to_end_is_waited_for(folder: Path) -> None:
    scratch = scratch_in(folder, keep=True)
    timer = threading.Timer(0.5, lambda: scratch.close(all_returned=True))
    timer.start()
    scratch_in(folder, keep=True).close(all_returned=True)
    timer.join()


def test_what_is_kept_is_refused_for_another(folder: Path) -> None:
    scratch = scratch_in(folder, keep=True)
    image = view(scratch)
    image.write(0, b"a")
    image.close()
    with pytest.raises(MountError, match="another mount uses it"):
        scratch_in(folder, keep=True)
    scratch.close(all_returned=True)
    with pytest.raises(MountError, match="with --keep-scratch"):
        scratch_in(folder, keep=False)
    with pytest.raises(MountError, match="another repository"):
        scratch_in(folder, keep=True, repository_id="r2")
    scratch = scratch_in(folder, keep=True)
    for other in (Disk("web01", DISK.point, "vda", "v2", SIZE), Disk("web01", DISK.point, "vda", "v1", SIZE + 1)):
        with pytest.raises(Refused, match="another disk"):
            scratch.changes(other)
    scratch.close(all_returned=True)


@pytest.mark.parametrize("damage", ["map", "data", "about.json", "link", "short map"])
def test_what_is_kept_and_damaged_is_refused(folder: Path, damage: str) -> None:
    scratch = scratch_in(folder, keep=True)
    view(scratch).write(0, b"a")
    scratch.close(all_returned=True)
    inside = next(folder.glob(f"{KEPT}/web01/*/vda"))
    match damage:
        case "map":
            (inside / "map").write_bytes(b"\7" + bytes(PAGE - 1))
        case "short map":
            os.truncate(inside / "map", 100)
        case "data":
            os.truncate(inside / "data", 100)
        case "about.json":
            (inside / "about.json").write_text("{")
        case "link":
            (inside / "data").rename(folder / "elsewhere")
            (inside / "data").symlink_to(folder / "elsewhere")
    scratch = scratch_in(folder, keep=True)
    with pytest.raises(Refused):
        view(scratch)
    scratch.close(all_returned=True)


def test_a_view_that_was_never_finished_is_begun_again(folder: Path) -> None:
    scratch = scratch_in(folder, keep=True)
    view(scratch).write(0, b"a")
    scratch.close(all_returned=True)
    next(folder.glob(f"{KEPT}/web01/*/vda/about.json")).unlink()
    scratch = scratch_in(folder, keep=True)
    image = view(scratch)
    assert content(image) == DATA
    image.write(0, b"b")
    assert content(image) == b"b" + DATA[1:]
    scratch.close(all_returned=True)


def test_which_folders_are_refused(folder: Path) -> None:
    repository, inside = folder / "repo", folder / "repo" / "a" / "b"
    inside.mkdir(parents=True)
    link = folder / "link"
    link.symlink_to(inside)
    for path in (repository, inside, link):
        with pytest.raises(MountError, match="lies in the repository"):
            ScratchFolder(str(path), str(repository), "r1", "/nowhere", keep=False)
        with pytest.raises(MountError, match="lies in the mount point"):
            ScratchFolder(str(path), "/nowhere", "r1", str(repository), keep=False)
    with pytest.raises(MountError, match="make it first"):
        scratch_in(folder / "none", keep=False)
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    with pytest.raises(MountError, match="others can write"):
        scratch_in(shared, keep=False)
    if os.geteuid() == 0:
        shared.chmod(0o700)
        os.chown(shared, 12345, -1)
        with pytest.raises(MountError, match="another user"):
            scratch_in(shared, keep=False)


def test_names_that_would_lead_elsewhere_stay_below(folder: Path) -> None:
    scratch = scratch_in(folder, keep=True)
    image = view(scratch, Disk("..", "20260101T000000Z", "a/../../x", "v1", SIZE))
    image.write(0, b"a")
    files = {str(p.relative_to(folder)) for p in folder.rglob("data")}
    assert files == {f"{KEPT}/%2E./20260101T000000Z/a%2F..%2F..%2Fx/data"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in folder.rglob("*"))
    scratch.close(all_returned=True)


def test_writers_of_parts_of_one_block_do_not_lose_each_others(folder: Path) -> None:
    scratch = scratch_in(folder, keep=False)
    size = 1 * MiB
    image = view(scratch, Disk("w", "p", "d", "v", size), bytes(size))
    with ThreadPoolExecutor(8) as pool:
        offsets = random.Random(1).sample(range(0, size, 512), size // 512)
        list(pool.map(lambda offset: image.write(offset, bytes([offset // 512 % 255 + 1]) * 512), offsets))
    assert content(image) == b"".join(bytes([n % 255 + 1]) * 512 for n in range(size // 512))
    scratch.close(all_returned=True)
