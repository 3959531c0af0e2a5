"""Whether an NTFS was in use: what its log, `$LogFile`, says of it. It is not replayed here.

Source: Linux, fs/ntfs3/fslog.c (RESTART_HDR, RESTART_AREA); ntfs-3g, libntfs-3g/logfile.c (ntfs_is_logfile_clean).
"""

import struct

LENGTH = 64 << 10
"""Bytes at the log's beginning that hold its two pages of restart."""

_HEAD = struct.Struct("<4s4x8xIIH")  # magic; size of a page of the system, of the log; where the area is
_AREA = struct.Struct("<QHHHH")  # newest LSN; clients, free ones, ones in use, flags
_NO_CLIENT, _CLEAN = 0xFFFF, 0x2
_LARGEST_AREA_AT = 510 - _AREA.size  # behind that each sector's last bytes stand elsewhere


def was_in_use(log: bytes) -> bool:
    """Return whether a volume's log may hold changes. `log`: its first LENGTH bytes, or what there is of them."""
    if log[:4] in {b"\xff\xff\xff\xff", b"CHKD"}:  # emptied by ntfs-3g, or by chkdsk
        return False
    pages = [page for page in (_page(log, 0), _page(log, _size(log))) if page]
    _, in_use, flags = max(pages, default=(0, 0, 0))
    return in_use != _NO_CLIENT and not flags & _CLEAN


def _size(log: bytes) -> int:
    size = _HEAD.unpack_from(log)[1] if len(log) >= _HEAD.size else 0
    return int(size) if 512 <= size <= LENGTH // 2 else 4096


def _page(log: bytes, at: int) -> tuple[int, int, int] | None:
    """Return the newest LSN, clients in use and flags of a page of restart; None: there is none."""
    page = log[at : at + 512]
    if len(page) < 512 or page[:4] != b"RSTR":
        return None
    area_at = _HEAD.unpack_from(page)[3]
    if not _HEAD.size <= area_at <= _LARGEST_AREA_AT:
        return None
    newest, _, _, in_use, flags = _AREA.unpack_from(page, area_at)
    return newest, in_use, flags
