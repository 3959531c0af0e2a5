"""Which points stay: the keep rules, as restic has them. Pure.

A rule of N hours, days, ISO weeks, months or years keeps the newest point of each of the N latest such periods (UTC)
that have one. A point may be kept by several rules; all of a VM's points count, whatever their chain.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

FUTURE = "future"  # the reason for which stays what is dated so

Period = Callable[[datetime], object]


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How many points each rule keeps; None where the rule was not given.

    Attributes:
        within: keeps what is not older than the newest point by more than this.
    """

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None
    within: timedelta | None = None

    def __bool__(self) -> bool:
        """Whether there is any rule."""
        return self != KeepRules()


_PERIODS: Mapping[str, Period] = {
    "last": lambda moment: object(),  # each point is a period of its own
    "hourly": lambda moment: (moment.date(), moment.hour),
    "daily": datetime.date,
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}


def kept(points: Iterable[tuple[str, datetime]], rules: KeepRules, now: datetime) -> dict[str, list[str]]:
    """Return the names of the rules that keep each point; none: it may go.

    Args:
        points: id and time of the points of one VM, oldest first; two of the same moment in the order they were taken.
        rules: the rules.
        now: what is dated later stays, and no rule counts it, unless all is: one point taken with a wrong clock would
            let the others go, and every new one that is dated right.
    """
    newest_first = [(point, moment.astimezone(UTC)) for point, moment in points]
    newest_first.sort(key=lambda p: p[1])  # --time may have dated one back; it keeps the order of equals
    newest_first.reverse()
    found: dict[str, list[str]] = {point: [] for point, _ in newest_first}
    counted = [p for p in newest_first if p[1] <= now] or newest_first
    for point, _ in newest_first[: len(newest_first) - len(counted)]:
        found[point].append(FUTURE)
    for rule, period in _PERIODS.items():
        left = getattr(rules, rule) or 0
        before: object = None
        for point, moment in counted:
            this = period(moment)
            if left and this != before:
                found[point].append(rule)
                left -= 1
            before = this
    if rules.within is not None:
        for point, moment in counted:
            if counted[0][1] - moment <= rules.within:
                found[point].append("within")
    return found
