"""Where the log of an XFS begins and ends, found as the kernel finds it when it mounts.

The head is where the rounds change that the sectors say they were written in. Up to eight records are written side by
side, so before it may be holes, and records that were torn: the first of these is the head then, if it is one of the
last eight; one before them is damage. And the tail, of which the record before the head knows, may have been
overwritten by what was torn.

Source: fs/xfs/xfs_log_recover.c: xlog_find_head, xlog_find_tail, xlog_verify_head, xlog_verify_tail.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backupfs.guest.xfs_records import SECTOR, Record, Records, UnreadableLogError

_IN_FLIGHT = 8  # records that may be being written at a time
_LONGEST = (256 << 10) // SECTOR


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the log begins and ends, in sectors; where both are the same, nothing is in it.

    Attributes:
        lsn: no less than the number of anything that was ever written to it.
    """

    tail: int
    head: int
    lsn: int


def find_ends(log: Records) -> Ends:
    """Return where the log begins and ends.

    Raises:
        UnreadableLogError: the kernel would not mount it.
        GuestError: the volume can't be read.
    """
    head = _head(log)
    last = _before(log, head, head, 1)
    tail = _tail_of(log, last)
    if _is_unmounted(log, head, last):
        tail = head
    else:
        torn = _first_bad(log, _before(log, head, tail, _IN_FLIGHT), head)
        if torn is not None:
            last = _before(log, torn, tail, 1)
            head, tail = torn, _tail_of(log, last)
        if head != tail:
            tail = _verified_tail(log, head, tail, log.room(last))
        if torn is not None and _is_unmounted(log, head, last):
            tail = head
    written = _rounds_of(log, head, last)
    return Ends(tail, head, written << 32 | head)


def _head(log: Records) -> int:
    """Return the sector behind the last record, as far as the rounds tell. Source: xlog_find_head, xlog_find_zeroed."""
    (first,), (last,) = log.rounds(0, 1), log.rounds(log.sectors - 1, 1)
    if not first:
        raise UnreadableLogError  # nothing was ever written to it
    scanned = min(log.sectors, _IN_FLIGHT * _LONGEST)
    if not last:  # it was never full
        head = _change(log, 0, log.sectors - 1, 0)
        back = min(scanned, head)
        return _whole_records(log, _find(log, head - back, back, 0, head), scanned)
    if first == last:
        head, hole = log.sectors, last - 1
    else:
        head, hole = _change(log, 0, log.sectors - 1, last), last
    if head >= scanned:
        head = _find(log, head - scanned, scanned, hole, head)
    else:
        start = log.sectors - (scanned - head)
        at_end = _find(log, start, scanned - head, hole - 1, -1)
        head = at_end if at_end >= 0 else _find(log, 0, head, hole, head)
    return _whole_records(log, head) % log.sectors


def _change(log: Records, low: int, high: int, wanted: int) -> int:
    """Return the first sector of a round, if each one behind it is of that, too. Source: xlog_find_cycle_start."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if log.rounds(middle, 1)[0] == wanted else (middle, high)
    return high


def _find(log: Records, start: int, count: int, wanted: int, otherwise: int) -> int:
    """Return the first of some sectors that is of a round. Source: xlog_find_verify_cycle."""
    rounds = log.rounds(start, count)
    return start + rounds.index(wanted) if wanted in rounds else otherwise


def _whole_records(log: Records, head: int, furthest: int = _LONGEST) -> int:
    """Return the same head, or where the record begins that it cuts off. Source: xlog_find_verify_log_record."""
    for back in range(1, min(furthest, log.sectors) + 1):
        at = head - back
        if log.is_header(at):
            log.check_owner(at)
            return head if log.length(at) == back else at % log.sectors
    raise UnreadableLogError


def _sectors(log: Records, begin: int, end: int) -> int:
    """Return how many sectors are from one to another; all, where they are the same."""
    return (end - begin) % log.sectors or log.sectors


def _before(log: Records, head: int, tail: int, count: int) -> int:
    """Return where the last record before a sector begins, or the `count`th, or the first behind the tail.

    Source: xlog_rseek_logrec_hdr.
    """
    found = -1
    for back in range(1, _sectors(log, tail, head) + 1):
        if log.is_header(head - back):
            found, count = (head - back) % log.sectors, count - 1
            if not count:
                break
    if found < 0:
        raise UnreadableLogError
    return found


def _behind(log: Records, begin: int, head: int, count: int) -> int:
    """Return where the first record at or behind a sector begins, or the `count`th. Source: xlog_seek_logrec_hdr."""
    for ahead in range(_sectors(log, begin, head)):
        if log.is_header(begin + ahead):
            count -= 1
            if not count:
                return (begin + ahead) % log.sectors
    raise UnreadableLogError


def _tail_of(log: Records, last: int) -> int:
    tail = int.from_bytes(log.read(last, 1)[28:32])
    if tail >= log.sectors:
        raise UnreadableLogError
    return tail


def _rounds_of(log: Records, head: int, last: int) -> int:
    """Return in which round the log is at its head.

    Raises:
        UnreadableLogError: the tail, of which the last record knows, is not in that, or behind it in the one before.

    Source: xlog_set_state, xlog_clear_stale_blocks.
    """
    header = log.read(last, 1)
    tail_round, tail = int.from_bytes(header[24:28]), int.from_bytes(header[28:32])
    head_round = int.from_bytes(header[4:8]) + (head <= last)
    # Behind an unmount the tail is the head.
    if not _is_unmounted(log, head, last) and head_round - tail_round != (head < tail):
        raise UnreadableLogError
    return head_round


def _is_unmounted(log: Records, head: int, last: int) -> bool:
    """Whether the last record is what is written when everything is in its place. Source: xlog_check_unmount_rec."""
    return (last + log.length(last)) % log.sectors == head and log.is_unmount(last)


def records(log: Records, begin: int, head: int, note: Callable[[int], None] = lambda _at: None) -> Iterator[Record]:
    """Yield the records from one on up to the head.

    Args:
        note: is told where each begins before it is read.

    Raises:
        UnreadableLogError: one is damaged.
    """
    at, left = begin, _sectors(log, begin, head)
    while left > 0:
        note(at)
        record = log.record(at)
        if record.sectors > left:
            raise UnreadableLogError
        yield record
        at, left = (at + record.sectors) % log.sectors, left - record.sectors


def _first_bad(log: Records, begin: int, head: int) -> int | None:
    """Return where the first record begins that is damaged; None: all are right."""
    noted = [begin]
    try:
        for _ in records(log, begin, head, noted.append):
            noted.clear()
    except UnreadableLogError:
        return noted[-1]
    return None


def _verified_tail(log: Records, head: int, tail: int, room: int) -> int:
    """Return the tail, or the first record behind it that was not overwritten. Source: xlog_verify_tail."""
    tail = _behind(log, tail, head, 1)
    while (bad := _first_bad(log, tail, head)) is not None:
        if not bad or (bad - head) % log.sectors > _IN_FLIGHT * room // SECTOR:  # to the kernel 0 is no place here
            raise UnreadableLogError
        tail = _behind(log, bad, head, 2)
    return tail
