"""Taking points away, by name or by rule. No data moves: gc gives the space back. Any point of a chain may go.

A point is gone when its manifest is, and that is on the disk when these return. Who has it open reads on.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from backupfs.errors import Corrupt, NotFound, RepositoryError, UsageError
from backupfs.repository.repository import Repository
from backupfs.services.retention import KeepRules, kept

log = logging.getLogger(__name__)

PINNED, DAMAGED = "pinned", "damaged"  # these stay without a rule


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of a point: which keep it; none: it goes."""

    vm: str
    id: str
    rules: list[str]


def delete(
    repository: Repository, points: Iterable[tuple[str, str]], waiting: Callable[[str], None] | None = None
) -> list[tuple[str, str]]:
    """Delete points, (vm, id); all are looked at first. Returns them, each once.

    A point whose manifest is damaged may be deleted too: it can't be read, and as long as it is there gc refuses.

    Args:
        waiting: called with a message when another process writes to the repository, before waiting for that; None:
            do not wait.

    Raises:
        NotFound: one is not there; nothing was deleted.
        RepositoryError: one is pinned, and nothing was deleted; or one can't be deleted.
        Locked: another process writes to the repository.
    """
    wanted = list(dict.fromkeys(points))
    with repository.exclusive(waiting):
        for vm, point in wanted:
            try:
                pinned = repository.manifest(vm, point).pinned
            except Corrupt as e:
                log.warning("%s", e)
                continue
            if pinned:
                raise RepositoryError(f"{vm}/{point} is pinned; nothing was deleted. Take the pin away first")
        repository.remove_points(wanted)
    return wanted


def prune(
    repository: Repository,
    vm: str | None,
    rules: KeepRules,
    *,
    dry_run: bool,
    waiting: Callable[[str], None] | None = None,
) -> list[Verdict]:
    """Delete what no rule keeps, of one VM or of each. Returns the verdict on every point, oldest first in a VM.

    Pinned points stay, and damaged ones: whether they are pinned nobody knows.

    Args:
        dry_run: delete nothing.
        waiting: as for `delete`.

    Raises:
        UsageError: there is no rule.
        NotFound: there is no such VM.
        RepositoryError: one can't be deleted; others may be gone.
        Locked: another process writes to the repository.
    """
    if not rules:
        raise UsageError("no rule: without one nothing would be kept; give at least one --keep-… option")
    if vm is not None:
        repository.resolve(vm, "latest")
    if dry_run:
        return _verdicts(repository, vm, rules)
    with repository.exclusive(waiting):
        verdicts = _verdicts(repository, vm, rules)
        repository.remove_points((v.vm, v.id) for v in verdicts if not v.rules)
    return verdicts


def _verdicts(repository: Repository, vm: str | None, rules: KeepRules) -> list[Verdict]:
    verdicts = []
    for name in repository.vms() if vm is None else [vm]:
        moments: list[tuple[str, datetime]] = []
        staying: dict[str, str] = {}
        points = repository.points(name)
        for point in points:
            try:
                manifest = repository.manifest(name, point)
                moments.append((point, datetime.fromisoformat(manifest.time)))
            except Corrupt as e:
                log.warning("%s", e)
                staying[point] = DAMAGED
            except NotFound:  # a dry run beside a delete
                continue
            else:
                if manifest.pinned:
                    staying[point] = PINNED
        by_rule = kept(moments, rules, datetime.now(UTC))
        for point in points:
            reasons = by_rule.get(point, []) + ([staying[point]] if point in staying else [])
            if point in by_rule or point in staying:
                verdicts.append(Verdict(name, point, reasons))
    return verdicts
