"""Taking one point of a VM: its disks' sources are read and what changed becomes a layer each.

The calling thread drives the source (many requests in flight) and walks its extents; a few threads hash, compress and
write. Whatever fails, nothing is published.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from backupfs.errors import SourceError, UsageError
from backupfs.extents import Extent, coalesce, intersect, narrow, widen
from backupfs.repository.manifest import Manifest
from backupfs.repository.repository import Repository, Writer
from backupfs.repository.writer import ChainEnd, DiskWriter, PointWriter
from backupfs.services.audit import Sample, first_difference
from backupfs.sources import Source, open_source
from backupfs.units import GiB, MiB

_WINDOW = GiB  # of the disk, planned at a time: bounds the memory for its extents
_PART = 2 * MiB  # read, hashed and written at a time
_WORKERS = min(4, max(2, os.cpu_count() or 1))
_QUEUE = 2 * _WORKERS  # parts waiting for or at a worker
AUDIT = 64  # chunks

Part = tuple[int, memoryview]  # offset, bytes

# (disk, bytes of the disk dealt with, size of the disk, bytes read): called from the calling thread, often.
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """A disk to take: its name, where it comes from (path or NBD URI), and the bitmap that says what changed."""

    name: str
    source: str
    bitmap: str | None


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What the user asked for.

    Attributes:
        since: the point that the bitmaps have recorded since; None: the chain's last one.
        audit: how many chunks that a bitmap calls clean are compared.
        full: start a new chain.
        chain: the chain's name as the user knows it.
    """

    vm: str
    disks: Sequence[DiskRequest]
    moment: datetime
    since: str | None = None
    audit: int = AUDIT
    full: bool = False
    chain: str = "main"
    timeout_s: float = 30.0


def backup(repository: Repository, request: BackupRequest, progress: Progress) -> Manifest:
    """Take and publish one point. Returns its manifest.

    Raises:
        UsageError: `since` is not where the chain ends.
        Locked: another process writes to the repository.
        SourceError: a disk can't be read; nothing was published.
        RepositoryError: it can't be written; nothing was published.
    """
    with repository.writer() as writer, contextlib.ExitStack() as stack:
        ends = {
            d.name: None if request.full else writer.chain_end(request.vm, d.name, request.chain) for d in request.disks
        }
        _check_since(request, ends)
        sources = []
        for disk in request.disks:
            source = open_source(disk.source, disk.bitmap, timeout_s=request.timeout_s)
            stack.callback(source.close)
            sources.append(source)
        point = writer.begin(request.vm, request.moment)
        stack.callback(point.abandon)
        for disk, source in zip(request.disks, sources, strict=True):
            _DiskBackup(request, disk, source, ends[disk.name], progress).take(writer, point)
        parents = [end.point for end in ends.values() if end]
        return writer.commit(point, parent=max(parents, key=repository.points(request.vm).index, default=None))


def _check_since(request: BackupRequest, ends: dict[str, ChainEnd | None]) -> None:
    if request.since is None:
        return
    for disk, end in ends.items():
        if end is None or end.point != request.since:
            where = f"ends at {end.point}" if end else "has no point yet"
            raise UsageError(
                f"--since {request.since}: chain {request.chain} of {request.vm}/{disk} {where}; what a bitmap "
                "recorded since another point can't continue it"
            )


class _DiskBackup:
    """One disk of one backup."""

    def __init__(
        self, request: BackupRequest, disk: DiskRequest, source: Source, end: ChainEnd | None, progress: Progress
    ) -> None:
        self._request = request
        self._disk = disk
        self._source = source
        self._end = end
        self._progress = progress
        self._read_bytes = 0

    def take(self, writer: Writer, point: PointWriter) -> None:
        """Read the disk and finish its layer."""
        name, end, source = self._disk.name, self._end, self._source
        chain = writer.next_chain(self._request.vm, name, self._request.chain) if end is None else end.entry.chain
        self._check_format(writer.last_format(self._request.vm, name))
        target = point.add_disk(name, source.size, chain, end)
        self._chunk_size = target.layer.header.chunk_size
        read, reason = self._mode(target.layer.header.seq)
        if read == "all":
            self._ingest(target, self._plan(lambda dirty: True))
        else:
            clean = Sample(self._request.audit - self._request.audit // 4, random.SystemRandom())
            clean_zero = Sample(self._request.audit // 4, random.SystemRandom())
            self._ingest(target, self._watch(self._plan(lambda dirty: dirty), clean, clean_zero))
            wrong = self._audit(clean, clean_zero)
            if wrong is not None:
                # Anew: what the server called clean the second time need not be what it called clean the first time.
                point.drop_disk(target)
                target = point.add_disk(name, source.size, chain, end)
                self._ingest(target, self._plan(lambda dirty: True))
                read = "all"
                reason = f"bitmap {self._disk.bitmap!r} does not know of a change at offset {wrong}: all was read"
        point.finish_disk(target, read=read, reason=reason, bitmap=source.bitmap, source_format=source.format)

    def _mode(self, seq: int) -> tuple[Literal["all", "dirty"], str]:
        """Return how the disk is to be read, and why not by bitmap or why a new chain.

        Args:
            seq: of the new layer.
        """
        end, source = self._end, self._source
        if end is None:
            return "all", "a new chain was asked for" if self._request.full else "the first point of its chain"
        if source.bitmap_problem:
            return "all", source.bitmap_problem
        if source.bitmap is None:
            return "all", "no bitmap was named"
        if seq != end.entry.seq + 1:
            # Since which of the two has the bitmap recorded? Of what lies between, nobody knows.
            return "all", "a layer after the chain's last point is there: a point was taken away, or a backup broke off"
        if source.size < end.entry.size:
            sizes = f"from {end.entry.size} to {source.size} bytes"
            return "all", f"the disk shrank {sizes}: a bitmap does not tell what was cut off"
        return "dirty", ""

    def _check_format(self, last: str | None) -> None:
        """A guest can write the header of another format, with any host file as its backing file, on a raw disk.

        Args:
            last: the format of the newest point that was taken from a file, in any chain.
        """
        if last == "raw" and self._source.format not in ("raw", "nbd"):
            raise SourceError(
                f"{self._disk.source}: looks like {self._source.format} now and was raw before; a guest can write such "
                "a header. If you converted the image yourself, serve it with qemu-nbd and name its NBD URI"
            )

    def _plan(self, wanted: Callable[[bool], bool]) -> Iterator[tuple[Extent, bool]]:
        """Cover the disk with (extent of whole chunks, whether it is wanted); the extent's flag: it is zero.

        Args:
            wanted: given whether a chunk is dirty, says whether it is to be taken.
        """
        size, chunk = self._source.size, self._chunk_size
        for start in range(0, size, _WINDOW):
            length = min(_WINDOW, size - start)
            zeroes: list[Extent] = []
            dirties: list[Extent] = []
            for zero, dirty in self._source.status(start, length):
                zeroes.append(zero)
                dirties.extend(self._resized(dirty))
            end = start + length
            for zero, dirty in intersect(
                coalesce(narrow(coalesce(zeroes), chunk, end)), coalesce(widen(coalesce(dirties), chunk, end))
            ):
                yield zero, wanted(dirty.flag)

    def _resized(self, dirty: Extent) -> Iterator[Extent]:
        """Call dirty what a bitmap can't know about a disk whose size changed: its old last chunk, all after it.

        QEMU leaves the bits of a grown area clean.
        """
        old = self._end.entry.size if self._end else 0
        border = old // self._chunk_size * self._chunk_size
        if self._source.size == old or dirty.end <= border:
            yield dirty
            return
        if dirty.offset < border:
            yield Extent(dirty.offset, border - dirty.offset, dirty.flag)
        first = max(dirty.offset, border)
        yield Extent(first, dirty.end - first, True)

    def _watch(
        self, plan: Iterator[tuple[Extent, bool]], clean: Sample, clean_zero: Sample
    ) -> Iterator[tuple[Extent, bool]]:
        """Pass the plan on and sample what is not wanted."""
        for extent, wanted in plan:
            if not wanted:
                sample = clean_zero if extent.flag else clean
                sample.add(extent.offset // self._chunk_size, -(-extent.length // self._chunk_size))
            yield extent, wanted

    def _audit(self, clean: Sample, clean_zero: Sample) -> int | None:
        assert self._end is not None
        return first_difference(self._source, self._end.image, clean.chunks + clean_zero.chunks, self._chunk_size)

    def _ingest(self, target: DiskWriter, plan: Iterator[tuple[Extent, bool]]) -> None:
        """Carry what the plan wants into the layer."""
        pending: set[Future[None]] = set()
        with ThreadPoolExecutor(_WORKERS, "ingest") as workers:
            try:
                for parts in self._batches(target, plan):
                    if len(pending) >= _QUEUE:
                        pending = _settle(pending)
                    pending.add(workers.submit(_write, target, parts))
                for future in pending:
                    future.result()
            except BaseException:
                workers.shutdown(wait=True, cancel_futures=True)
                raise

    def _batches(self, target: DiskWriter, plan: Iterator[tuple[Extent, bool]]) -> Iterator[list[Part]]:
        """Read what the plan wants; yield it some MiB at a time: to hand a part over costs as much as to hash it."""
        held: list[Part] = []
        size = 0
        for offset, data in self._chunks_of(self._ranges(target, plan)):
            self._read_bytes += len(data)
            held.append((offset, data))
            size += len(data)
            if size >= _PART:
                yield held
                held, size = [], 0
        if held:
            yield held

    def _chunks_of(self, ranges: Iterator[tuple[int, int]]) -> Iterator[Part]:
        """Read ranges, in parts of whole chunks; a server that answers in smaller ones is asked range by range."""
        if self._source.request_size % self._chunk_size == 0:
            yield from self._source.read_many(ranges)
            return
        for offset, length in ranges:
            buffer = memoryview(bytearray(length))
            self._source.readinto(offset, buffer)
            yield offset, buffer

    def _ranges(self, target: DiskWriter, plan: Iterator[tuple[Extent, bool]]) -> Iterator[tuple[int, int]]:
        """Yield what is to be read, at most _PART at a time; zero ranges go to the layer on the way."""
        size = self._source.size
        for extent, wanted in plan:
            if extent.flag:  # clean or not: it costs nothing to take the server's word, and a bitmap may have missed it
                target.zero(extent.offset, extent.length)
            elif wanted:
                for offset in range(extent.offset, extent.end, _PART):
                    self._progress(self._disk.name, offset, size, self._read_bytes)
                    yield offset, min(_PART, extent.end - offset)
            self._progress(self._disk.name, extent.end, size, self._read_bytes)


def _write(target: DiskWriter, parts: list[Part]) -> None:
    for offset, data in parts:
        target.write(offset, data)


def _settle(pending: set[Future[None]]) -> set[Future[None]]:
    """Wait until at least one part is done; return those that are not. A part's error is raised here."""
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest
