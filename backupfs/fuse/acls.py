"""The guests' POSIX ACLs, where the kernel is to keep them: it then asks once for each file, not at every `ls -l`.

It also goes by them, and by modes, then. So this is only for mounts of a root who passes by all permissions, and that
lets nobody else in: whoever is let in reads everything. Even to him the kernel refuses what has an ACL that it can't
read or understand, with that error; unless the error is EACCES, which is what he passes by.

Source: Linux, fs/fuse/acl.c, fs/namei.c (generic_permission), fs/posix_acl.c, include/uapi/linux/posix_acl_xattr.h.
"""

import os
import re
import struct
from itertools import pairwise
from pathlib import Path

NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<2HI")  # tag, permissions, user or group
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_LARGEST = 4096  # bytes of an ACL for which the kernel has room: a page of the smallest kind
_NEEDED = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_ALL_USERS = ["0", "0", "4294967295"]


def passes_permissions() -> bool:
    """Whether who mounts is a root to whom all permissions are given, of whatever user a file is."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        users = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except OSError:
        return False
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return os.geteuid() == 0 and users == _ALL_USERS and found is not None and int(found[1], 16) & _NEEDED == _NEEDED


def is_sound(acl: bytes) -> bool:
    """Whether the kernel takes something for an ACL, and can go by it."""
    if acl == _VERSION:  # without entries: there is none
        return True
    if len(acl) > _LARGEST or acl[:4] != _VERSION or (len(acl) - 4) % _ENTRY.size:
        return False
    entries = list(_ENTRY.iter_unpack(acl[4:]))
    tags = [tag for tag, _, _ in entries]
    named = any(tag in (_USER, _GROUP) for tag in tags)
    return (
        all(tags.count(tag) == 1 for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER))
        and tags.count(_MASK) in ((1,) if named else (0, 1))
        and all(one <= other for one, other in pairwise(tags))
        and not set(tags) - {_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER}
        and all(permissions <= 7 for _, permissions, _ in entries)
        and all(who != 0xFFFFFFFF for tag, _, who in entries if tag in (_USER, _GROUP))
    )
