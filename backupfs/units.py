"""Sizes and times as people write them."""

import re
from datetime import UTC, datetime, timedelta

from backupfs.errors import UsageError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_HOURS = {"h": 1, "d": 24, "w": 7 * 24}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that `text` stands for: `65536`, `64KiB`, `64K`, `10G`, always powers of 1024.

    Raises:
        UsageError: `text` is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"not a size: {text!r}; write for example 65536, 64KiB or 10G")
    return int(match[1]) << (10 * _POWERS[(match[2] or "").upper()])


def format_size(size: float) -> str:
    """Return `size` bytes with a binary unit and three digits, as in `1.5 GiB`."""
    if size < KiB:
        return f"{int(size)} B"
    unit = ""
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007, the last one stands
        size /= 1024
        if size < 1000:
            break
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def parse_time(text: str) -> datetime:
    """Return the UTC time that `text` names: ISO 8601, basic or extended; without a zone it is UTC.

    Raises:
        UsageError: `text` is not a time.
    """
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as e:
        raise UsageError(f"not a time: {text!r}; write for example 2026-11-22T20:00:00Z") from e


def parse_duration(text: str) -> timedelta:
    """Return the time that `text` stands for: `36h`, `30d` or `4w`.

    Raises:
        UsageError: `text` is not a duration.
    """
    match = re.fullmatch(r"(\d{1,6})([hdw])", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"not a duration: {text!r}; write for example 36h, 30d or 4w")
    return timedelta(hours=int(match[1]) * _HOURS[match[2]])
