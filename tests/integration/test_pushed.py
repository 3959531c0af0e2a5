"""Files that push-mode backups leave, made by QEMU's own backup jobs."""

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import backupfs, backupfs_json
from images import BytesImage
from qmp_client import QmpClient
from repositories import read_point
from servers import _running, need, run

from backupfs.errors import ConnectError, UsageError
from backupfs.extents import Extent
from backupfs.image import Image
from backupfs.repository.repository import Repository
from backupfs.sources.pushed import Overlay, PushedSource, open_pushed
from backupfs.sources.source import Source
from backupfs.units import KiB, MiB

SIZE = 12 * MiB
pytestmark = pytest.mark.usefixtures("tools")


@pytest.fixture
def tools() -> None:
    need("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-io", "setpriv")


class Machine:
    """QEMU with one disk and nothing else; its guest is `io`."""

    def __init__(self, folder: Path, monitor: QmpClient, create: Sequence[str], granularity: int) -> None:
        self.folder = folder
        self.qmp = monitor
        self._create = create
        self._granularity = granularity
        self._size = SIZE

    def io(self, command: str) -> None:
        self.qmp.human(f'qemu-io disk "{command}"')

    def grow(self, size: int) -> None:
        self.qmp("block_resize", node_name="disk", size=size)
        self._size = size

    @contextmanager
    def target(self, name: str) -> Iterator[Path]:
        """Add a new file as a node."""
        path = self.folder / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", *self._create, path, str(self._size))
        self.qmp("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": str(path)})
        try:
            yield path
        finally:
            self.qmp("blockdev-del", node_name=name)

    def push(self, name: str, sync: str) -> Path:
        """Run a backup job to its end; a full one begins the bitmap, an incremental one goes on from the last."""
        with self.target(name) as path:
            how = {"device": "disk", "target": name, "sync": sync, "job-id": name, "auto-dismiss": False}
            actions = [{"type": "blockdev-backup", "data": how}]
            if sync == "incremental":
                how["bitmap"] = "b"
            elif name == "full":
                bitmap = {"node": "disk", "name": "b", "granularity": self._granularity}
                actions.insert(0, {"type": "block-dirty-bitmap-add", "data": bitmap})
            self.qmp("transaction", actions=actions)
            while (job := self.qmp("query-jobs")[0])["status"] != "concluded":
                assert "error" not in job
            assert "error" not in job
            self.qmp("job-dismiss", id=name)
        return path

    def content(self) -> bytes:
        """Return the disk as it is: by a full job, and what QEMU makes of that."""
        path = self.push("now", "full")
        raw = path.with_suffix(".raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
        path.unlink()
        return raw.read_bytes()


@contextmanager
def machine(create: Sequence[str] = (), granularity: int = 64 * KiB) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="bfs-test-") as name:
        folder = Path(name)
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", str(SIZE))
        disk = f"driver=qcow2,discard=unmap,node-name=disk,file.driver=file,file.filename={folder}/disk.qcow2"
        command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
        command += ["-blockdev", disk, "-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        with _running(command, folder / "qmp"):
            monitor = QmpClient(folder / "qmp")
            try:
                yield Machine(folder, monitor, create, granularity)
            finally:
                monitor.close()


@contextmanager
def opened(path: Path | str) -> Iterator[PushedSource]:
    source = open_pushed(str(path), 10)
    try:
        yield source
    finally:
        source.close()


def everything(image: Image) -> bytes:
    buffer = bytearray(image.size)
    image.readinto(0, buffer)
    return bytes(buffer)


def check(source: Source, expected: bytes, before: bytes) -> None:
    """Compare a source with what it has to hold: bytes, zeroes, what is clean."""
    assert source.size == len(expected)
    assert everything(source) == expected
    position = 0
    for zero, dirty in source.status(0, source.size):
        assert (zero.offset, zero.length) == (dirty.offset, dirty.length) == (position, zero.length)
        position = zero.end
        if zero.flag:
            assert not any(expected[zero.offset : zero.end])
        if not dirty.flag:
            assert before[zero.offset : zero.end] == expected[zero.offset : zero.end]
    assert position == source.size
    generator = random.Random(5)
    ranges = []
    for _ in range(20):
        offset = generator.randrange(source.size)
        ranges.append((offset, generator.randrange(min(3 * MiB, source.size - offset) + 1)))
    got = 0
    for offset, content in source.read_many(ranges):
        assert content == expected[offset : offset + len(content)]
        got += len(content)
    assert got == sum(length for _, length in ranges)


def guest_writes(guest: Machine, generator: random.Random, count: int) -> None:
    for _ in range(count):
        length = generator.choice([512, 4 * KiB, 64 * KiB, 300 * KiB, MiB])
        offset = generator.randrange((SIZE - length) // 512) * 512
        kind = generator.choice(["write -P {}", "write -P {}", "write -z", "write -P 0", "discard"])
        guest.io(f"{kind.format(generator.randrange(1, 256))} {offset} {length}")


@pytest.mark.parametrize(
    ("create", "granularity"),
    [((), 64 * KiB), (("-o", "cluster_size=4096"), 4 * KiB), (("-o", "extended_l2=on,cluster_size=128k"), 4 * KiB)],
    ids=["64k", "4k", "subclusters"],
)
def test_a_series(create: Sequence[str], granularity: int) -> None:
    generator = random.Random(granularity)
    with machine(create, granularity) as guest:
        guest_writes(guest, generator, 20)
        before = guest.content()
        with opened(guest.push("full", "full")) as full:
            assert full.complete
            assert (full.bitmap, full.bitmap_problem, full.format) == ("pushed", None, "qcow2")
            check(full, before, before)
        for number in range(4):
            guest_writes(guest, generator, 6)
            path = guest.push(f"inc{number}", "incremental")
            now = guest.content()
            with opened(path) as pushed:
                assert not pushed.complete
                for extent in pushed.dirty(0, pushed.size):
                    if extent.flag:
                        buffer = bytearray(extent.length)
                        pushed.readinto(extent.offset, buffer)
                        assert buffer == now[extent.offset : extent.end]
                check(Overlay(pushed, BytesImage(before)), now, before)
            before = now


def test_an_increment_of_nothing() -> None:
    with machine() as guest:
        guest.push("full", "full")
        with opened(guest.push("inc", "incremental")) as pushed:
            assert list(pushed.dirty(0, SIZE)) == [Extent(0, SIZE, False)]
            old = random.Random(1).randbytes(SIZE)
            check(Overlay(pushed, BytesImage(old)), old, old)
            for offset, length in ((0, 1), (SIZE - 1, 1), (0, SIZE)):
                with pytest.raises(ValueError, match="not in it"):
                    list(pushed.read_many([(offset, length)]))


def test_a_disk_that_grew() -> None:
    with machine() as guest:
        guest.io(f"write -P 3 0 {SIZE}")
        guest.push("full", "full")
        before = guest.content()[: SIZE - 700]  # whatever is stored of it
        guest.grow(SIZE + 5 * MiB + 512)
        guest.io(f"write -P 4 {SIZE + MiB} 64k")
        guest.io(f"write -P 5 {SIZE - 64 * KiB} 64k")
        path = guest.push("inc", "incremental")
        now = guest.content()
        with opened(path) as pushed:
            check(Overlay(pushed, BytesImage(before)), now, before.ljust(len(now), b"\0"))


@pytest.mark.parametrize("backing", ["missing.raw", "/etc/passwd", "json:{}", "nbd://127.0.0.1:1/x"])
def test_a_backing_file_is_not_looked_at(tmp_path: Path, backing: str) -> None:
    path = tmp_path / "inc.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-c", "write -P 9 128k 64k", path)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, path)
    with opened(path) as pushed:
        assert [e for e in pushed.dirty(0, MiB) if e.flag] == [Extent(128 * KiB, 64 * KiB, True)]
        assert not pushed.complete
        expected = b"a" * 128 * KiB + b"\x09" * 64 * KiB + b"a" * 832 * KiB
        check(Overlay(pushed, BytesImage(b"a" * MiB)), expected, b"a" * MiB)


def test_a_file_that_is_being_written_is_refused() -> None:
    with machine() as guest, guest.target("inc") as path, pytest.raises(ConnectError, match="in use by another"):
        open_pushed(str(path), 10)
    with machine() as guest:
        path = guest.push("full", "full")
        # And once it is open, nobody writes to it.
        with opened(path), pytest.raises(AssertionError, match="lock"):
            run("qemu-io", "-c", "write 0 512", path)


def test_what_no_backup_job_wrote(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(MiB))
    (tmp_path / "short").write_bytes(b"QFI\xfb")
    (tmp_path / "bad").write_bytes(b"QFI\xfb\0\0\0\3" + b"\xff" * 64 + bytes(8) + b"\xff" * 1000)
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={tmp_path}/d,data_file_raw=on",
        tmp_path / "x",
        "1M",
    )
    for name, words in (
        ("raw", "no qcow2 file"),
        ("short", "no qcow2 file"),
        ("bad", "bad: qemu-nbd does not serve it: "),
        ("x", "data in another file"),
        ("missing", "No such file"),
        ("", "is a folder"),
    ):
        with pytest.raises(ConnectError, match=words):
            open_pushed(str(tmp_path / name), 10)
    with pytest.raises(UsageError):
        open_pushed("a\0b", 10)


@pytest.mark.parametrize(
    "name", ["-dash", "a,b=c", 'quo"te', "new\nline", "nbd:x", "json:{}", "é", "\udcff", "%41?"], ids=ascii
)
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "plain", "1M")
    run("qemu-io", "-c", "write -P 9 0 1M", tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / name)
    for spec in (name, str(tmp_path / name)):
        with opened(spec) as pushed:
            assert pushed.complete
            assert everything(pushed) == b"\x09" * MiB


def test_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    fds = len(os.listdir("/proc/self/fd"))
    folders = set(Path(tempfile.gettempdir()).glob("backupfs-*"))
    source = open_pushed(str(path), 10)
    assert set(Path(tempfile.gettempdir()).glob("backupfs-*")) <= folders
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_the_command_takes_a_series_and_refuses_a_gap(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    backupfs(repo, "init")
    contents = {}
    with machine(["-o", "cluster_size=4k"], 4 * KiB) as guest:
        generator = random.Random(11)
        for name in ("full", "inc1", "inc2", "inc3"):
            if name == "inc2":
                guest.grow(SIZE + 3 * MiB + 512)
            guest_writes(guest, generator, 20)
            pushed = guest.push(name, "full" if name == "full" else "incremental")
            contents[name] = guest.content()
            if name == "inc1":
                words = f"vda={pushed}", "--push"
                assert "--since POINT" in backupfs(repo, "backup", "web01", *words, code=2)
                assert "can begin" in backupfs(repo, "backup", "other", *words, code=2)
            since = [] if name == "full" else ["--since", backupfs_json(repo, "points")[-1]["id"]]
            taken = backupfs_json(repo, "backup", "web01", f"vda={pushed}", "--push", *since)
            assert taken["disks"][0]["read"] == ("all" if name == "full" else "dirty")
        points = [p["id"] for p in backupfs_json(repo, "points")]
        again = f"vda={pushed}", "--push", "--since", points[0]
        assert "ends at" in backupfs(repo, "backup", "web01", *again, code=2)
    with Repository.open(str(repo)) as repository:
        for point, content in zip(points, contents.values(), strict=True):
            assert read_point(repository, point) == content
