"""Who shows a chain's disk as a raw file: backupfs in its ways, the peers, and the disk itself as a plain file."""

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import BACKUPFS
from benchmarks.workplace import Failed, Mount, Workplace, processor_s, run, unmount

NONE, ZSTD, PYFUSE3, PASSTHROUGH = "none", "zstd", "pyfuse3", "passthrough"  # backupfs, and how
QEMU, QEMU_THREADS, NBDFUSE, NATIVE = "qemu", "qemu-threads", "nbdfuse", "native"
OURS = (NONE, ZSTD, PYFUSE3, PASSTHROUGH)
PEERS = (QEMU, QEMU_THREADS, NBDFUSE, NATIVE)
LEGEND = {
    NONE: "backupfs, codec none, the read lane",
    ZSTD: "backupfs, codec zstd, the read lane",
    PYFUSE3: "backupfs, codec none, pyfuse3's plain path (BACKUPFS_NO_READ_LANE=1)",
    PASSTHROUGH: "backupfs, a hydrated point, read by the kernel",
    QEMU: "qemu-storage-daemon's FUSE export of as many qcow2 overlays; above 100 io_uring for the topmost only",
    QEMU_THREADS: "the same with QEMU's default aio=threads, up to 100",
    NBDFUSE: "nbdfuse over qemu-nbd of as many qcow2 overlays, up to 100",
    NATIVE: "the same bytes in a raw file of the host's file system",
}
# Above, opening node by node takes QEMU minutes: the files behind are then opened as it likes, not as we say.
_NODES = 100
_L2_CACHE = 256 << 20  # all L2 tables of 2 TiB in clusters of 64 KiB; only what is used is taken


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk and its deltas as it lies on the host's file system.

    Attributes:
        folder: none and zstd, the repositories; qcow2, the overlays; native, raw files by the number of deltas.
        size: of the disk, bytes.
        points: by codec, the points by the number of deltas.
    """

    folder: Path
    size: int
    points: dict[str, list[str]]

    def overlay(self, depth: int) -> Path:
        return self.folder / "qcow2" / f"{depth}.qcow2"

    def native(self, depth: int) -> Path:
        return self.folder / "native" / f"{depth}.raw"


@dataclass(frozen=True, slots=True)
class Contender:
    """A disk after so many deltas, as one of them shows it.

    Attributes:
        pids: the processes that answer; none where it is the kernel alone.
    """

    who: str
    depth: int
    path: Path
    pids: tuple[int, ...] = field(default=())

    @property
    def has_own_pages(self) -> bool:
        """Whether the page cache has pages of this file, apart from those of the files behind."""
        return self.who not in (NATIVE, PASSTHROUGH)

    def cpu_s(self) -> float:
        """Return the processor time that its processes have used, seconds."""
        return sum(processor_s(pid) for pid in self.pids)


@contextlib.contextmanager
def opened(place: Workplace, chain: Chain, who: str, depth: int) -> Iterator[Contender]:
    """Show a disk, in processes of its own, while the block runs. Raises Failed."""
    if who == NATIVE:
        yield Contender(who, depth, chain.native(depth))
    elif who in OURS:
        codec = ZSTD if who == ZSTD else NONE
        ways = {"read_lane": who != PYFUSE3, "passthrough": who == PASSTHROUGH}
        with place.mounted(chain.folder / codec, **ways) as mount:
            yield Contender(who, depth, mount.disk(chain.points[codec][depth]), _pids(mount))
    elif who in (QEMU, QEMU_THREADS):
        aio = "io_uring" if who == QEMU else "threads"
        with exported_by_qemu(place, describe_chain(chain.overlay(depth), depth, aio), depth, chain.size) as (
            path,
            pid,
        ):
            yield Contender(who, depth, path, (pid,))
    else:
        with shown_by_nbdfuse(place, chain.overlay(depth), depth, chain.size) as (path, pids):
            yield Contender(who, depth, path, pids)


def _pids(mount: Mount) -> tuple[int, ...]:
    children = Path(f"/proc/{mount.pid}/task/{mount.pid}/children").read_text().split()
    return mount.pid, *(int(child) for child in children)


@contextlib.contextmanager
def exported_by_qemu(place: Workplace, chain: dict[str, object], depth: int, size: int) -> Iterator[tuple[Path, int]]:
    """Show a block node by qemu-storage-daemon's FUSE export; yield the path and the process.

    Raises:
        Failed: the daemon ends before the export is there, or takes too long.
    """
    path = place.new_path("export.raw")
    path.touch()
    node = json.dumps(chain | {"node-name": "disk"})
    export = f"type=fuse,id=export,node-name=disk,mountpoint={path},writable=off"
    command = ["qemu-storage-daemon", "--blockdev", node, "--export", export]
    try:
        with _many_files(depth), place.child(command, _has_size(path, size)) as pid:
            yield path, pid
    finally:
        unmount(path)


@contextlib.contextmanager
def shown_by_nbdfuse(place: Workplace, image: Path, depth: int, size: int) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Show a qcow2 and its backing files by nbdfuse on a qemu-nbd; yield the path and the processes. Raises Failed."""
    address, folder = place.new_socket(), place.new_path("nbdfuse")
    folder.mkdir()
    path = folder / "disk.raw"
    node = "json:" + json.dumps(describe_chain(image, depth))
    serve = ["qemu-nbd", "--persistent", "--shared=8", "--read-only", f"--socket={address}", node]
    show = ["nbdfuse", "--readonly", str(path), "--unix", str(address)]
    try:
        with (
            _many_files(depth),
            place.child(serve, address.exists) as server,
            place.child(show, _has_size(path, size)) as shower,
        ):
            try:
                yield path, (shower, server)
            finally:
                unmount(folder)
    finally:
        unmount(folder)


def describe_chain(image: Path, depth: int, aio: str = "io_uring") -> dict[str, object]:
    """Return the block node of a chain, with the settings that make QEMU fastest: io_uring, and all L2 tables cached.

    Without O_DIRECT, as backupfs reads its layers, too. With aio=threads it reads at two thirds of io_uring's speed.
    """
    if depth > _NODES:
        return _node(image, aio)
    node: dict[str, object] | None = None
    for number in range(depth + 1):
        node = _node(image.with_name(f"{number}.qcow2"), aio) | {"backing": node}
    assert node is not None
    return node


def _node(image: Path, aio: str) -> dict[str, object]:
    file = {"driver": "file", "filename": str(image), "aio": aio, "cache": {"direct": False}}
    return {"driver": "qcow2", "read-only": True, "l2-cache-size": _L2_CACHE, "file": file}


@contextlib.contextmanager
def _many_files(count: int) -> Iterator[None]:
    """Let a child that is started in the block open that many files, and some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 100:
        raise Failed(f"{count} overlays are more open files than the hard limit lets have ({hard})")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _has_size(path: Path, size: int) -> Callable[[], bool]:
    def answered() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size == size
        return False

    return answered


def hydrate(chain: Chain, depth: int) -> None:
    """Make a point of codec none ready for being read by the kernel itself."""
    run(BACKUPFS, "-r", chain.folder / NONE, "hydrate", f"vm/{chain.points[NONE][depth]}")


def drop_caches() -> None:
    """Empty the page cache of this machine. Source: Documentation/admin-guide/sysctl/vm.rst."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as e:
        raise Failed(f"cold reads need root, to empty the page cache: {e}") from e
