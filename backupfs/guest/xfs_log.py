"""Whether the log of an XFS has something that is not in the file system yet. Source: fs/xfs/xfs_log_recover.c."""

import struct

from backupfs.guest.xfs_disk import Disk

_SECTOR = 512
_HEADER = b"\xfe\xed\xba\xbe"
_LONGEST_RECORD = 1024  # sectors, and more
_PER_HEADER = 32 << 10  # bytes of a record that one sector of header is for
_UNMOUNT = 0x20


def note(disk: Disk) -> str | None:
    """Return what somebody has to know of it; None: it is empty. Raises GuestError."""
    how = "the kernel replays it: mount DISK.rw (backupfs mount --scratch)"
    if disk.log_at is None:
        return f"its log is on another disk, and was not replayed: what was written last may be missing; {how}"
    sectors = disk.log_blocks * disk.block // _SECTOR
    if not _ends_with_unmount(disk, disk.log_at, sectors):
        return f"its log was not replayed: unless the guest was frozen, what was written last is missing; {how}"
    return None


def _ends_with_unmount(disk: Disk, begin: int, sectors: int) -> bool:
    """Whether the last record says that it was unmounted."""

    def sector(number: int) -> bytes:
        return disk.read(begin + number % sectors * _SECTOR, _SECTOR)

    def cycle(number: int) -> int:
        data = sector(number)
        return int(struct.unpack_from(">I", data, 4 if data[:4] == _HEADER else 0)[0])

    # The head: the log is written round and round, and each sector says in which round it was.
    first, low, high = cycle(0), 0, sectors
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cycle(middle) == first else (low, middle)
    head = high
    for back in range(1, min(_LONGEST_RECORD, sectors)):
        data = sector(head - back + sectors)
        if data[:4] == _HEADER:
            version, length = struct.unpack_from(">II", data, 8)
            (operations,) = struct.unpack_from(">I", data, 40)
            (most,) = struct.unpack_from(">I", data, 320)
            headers = -(-most // _PER_HEADER) if version & 2 and 0 < most <= 8 << 20 else 1
            last = sector(head - back + headers + sectors)
            return operations == 1 and length <= _SECTOR and back == headers + 1 and bool(last[9] & _UNMOUNT)
    return False
