"""The keep rules against a plain restatement of them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.errors import UsageError
from backupfs.services.retention import KeepRules, kept
from backupfs.units import parse_duration

MOMENTS = st.lists(
    st.datetimes(datetime(2023, 12, 20), datetime(2025, 1, 12)).map(lambda d: d.replace(tzinfo=UTC)), max_size=60
)
LATER = datetime(2030, 1, 1, tzinfo=UTC)
COUNT = st.none() | st.integers(1, 12)
FORMATS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}


def named(moments: list[datetime]) -> list[tuple[str, datetime]]:
    return [(f"p{i}", moment) for i, moment in enumerate(sorted(moments))]


@given(
    MOMENTS,
    st.builds(
        KeepRules, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, st.none() | st.timedeltas(timedelta(0), timedelta(99))
    ),
)
def test_rules(moments: list[datetime], rules: KeepRules) -> None:
    points = named(moments)
    expected: dict[str, set[str]] = {point: set() for point, _ in points}
    for point, _ in points[-rules.last :] if rules.last else []:
        expected[point].add("last")
    for rule, form in FORMATS.items():
        newest = {moment.strftime(form): point for point, moment in points}  # a later one takes the place
        for period in sorted(newest)[-getattr(rules, rule) :] if getattr(rules, rule) else []:
            expected[newest[period]].add(rule)
    if rules.within is not None:
        for point, moment in points:
            if moment >= points[-1][1] - rules.within:
                expected[point].add("within")
    assert {point: set(found) for point, found in kept(points, rules, LATER).items()} == expected


@given(MOMENTS, st.integers(1, 12))
def test_a_second_time_changes_nothing(moments: list[datetime], count: int) -> None:
    rules = KeepRules(daily=count, weekly=count, monthly=count)
    points = named(moments)
    stays = [p for p in points if kept(points, rules, LATER)[p[0]]]
    assert kept(stays, rules, LATER) == {p: r for p, r in kept(points, rules, LATER).items() if r}
    assert not points or points[-1] in stays


def test_equal_times_and_other_zones() -> None:
    noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
    points = [("a", noon), ("b", noon), ("c", noon.astimezone(timezone(timedelta(hours=13))))]
    assert kept(points, KeepRules(last=1), LATER) == {"a": [], "b": [], "c": ["last"]}
    assert kept(points, KeepRules(daily=5), LATER) == {"a": [], "b": [], "c": ["daily"]}


def test_a_wrong_clock_does_not_let_all_go() -> None:
    now = datetime(2026, 11, 22, 12, tzinfo=UTC)
    points = [
        ("old", now - timedelta(days=9)),
        ("good", now - timedelta(hours=2)),
        ("ahead", now + timedelta(days=999)),
    ]
    assert kept(points, KeepRules(within=timedelta(days=1)), now) == {
        "old": [],
        "good": ["within"],
        "ahead": ["future"],
    }
    assert kept(points, KeepRules(last=1), now) == {"old": [], "good": ["last"], "ahead": ["future"]}
    assert kept(points, KeepRules(daily=2), now) == {"old": ["daily"], "good": ["daily"], "ahead": ["future"]}
    assert kept(points[2:], KeepRules(within=timedelta(0)), now) == {"ahead": ["within"]}


def test_no_rule_is_none() -> None:
    assert not KeepRules()
    assert KeepRules(last=1)
    assert KeepRules(within=timedelta(0))


def test_durations() -> None:
    assert parse_duration("36h") == timedelta(hours=36)
    assert parse_duration("30d") == timedelta(days=30)
    assert parse_duration(" 4w ") == timedelta(weeks=4)
    for text in ("", "30", "d", "-1d", "1.5d", "30 d", "1y", "9999999d"):
        with pytest.raises(UsageError, match="not a duration"):
            parse_duration(text)
