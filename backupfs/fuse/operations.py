"""The kernel's requests, answered: inode numbers, handles and errnos. The only `import pyfuse3`.

All of it runs on the trio thread; what blocks, the catalogue and the images, runs in worker threads.

pyfuse3 lets only FUSEError out of a handler: any other exception ends the whole mount. So `@answers` wraps every
handler. pyfuse3's own defaults are right for what is not here: FORGET is dropped; FLUSH and POLL answer ENOSYS, after
which the kernel does not ask again. Nothing waits for a FLUSH: a write is in the image when it is answered.
"""

import contextlib
import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple, cast

import pyfuse3
import trio

from backupfs.errors import BackupfsError, NotFound
from backupfs.fuse.catalogue import DiskFile, TextFile, Writable
from backupfs.fuse.complaints import Complaints
from backupfs.fuse.guest_xattrs import Xattrs
from backupfs.fuse.images import AtHand, OpenImages
from backupfs.fuse.lane import Lane
from backupfs.fuse.nodes import Attributes, Entry, GuestPart, Stale
from backupfs.fuse.tree import Tree

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_CATALOGUE_CALLS = 8  # at once; the rest waits, reads do not
_GUEST_CALLS = 6  # at once, of the guests' files on a volume: they may hang until a deadline
_TASKS = 500  # requests that pyfuse3 works on at once: more than a hung image's readers are likely to be
_GUESTS_CLOSED_S = 10.0
_XATTRS = b"user.backupfs."


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open file: its inode; its content if that is at hand; for a file of a guest, its volume."""

    inode: int
    content: bytes | None = None
    writable: bool = False
    guest: GuestPart | None = None


def answers(
    handler: Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]:
    """Let only FUSEError and trio.Cancelled out of a handler."""
    takes_inode = handler.__code__.co_varnames[1].endswith("inode")  # not a file handle, or nothing

    @functools.wraps(handler)
    async def answer(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Stale as e:
            raise pyfuse3.FUSEError(errno.ESTALE) from e
        except NotFound as e:
            raise pyfuse3.FUSEError(errno.ENOENT) from e
        except Exception as e:
            self.complaints.say(self.subject(args[0]) if takes_inode else "the mount", handler.__name__, e)
            raise pyfuse3.FUSEError(errno.EIO) from e

    return answer


class Operations(pyfuse3.Operations):
    """Answers for a tree.

    Args:
        tree: what there is.
        background: for the checks of images; lives as long as the mount.
        on_ready: called when the kernel has shaken hands: from then on the mount answers. Must not raise.
        lane: answers reads instead of pyfuse3, if there is one.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self, tree: Tree, background: trio.Nursery, on_ready: Callable[[], None], lane: Lane | None = None
    ) -> None:
        super().__init__()
        self.complaints = Complaints()
        self.images = OpenImages(
            background,
            tree.describe,
            lane.drop_pages if lane else drop_pages,
            lane.passthrough if lane else None,
        )
        self._background = background
        self._lane = lane
        self._abandoned = False
        self._tree = tree
        self._on_ready = on_ready
        self._owner = os.geteuid(), os.getegid()
        self._limiter = trio.CapacityLimiter(_CATALOGUE_CALLS)
        self._handles = itertools.count(1)
        self._files: dict[int, _Opened] = {}
        self._folders: dict[int, tuple[int, Sequence[Entry] | None]] = {}  # None: not read yet
        self._guest_limiters: dict[GuestPart, trio.CapacityLimiter] = {}

    def init(self) -> None:
        self._on_ready()

    def subject(self, inode: Any) -> str:
        """Return the path of an inode, for messages."""
        try:
            return self._tree.describe(inode)
        except NotFound:
            return f"inode {inode}"

    @property
    def abandoned(self) -> bool:
        """Whether a thread may still be in the catalogue or in an image: they must not be closed then."""
        return self._abandoned or self.images.abandoned or self._tree.guests.disks.busy

    async def _ask(self, call: Callable[[*Ts], R], *args: *Ts, of: GuestPart | None = None) -> R:
        """Have a call done in a thread; `of` which volume of a guest it asks, if it does."""
        limiter = self._limiter
        if of is not None:
            limiter = self._guest_limiters.setdefault(of, trio.CapacityLimiter(_GUEST_CALLS))
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=limiter, abandon_on_cancel=True)
        except trio.Cancelled:
            self._abandoned = True
            raise
        finally:
            if of is not None and not limiter.borrowed_tokens:
                self._guest_limiters.pop(of, None)

    async def close_idle_guests(self) -> None:
        """Close the guests' disks that nobody looks at any more, again and again."""
        while True:
            await trio.sleep(_GUESTS_CLOSED_S)
            await self._ask(self._tree.guests.disks.close_idle)

    def _reply(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        reply = pyfuse3.EntryAttributes()
        reply.st_ino = attributes.inode
        reply.generation = 0
        reply.st_mode = attributes.mode
        reply.st_nlink = attributes.nlink
        reply.st_uid, reply.st_gid = self._owner
        reply.st_size = attributes.size
        reply.st_blocks = -(-attributes.allocated // 512)
        reply.st_blksize = 65536
        reply.st_atime_ns = reply.st_mtime_ns = reply.st_ctime_ns = attributes.time_ns
        guest = attributes.guest
        if guest is not None:
            reply.st_uid, reply.st_gid, reply.st_rdev = guest.uid, guest.gid, guest.rdev
            reply.st_atime_ns, reply.st_ctime_ns = guest.atime_ns, guest.ctime_ns
        reply.attr_timeout = reply.entry_timeout = attributes.timeout_s
        return reply

    @answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._reply(
            await self._ask(self._tree.lookup, parent_inode, name, of=self._tree.guest_part(parent_inode))
        )

    @answers
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._reply(await self._ask(self._tree.attributes, inode, of=self._tree.guest_part(inode)))

    @answers
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._ask(self._tree.target, inode, of=self._tree.guest_part(inode))

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        usage = await self._ask(self._tree.catalogue.usage)
        reply = pyfuse3.StatvfsData()
        reply.f_bsize, reply.f_frsize = usage.f_bsize, usage.f_frsize
        reply.f_blocks, reply.f_bfree, reply.f_bavail = usage.f_blocks, usage.f_bfree, usage.f_bavail
        reply.f_files, reply.f_ffree, reply.f_favail = usage.f_files, usage.f_ffree, usage.f_favail
        reply.f_namemax = 255
        return reply

    @answers
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        handle = next(self._handles)
        self._folders[handle] = inode, None
        return handle

    @answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        # A cookie is a place in a listing that does not change: points may come and go in between. Reading from the
        # start, as rewinddir does, takes a new one. The first question need not be for the start: of a guest's folder
        # the kernel may have kept that, and lost the rest.
        inode, entries = self._folders[fh]
        if start_id == 0 or entries is None:
            entries = await self._ask(self._tree.entries, inode, of=self._tree.guest_part(inode))
            self._folders[fh] = inode, entries
        for cookie in range(start_id, len(entries)):
            entry = entries[cookie]
            if not pyfuse3.readdir_reply(token, entry.name, self._reply(entry.attributes), cookie + 1):
                break

    @answers
    async def releasedir(self, fh: int) -> None:
        del self._folders[fh]

    @answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        changes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        guest = self._tree.guest_part(inode)
        if changes and guest:
            raise pyfuse3.FUSEError(errno.EROFS)
        file = await self._ask(self._tree.file, inode, of=guest)
        if _is_writable(file) and ctx.uid not in (0, self._owner[0]):
            raise pyfuse3.FUSEError(errno.EACCES)  # the kernel does not look at modes here: mountpoint.py
        if changes and not _is_writable(file):
            raise pyfuse3.FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EPERM)  # a disk stays as long as it is
        if isinstance(file, DiskFile):
            try:
                await self.images.acquire(inode, file)
            except Stale:
                raise
            except NotFound as e:
                await self._ask(self._tree.file, inode)  # Stale: the point has just gone
                # The name is there, so it is a part of the content that is missing.
                self.complaints.say(self.subject(inode), "open", e)
                raise pyfuse3.FUSEError(errno.EIO) from e
        handle = next(self._handles)
        live = isinstance(file, DiskFile) and file.live
        if isinstance(file, TextFile):
            self._files[handle] = _Opened(inode, content=file.content)
        else:
            self._files[handle] = _Opened(inode, writable=_is_writable(file), guest=None if file else guest)
        if self._lane and file and not live:  # before the kernel has the handle
            held = AtHand(file.content) if isinstance(file, TextFile) else self.images.held(inode)
            self._lane.add(handle, inode, held)
        # keep_cache: an inode number never stands for other content (tree.py). Of a live disk nothing is kept at all,
        # and its reads are not those of the background, of which the kernel has only 12 in flight for all files.
        return pyfuse3.FileInfo(fh=handle, keep_cache=not live, direct_io=live)

    @answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        opened = self._files[fh]
        if opened.content is not None:
            return opened.content[off : off + size]
        try:
            if opened.guest is not None:
                return await self._ask(self._tree.guests.read, opened.inode, off, size, of=opened.guest)
            # pyfuse3 takes any buffer: a copy of 1 MiB would only cost time.
            return cast(bytes, await self.images.read(opened.inode, off, size))
        except Exception as e:
            self.complaints.say(self.subject(opened.inode), f"read of {size} bytes at {off}", e)
            raise pyfuse3.FUSEError(errno.EIO) from e

    @answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write where there is no lane, which takes it otherwise, and says the same."""
        opened = self._files[fh]
        size = (await self._ask(self._tree.attributes, opened.inode)).size
        if off + len(buf) > size and off >= size:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        data = buf[: size - off]
        await self._change(opened.inode, "write", lambda image: image.write(off, data))
        return len(data)

    @answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        opened = self._files[fh]
        if opened.writable:
            await self._change(opened.inode, "fsync", lambda image: image.flush())

    async def _change(self, inode: int, doing: str, call: Callable[[Writable], None]) -> None:
        try:
            await self.images.change(inode, call)
        except OSError as e:
            self.complaints.say(self.subject(inode), doing, BackupfsError(e.strerror or str(e)))
            raise pyfuse3.FUSEError(e.errno or errno.EIO) from e
        except Exception as e:
            self.complaints.say(self.subject(inode), doing, e)
            raise pyfuse3.FUSEError(errno.EIO) from e

    @answers
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Take a size that it has already, and times, which are not kept. Nothing else changes."""
        if self._tree.guest_part(inode):
            raise pyfuse3.FUSEError(errno.EROFS)
        attributes = await self._ask(self._tree.attributes, inode)
        try:
            file = await self._ask(self._tree.file, inode)
        except Stale as e:
            raise pyfuse3.FUSEError(errno.EROFS) from e
        if not _is_writable(file):
            raise pyfuse3.FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != attributes.size:
            raise pyfuse3.FUSEError(errno.EPERM)
        return self._reply(attributes)

    @answers
    async def release(self, fh: int) -> None:
        opened = self._files.pop(fh)
        if self._lane:
            await self._lane.remove(fh)
        if opened.content is None and opened.guest is None:
            await self.images.release(opened.inode)

    # What the lane leaves to others (lane.Others).

    def start_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        self._background.start_soon(self._answer_read, unique, handle, offset, size)

    def start_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        self._background.start_soon(self._answer_seek, unique, handle, offset, whence)

    def xattrs_at_hand(self, inode: int) -> Xattrs | None:
        return self._tree.xattrs_at_hand(inode)

    def xattrs(self, inode: int) -> Xattrs:
        return self._tree.guest_xattrs(inode)

    def is_guests(self, inode: int) -> bool:
        try:
            return self._tree.guest_part(inode) is not None
        except Stale:
            return True  # who is asked next says so

    def volume_number(self, inode: int) -> int | None:
        return self._tree.volume_number(inode)

    def small_content(self, inode: int) -> bytes | None:
        return self._tree.small_content(inode)

    def small_at_hand(self, inode: int) -> tuple[bytes | None, bool]:
        return self._tree.small_at_hand(inode)

    def read_on(self, inode: int) -> None:
        self._tree.read_on(inode)

    def is_constant(self, inode: int) -> bool:
        return self._tree.is_constant(inode)

    def complain(self, inode: int, doing: str, error: Exception) -> None:
        self.complaints.say(self.subject(inode), doing, error)

    async def _answer_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        assert self._lane, "it asks"
        with self._refusing(unique):
            content = await self.read(handle, offset, size)
            self._lane.answer(unique, [content], len(content))

    async def _answer_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        assert self._lane, "it asks"
        opened = self._files.get(handle)
        with self._refusing(unique):
            try:
                if opened is None:
                    raise OSError(errno.EBADF, "no such file is open")
                if opened.guest is not None:
                    found = await self._ask(self._tree.guests.seek, opened.inode, offset, whence, of=opened.guest)
                elif opened.content is None:
                    found = await self.images.seek(opened.inode, offset, whence)
                elif offset >= len(opened.content):
                    raise OSError(errno.ENXIO, "not inside the file")
                else:
                    found = len(opened.content) if whence == os.SEEK_HOLE else offset
            except OSError as e:
                raise pyfuse3.FUSEError(e.errno or errno.EIO) from e
            self._lane.answer_seek(unique, found)

    @contextlib.contextmanager
    def _refusing(self, unique: int) -> Iterator[None]:
        """Answer with an errno what raises."""
        assert self._lane, "it asks"
        try:
            yield
        except pyfuse3.FUSEError as e:
            self._lane.refuse(unique, e.errno)
        except trio.Cancelled:
            self._lane.refuse(unique, errno.ENOTCONN)
            raise
        except Exception as e:  # noqa: BLE001, it would end the mount
            self.complaints.say("the mount", "a read", e)
            self._lane.refuse(unique, errno.EIO)

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if self._tree.guest_part(inode) is not None:
            xattrs = await self._guest_xattrs(inode)
            value = xattrs.values.get(name)
            if value is None:
                raise pyfuse3.FUSEError(xattrs.missing(name))
            return value
        if name.startswith(_XATTRS):  # `ls -l` and `cp -a` ask for security.* and system.* of every file: no
            value = (await self._xattrs(inode)).get(name)
            if value is not None:
                return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    @answers
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        if self._tree.guest_part(inode) is not None:
            return list((await self._guest_xattrs(inode)).values)
        return list(await self._xattrs(inode))

    async def _guest_xattrs(self, inode: int) -> Xattrs:
        known = self._tree.xattrs_at_hand(inode)
        if known is None:
            known = await self._ask(self._tree.guest_xattrs, inode, of=self._tree.guest_part(inode))
        return known

    async def _xattrs(self, inode: int) -> dict[bytes, bytes]:
        try:
            file = await self._ask(self._tree.file, inode)
        except Stale:
            return {}  # folders have none either
        return {k.encode(): v for k, v in file.xattrs.items()} if isinstance(file, DiskFile) else {}


def _is_writable(file: DiskFile | TextFile | None) -> bool:
    return isinstance(file, DiskFile) and file.written is not None


async def _refuse(*_: Any) -> None:
    raise pyfuse3.FUSEError(errno.EROFS)


# The kernel refuses most of these itself on a read-only mount. pyfuse3's own answer, ENOSYS, would be a riddle.
_CHANGES = "mknod mkdir unlink rmdir symlink rename link create setxattr removexattr"
for _name in _CHANGES.split():
    setattr(Operations, _name, _refuse)


def drop_pages(inode: int) -> None:
    """Make the kernel forget what it has cached of an inode. May block: never from a handler, only in a thread."""
    with contextlib.suppress(OSError):  # ENOENT: the kernel does not know the inode any more
        pyfuse3.invalidate_inode(inode)


def attach(operations: Operations, device: int) -> None:
    """Answer at `device`, an open /dev/fuse that is mounted already. libfuse closes it, in `detach`.

    Source: libfuse's fuse_mnt_parse_fuse_fd: a mount point `/dev/fd/N` is taken as an open device.
    """
    pyfuse3.init(operations, f"/dev/fd/{device}", set())


async def serve() -> None:
    """Answer requests until the mount is taken away, or `stop` is called."""
    await pyfuse3.main(max_tasks=_TASKS)


def stop() -> None:
    """Make `serve` return once the requests that are being answered are. On the trio thread."""
    pyfuse3.terminate()


def detach() -> None:
    """Close the device. A mount that is still there is dead from now on."""
    pyfuse3.close(unmount=False)
