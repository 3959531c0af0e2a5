"""Passthrough: the kernel reads a disk from a raw file by itself, and no READ comes to us. Linux >= 6.9, root.

INIT agrees on it; a raw file is registered at the device, which gives an id; OPEN's answer carries the id. libfuse 3.14
knows nothing of this, so the lane has libfuse's answers of the two amended on their way to the kernel.

The kernel wants all handles of an inode that are open at a time to be alike: either none is in passthrough, or all are,
with the same id; it refuses others (EIO). So the way is chosen when an inode is first opened, and kept until its
last handle is released (images.py). The kernel lets go of a handle before it sends RELEASE: what is released for us is
released for it, and what is not yet released for us gets the same way again, which is right for both.

Source: Linux, fs/fuse/iomode.c, fs/fuse/passthrough.c, fs/fuse/backing.c.
"""

import fcntl
import logging
import os
from collections.abc import Callable

from backupfs.fuse import kernel
from backupfs.fuse.kernel import ANSWER

log = logging.getLogger(__name__)

_STACK_DEPTH = 1  # ours; with 2 raw files on overlayfs would do, but no overlayfs could be put on the mount


class Passthrough:
    """What the kernel reads by itself in one mount. `register` and `forget` are called in threads.

    Args:
        device: the FUSE device.
        wanted: False: all reads are to come to us.
    """

    def __init__(self, device: int, *, wanted: bool = True) -> None:
        self._device = device
        self._wanted = wanted and os.geteuid() == 0
        self._agreed = False
        self._told = False
        self._amended: dict[int, int] = {}  # unique -> opcode of what libfuse is answering

    def note(self, opcode: int, unique: int, request: bytearray) -> None:
        """Look at an INIT or an OPEN on its way to libfuse. In the reader thread."""
        if opcode == kernel.INIT:
            flags, flags2 = kernel.INIT_REQUEST.unpack_from(request)
            if not (self._wanted and flags & kernel.INIT_EXT and flags2 & kernel.PASSTHROUGH):
                return
        elif not self._agreed:
            return
        self._amended[unique] = opcode

    def amend(self, answer: bytearray, backing_of: Callable[[int], int]) -> None:
        """Amend libfuse's answer, if it is one of an INIT or an OPEN. In the relay thread.

        Args:
            answer: changed in place.
            backing_of: returns the id of the raw file for a handle, 0: none.
        """
        _, error, unique = ANSWER.unpack_from(answer)
        opcode = self._amended.pop(unique, None)
        if opcode is None or error:
            return
        if opcode == kernel.INIT:
            (flags,) = kernel.SIZE.unpack_from(answer, kernel.INIT_FLAGS_AT)
            flags2, _ = kernel.INIT_FLAGS2.unpack_from(answer, kernel.INIT_FLAGS2_AT)
            # Without INIT_EXT nobody wrote flags2, and it counted for nothing.
            flags2 = kernel.PASSTHROUGH | (flags2 if flags & kernel.INIT_EXT else 0)
            kernel.SIZE.pack_into(answer, kernel.INIT_FLAGS_AT, flags | kernel.INIT_EXT)
            kernel.INIT_FLAGS2.pack_into(answer, kernel.INIT_FLAGS2_AT, flags2, _STACK_DEPTH)
            self._agreed = True
            return
        handle = kernel.OPEN_ANSWER.unpack_from(answer)[3]
        backing = backing_of(handle)
        if backing:
            # The kernel refuses KEEP_CACHE beside it. A FLUSH would make close(2) fail when the mount is gone.
            flags = kernel.FOPEN_PASSTHROUGH | kernel.FOPEN_NOFLUSH
            kernel.OPEN_FLAGS.pack_into(answer, kernel.OPEN_FLAGS_AT, flags, backing)

    def register(self, raw: Callable[[], int | None]) -> int:
        """Return the id of the raw file that the kernel is to read, 0 if reads are to come to us. Never raises.

        Args:
            raw: opens the file; see `DiskFile.raw`.
        """
        if not self._agreed:
            return 0
        try:
            fd = raw()
            if fd is None:
                return 0
            try:
                # The kernel opens it as the reader opens ours, and fails if that can't be.
                os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
                backing = bytearray(kernel.BACKING_MAP.pack(fd, 0, 0))
                number: int = fcntl.ioctl(self._device, kernel.BACKING_OPEN, backing)
                return number
            finally:
                os.close(fd)
        except Exception as e:  # noqa: BLE001, we can read it ourselves
            # ELOOP: on overlayfs; EPERM: without CAP_SYS_ADMIN; EINVAL: no direct reads there.
            if not self._told:
                self._told = True
                log.warning("passthrough can't be used, so such files are read as others are: %s", e or repr(e))
            return 0

    def forget(self, backing: int) -> None:
        """Let a raw file go. Handles that are open with it keep it."""
        try:
            fcntl.ioctl(self._device, kernel.BACKING_CLOSE, kernel.SIZE.pack(backing))
        except OSError as e:
            log.error("raw file %d can't be let go: %s", backing, e)
