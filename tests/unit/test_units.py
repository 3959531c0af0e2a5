"""Sizes and times as people write them."""

from datetime import UTC, datetime

import pytest

from backupfs.errors import UsageError
from backupfs.units import format_size, parse_size, parse_time


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("64KiB", 65536), ("64k", 65536), ("10G", 10 << 30), ("1 TiB", 1 << 40), ("0B", 0)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5G", "64 KB!", "１２"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 30, "1 GiB"),
        (999 << 10, "999 KiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


def test_times_without_a_zone_are_utc() -> None:
    expected = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
    assert parse_time("2026-11-22T20:00:00") == expected
    assert parse_time("20261122T200000Z") == expected
    assert parse_time("2026-11-22T21:00:00+01:00") == expected
    with pytest.raises(UsageError):
        parse_time("yesterday")
