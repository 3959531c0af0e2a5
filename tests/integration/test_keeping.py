"""Random lives of a repository: points taken, deleted, pruned, gc, reindex, all of them killed anywhere, damage that is
repaired, while another process has images open, and in some lives a real mount shows all points. Every point that
remains, and every open image, equals its model byte for byte; and what gc leaves is what they see.

The measure. *Seen* are the bytes of every payload that a remaining point or an open image shows, found through the
chunk maps that readers use, not through gc's own. *Kept* is what all layer files take on the file system. It may be at
most 5 percent more than what is seen, not counting, of each layer, header, table and trailer in whole blocks, and the
rest of the block in which its payloads end. The table is taken with the rows that have to be there, those of chunks
that are seen and of zeroes; with codec none, where gc has no reason to write a layer again, with those that are there.
"""

import hashlib
import os
import random
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from commands import BACKUPFS
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mounts import unmount_all
from reader import DISK, VM, Reader, places_of
from repositories import add_point, read_point

from backupfs.extents import Extent
from backupfs.repository import codec
from backupfs.repository.format import FENCE_ROWS, HEADER_SIZE, ROW, TRAILER_SIZE, round_up
from backupfs.repository.layer import Layer
from backupfs.repository.point import layer_path
from backupfs.repository.repository import Repository
from backupfs.services.gc import freed_by_deleting, gc
from backupfs.services.prune import delete, prune
from backupfs.services.repair import repair
from backupfs.services.retention import KeepRules
from backupfs.services.verify import verify

LONG = bool(os.environ.get("BACKUPFS_LONG"))
CHUNK = BLOCK = 4096
LARGEST = 600 * CHUNK  # three regions
MOUNTED = 4  # one in so many lives has a mount, which takes seconds
# In memory, since most of the time would go into fsync; it takes holes too.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
STEPS = ("unlink", "link", "rename", "fsync", "ftruncate", "mkdir", "rmdir", "open", "close", "pwritev", "lseek")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that kills itself before its `step`th call of one of STEPS. Returns whether it did."""
    child = os.fork()
    if child == 0:
        try:
            left = step

            def counted(call: Callable[..., object]) -> Callable[..., object]:
                def counting(*arguments: object, **named: object) -> object:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **named)

                return counting

            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def alignment(layer: Layer) -> int:
    """Return how many bytes lie free between payloads, because one that is stored as it is begins with a block."""
    if layer.header.plain:
        return 0
    payloads = [row for rows in layer.rows() for row in rows.tolist() if row[ROW.names.index("codec")] != codec.ZERO]
    at, size = ROW.names.index("offset"), ROW.names.index("length")
    free, end = 0, 0
    for row in sorted(payloads, key=lambda row: row[at]):
        gap = row[at] - end if end else 0
        assert 0 <= gap < BLOCK, "payloads lie side by side"
        assert gap == 0 or row[at] % BLOCK == 0
        free, end = free + gap, row[at] + row[size]
    return free


def spoil(path: str, offset: int, length: int) -> None:
    """Make other bytes of all in a range of a file."""
    mode = os.stat(path).st_mode
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        data = file.read(length)
        assert data
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))
    os.chmod(path, mode)


class Keeping(RuleBasedStateMachine):
    """One disk whose bytes are known, two chains of its points, and somebody who reads them."""

    @initialize(size=st.integers(1, LARGEST), codec=st.sampled_from(["none", "zstd"]), seed=st.integers(0, 1 << 32))
    def begin(self, size: int, codec: str, seed: int) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=SCRATCH)
        self.path = Path(self.folder.name) / "repo"
        Repository.init(str(self.path), chunk_size=CHUNK, codec_name=codec)
        self.repository = Repository.open(str(self.path))
        self.random = random.Random(seed)
        self.disk = bytearray(self.random.randbytes(size))
        self.points: dict[str, bytes] = {}
        self.open: dict[str, bytes] = {}  # images in the other process
        self.changed: dict[str, tuple[str, set[int]]] = {}  # chain -> its last point, chunks changed since
        self.taken: set[tuple[str, int]] = set()  # chain and seq of every layer that ever was a point's
        self.days = 0
        self.reader: Reader | None = None
        self.garbage = False  # there may be some
        self.mounted = False
        self.mounts = seed % MOUNTED == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
        for _ in range(3):
            self.take_point("scattered", 0, "main", True, 1)

    def _reader(self) -> Reader:
        self.reader = self.reader or Reader(self.path)
        return self.reader

    def _change(self, kind: str, where: float) -> None:
        if kind == "back":  # the disk goes back to what it was: a deleted layer between would show through
            old = self.points[self.random.choice(sorted(self.points))] if self.points else b"\1"
            self._resize(len(old))
            self.disk[:] = old
            for _, chunks in self.changed.values():
                chunks.update(range(-(-len(old) // CHUNK)))
        elif kind == "size":
            self._resize(1 + int(where * LARGEST))
        elif kind == "scattered":
            for _ in range(30):
                self._write(self.random.random(), self.random.randrange(1, 6000), zero=self.random.random() < 0.2)
        else:
            self._write(where, self.random.randrange(1, 40 * CHUNK), zero=kind == "zero")

    def _write(self, where: float, length: int, *, zero: bool) -> None:
        offset = int(where * (len(self.disk) - 1))
        length = min(length, len(self.disk) - offset)
        text = b"%d " % self.random.randrange(99)
        data = bytes(length) if zero else self.random.choice([self.random.randbytes(length), (text * length)[:length]])
        self.disk[offset : offset + length] = data
        for _, chunks in self.changed.values():
            chunks.update(range(offset // CHUNK, -(-(offset + length) // CHUNK)))

    def _resize(self, size: int) -> None:
        for _, chunks in self.changed.values():
            chunks.update(range(min(size, len(self.disk)) // CHUNK, -(-max(size, len(self.disk)) // CHUNK)))
        del self.disk[size:]
        self.disk.extend(bytes(size - len(self.disk)))

    def _extents(self, chain: str, by_bitmap: bool) -> list[Extent] | None:
        last, chunks = self.changed.get(chain, ("", set()))
        if not by_bitmap or last not in self.points:
            return None
        found = []
        for chunk in sorted(c for c in chunks if c * CHUNK < len(self.disk)):
            data = self.disk[chunk * CHUNK : (chunk + 1) * CHUNK]
            found.append(Extent(chunk * CHUNK, len(data), not any(data)))
        return found

    @rule(
        kind=st.sampled_from(["scattered", "scattered", "back", "one", "zero", "size"]),
        where=st.floats(0, 1),
        chain=st.sampled_from(["main", "main", "weekly"]),
        by_bitmap=st.booleans(),
        full=st.integers(0, 9),
    )
    def take_point(self, kind: str, where: float, chain: str, by_bitmap: bool, full: int) -> None:
        self._change(kind, where)
        extents = self._extents(chain, by_bitmap) if full else None
        self.days += 1
        data = bytes(self.disk)
        point = add_point(
            self.repository, data, extents, chain=chain, full=not full, step=CHUNK * 16, day=self.days - 10_000
        )
        self._took(point.id, data, chain)
        self.changed[chain] = point.id, set()
        assert read_point(self.repository, point.id) == data

    def _took(self, point: str, data: bytes, chain: str) -> None:
        entry = self.repository.manifest(VM, point).disks[0]
        assert (entry.chain, entry.seq) not in self.taken, "a number is never used twice"
        self.taken.add((entry.chain, entry.seq))
        self.points[point] = data

    @precondition(lambda self: self.points)
    @rule(count=st.integers(1, 3), which=st.sampled_from(["newest", "open", "any"]))
    def delete(self, count: int, which: str) -> None:
        names = sorted(self.points)
        gone = names[-count:] if which == "newest" else self.random.sample(names, min(count, len(names)))
        if which == "open":
            gone = [*sorted(self.open.keys() & self.points.keys())[-count:]] or gone
        assert delete(self.repository, [(VM, point) for point in gone]) == [(VM, point) for point in gone]
        for point in gone:
            del self.points[point]
        self.garbage = True

    @precondition(lambda self: len(self.points) > 2)
    @rule(last=st.integers(1, 4), monthly=st.integers(1, 2))
    def prune(self, last: int, monthly: int) -> None:
        verdicts = prune(self.repository, VM, KeepRules(last=last, monthly=monthly), dry_run=False)
        kept = {v.id for v in verdicts if v.rules}
        assert kept >= set(sorted(self.points)[-last:])
        self.points = {point: data for point, data in self.points.items() if point in kept}
        self.garbage = True

    @precondition(lambda self: self.garbage)
    @rule()
    def gc(self) -> None:
        promised = gc(self.repository, dry_run=True)
        freed = {point: freed_by_deleting(self.repository, VM)[point] for point in self.points}
        report = gc(self.repository)
        if report.open == promised.open:  # else the mount has closed an image in between
            assert report.visible == promised.visible
            assert report.layers == promised.layers
            assert abs(report.freed - promised.freed) <= BLOCK * len(list(self.path.rglob("*.layer")))  # extent blocks
        # The mount may keep an image that it has read for a moment; what that sees is not known here.
        known = len(report.open) == len(self.open.keys() - self.points.keys())
        if known:
            self._measure(report.visible)
        self.garbage = not known
        assert all(0 <= size <= report.visible for size in freed.values())
        self._read_open_images()

    def _measure(self, visible: int) -> None:
        places = set()
        for point in self.points:
            image = self.repository.open_image(VM, point, DISK)
            entry = self.repository.manifest(VM, point).disk(DISK)
            assert entry
            places.update(places_of(image, entry.chain))
            image.close()
        for point in self.open:
            places.update(self._reader().places(point))
        rows = Counter((chain, seq) for chain, seq, _, _ in places)
        kept, fixed = sum(path.stat().st_blocks * 512 for path in self.path.rglob("*.raw")), 0
        for path in self.path.rglob("*.layer"):
            kept += path.stat().st_blocks * 512
            layer = Layer(str(path))
            trailer = layer.trailer()
            if self.repository.settings.codec == "none":
                count = trailer.rows
            else:
                count = rows[path.parent.name, int(path.stem)] + trailer.rows - trailer.data_chunks
            table = count * ROW.itemsize + 8 * -(-count // FENCE_ROWS) + TRAILER_SIZE
            fixed += BLOCK + BLOCK + round_up(table, BLOCK) + alignment(layer)
        assert sum(n for _, _, _, n in places) == visible
        assert kept - fixed <= 1.05 * visible

    @rule(what=st.sampled_from(["reindex", "open"]))
    def renew(self, what: str) -> None:
        if what == "reindex":
            assert self.repository.reindex() == len(self.points)
        else:
            self.repository.close()
            self.repository = Repository.open(str(self.path))

    @precondition(lambda self: self.points)
    @rule(newest=st.booleans())
    def open_image(self, newest: bool) -> None:
        point = max(self.points) if newest else self.random.choice(sorted(self.points))
        if point not in self.open:
            assert self._reader().open(point)
            self.open[point] = self.points[point]

    @precondition(lambda self: self.open)
    @rule(how=st.sampled_from(["close", "close", "kill"]))
    def close_image(self, how: str) -> None:
        if how == "kill":  # a lock dies with its holder
            self._reader().kill()
            self.reader = None
            self.open = {}
            self.garbage = True
            return
        point = self.random.choice(sorted(self.open))
        self._reader().close_image(point)
        del self.open[point]
        self.garbage = True

    def _read_open_images(self) -> None:
        for point, data in self.open.items():
            assert self._reader().digest(point) == hashlib.sha256(data).hexdigest()

    @precondition(lambda self: self.points)
    @rule(what=st.sampled_from(["chunk", "chunk", "header", "trailer", "row"]))
    def repair(self, what: str) -> None:
        """Damage something that a point needs, and that can be had elsewhere; find it, and put it right."""
        point = self.random.choice(sorted(self.points))
        image = self.repository.open_image(VM, point, DISK)  # it is indexed from here on
        places = places_of(image, "")
        image.close()
        entry = self.repository.manifest(VM, point).disk(DISK)
        assert entry
        seq = entry.seq
        if what == "chunk":
            if not places:
                return
            _, seq, number, _ = self.random.choice(places)
        layer = Layer(layer_path(str(self.path), VM, DISK, entry.chain, seq))
        trailer = layer.trailer()
        if what == "chunk":
            ((at, size),) = [(r["offset"], r["length"]) for rows in layer.rows(number, number + 1) for r in rows]
            spoil(layer.data.path, int(at), int(size))
        elif what == "header":
            spoil(layer.path, self.random.randrange(HEADER_SIZE), 1)
        elif what == "trailer":
            spoil(layer.path, layer.length - 1 - self.random.randrange(TRAILER_SIZE), 1)
        elif trailer.rows and (entry.kind == "delta" or entry.raw):  # where its rows are elsewhere
            row = self.random.randrange(trailer.rows)
            spoil(layer.path, trailer.table_offset + row * ROW.itemsize + self.random.randrange(ROW.itemsize), 1)
        else:
            return
        source = Path(self.folder.name) / "source.raw"
        source.write_bytes(self.points[point])
        report = verify(self.repository, VM, None, 1, lambda *_: None)
        assert any(point in damage.points for damage in report.all_damage(CHUNK))
        repair(self.repository, report, [(DISK, str(source))], None)
        assert [d for d in report.all_damage(CHUNK) if d.repaired is None] == []
        assert list(verify(self.repository, VM, None, 1, lambda *_: None).all_damage(CHUNK)) == []
        self._check()
        self._read_open_images()

    @precondition(lambda self: self.mounts and self.points)
    @rule(newest=st.booleans())
    def look_through_a_mount(self, newest: bool) -> None:
        mount = Path(self.folder.name) / "mnt"
        if not self.mounted:
            mount.mkdir()
            environment = {**os.environ, "XDG_STATE_HOME": self.folder.name}
            self.mounted = True
            subprocess.run([*BACKUPFS, "-r", str(self.path), "mount", str(mount)], env=environment, check=True)
        point = max(self.points) if newest else self.random.choice(sorted(self.points))
        assert (mount / VM / point / f"{DISK}.raw").read_bytes() == self.points[point]

    @rule(what=st.sampled_from(["backup", "delete", "prune", "gc", "gc", "reindex"]), step=st.integers(0, 120))
    def crash(self, what: str, step: int) -> None:
        self.repository.close()
        self.days += 1
        data = bytes(self.disk)
        doomed = self.random.sample(sorted(self.points), min(2, len(self.points)))

        def work() -> None:
            with Repository.open(str(self.path)) as repository:
                if what == "backup":
                    add_point(repository, data, day=self.days - 10_000)
                elif what == "delete":
                    delete(repository, [(VM, point) for point in doomed])
                elif what == "prune":
                    prune(repository, None, KeepRules(last=1), dry_run=False)
                elif what == "gc":
                    gc(repository)
                else:
                    repository.reindex()

        killed = killed_at(step, work)
        self.garbage = True
        self.repository = Repository.open(str(self.path))
        there, before = set(self.repository.points(VM)), set(self.points)
        new, gone = there - before, before - there
        if what == "backup":
            assert not gone
            assert len(new) == 1 or (not new and killed)
            for point in new:
                self._took(point, data, "main")
            self.changed.pop("main", None)  # nobody knows whether the bitmap was taken
        else:
            assert not new
            allowed = {"delete": set(doomed), "prune": set(sorted(before)[:-1])}.get(what, set())
            assert gone <= allowed
            assert killed or gone == allowed
        for point in gone:
            del self.points[point]
        self._check()
        self._read_open_images()

    @invariant()
    def the_points_are_those_of_the_model(self) -> None:
        if hasattr(self, "repository"):
            assert set(self.repository.points(VM)) == set(self.points)

    def _check(self) -> None:
        for point, data in self.points.items():
            assert read_point(self.repository, point) == data
            image = self.repository.open_image(VM, point, DISK)
            image.check_map()
            image.close()

    def teardown(self) -> None:
        if not hasattr(self, "repository"):
            return
        try:
            self._check()
            unmount_all(str(Path(self.folder.name) / "mnt"))
            self.gc()
            self._check()
            if self.reader:
                self.reader.close()
                self.reader = None
        finally:
            if self.reader:
                self.reader.kill()
            unmount_all(str(Path(self.folder.name) / "mnt"))
            self.repository.close()
            self.folder.cleanup()


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(
    max_examples=200 if LONG else 14,
    stateful_step_count=60 if LONG else 40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if LONG else [])],  # that takes minutes
    suppress_health_check=list(HealthCheck),
)
