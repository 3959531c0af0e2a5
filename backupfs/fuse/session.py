"""A mount's life: mount, answer until somebody ends it, unmount. On the main thread of a process of its own.

It ends well, and `run` returns, when the mount is taken away from outside, or on SIGTERM, SIGINT or SIGHUP, which take
it away from inside. When it crashes, the mount is left there, dead (ENOTCONN): an empty folder in its place would make
rsync delete a mirror. The next start cleans up (mountpoint.py).
"""

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import trio

from backupfs.errors import MountError
from backupfs.fuse import acls, mountpoint
from backupfs.fuse.catalogue import Catalogue
from backupfs.fuse.lane import Lane
from backupfs.fuse.operations import Operations, attach, detach, serve, stop
from backupfs.fuse.tree import Tree

log = logging.getLogger(__name__)

_NO_LANE = "BACKUPFS_NO_READ_LANE"  # for tests: set, pyfuse3 answers reads
_GRACE_S = 5.0  # what a signal leaves the requests that are being answered, and the end the checks of images

# What the mount is anyway, and what mount(8) passes on by itself: "rw" for an fstab line that does not say "ro".
_OPTIONS = """
    ro rw nosuid suid nodev dev noexec exec default_permissions defaults sync async lazytime nolazytime silent loud
    atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime mand nomand
    auto noauto nofail user nouser users owner group _netdev
"""
_WITHOUT_EFFECT = frozenset(_OPTIONS.split())
OPTIONS = ("allow_other", "no_passthrough", "keep_scratch")
"""What there is to choose."""
SCRATCH = "scratch="
"""The same, and a folder follows."""
_PREFIXES_WITHOUT_EFFECT = ("x-", "X-", "comment=")


def check_options(options: Sequence[str]) -> frozenset[str]:
    """Check what came with `-o`; each may be a list with commas. Return those of OPTIONS and SCRATCH among it.

    Raises:
        MountError: an option is not known, or contradicts another.
    """
    found = set[str]()
    given = [part for text in options for part in text.split(",") if part]
    scratches = {option for option in given if option.startswith(SCRATCH)}
    if len(scratches) > 1 or (scratches and "ro" in given):
        raise MountError(f"mount options {','.join(given)}: one {SCRATCH}FOLDER, and no ro beside it")
    for option in given:
        if option in OPTIONS or option in scratches:
            found.add(option)
        elif option not in _WITHOUT_EFFECT and not option.startswith(_PREFIXES_WITHOUT_EFFECT):
            known = ", ".join((*OPTIONS, f"{SCRATCH}FOLDER"))
            raise MountError(f"mount option {option!r} is not known; what there is to choose is {known}")
    return frozenset(found)


def run(
    catalogue: Catalogue,
    path: str,
    *,
    source: str,
    allow_other: bool,
    on_ready: Callable[[], None],
    passthrough: bool = True,
    writable: bool = False,
) -> bool:
    """Mount the catalogue at `path` and answer until the mount ends.

    Args:
        catalogue: what to show.
        path: a folder.
        source: what `mount` and `df` show as the device.
        allow_other: let other users in.
        on_ready: called once, when the mount answers. When it raises OSError the mount ends.
        passthrough: have the kernel read the files by itself for which the catalogue has a raw file, where it can.
        writable: the catalogue has files that can be written to.

    Returns:
        Whether all calls of the catalogue and of its images have returned. If not, a thread hangs in one, and nothing
        that they use may be closed.

    Raises:
        MountError: it can't be mounted, or it ended for no good reason.
    """
    path = mountpoint.resolve(path)
    mountpoint.prepare(path)
    device = partial(mountpoint.open_device, path, source, allow_other=allow_other, writable=writable)
    return trio.run(partial(_live, catalogue, path, device, allow_other, on_ready, passthrough=passthrough))


async def _live(
    catalogue: Catalogue,
    path: str,
    open_device: Callable[[], int],
    allow_other: bool,
    on_ready: Callable[[], None],
    *,
    passthrough: bool,
) -> bool:
    tree = Tree(catalogue, readable_by_all=allow_other)
    # The signals first: one that comes between mount(2) and here would leave a dead mount.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        device = open_device()
        mounted = mountpoint.find(path)
        attached, lane = False, None
        try:
            async with trio.open_nursery() as nursery:

                def ready() -> None:
                    try:
                        on_ready()
                    except OSError as e:
                        log.error("%s: who started the mount is gone (%s); unmounting", path, e)
                        os.kill(os.getpid(), signal.SIGTERM)

                async with trio.open_nursery() as in_progress:
                    operations, lane = _attach(
                        lambda lane: Operations(tree, in_progress, ready, lane),
                        device,
                        passthrough=passthrough,
                        keep_acls=not allow_other and acls.passes_permissions(),
                    )
                    attached = True
                    nursery.start_soon(operations.close_idle_guests)
                    nursery.start_soon(_end_on_signal, signals, path, mounted, nursery.cancel_scope)
                    if lane:
                        lane.start(operations, lambda: mountpoint.raise_readahead(mounted), stop)
                    await serve()
                    if lane:
                        await lane.finish()
                    in_progress.cancel_scope.deadline = trio.current_time() + _GRACE_S
                nursery.cancel_scope.cancel()
        except Exception as e:
            log.exception("%s: the mount has crashed", path)
            raise MountError(f"{path}: the mount has crashed: {e!r}") from e
        finally:
            if attached:
                detach()
            else:
                os.close(device)
            if lane:
                lane.close()
    if operations.abandoned or (lane and lane.reading):
        return False
    tree.guests.disks.close_idle(0)
    return True


def _attach(
    operations: Callable[[Lane | None], Operations], device: int, *, passthrough: bool, keep_acls: bool
) -> tuple[Operations, Lane | None]:
    """Have libfuse answer behind a lane; or, when that can't be, at the device itself, which is slower."""
    if not os.environ.get(_NO_LANE):
        lane = None
        try:
            lane = Lane(device, passthrough=passthrough, keep_acls=keep_acls)
            with_lane = operations(lane)
            attach(with_lane, lane.session)
            return with_lane, lane
        except (OSError, RuntimeError) as e:
            log.warning("reads are slower than they could be, without the read lane: %s", e)
            if lane:
                lane.give_up()
    alone = operations(None)
    attach(alone, device)
    return alone, None


async def _end_on_signal(
    signals: AsyncIterator[int], path: str, mounted: mountpoint.Mounted | None, everything: trio.CancelScope
) -> None:
    async for number in signals:
        log.info("%s: %s: unmounting", path, signal.Signals(number).name)
        break
    # Requests go on being answered meanwhile: unmounting must never wait for ourselves.
    await trio.to_thread.run_sync(_detach_ours, path, mounted)
    stop()
    with trio.move_on_after(_GRACE_S):
        async for _ in signals:
            break  # a second one: no grace
    log.warning("%s: requests are still being answered; leaving them", path)
    everything.cancel()


def _detach_ours(path: str, mounted: mountpoint.Mounted | None) -> None:
    """Take our mount away unless somebody did, or mounted something over it."""
    now = mountpoint.find(path)
    if now is None or mounted is None or now.mount_id != mounted.mount_id:
        return
    try:
        mountpoint.detach(path)
    except MountError as e:
        log.warning("%s", e)
