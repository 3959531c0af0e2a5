"""How things stand: each VM's newest point, the last results, free space, known damage; also as Prometheus metrics."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from backupfs.errors import BackupfsError, RepositoryError
from backupfs.repository import results
from backupfs.repository.repository import Repository
from backupfs.repository.results import Result
from backupfs.services.damage import Damage, Report
from backupfs.units import parse_time

_KEPT = 1000  # ranges of damage that are remembered of a VM
_LEAST_FREE = 64 << 20  # bytes below which no backup begins
_AHEAD = timedelta(hours=1)  # that another machine's clock may be ahead of ours
# How long a failed backup of a VM without points is a problem. Who backs it up every week fails again before that; a
# name that was mistyped once is nobody's worry any more.
_NEW = timedelta(days=8)


@dataclass(slots=True)
class VmStatus:
    """One VM.

    Attributes:
        newest, time, age_s: its newest point's id, time and age.
        verified: when all of it was verified last, whole or by a sample; None: never.
        damaged: ranges and files.
    """

    vm: str
    points: int
    newest: str
    time: str
    age_s: int
    verified: str | None = None
    damaged: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Status:
    """A repository's state. `problems` are all that is wrong, in words; none: all is well."""

    vms: list[VmStatus]
    results: list[Result]
    free_bytes: int
    size_bytes: int
    damage: list[dict[str, Any]]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return what `status --json` prints."""
        document = msgspec.to_builtins(self)
        assert isinstance(document, dict)
        for result in document["results"]:
            result["facts"].pop("damage", None)  # it stands once, below
        return {"ok": not self.problems, **document}


def status(repository: Repository, max_age: timedelta | None, max_verify_age: timedelta | None = None) -> Status:
    """Look at everything that can be told without reading layers.

    Args:
        max_age: a VM whose newest point is older has a problem.
        max_verify_age: so has one that was not verified for longer, though it had points.

    Raises:
        NotFound, RepositoryError: there is no repository, or it can't be read.
    """
    found, unreadable = results.load(repository.path)
    now = datetime.now(UTC)
    there = [(vm, points) for vm in repository.vms() if (points := repository.points(vm))]
    seen = {vm for vm, _ in there}
    # What was found in points that are all gone is no worry any more, and nothing could take it away.
    found = [r for r in found if r.what != "verify" or r.vm in seen]
    vms = [
        _vm(repository, vm, points, found, now=now, max_age=max_age, max_verify_age=max_verify_age)
        for vm, points in there
    ]
    try:
        space = os.statvfs(repository.path)
    except OSError as e:
        raise RepositoryError(f"{repository.path}: {e.strerror}") from e
    free = space.f_bavail * space.f_frsize
    problems = [f"{v.vm}: {problem}" for v in vms for problem in v.problems]
    problems += [f"{r.what}: {_outcome(r)}" for r in found if not r.ok and r.vm is None]
    problems += unreadable
    problems += [
        f"{r.vm}: it has no points; {r.what}: {_outcome(r)}"
        for r in found
        if not r.ok and r.vm and r.vm not in seen and now - parse_time(r.finished) <= _NEW
    ]
    if free < _LEAST_FREE:
        problems.append("no space left: less than 64 MiB are free")
    if not vms:
        problems.append("there are no points")
    damage = [d for r in found if r.what == "verify" for d in r.facts.get("damage", [])]
    return Status(vms, found, free, space.f_blocks * space.f_frsize, damage, problems)


def _vm(
    repository: Repository,
    vm: str,
    points: list[str],
    found: list[Result],
    *,
    now: datetime,
    max_age: timedelta | None,
    max_verify_age: timedelta | None,
) -> VmStatus:
    moment = _moment(points[-1])
    age = now - moment
    state = VmStatus(
        vm=vm,
        points=len(points),
        newest=points[-1],
        time=moment.isoformat().replace("+00:00", "Z"),
        age_s=int(age.total_seconds()),
    )
    if age < -_AHEAD:
        # It would stay the newest one for so long, whatever became of the backups after it.
        state.problems.append(
            f"the newest point is dated {_hours(-age)} in the future, so how old the newest backup is can't be told; "
            "was a clock wrong? `backupfs delete` takes it away"
        )
    if max_age is not None and age > max_age:
        state.problems.append(f"the newest point is {_hours(age)} old, more than {_hours(max_age)}")
    try:
        repository.manifest(vm, points[-1])
    except BackupfsError as e:
        state.problems.append(f"the newest point's manifest: {e}")
    for result in found:
        if result.vm == vm:
            state.damaged += int(result.facts.get("damaged", len(result.facts.get("damage", []))))
            if not result.ok:
                state.problems.append(f"{result.what}: {_outcome(result)}")
            if result.what == "verify":
                state.verified = _verified(result)
    if max_verify_age is not None:
        unchecked = now - (parse_time(state.verified) if state.verified else _moment(points[0]))
        if unchecked > max_verify_age:
            words = "the last verification is" if state.verified else "never verified, and the oldest point is"
            state.problems.append(f"{words} {_hours(unchecked)} old, more than {_hours(max_verify_age)}")
    return state


def _moment(point: str) -> datetime:
    return parse_time(point.partition("-")[0])


def _verified(result: Result) -> str | None:
    """Return when all of a VM was verified last. Results of earlier versions do not say it apart."""
    verified = result.facts.get("verified", result.finished if result.ok else None)
    return verified if isinstance(verified, str) else None


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.1f} h"


def _outcome(result: Result) -> str:
    return f"{result.message or 'failed'} ({result.finished})"


def keep_failed_verification(repository: Repository, vms: list[str], error: BaseException) -> None:
    """Remember that a verification did not come to its end. What is known to be damaged stays known."""
    before = {r.vm: r for r in results.load(repository.path)[0] if r.what == "verify"}
    words = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    for vm in vms:
        facts = before[vm].facts if vm in before else {}
        result = Result(what="verify", vm=vm, ok=False, finished=results.now(), message=words, facts=facts)
        results.store(repository.path, result)


def keep_verification(repository: Repository, vms: list[str], point: str | None, report: Report) -> None:
    """Remember what a verification found, for each VM that it looked at.

    What is known to be damaged stays known until all of the VM was read and it was not found any more.
    """
    found = list(report.all_damage(repository.settings.chunk_size))
    before = {r.vm: r for r in results.load(repository.path)[0] if r.what == "verify"}
    complete = report.sample == 1 and point is None
    for vm in vms:
        damage = [_plain(d) for d in found if d.vm == vm and d.repaired is None]
        if not complete:
            there = set(repository.points(vm))
            new = {(d["file"], d["file_offset"]) for d in damage}
            repaired = {(d.file, d.file_offset) for d in found if d.repaired}
            old = before[vm].facts.get("damage", []) if vm in before else []
            damage += [
                d
                for d in old
                if there.intersection(d["points"]) and (d["file"], d["file_offset"]) not in new | repaired
            ]
            if point is not None and not damage and vm not in before:
                continue  # one point says little about the VM
        finished = results.now()
        result = Result(
            what="verify",
            vm=vm,
            ok=not damage,
            finished=finished,
            seconds=report.seconds,
            message=f"{len(damage)} damaged ranges or files" if damage else "",
            facts={
                "sample": report.sample,
                "point": point,
                "verified": finished if point is None else _verified(before[vm]) if vm in before else None,
                "damaged": len(damage),
                "damage": damage[:_KEPT],
            },
        )
        results.store(repository.path, result)


def _plain(damage: Damage) -> dict[str, Any]:
    document = msgspec.to_builtins(damage)
    assert isinstance(document, dict)
    return document


def write_metrics(state: Status | None, path: str) -> None:
    """Write the state as a text file for Prometheus' node_exporter; it appears by rename.

    Args:
        state: None: the repository can't be looked at. The file must not go on saying what was true before.

    Source: prometheus.io, text-based exposition format.

    Raises:
        BackupfsError: it can't be written there.
    """
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in _metrics(state))
            os.chmod(temporary, 0o644)
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise
    except OSError as e:
        raise BackupfsError(f"--metrics {path}: {e.strerror}; what is there may be old") from e


def _metrics(state: Status | None) -> Iterator[str]:
    def family(name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Iterator[str]:
        yield f"# HELP backupfs_{name} {text}"
        yield f"# TYPE backupfs_{name} gauge"
        for labels, value in samples:
            shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            yield f"backupfs_{name}{{{shown}}} {value:.15g}" if shown else f"backupfs_{name} {value:.15g}"

    yield from family("ok", "1 when nothing is wrong.", [({}, state is not None and not state.problems)])
    if state is None:
        return
    vms = state.vms
    yield from family("free_bytes", "Free on the repository's file system.", [({}, state.free_bytes)])
    yield from family("size_bytes", "Size of the repository's file system.", [({}, state.size_bytes)])
    yield from family("points", "Points of a VM.", [({"vm": v.vm}, v.points) for v in vms])
    yield from family(
        "newest_point_timestamp_seconds",
        "The moment of a VM's newest point.",
        [({"vm": v.vm}, parse_time(v.time).timestamp()) for v in vms],
    )
    yield from family(
        "verified_timestamp_seconds",
        "When all of a VM was verified last.",
        [({"vm": v.vm}, parse_time(v.verified).timestamp()) for v in vms if v.verified],
    )
    yield from family("damaged", "Known damaged ranges and files.", [({"vm": v.vm}, v.damaged) for v in vms])
    last = [({"what": r.what, "vm": r.vm or ""}, r) for r in state.results]
    yield from family("last_ok", "1 when the last run went well.", [(labels, r.ok) for labels, r in last])
    yield from family(
        "last_duration_seconds", "How long the last run took.", [(labels, r.seconds) for labels, r in last]
    )
    yield from family(
        "last_timestamp_seconds",
        "When the last run ended.",
        [(labels, parse_time(r.finished).timestamp()) for labels, r in last],
    )


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
