"""The images that are open in a mount, one for each inode however often it is open. On the trio thread only.

Everything that blocks, the opening, reading, checking and closing of an Image, is done in worker threads. A read that
hangs holds one of its image's own threads, so files of other images go on being answered. A live image, which may hang
until its deadline, has threads that do not count among the others', for opening too.

An image is closed when its last user has let it go; a check that still runs is a user. Only the end of the mount
cancels a call. Its thread is then left to itself and `abandoned` set: the repository must not be closed under its feet.
"""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from backupfs.errors import BackupfsError
from backupfs.fuse.catalogue import DiskFile, Lender, Writable
from backupfs.fuse.passthrough import Passthrough
from backupfs.image import Buffer, BytesImage, Image, seek

log = logging.getLogger(__name__)

T = TypeVar("T")

READS_OF_AN_IMAGE = 8
READS_OF_A_LIVE_IMAGE = 16
READS_AT_ONCE = 32
"""Of all images together: each holds a buffer of up to 1 MiB, the largest READ of the kernel."""
_CALLS_AT_ONCE = 8


class Condemned(BackupfsError):
    """The image's check failed: none of its bytes can be trusted."""


@dataclass(slots=True)
class _Shared:
    """An image and those who use it."""

    limiter: trio.CapacityLimiter
    users: int = 0  # handles, and a check that runs
    handles: int = 0
    image: Image | None = None
    lender: Lender | None = None  # the same, if it is one
    condemned: Exception | None = None
    backing: int | None = None  # of the raw file that the kernel reads instead, 0: none; None: not chosen yet
    opening: trio.Lock = field(default_factory=trio.Lock)


class AtHand:
    """A small file whose content is at hand, as an image that is open (workers.Held)."""

    condemned: Exception | None = None
    backing: int | None = None

    def __init__(self, content: bytes) -> None:
        self.image: Image | None = BytesImage(content)


class OpenImages:
    """Opens, shares, reads, checks and closes images.

    Args:
        background: runs the checks.
        describe: names an inode, for messages.
        drop_pages: makes the kernel forget what it has cached of an inode; called in a thread.
        passthrough: has the kernel read raw files by itself.
    """

    def __init__(
        self,
        background: trio.Nursery,
        describe: Callable[[int], str],
        drop_pages: Callable[[int], None],
        passthrough: Passthrough | None = None,
    ) -> None:
        self.abandoned = False
        self._background = background
        self._describe = describe
        self._drop_pages = drop_pages
        self._passthrough = passthrough
        self._shared: dict[int, _Shared] = {}
        self._checked: set[int] = set()
        self._condemned: dict[int, Exception] = {}
        self._reads = trio.CapacityLimiter(READS_AT_ONCE)
        self._calls = trio.CapacityLimiter(_CALLS_AT_ONCE)
        self._checks = trio.CapacityLimiter(1)  # it takes a processor for seconds: never two of them

    async def acquire(self, inode: int, file: DiskFile) -> None:
        """Open the image, or use it with others. Each call needs a `release`, unless it raised.

        Raises:
            BackupfsError: it can't be opened.
        """
        if inode in self._condemned:
            raise Condemned(f"the image can't be trusted: {self._condemned[inode]}")
        shared = self._shared.get(inode)
        if shared is None:
            limiter = trio.CapacityLimiter(READS_OF_A_LIVE_IMAGE if file.live else READS_OF_AN_IMAGE)
            shared = self._shared[inode] = _Shared(limiter)
        shared.users += 1
        shared.handles += 1
        try:
            async with shared.opening:
                if shared.image is None:
                    image = await self._in_thread(file.open, shared.limiter if file.live else self._calls)
                    shared.image, shared.lender = image, image if isinstance(image, Lender) else None
                    self._start_check(inode, shared, file)
                if shared.backing is None:
                    shared.backing = await self._choose_way(file)
        except BaseException:
            await self.release(inode)
            raise

    async def release(self, inode: int) -> None:
        """Let the image go; the last one closes it."""
        shared = self._shared[inode]
        shared.handles -= 1
        if not shared.handles:
            backing, shared.backing = shared.backing, None
            if backing and self._passthrough:
                # It may be the last hold on a large file that has no name any more.
                await self._in_thread(partial(self._passthrough.forget, backing), self._calls)
        await self._let_go(inode, shared)

    async def _let_go(self, inode: int, shared: _Shared) -> None:
        shared.users -= 1
        if not shared.users:
            del self._shared[inode]
            if shared.image is not None:
                try:
                    await self._in_thread(shared.image.close, self._calls)
                except Exception:
                    log.exception("%s: closing failed", self._describe(inode))

    async def read(self, inode: int, offset: int, length: int) -> Buffer:
        """Return the bytes of the range, cut at the disk's end: in full, never fewer.

        Raises:
            Condemned: the check found that the image can't be trusted.
            Exception: whatever the Image raises.
        """
        shared = self._shared[inode]
        image = shared.image
        assert image is not None, "acquired"
        length = max(0, min(length, image.size - offset))
        if not length:
            return bytearray()

        lender = shared.lender
        if lender is not None:
            at_hand = lender.lend_at_once(offset, length)
            if at_hand is not None:
                return at_hand
            return await self._in_thread(lambda: lender.lend(offset, length), shared.limiter)

        def read() -> bytearray:
            buffer = bytearray(length)
            image.readinto(offset, buffer)
            return buffer

        _refuse_condemned(shared)
        async with shared.limiter:
            content = await self._in_thread(read, self._reads)
        _refuse_condemned(shared)  # it may have been found out in the meantime
        return content

    async def change(self, inode: int, call: Callable[[Writable], None]) -> None:
        """Write to an image, or flush it.

        Raises:
            OSError: it can't be written to; the errno is for who writes.
            Exception: whatever else the Image raises.
        """
        shared = self._shared[inode]
        image = shared.image
        if not isinstance(image, Writable):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        _refuse_condemned(shared)
        async with shared.limiter:
            await self._in_thread(partial(call, image), self._reads)

    async def _choose_way(self, file: DiskFile) -> int:
        """Find out who reads the image, for all handles until there is none any more: see passthrough.py."""
        if self._passthrough is None or file.raw is None:
            return 0
        return await self._in_thread(partial(self._passthrough.register, file.raw), self._calls)

    def _start_check(self, inode: int, shared: _Shared, file: DiskFile) -> None:
        if file.check is not None and inode not in self._checked:
            shared.users += 1
            self._background.start_soon(self._check, inode, shared, file)

    async def _check(self, inode: int, shared: _Shared, file: DiskFile) -> None:
        check, image = file.check, shared.image
        assert check is not None, "started for one"
        assert image is not None, "open"
        try:
            await self._in_thread(lambda: check(image), self._checks)
            self._checked.add(inode)
        except Exception as e:  # noqa: BLE001, a check that can't be done is no reason to end the mount
            shared.condemned = self._condemned[inode] = e
            log.error("%s: every read of it fails from now on: %s", self._describe(inode), e)
            # Later reads are refused; what earlier ones left in the page cache would still be served by the kernel.
            await self._in_thread(lambda: self._drop_pages(inode), self._checks)
        finally:
            await self._let_go(inode, shared)

    def held(self, inode: int) -> _Shared:
        """Return an image that was acquired, for who reads it without `read`: see there for what to refuse."""
        return self._shared[inode]

    async def seek(self, inode: int, offset: int, whence: int) -> int:
        """Return where data or a hole begins; see `image.seek`."""
        shared = self._shared[inode]
        image = shared.image
        assert image is not None, "acquired"
        _refuse_condemned(shared)
        if shared.lender is not None:
            return await self._in_thread(lambda: seek(image, offset, whence), shared.limiter)
        async with shared.limiter:
            return await self._in_thread(lambda: seek(image, offset, whence), self._reads)

    async def _in_thread(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        try:
            return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
        except trio.Cancelled:
            self.abandoned = True
            raise


def _refuse_condemned(shared: _Shared) -> None:
    if shared.condemned is not None:
        raise Condemned(f"the image can't be trusted: {shared.condemned}")
