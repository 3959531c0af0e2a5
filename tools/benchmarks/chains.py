"""Chains that hold the same bytes: points in a repository, and qcow2 overlays. A base, and the same changes on it."""

import errno
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import numpy as np

from backupfs.repository.repository import Repository, Writer
from backupfs.repository.writer import ChainEnd
from backupfs.units import KiB, MiB
from benchmarks.disks import distinct
from benchmarks.overlays import write_overlay
from benchmarks.workplace import run

CHUNK = 64 * KiB
CODECS = ("none", "zstd")
_STEP = 4 * MiB  # written at a time into the base
_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)

Changes = list[tuple[int, bytes]]  # offset and bytes of each chunk that a delta changes, in order


class Disk(Protocol):
    """A disk that changes.

    Attributes:
        raw: the disk before the first delta, a file; sparse where it is zero.
        size: bytes.
    """

    raw: Path
    size: int

    def changes(self, number: int) -> Changes:
        """Return what delta `number`, from 1 on, changes: the same each time."""


class MovedChunks:
    """A disk of which each delta changes so many single chunks: to others of its chunks, each with its own mark."""

    def __init__(self, raw: Path, chunks: int) -> None:
        self.raw = raw
        self.size = raw.stat().st_size
        self._chunks = chunks
        self._bytes = np.memmap(raw, np.uint8, "r")

    def changes(self, number: int) -> Changes:
        rng = np.random.default_rng(number)
        places = np.sort(distinct(rng, self.size // CHUNK, self._chunks))
        sources = rng.integers(0, self.size // CHUNK, len(places))
        changes = []
        for i, (place, source) in enumerate(zip(places.tolist(), sources.tolist(), strict=True)):
            mark = number.to_bytes(8, "little") + i.to_bytes(8, "little")
            start = source * CHUNK
            changes.append((place * CHUNK, mark + self._bytes[start + len(mark) : start + CHUNK].tobytes()))
        return changes


class PutTogether:
    """A disk that is what `last` holds only after the last delta: each puts its share of the chunks right.

    So a file system that is whole can lie in all the layers of a chain.

    Args:
        last: the disk at the end, raw.
        raw: a path for the disk at the beginning.
        deltas: how many.
    """

    def __init__(self, last: Path, raw: Path, deltas: int) -> None:
        self.raw = raw
        self.size = last.stat().st_size
        self._last = np.memmap(last, np.uint8, "r")
        used = [n for n in range(self.size // CHUNK) if self._last[n * CHUNK : (n + 1) * CHUNK].any()]
        late = np.random.default_rng(0).permutation(used)[: len(used) // 2]  # the other half is in the base
        self._late = [np.sort(late[i::deltas]).tolist() for i in range(deltas)]
        with raw.open("wb") as file:
            file.truncate(self.size)
            for n in sorted(set(used) - set(late.tolist())):
                file.seek(n * CHUNK)
                file.write(self._chunk(n))

    def changes(self, number: int) -> Changes:
        return [(n * CHUNK, self._chunk(n)) for n in self._late[number - 1]]

    def _chunk(self, number: int) -> bytes:
        return self._last[number * CHUNK : (number + 1) * CHUNK].tobytes()


def build_repository(path: Path, disk: Disk, count: int, codec: str) -> list[str]:
    """Write a full point and `count` deltas into a new repository, through the library. Returns the points in order."""
    Repository.init(str(path), codec_name=codec)
    points, end = [], None
    with Repository.open(str(path)) as repository, repository.writer() as writer:
        for number in range(count + 1):
            changes = disk.changes(number) if number else _data(disk.raw)
            end = _add_point(repository, writer, end, number, disk.size, changes)
            points.append(end.point)
    return points


def _data(raw: Path) -> Iterator[tuple[int, bytes]]:
    """Yield what is not zero in a sparse file, a step at a time."""
    with raw.open("rb", buffering=0) as file:
        for start, end in data_extents(file.fileno()):
            for offset in range(start // CHUNK * CHUNK, end, _STEP):
                piece = os.pread(file.fileno(), min(_STEP, -(-end // CHUNK) * CHUNK - offset), offset)
                if piece.strip(b"\0"):
                    yield offset, piece


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Walk over a file by SEEK_DATA and SEEK_HOLE; yield where each piece of data begins and ends."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _add_point(  # noqa: PLR0917
    repository: Repository,
    writer: Writer,
    end: ChainEnd | None,
    number: int,
    size: int,
    changes: Iterable[tuple[int, bytes]],
) -> ChainEnd:
    """Write a point of one disk; return what the next one continues."""
    point = writer.begin("vm", _MOMENT + timedelta(hours=number))
    try:
        chain = end.entry.chain if end else writer.next_chain("vm", "vda", "main")
        target = point.add_disk("vda", size, chain, end)
        for offset, data in changes:
            target.write(offset, memoryview(data))
        entry = point.finish_disk(target, read="all", reason="a benchmark")
        manifest = writer.commit(point, parent=end.point if end else None)
    finally:
        point.abandon()
    return ChainEnd(manifest.id, entry, repository.open_image("vm", manifest.id, "vda"))


def build_overlays(folder: Path, disk: Disk, count: int) -> None:
    """Make the same chain of qcow2 files in a new folder: 0.qcow2, and an overlay for each delta."""
    folder.mkdir()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.raw, folder / "0.qcow2")
    for number in range(1, count + 1):
        write_overlay(folder / f"{number}.qcow2", disk.size, disk.changes(number), f"{number - 1}.qcow2")


def build_file(path: Path, disk: Disk, count: int) -> None:
    """Make the same disk after so many deltas, a sparse raw file."""
    run("cp", "--sparse=always", disk.raw, path)
    with path.open("r+b", buffering=0) as file:
        for number in range(1, count + 1):
            for offset, data in disk.changes(number):
                os.pwrite(file.fileno(), data, offset)
