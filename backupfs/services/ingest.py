"""Reading one disk into one layer: which chunks, how, and whether the bitmap told the truth.

The calling thread drives the source (many requests in flight) and walks its extents; a few threads hash, compress and
write.
"""

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Literal

from backupfs.errors import SourceError
from backupfs.extents import Extent, coalesce, intersect, narrow, widen
from backupfs.repository.repository import Writer
from backupfs.repository.writer import ChainEnd, DiskWriter, PointWriter
from backupfs.services.audit import Sample, first_difference
from backupfs.sources import Source
from backupfs.units import GiB, MiB

_WINDOW = GiB  # of the disk, planned at a time: bounds the memory for its extents
_PART = 2 * MiB  # read, hashed and written at a time
_WORKERS = min(4, max(2, os.cpu_count() or 1))
_QUEUE = 2 * _WORKERS  # parts waiting for or at a worker

Part = tuple[int, memoryview]  # offset, bytes

# (disk, bytes of the disk dealt with, size of the disk, bytes read): called from the calling thread, often.
Progress = Callable[[str, int, int, int], None]


class DiskBackup:
    """One disk of one backup.

    Args:
        name: of the disk.
        source: what is read.
        end: where its chain ends; None: a new chain begins.
        known_since: the source's bitmap is known to have recorded since that end; else it is the caller's word.
        probed: the source's format was found out by looking at the image.
        audit: how many chunks that a bitmap calls clean are compared.
        new: why a chain begins, if one does.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        end: ChainEnd | None,
        progress: Progress,
        *,
        known_since: bool,
        probed: bool,
        audit: int,
        new: str,
    ) -> None:
        self._name = name
        self._source = source
        self._end = end
        self._progress = progress
        self._known_since = known_since
        self._probed = probed
        self._audited = audit
        self._new = new
        self._read_bytes = 0

    def take(self, writer: Writer, point: PointWriter, chain_name: str, recorder: str | None) -> None:
        """Read the disk and finish its layer.

        Args:
            writer: to ask about the disk's past.
            point: the point that it becomes a part of.
            chain_name: as the user knows it.
            recorder: what records from this moment on.

        Raises:
            SourceError: the disk can't be read.
            RepositoryError: the layer can't be written, or the chain's end can't be read.
        """
        name, end, source = self._name, self._end, self._source
        chain = writer.next_chain(point.vm, name, chain_name) if end is None else end.entry.chain
        if self._probed:
            self._check_format(writer.last_format(point.vm, name))
        target = point.add_disk(name, source.size, chain, end)
        self._chunk_size = target.layer.header.chunk_size
        read, reason = self._mode(target.layer.header.seq)
        if read == "all":
            self._ingest(target, self._plan(lambda dirty: True))
        else:
            clean = Sample(self._audited - self._audited // 4, random.SystemRandom())
            clean_zero = Sample(self._audited // 4, random.SystemRandom())
            self._ingest(target, self._watch(self._plan(lambda dirty: dirty), clean, clean_zero))
            wrong = self._audit(clean, clean_zero)
            if wrong is not None:
                # Anew: what the server called clean the second time need not be what it called clean the first time.
                point.drop_disk(target)
                target = point.add_disk(name, source.size, chain, end)
                self._ingest(target, self._plan(lambda dirty: True))
                read = "all"
                reason = f"bitmap {source.bitmap!r} does not know of a change at offset {wrong}: all was read"
        point.finish_disk(
            target, read=read, reason=reason, bitmap=source.bitmap, recorder=recorder, source_format=source.format
        )

    def _mode(self, seq: int) -> tuple[Literal["all", "dirty"], str]:
        """Return how the disk is to be read, and why not by bitmap or why a new chain.

        Args:
            seq: of the new layer.
        """
        end, source = self._end, self._source
        if end is None:
            return "all", self._new
        if source.bitmap_problem:
            return "all", source.bitmap_problem
        if source.bitmap is None:
            return "all", "no bitmap was named"
        if seq != end.entry.seq + 1 and not self._known_since:
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
                f"{self._source.description}: looks like {self._source.format} now and was raw before; a guest can "
                "write such a header. If you converted the image yourself, serve it with qemu-nbd and name its NBD URI"
            )

    def _plan(self, wanted: Callable[[bool], bool]) -> Iterator[tuple[Extent, bool]]:
        """Cover the disk with (extent of whole chunks, whether it is wanted); the extent's flag: it is zero.

        Args:
            wanted: given whether a chunk is dirty, says whether it is to be taken.
        """
        for start in range(0, self._source.size, _WINDOW):
            for zero, dirty in self._window(start):
                yield zero, wanted(dirty.flag)

    def _window(self, start: int) -> Iterator[tuple[Extent, Extent]]:
        """Cover a window of the disk with pairs of equal extents of whole chunks: (zero, dirty)."""
        length, chunk = min(_WINDOW, self._source.size - start), self._chunk_size
        zeroes: list[Extent] = []
        dirties: list[Extent] = []
        for zero, dirty in self._source.status(start, length):
            zeroes.append(zero)
            dirties.extend(self._resized(dirty))
        end = start + length
        return intersect(coalesce(narrow(coalesce(zeroes), chunk, end)), coalesce(widen(coalesce(dirties), chunk, end)))

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
        """Return where a chunk that the bitmap calls clean is not as it was: of the samples, and the last with data.

        That one tells whether a disk was cut off and has grown again since, of which QEMU's bitmaps know nothing: all
        behind the cut is zero then, or dirty.
        """
        assert self._end is not None
        chunks = {*clean.chunks, *clean_zero.chunks, *self._last_clean()}
        return first_difference(self._source, self._end.image, chunks, self._chunk_size)

    def _last_clean(self) -> list[int]:
        """Return the number of the last chunk that is clean, not said to be zero, and had data; none if none is."""
        assert self._end is not None
        before = self._end.image
        for start in reversed(range(0, min(self._source.size, before.size), _WINDOW)):
            for zero, dirty in reversed(list(self._window(start))):
                length = min(zero.end, before.size) - zero.offset
                if zero.flag or dirty.flag or length <= 0:
                    continue
                data = [e.end for e in before.extents(zero.offset, length) if not e.flag]
                if data:
                    return [(data[-1] - 1) // self._chunk_size]
        return []

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
                    self._progress(self._name, offset, size, self._read_bytes)
                    yield offset, min(_PART, extent.end - offset)
            self._progress(self._name, extent.end, size, self._read_bytes)


def _write(target: DiskWriter, parts: list[Part]) -> None:
    for offset, data in parts:
        target.write(offset, data)


def _settle(pending: set[Future[None]]) -> set[Future[None]]:
    """Wait until at least one part is done; return those that are not. A part's error is raised here."""
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest
