"""Random chains against a bytearray a point: writes, zeroes, discards, resizes, several chains, reopening, reindex."""

import os
import random
import tempfile
from collections.abc import Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from repositories import add_point, read_point

from backupfs.extents import Extent, coalesce, narrow, widen
from backupfs.repository.repository import Repository

LONG = bool(os.environ.get("BACKUPFS_LONG"))
CHUNK = 4096
LARGEST = 700 * CHUNK  # three regions


class Chains(RuleBasedStateMachine):
    """One disk whose bytes are known, and a repository of its points."""

    @initialize(size=st.integers(1, LARGEST), codec=st.sampled_from(["none", "zstd"]), seed=st.integers(0, 1 << 32))
    def begin(self, size: int, codec: str, seed: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "repo")
        Repository.init(self.path, chunk_size=CHUNK, codec_name=codec)
        self.repository = Repository.open(self.path)
        self.random = random.Random(seed)
        self.disk = bytearray(size)
        self.points: dict[str, bytes] = {}
        self.changed: dict[str, set[int]] = {}  # chain -> chunks changed since its last point
        self.sizes: dict[str, int] = {}

    def _change(self, offset: int, data: bytes) -> None:
        self.disk[offset : offset + len(data)] = data
        for chunks in self.changed.values():
            chunks.update(range(offset // CHUNK, -(-(offset + len(data)) // CHUNK)))

    @rule(
        where=st.floats(0, 1),
        length=st.integers(1, 40 * CHUNK),
        kind=st.sampled_from(["random", "text", "zero", "one"]),
    )
    def write(self, where: float, length: int, kind: str) -> None:
        offset = int(where * (len(self.disk) - 1))
        length = min(length, len(self.disk) - offset)
        if kind == "one":
            length = 1
        data = {
            "random": lambda: self.random.randbytes(length),
            "text": lambda: (b"%d " % self.random.randrange(99)) * length,
            "zero": lambda: bytes(length),
            "one": lambda: b"\1",
        }[kind]()[:length]
        self._change(offset, data)

    @rule(size=st.integers(1, LARGEST))
    def resize(self, size: int) -> None:
        if size < len(self.disk):
            for chunks in self.changed.values():  # it may grow again before the next point
                chunks.update(range(size // CHUNK, -(-len(self.disk) // CHUNK)))
            del self.disk[size:]
        else:
            self.disk.extend(bytes(size - len(self.disk)))

    @rule(chain=st.sampled_from(["main", "weekly"]), by_bitmap=st.booleans(), full=st.integers(0, 9))
    def take_point(self, chain: str, by_bitmap: bool, full: int) -> None:
        """A delta by what changed, with zero extents as ZERO, or by all of the disk; sometimes a new chain."""
        data = bytes(self.disk)
        extents = None
        if by_bitmap and chain in self.changed and full:
            extents = list(self._extents(chain))
        point = add_point(self.repository, data, extents, chain=chain, full=not full)
        self.points[point.id] = data
        self.changed[chain] = set()
        self.sizes[chain] = len(data)
        assert read_point(self.repository, point.id) == data

    def _extents(self, chain: str) -> Iterator[Extent]:
        size, old = len(self.disk), self.sizes[chain]
        dirty = set(self.changed[chain])
        if size != old:
            dirty.update(range(min(old, size) // CHUNK, -(-size // CHUNK)))
        for chunk in sorted(c for c in dirty if c * CHUNK < size):
            offset, length = chunk * CHUNK, min(CHUNK, size - chunk * CHUNK)
            zero = not any(self.disk[offset : offset + length])
            yield Extent(offset, length, zero)

    @rule()
    def open_again(self) -> None:
        self.repository.close()
        self.repository = Repository.open(self.path)

    @precondition(lambda self: self.points)
    @rule()
    def reindex(self) -> None:
        assert self.repository.reindex() == len(self.points)

    @precondition(lambda self: self.points)
    @rule(choice=st.randoms(use_true_random=False))
    def check_one(self, choice: random.Random) -> None:
        self._check(choice.choice(sorted(self.points)))

    def _check(self, point: str) -> None:
        data = self.points[point]
        assert read_point(self.repository, point) == data
        image = self.repository.open_image("web01", point, "vda")
        image.check_map()
        extents = list(image.extents(0, image.size))
        assert sum(e.length for e in extents) == len(data)
        assert extents == list(coalesce(extents))
        for extent in extents:
            assert not extent.flag or not any(data[extent.offset : extent.end])
        offset = self.random.randrange(len(data))
        part = bytearray(min(self.random.randrange(3 * CHUNK), len(data) - offset))
        image.readinto(offset, part)
        assert part == data[offset : offset + len(part)]

    def teardown(self) -> None:
        if not hasattr(self, "repository"):
            return
        try:
            for point in self.points:
                self._check(point)
        finally:
            self.repository.close()
            self.folder.cleanup()


TestChains = Chains.TestCase
TestChains.settings = settings(
    max_examples=1000 if LONG else 36,
    stateful_step_count=90 if LONG else 40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_dirty_zero_chunk_hides_the_old_bytes(tmp_path: os.PathLike[str]) -> None:
    """A peer drops dirty-and-zero ranges and so brings old bytes back."""
    path = os.path.join(tmp_path, "repo")
    Repository.init(path, chunk_size=CHUNK)
    data = random.Random(1).randbytes(600 * CHUNK + 100)
    with Repository.open(path) as repository:
        first = add_point(repository, data)
        hole = [Extent(CHUNK, 500 * CHUNK, True)]
        emptied = bytearray(data)
        emptied[CHUNK : 501 * CHUNK] = bytes(500 * CHUNK)
        second = add_point(repository, bytes(emptied), hole)
        assert second.disks[0].data_bytes == 0
        assert second.disks[0].stored_bytes == 0
        assert read_point(repository, first.id) == data
        assert read_point(repository, second.id) == emptied


def test_plan_of_whole_chunks() -> None:
    """Dirty is widened, zero is narrowed: a chunk that is partly zero is read."""
    dirty = list(coalesce(widen([Extent(0, 100, False), Extent(100, 1, True), Extent(101, 9899, False)], CHUNK, 10000)))
    zero = list(coalesce(narrow([Extent(0, 5000, True), Extent(5000, 5000, False)], CHUNK, 10000)))
    assert dirty == [Extent(0, 4096, True), Extent(4096, 5904, False)]
    assert zero == [Extent(0, 4096, True), Extent(4096, 5904, False)]
