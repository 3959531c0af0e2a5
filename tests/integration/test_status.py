"""edit, status and its metrics: manifests are replaced whole, and what is wrong makes status fail."""

import json
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from repositories import add_point, read_point

from backupfs.errors import BackupfsError, Locked, UsageError
from backupfs.repository import results
from backupfs.repository.manifest import open_sealed, seal
from backupfs.repository.repository import Repository
from backupfs.services.edit import edit
from backupfs.services.status import Status, status, write_metrics
from backupfs.units import KiB


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    path = tmp_path / "repo"
    Repository.init(str(path))
    with Repository.open(str(path)) as repository:
        add_point(repository, b"1" * 100 * KiB)
        add_point(repository, b"2" * 100 * KiB)
    return path


def run_status(repo: Path, *words: str) -> tuple[int, dict[str, object]]:
    environment = {**os.environ, "BACKUPFS_REPOSITORY": str(repo)}
    command = [*BACKUPFS, "status", "--json", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def look(repository: Repository, max_age: timedelta | None = None, max_verify_age: timedelta | None = None) -> Status:
    return status(repository, max_age, max_verify_age)


def age(repo: Path, name: str, days: float) -> None:
    """Make a result as old as that."""
    path = repo / "status" / f"{name}.json"
    found = open_sealed(path.read_bytes(), str(path), results.Result)
    then = datetime.now(UTC) - timedelta(days=days)
    found.finished = then.isoformat(timespec="seconds").replace("+00:00", "Z")
    if "verified" in found.facts:
        found.facts["verified"] = found.finished
    path.write_bytes(seal(found))


def test_edit_changes_what_a_person_may_change(repo: Path) -> None:
    with Repository.open(str(repo)) as repository:
        point = repository.points("web01")[0]
        image = repository.open_image("web01", point, "vda")
        before = repository.manifest("web01", point)
        backupfs(repo, "edit", f"web01/{point}", "--note", "before\nthe upgrade", "--tag", "a", "--tag", "b", "--pin")
        after = repository.manifest("web01", point)
        assert (after.note, after.tags, after.pinned) == ("before\nthe upgrade", ["a", "b"], True)
        assert after.disks == before.disks
        assert backupfs_json(repo, "edit", f"web01/{point}", "--untag", "a", "--no-pin")["tags"] == ["b"]
        after = repository.manifest("web01", point)
        assert (after.note, after.tags, after.pinned) == ("before\nthe upgrade", ["b"], False)
        data = bytearray(10)
        image.readinto(0, data)
        assert data == b"1" * 10
        image.close()
        assert read_point(repository, point) == b"1" * 100 * KiB
        repository.reindex()
        assert read_point(repository, point) == b"1" * 100 * KiB
    assert not list((repo / "tmp").iterdir())
    backupfs(repo, "edit", "web01/latest", "--tag", "", code=2)
    backupfs(repo, "verify")


def test_edit_keeps_what_it_does_not_know(repo: Path) -> None:
    with Repository.open(str(repo)) as repository:
        point = repository.points("web01")[0]
        path = repo / "vms/web01/points" / f"{point}.json"
        document = json.loads(path.read_bytes())
        del document["blake3"]
        path.write_bytes(seal({**document, "of_a_later_version": [1, 2]}))
        for _ in range(2):
            edit(repository, "web01", point, note="x", add=["t"], remove=[], pinned=True, waiting=None)
            assert json.loads(path.read_bytes())["of_a_later_version"] == [1, 2]
        for bad in ("", " x", "a\nb", "x" * 101):
            with pytest.raises(UsageError):
                edit(repository, "web01", point, note=None, add=[bad], remove=[], pinned=None, waiting=None)
        with repository.exclusive(), pytest.raises(Locked):
            edit(repository, "web01", point, note="y", add=[], remove=[], pinned=None, waiting=None)


def test_status_of_a_good_repository(repo: Path) -> None:
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    disk = repo.parent / "disk.raw"
    disk.write_bytes(b"3" * 70000)
    backupfs(repo, "backup", "web01", f"vda={disk}", "--time", moment)
    backupfs(repo, "verify")
    backupfs(repo, "gc")
    code, found = run_status(repo, "--max-age", "26h")
    assert code == 0
    assert found["ok"] is True
    (vm,) = found["vms"]  # type: ignore[misc]
    assert (vm["vm"], vm["points"], vm["problems"]) == ("web01", 3, [])
    assert 0 <= vm["age_s"] < 300
    assert {(r["what"], r["vm"], r["ok"]) for r in found["results"]} == {  # type: ignore[attr-defined]
        ("backup", "web01", True),
        ("verify", "web01", True),
        ("gc", None, True),
    }
    backupfs(repo, "gc", "--dry-run")
    text = backupfs(repo, "status")
    assert "backup web01: good" in text
    assert "free" in text


def test_what_makes_status_fail(repo: Path) -> None:
    with Repository.open(str(repo)) as repository:
        assert look(repository).problems == []
        (old,) = look(repository, timedelta(0)).problems
        assert "newest point is" in old
        backupfs(repo, "backup", "web01", f"vda={repo}/nothing", code=30)
        (failed,) = look(repository).problems
        assert failed.startswith("web01: backup: ")
        backupfs(repo, "backup", "web09", f"vda={repo}/nothing", code=30)
        assert len(look(repository).problems) == 2
        with pytest.raises(KeyboardInterrupt), results.recording(str(repo), "gc"):
            raise KeyboardInterrupt
        assert any("gc: interrupted" in p for p in look(repository).problems)
        with pytest.raises(Locked), results.recording(str(repo), "gc"):
            raise Locked("by another")
        assert any("gc: interrupted" in p for p in look(repository).problems)
        with results.recording(str(repo), "gc"):
            pass
        assert len(look(repository).problems) == 2
        newest = repo / "vms/web01/points" / f"{repository.points('web01')[-1]}.json"
        newest.write_bytes(newest.read_bytes().replace(b"crash", b"Crash"))
        assert any("manifest" in p for p in look(repository).problems)
    code, found = run_status(repo)
    assert code == 1
    assert found["ok"] is False


def test_a_point_of_the_future_is_a_problem(repo: Path, tmp_path: Path) -> None:
    disk = tmp_path / "later.raw"
    disk.write_bytes(bytes(1 << 20))
    backupfs(repo, "backup", "web02", f"vda={disk}", "--time", "2099-01-01T00:00:00Z")
    with Repository.open(str(repo)) as repository:
        (problem,) = look(repository, timedelta(days=36_500)).problems
    assert problem.startswith("web02: the newest point is dated")


def test_no_points_is_a_problem(tmp_path: Path) -> None:
    Repository.init(str(tmp_path / "repo"))
    code, found = run_status(tmp_path / "repo")
    assert (code, found["problems"]) == (1, ["there are no points"])


def test_a_repository_that_can_not_be_looked_at_is_not_ok(repo: Path, tmp_path: Path) -> None:
    """An unmounted disk must not leave metrics that say what was true before."""
    path = tmp_path / "backupfs.prom"
    backupfs(repo, "status", "--metrics", path)
    assert "backupfs_ok 1" in path.read_text().splitlines()
    repo.rename(tmp_path / "away")
    backupfs(repo, "status", "--metrics", path, code=10)
    assert [line for line in path.read_text().splitlines() if not line.startswith("#")] == ["backupfs_ok 0"]


def test_what_was_wrong_with_a_vm_that_is_gone_is_no_worry(repo: Path, tmp_path: Path) -> None:
    """Nothing could take it away: `verify` finds no such VM."""
    with Repository.open(str(repo)) as repository:
        add_point(repository, b"x" * 100 * KiB, vm="gone")
        layer = next((repo / "vms/gone/disks").rglob("*.layer"))
        layer.chmod(0o600)
        with open(layer, "r+b") as file:
            file.seek(4096 + 7)
            file.write(b"?")
        backupfs(repo, "verify", code=20)
        backupfs(repo, "backup", "gone", f"vda={repo}/nothing", code=30)
        assert len(look(repository).damage) == 1
        assert len(look(repository).problems) == 2
        backupfs(repo, "delete", "gone/latest")
        backupfs(repo, "gc")
        backupfs(repo, "verify")
        state = look(repository)
        assert state.damage == []
        assert [(r.what, r.vm) for r in state.results if not r.ok] == [("backup", "gone")]
        assert [p.startswith("gone: it has no points; backup: ") for p in state.problems] == [True]
        age(repo, "backup-gone", 9)
        assert look(repository).problems == []
        write_metrics(look(repository), str(tmp_path / "backupfs.prom"))
        assert 'what="verify",vm="gone"' not in (tmp_path / "backupfs.prom").read_text()
    assert "backup gone: FAILED" in backupfs(repo, "status")


def test_a_verification_gets_too_old(repo: Path, tmp_path: Path) -> None:
    week = timedelta(days=8)
    with Repository.open(str(repo)) as repository:
        assert look(repository, None, timedelta(days=36_500)).problems == []  # not before its points are so old
        disk = tmp_path / "disk.raw"
        disk.write_bytes(bytes(KiB))
        backupfs(repo, "backup", "old", f"vda={disk}", "--time", "2020-01-01T00:00:00Z")
        (problem,) = look(repository, None, timedelta(days=300)).problems
        assert problem.startswith("old: never verified, and the oldest point is ")
        backupfs(repo, "verify", "--sample", "50%")
        assert look(repository, None, week).problems == []
        age(repo, "verify-old", 9)
        (problem,) = look(repository, None, week).problems
        assert problem.startswith("old: the last verification is 216.0 h old, more than 192.0 h")
        backupfs(repo, "verify", "old/latest")  # one point is not all of it
        assert look(repository, None, week).problems == [problem]
        monday = look(repository).vms[0].verified
        write_metrics(look(repository), str(tmp_path / "backupfs.prom"))
        assert monday is not None
        stamp = int(datetime.fromisoformat(monday).timestamp())
        line = f'backupfs_verified_timestamp_seconds{{vm="old"}} {stamp}'
        assert line in (tmp_path / "backupfs.prom").read_text().splitlines()
        code, found = run_status(repo, "--max-verify-age", "8d")
        assert (code, found["problems"]) == (1, [problem])
        backupfs(repo, "verify", "old")
        assert look(repository, None, week).problems == []


def test_metrics_that_can_not_be_written_hide_nothing(repo: Path, tmp_path: Path) -> None:
    command = [*BACKUPFS, "-r", str(repo), "status", "--metrics", str(tmp_path / "no" / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("GOOD: 1 VMs\n")
    assert "No such file" in done.stderr
    command[command.index("-r") + 1] = str(tmp_path / "none")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 10
    assert "No such file" in done.stderr
    assert "is not a repository" in done.stderr


def test_the_first_line_says_it(repo: Path) -> None:
    assert backupfs(repo, "status").splitlines()[0] == "GOOD: 1 VMs"
    command = [*BACKUPFS, "-r", str(repo), "status", "--max-age", "0h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("WRONG: web01: the newest point is ")


def test_a_verification_that_breaks_off_is_told(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from backupfs.cli import cli
    from backupfs.services import verify

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", break_off)
    CliRunner().invoke(cli, ["-r", str(repo), "verify"])
    with Repository.open(str(repo)) as repository:
        assert any("verify: interrupted" in p for p in look(repository).problems)
    monkeypatch.undo()
    backupfs(repo, "verify")
    with Repository.open(str(repo)) as repository:
        assert look(repository).problems == []


def test_metrics_are_prometheus_text(repo: Path, tmp_path: Path) -> None:
    path = tmp_path / "backupfs.prom"
    with Repository.open(str(repo)) as repository:
        add_point(repository, b"x", vm='a "b" \\ c')
        backupfs(repo, "verify")
        write_metrics(look(repository), str(path))
        with pytest.raises(BackupfsError, match="No such file"):
            write_metrics(look(repository), str(tmp_path / "no" / "file"))
    lines = path.read_text().splitlines()
    sample = re.compile(
        r'backupfs_[a-z_]+(\{[a-z]+="(?:[^"\\]|\\[\\"n])*"(,[a-z]+="(?:[^"\\]|\\[\\"n])*")*\})? -?[0-9.e+]+'
    )
    for line in lines:
        assert sample.fullmatch(line) or re.fullmatch(r"# (HELP|TYPE) backupfs_[a-z_]+ .+", line), line
    assert "backupfs_ok 1" in lines
    assert 'backupfs_points{vm="web01"} 2' in lines
    assert 'backupfs_points{vm="a \\"b\\" \\\\ c"} 1' in lines
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir() if "prom" in p.name] == ["backupfs.prom"]
    backupfs(repo, "status", "--metrics", path)
    (repo / "status" / "verify-web01.json").write_text("{}")
    backupfs(repo, "status", "--metrics", path, code=1)
    assert "backupfs_ok 0" in path.read_text().splitlines()
