"""What a backup job of QEMU's or libvirt's leaves behind (push mode): a qcow2 file of the clusters that it copied.

A full job writes every cluster, an incremental one those that were dirty; zero ones are written down as zero. So what
is allocated in the file itself is what changed, and the rest is as it was at the moment that the increment goes on
from. Nothing in the file says which moment that is, or that the job came to its end: who hands it over has to know.

    file     ##----##---0      # data, 0 zero, - not in the file
    base     aaaaaaaaaaaaaa    the disk as it was
    Overlay  ##aaaa##aaa0aa
"""

import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from urllib.parse import quote

from backupfs.errors import ConnectError, SourceError
from backupfs.extents import Extent, clip, coalesce
from backupfs.image import Buffer, Image
from backupfs.sources.child import Child
from backupfs.sources.export import NbdSource
from backupfs.sources.qemu_nbd import FileSource, file_size, keep_writers_out, listening
from backupfs.sources.source import split

PUSHED = "pushed"  # in the place of a bitmap's name
_DEPTH = "qemu:allocation-depth"  # 0: not in the file; without a backing file the only other one is 1
_HEADER = struct.Struct(">4sI64xQ")  # magic, version, incompatible features. Source: QEMU docs/interop/qcow2.txt
_EXTERNAL_DATA = 1 << 2


class PushedSource(FileSource):
    """A pushed file, without its backing file. Made by `open_pushed` only.

    A Source whose `dirty` tells what is in the file. The rest can't be read: `read_many` refuses, as zeroes would be
    wrong. Lay it over the disk as it was (Overlay) to read everything.

    Attributes:
        complete: all of the disk is in the file, as a full job leaves it.
    """

    def __init__(self, uri: str, timeout_s: float, path: str) -> None:
        NbdSource.__init__(self, uri, PUSHED, timeout_s, description=path, dirty=_DEPTH)
        self.undo = ExitStack()
        self.format = "qcow2"
        if self.bitmap_problem is not None:
            self.close()
            raise ConnectError(f"{path}: qemu-nbd does not tell {_DEPTH}; that of QEMU 5.2 and later does")
        self.complete = all(extent.flag for extent in self.dirty(0, self.size))

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """See `Source.read_many`. Raises ValueError for what is not in the file."""

        def checked() -> Iterator[tuple[int, int]]:
            for offset, length in ranges:
                for extent in self.dirty(offset, length):
                    if not extent.flag:
                        raise ValueError(f"{self.description}: {extent.length} bytes at {extent.offset} are not in it")
                yield offset, length

        return super().read_many(checked())


def open_pushed(path: str, timeout_s: float) -> PushedSource:
    """Open a file that a push-mode backup wrote. Neither its backing file nor another one that it names is opened.

    Args:
        path: a qcow2 file.
        timeout_s: for qemu-nbd to be ready, and for each answer.

    Raises:
        ConnectError: it can't be opened, is still being written, or is no such file.
    """
    full = path if path.startswith("/") else os.path.join(os.getcwd(), path)
    file_size(path, full)
    with ExitStack() as undo:
        fd = keep_writers_out(path, full)
        undo.callback(os.close, fd)
        _check_header(path, fd)
        # By our descriptor: a path may have anything in it, JSON has not; and it is the file that was looked at.
        file = {"driver": "file", "filename": f"/proc/{os.getpid()}/fd/{fd}"}
        image = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file})
        command = ["qemu-nbd", "--read-only", "--allocation-depth", "--shared=8", "--cache=writeback", "--", image]
        with listening() as (listener, address):
            child = Child(command, listener)
            undo.callback(child.stop)
            try:
                source = PushedSource(f"nbd+unix:///?socket={quote(address)}", timeout_s, path)
            except SourceError as e:
                words = child.stop().removeprefix("qemu-nbd: ").replace(image, path)
                raise ConnectError(f"{path}: qemu-nbd does not serve it: {words or e}") from e
        source.undo = undo.pop_all()
    return source


def _check_header(path: str, fd: int) -> None:
    """Refuse what is no qcow2, or has its data in a file that it names: that could be any file of this machine."""
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(b"QFI\xfb"):
        raise ConnectError(f"{path}: is no qcow2 file: libvirt's push mode and QEMU's backup jobs write such")
    _, version, features = _HEADER.unpack(header)
    if version >= 3 and features & _EXTERNAL_DATA:
        raise ConnectError(f"{path}: has its data in another file, which a backup job does not do")


class Overlay:
    """A pushed file over the disk as it was when the increment began: the disk as it was after. A Source.

    Args:
        pushed: closed with the overlay.
        base: the disk as it was; not closed. Beyond its end there are zeroes.
    """

    def __init__(self, pushed: PushedSource, base: Image) -> None:
        self._pushed = pushed
        self._base = base
        self.size, self.description, self.format = pushed.size, pushed.description, pushed.format
        self.request_size = pushed.request_size
        self.bitmap, self.bitmap_problem = pushed.bitmap, pushed.bitmap_problem

    def dirty(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Source.dirty`: what is in the file."""
        return self._pushed.dirty(offset, length)

    def status(self, offset: int, length: int) -> Iterator[tuple[Extent, Extent]]:
        """See `Source.status`."""
        for zero, dirty in self._pushed.status(offset, length):
            if dirty.flag:
                yield zero, dirty
                continue
            for extent in self._base_extents(zero.offset, zero.length):
                yield extent, Extent(extent.offset, extent.length, False)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Image.extents`."""
        return coalesce(zero for zero, _ in self.status(offset, length))

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """See `Source.read_many`. Parts that are not wholly in the file are put together one by one."""
        others: deque[list[Extent]] = deque()

        def whole() -> Iterator[tuple[int, int]]:
            for offset, length in ranges:
                for part in self._parts(offset, length):
                    if all(extent.flag for extent in part):
                        yield part[0].offset, part[-1].end - part[0].offset
                    else:
                        others.append(part)

        for offset, content in self._pushed.read_many(whole()):
            yield offset, content
            while others:
                yield self._mixed(others.popleft())
        while others:
            yield self._mixed(others.popleft())

    def _parts(self, offset: int, length: int) -> Iterator[list[Extent]]:
        """Cut a range into parts of `request_size`; each as what is in the file and what is not."""
        cut = (
            Extent(piece, size, extent.flag)
            for extent in self._pushed.dirty(offset, length)
            for piece, size in _cut(extent.offset, extent.length, offset, self.request_size)
        )
        for _, part in groupby(cut, key=lambda extent: (extent.offset - offset) // self.request_size):
            yield list(part)

    def _mixed(self, part: list[Extent]) -> tuple[int, memoryview]:
        begin = part[0].offset
        content = memoryview(bytearray(part[-1].end - begin))
        for extent in part:
            target = content[extent.offset - begin :][: extent.length]
            if extent.flag:
                self._pushed.readinto(extent.offset, target)
            else:
                inside = max(0, min(extent.end, self._base.size) - extent.offset)
                if inside:
                    self._base.readinto(extent.offset, target[:inside])
        return begin, content

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `Image.readinto`."""
        target = memoryview(buffer).cast("B")
        for position, part in self.read_many([(offset, len(target))]):
            target[position - offset :][: len(part)] = part

    def _base_extents(self, offset: int, length: int) -> Iterator[Extent]:
        inside = max(0, min(offset + length, self._base.size) - offset)
        if inside:
            yield from clip(self._base.extents(offset, inside), offset, inside)
        if inside < length:
            yield Extent(offset + inside, length - inside, True)

    def close(self) -> None:
        """See `Image.close`."""
        self._pushed.close()


def _cut(offset: int, length: int, origin: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of `unit`, counted from `origin`."""
    head = min(length, -(offset - origin) % unit)
    if head:
        yield offset, head
    yield from split(offset + head, length - head, unit)
