"""What libfuse 3.14, or pyfuse3, can't say is put into its answers on their way to the kernel.

- INIT: symbolic links may be cached, as none of an inode number ever changes (nodes.py); ACLs, if that is wanted; and
  passthrough.
- OPENDIR: what is in a guest's folder may be cached, as it never changes.
- OPEN: which raw file the kernel reads instead (passthrough.py).

Source: Linux, fs/fuse/inode.c (process_init_reply), fs/fuse/readdir.c.
"""

from collections.abc import Callable

from backupfs.fuse import kernel
from backupfs.fuse.kernel import ANSWER
from backupfs.fuse.passthrough import Passthrough


class Amender:
    """Looks at requests, and amends the answers to them.

    Args:
        passthrough: has its own to add.
        backing_of: returns the id of the raw file for a handle, 0: none.
        is_constant: whether what is in a folder never changes; by its inode number.
        keep_acls: have the kernel keep ACLs (acls.py).
    """

    def __init__(
        self,
        passthrough: Passthrough,
        backing_of: Callable[[int], int],
        is_constant: Callable[[int], bool],
        *,
        keep_acls: bool,
    ) -> None:
        self._passthrough = passthrough
        self._backing_of = backing_of
        self._is_constant = is_constant
        self._wanted = kernel.CACHE_SYMLINKS | (kernel.POSIX_ACL if keep_acls else 0)
        self._folders: set[int] = set()  # uniques
        self._handshake: tuple[int, int] | None = None  # its unique, and what of _wanted the kernel offers

    def note(self, opcode: int, unique: int, request: bytearray) -> None:
        """Look at a request on its way to libfuse. In the reader thread."""
        if opcode == kernel.OPENDIR:
            if self._is_constant(kernel.INODE.unpack_from(request)[0]):
                self._folders.add(unique)
            return
        if opcode == kernel.INIT:
            self._handshake = unique, kernel.INIT_REQUEST.unpack_from(request)[0] & self._wanted
        self._passthrough.note(opcode, unique, request)

    def amend(self, answer: bytearray) -> None:
        """Amend libfuse's answer, in place. In the relay thread."""
        _, error, unique = ANSWER.unpack_from(answer)
        if unique in self._folders:
            self._folders.discard(unique)
            if not error:
                flags = kernel.FOPEN_KEEP_CACHE | kernel.FOPEN_CACHE_DIR
                kernel.OPEN_FLAGS.pack_into(answer, kernel.OPEN_FLAGS_AT, flags, 0)
            return
        if self._handshake and unique == self._handshake[0] and not error:
            (flags,) = kernel.SIZE.unpack_from(answer, kernel.INIT_FLAGS_AT)
            kernel.SIZE.pack_into(answer, kernel.INIT_FLAGS_AT, flags | self._handshake[1])
        self._passthrough.amend(answer, self._backing_of)
