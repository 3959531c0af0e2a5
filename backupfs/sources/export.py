"""An NBD export as a Source.

All methods may be called from any thread and from several at once. A connection that is cut, or a server that is silent
for `timeout_s`, ends the source: every later call raises.
"""

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from backupfs.errors import BitmapUnusable, ConnectError, ProtocolError, UsageError
from backupfs.extents import Extent, coalesce
from backupfs.image import Buffer, check_range
from backupfs.sources.nbd import Request, Wire
from backupfs.sources.source import DIRTY, ZERO, align, pair_extents, parse_descriptors, split
from backupfs.units import GiB, KiB, MiB

_ALLOCATION = "base:allocation"
_REQUEST = MiB
_WINDOW = 16 * MiB  # asked for and not yet handed over
_STATUS = GiB  # a block-status request; has to be below 4 GiB. At 64 KiB an extent a reply is 128 KiB
_LOST = (errno.ENOTCONN, errno.ESHUTDOWN)


class NbdSource:
    """An NBD export.

    Args:
        uri: as in the NBD URI specification; libnbd's options for TLS are allowed.
        bitmap: the name of a dirty bitmap of QEMU's that the server should offer.
        timeout_s: how long the server may be silent. (A name server is not covered: libnbd asks it and waits.)
        description: what messages call it, if not by the URI.
        dirty: the metadata context whose lowest bit says what changed, if `bitmap` is not one of QEMU's.

    Raises:
        UsageError: no bitmap can have this name.
        ConnectError: no connection.
        ProtocolError: the server's size is none.
    """

    def __init__(
        self,
        uri: str,
        bitmap: str | None = None,
        timeout_s: float = 30.0,
        *,
        description: str | None = None,
        dirty: str | None = None,
    ) -> None:
        self.uri = uri
        self.description = description or uri
        self.format = "nbd"
        contexts = {_ALLOCATION: ZERO}
        if bitmap is not None:
            contexts[dirty or _bitmap_context(bitmap)] = DIRTY
        self._wire = Wire(uri, contexts, self.description, timeout_s)
        self.size = self._export_size = self._wire.size
        self._contexts = {context: bit for context, bit in contexts.items() if self._wire.offers(context)}
        self.bitmap = bitmap if DIRTY in self._contexts.values() else None
        self.bitmap_problem: str | None = None
        if bitmap is not None and self.bitmap is None:
            self.bitmap_problem = f"the export has no dirty bitmap {bitmap!r}"
        self.request_size = max(min(self._wire.maximum, _REQUEST) // self._wire.unit, 1) * self._wire.unit

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """See `Source.read_many`."""
        done: deque[Request] = deque()
        parts = (part for offset, length in ranges for part in self._parts(offset, length))
        asked: dict[Request, tuple[int, int]] = {}
        pending = 0  # bytes
        part = next(parts, None)
        while part is not None or asked:
            # The window is filled before a part is handed over, so that the server works while the caller does.
            while part is not None and pending < _WINDOW:
                request = self._read_request(*part, done)
                self._wire.ask_read(request)
                asked[request] = part
                pending += request.length
                part = next(parts, None)
            self._wire.wait(done)
            request = done.popleft()
            pending -= request.length
            offset, length = asked.pop(request)
            yield offset, self._bytes_read(request)[offset - request.offset :][:length]

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"range {offset}+{length} is not inside a disk of {self.size} bytes")
        # Aligned outwards, the first part must not get longer than the server's maximum.
        head = min(length, -offset % self._wire.unit and self.request_size - offset % self._wire.unit)
        return chain(split(offset, head, self.request_size), split(offset + head, length - head, self.request_size))

    def _read_request(self, offset: int, length: int, done: "deque[Request]") -> Request:
        first, count = align(offset, length, self._wire.unit, self._export_size)
        # np.empty does not clear: 1 us for 2 MiB where bytearray takes 73.
        return Request(first, count, done, data=np.empty(count, np.uint8).data)

    def _bytes_read(self, request: Request) -> memoryview:
        self._raise_error("reading", request)
        assert request.data is not None
        return request.data

    def _raise_error(self, verb: str, request: Request) -> None:
        if request.error is None:
            return
        kind = ConnectError if request.error in _LOST else ProtocolError
        raise kind(
            f"{self.description}: {verb} {request.length} bytes at offset {request.offset} failed: "
            f"{os.strerror(request.error)} ({errno.errorcode.get(request.error, request.error)})"
        )

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `Image.readinto`."""
        # Not read into `buffer` itself: after a Ctrl-C an answer still on its way would be written there.
        target = memoryview(buffer).cast("B")
        for position, part in self.read_many([(offset, len(target))]):
            target[position - offset :][: len(part)] = part

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Image.extents`."""
        return coalesce(zero for zero, _ in self.status(offset, length))

    def dirty(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Source.dirty`."""
        if self.bitmap is None:
            raise BitmapUnusable(f"{self.description}: {self.bitmap_problem or 'no bitmap was asked for'}")
        return coalesce(dirty for _, dirty in self.status(offset, length))

    def status(self, offset: int, length: int) -> Iterator[tuple[Extent, Extent]]:
        """See `Source.status`."""
        check_range(self, offset, length)
        end = offset + length
        while offset < end:
            pairs = self._ask_status(offset, min(end - offset, _STATUS))
            yield from pairs
            offset = pairs[-1][0].end

    def _ask_status(self, offset: int, length: int) -> list[tuple[Extent, Extent]]:
        """Ask once. The pairs begin at `offset` and reach as far as the answer does."""
        known = {ZERO: [Extent(offset, length, False)], DIRTY: [Extent(offset, length, True)]}
        first, count = align(offset, length, self._wire.unit, self._export_size)
        answers = self._answers(first, count) if self._contexts else {}
        try:
            for context, bit in self._contexts.items():
                known[bit] = parse_descriptors(answers.get(context, ()), bit, first, count)
            return pair_extents(known[ZERO], known[DIRTY], offset, length)
        except ProtocolError as e:
            raise ProtocolError(f"{self.description}: {e}") from e

    def _answers(self, offset: int, length: int) -> dict[str, list[int]]:
        request = Request(offset, length, deque())
        self._wire.ask_status(request)
        self._wire.wait(request.done)
        self._raise_error("block status of", request)
        return request.answers

    def close(self) -> None:
        """See `Image.close`. Waits for nothing."""
        self._wire.close()


def _bitmap_context(bitmap: str) -> str:
    if not bitmap or not bitmap.isprintable() or len(bitmap.encode(errors="replace")) > KiB:
        raise UsageError(f"not the name of a bitmap: {bitmap!r}")
    return f"qemu:dirty-bitmap:{bitmap}"
