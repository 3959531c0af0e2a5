"""The part of the kernel's FUSE protocol that the read lane speaks. All integers in the machine's own byte order.

Source: <linux/fuse.h>, version 7.31 and later; what passthrough needs, 7.40.
"""

import struct
from typing import Final

DEVICE = "/dev/fuse"

# enum fuse_opcode
FORGET: Final = 2
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
RELEASE: Final = 18
GETXATTR: Final = 22
LISTXATTR: Final = 23
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
INTERRUPT: Final = 36
FALLOCATE: Final = 43
BATCH_FORGET: Final = 42
READDIRPLUS: Final = 44
LSEEK: Final = 46

UNANSWERED = frozenset((FORGET, BATCH_FORGET, INTERRUPT))
"""What has no reply. A file system may ignore these: without FORGET nothing of ours is kept longer than the mount
lives, and INTERRUPT asks whether a request could be answered sooner."""

# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding; then the beginning that
# struct fuse_read_in (of READ and READDIR), fuse_write_in and fuse_lseek_in have in common: fh, offset, size or whence.
REQUEST = struct.Struct("=4xIQ24xQQI")
"""opcode, unique, file handle, offset, size or whence; the last three only where the opcode has them."""
INODE = struct.Struct("=16xQ")
"""What a request is about."""
SIZE_AT = 56
"""Where `size` stands in a READDIR."""
SIZE = struct.Struct("=I")
DATA_AT = 80
"""Where the bytes of a WRITE begin."""
FALLOCATE_REQUEST = struct.Struct("=56xQI")
"""length, mode of a FALLOCATE, behind fh and offset."""
# The modes that there are. Source: <linux/falloc.h>
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
XATTR_AT = 48
"""Where the name in a GETXATTR begins; a zero byte ends it."""
XATTR_REQUEST = struct.Struct("=16xQ16xI")
"""inode, size of a GETXATTR or LISTXATTR; size 0: only the size of the answer is wanted."""

OPEN_REQUEST = struct.Struct("=16xQ16xI")
"""inode, flags of an OPEN."""

# struct fuse_out_header: len, error (negative), unique.
ANSWER = struct.Struct("=IiQ")
ANSWER_SIZE = ANSWER.size
# The same with struct fuse_lseek_out: offset.
LSEEK_ANSWER = struct.Struct("=IiQQ")

# The same with struct fuse_write_out: size, padding.
WRITE_ANSWER = struct.Struct("=IiQI4x")

# The same with struct fuse_getxattr_out: size, padding.
XATTR_SIZE_ANSWER = struct.Struct("=IiQI4x")

# struct fuse_out_header with unique 0 and a positive code in `error`, then struct fuse_notify_inval_inode_out: inode,
# offset, length; length 0: all of it.
INVALIDATE_INODE = struct.Struct("=IiQQqq")
NOTIFY_INVAL_INODE: Final = 2

# The same with struct fuse_notify_store_out: inode, offset, size, padding; the bytes follow.
STORE = struct.Struct("=IiQQQI4x")
NOTIFY_STORE: Final = 4

# struct fuse_init_in, behind the header: major, minor, max_readahead, flags, flags2.
INIT_REQUEST = struct.Struct("=40x12xII")
"""flags, flags2 of an INIT."""
# struct fuse_init_out, behind the header: major, minor, max_readahead, flags; max_background, congestion_threshold,
# max_write, time_gran, max_pages, map_alignment; flags2, max_stack_depth.
INIT_FLAGS_AT, INIT_FLAGS2_AT = 16 + 12, 16 + 32
INIT_FLAGS2 = struct.Struct("=II")
"""flags2, max_stack_depth."""
POSIX_ACL: Final = 1 << 20
"""In flags: the kernel may keep ACLs, and goes by them and by modes."""
CACHE_SYMLINKS: Final = 1 << 23
"""In flags: the kernel may keep the targets of symbolic links."""
INIT_EXT: Final = 1 << 30
"""In flags: flags2 counts."""
PASSTHROUGH: Final = 1 << (37 - 32)
"""In flags2: the kernel may read files from other files by itself."""

# struct fuse_open_out, behind the header: fh, open_flags, backing_id.
OPEN_ANSWER = struct.Struct("=IiQQIi")
OPEN_FLAGS_AT = 16 + 8
OPEN_FLAGS = struct.Struct("=Ii")
"""open_flags, backing_id."""
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

# ioctls of the device. struct fuse_backing_map: fd, flags, padding; the id of a backing file.
BACKING_OPEN: Final = 0x4010E501
BACKING_CLOSE: Final = 0x4004E502
BACKING_MAP = struct.Struct("=iIQ")

MAX_READ = 1 << 20
"""The largest READ: FUSE_MAX_MAX_PAGES, 256, if nobody raised fs.fuse.max_pages_limit."""
REQUEST_BUFFER = MAX_READ + 8192
"""What the kernel wants offered for a request, as it may be a WRITE, of as many bytes as the largest READ."""
