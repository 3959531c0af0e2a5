"""The commands, their JSON, their messages and exit codes, on image files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json

from backupfs.units import MiB

SIZE = 3 * MiB + 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk whose first half is random and whose second is empty."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE // 2))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    backupfs(tmp_path / "repo", "init")
    return tmp_path / "repo"


def test_from_init_to_map(repo: Path, disk: Path) -> None:
    first = backupfs_json(repo, "backup", "web01", f"vda={disk}", "--time", "2026-11-22T20:00:00Z")
    assert (first["vm"], first["id"], first["parent"]) == ("web01", "20261122T200000Z", None)
    with disk.open("r+b") as file:
        file.seek(2 * MiB)
        file.write(b"changed")
    second = backupfs_json(repo, "backup", "web01", f"vda={disk}")
    entry = second["disks"][0]
    assert second["parent"] == first["id"]
    assert (entry["kind"], entry["read"], entry["reason"]) == ("delta", "all", "no bitmap was named")
    assert (entry["chain"], entry["seq"], entry["data_bytes"], entry["size"]) == ("main", 1, 65536, SIZE)
    assert backupfs_json(repo, "points") == backupfs_json(repo, "points", "web01") == [first, second]
    assert "web01" in backupfs(repo, "points")
    shown = backupfs_json(repo, "show", "web01/latest")
    assert shown["id"] == second["id"]
    assert shown["disks"][0]["allocated_bytes"] == 26 * 65536
    assert f"id: {second['id']}" in backupfs(repo, "show", f"web01/{second['id']}")
    half = -(-SIZE // 2 // 65536) * 65536
    assert backupfs_json(repo, "map", "web01/latest/vda") == [
        {"offset": 0, "length": half, "zero": False, "point": first["id"]},
        {"offset": half, "length": 2 * MiB - half, "zero": True, "point": None},
        {"offset": 2 * MiB, "length": 65536, "zero": False, "point": second["id"]},
        {"offset": 2 * MiB + 65536, "length": SIZE - 2 * MiB - 65536, "zero": True, "point": None},
    ]
    assert len(backupfs(repo, "map", "web01/latest/vda").splitlines()) == 4
    assert backupfs(repo, "reindex") == "2 points indexed\n"


def test_chains_and_full(repo: Path, disk: Path) -> None:
    for words in ([], ["--chain", "weekly"], ["--full"], [], ["--chain", "weekly"]):
        backupfs(repo, "backup", "web01", f"vda={disk}", f"vdb={disk}", *words)
    found = [[(d["name"], d["chain"], d["seq"], d["kind"]) for d in p["disks"]] for p in backupfs_json(repo, "points")]
    assert [f[0] for f in found] == [
        ("vda", "main", 0, "full"),
        ("vda", "weekly", 0, "full"),
        ("vda", "main.2", 0, "full"),
        ("vda", "main.2", 1, "delta"),
        ("vda", "weekly", 1, "delta"),
    ]
    assert [f[1][0] for f in found] == ["vdb"] * 5


def test_the_repository_option_stands_anywhere(tmp_path: Path) -> None:
    for words in (["-r", str(tmp_path / "a"), "init"], ["init", "--repository", str(tmp_path / "b")]):
        subprocess.run([os.sys.executable, "-m", "backupfs", *words], check=True)
    assert (tmp_path / "a" / "backupfs.json").exists()
    assert (tmp_path / "b" / "backupfs.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["backup", "a/b", "vda=x"], 2, "slash"),
        (["backup", "..", "vda=x"], 2, "not a name"),
        (["backup", "a\nb", "vda=x"], 2, "can't be printed"),
        (["backup", "x" * 300, "vda=x"], 2, "too long"),
        (["backup", "web01", "../vda=x"], 2, "slash"),
        (["backup", "web01", "vda"], 2, "DISK=SOURCE"),
        (["backup", "web01", "vda=x", "vda=y"], 2, "twice"),
        (["backup", "web01", "vda=x", "--bitmap", "vdb=b0"], 2, "no such disk"),
        (["backup", "web01", "vda=x", "--chain", "a.b"], 2, "chain"),
        (["backup", "web01", "vda=x", "--time", "soon"], 2, "not a time"),
        (["backup", "web01"], 2, "nothing is named"),
        (["backup", "web01", "vda=x", "--qmp", "s"], 2, "both DISK=SOURCE and --qmp"),
        (["backup", "web01", "vda=x", "--disk", "vda"], 2, "--disk is for"),
        (["backup", "web01", "--qmp", "s", "--bitmap", "vda=b0"], 2, "--bitmap is for"),
        (["backup", "web01", "vda=/nonexistent/disk"], 30, "/nonexistent/disk"),
        (["backup", "web01", "vda=nbd+unix:///?socket=/nonexistent/s"], 30, "/nonexistent/s"),
        (["backup", "web01", "vda=gopher://x/"], 2, "gopher"),
        (["points", "nobody"], 10, "nobody"),
        (["show", "web01"], 2, "VM/POINT"),
        (["show", "web01/latest"], 10, "web01"),
        (["map", "web01/latest"], 2, "VM/POINT/DISK"),
        (["nonsense"], 2, "nonsense"),
        (["/nonexistent/repo", "/mnt"], 10, "/nonexistent/repo is not a repository"),  # mount(8)
        (["-r", "", "points"], 2, "it is empty"),
        (["backup", "web01", "vda=x", "--freeze", "require"], 2, "--freeze require is for --libvirt"),
        (["init"], 2, "not empty"),
    ],
)
def test_bad_input(repo: Path, words: list[str], code: int, message: str) -> None:
    assert message in backupfs(repo, *words, code=code)
    assert backupfs_json(repo, "points") == []


def test_no_repository(tmp_path: Path) -> None:
    assert "not a repository" in backupfs(tmp_path, "points", code=10)
    environment = {k: v for k, v in os.environ.items() if k != "BACKUPFS_REPOSITORY"}
    done = subprocess.run(
        [os.sys.executable, "-m", "backupfs", "points"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "BACKUPFS_REPOSITORY" in done.stderr


def test_names_that_are_not_ascii(repo: Path, disk: Path) -> None:
    backupfs(repo, "backup", "Büro-Server 2", f"Systemplatte é={disk}")
    point = backupfs_json(repo, "points", "Büro-Server 2")[0]
    assert point["disks"][0]["name"] == "Systemplatte é"
    assert backupfs_json(repo, "map", "Büro-Server 2/latest/Systemplatte é")[0]["offset"] == 0


def test_since_has_to_be_the_end_of_the_chain(repo: Path, disk: Path) -> None:
    assert "no point yet" in backupfs(repo, "backup", "web01", f"vda={disk}", "--since", "20261122T200000Z", code=2)
    ids = [backupfs_json(repo, "backup", "web01", f"vda={disk}")["id"] for _ in range(2)]
    assert ids[1] in backupfs(repo, "backup", "web01", f"vda={disk}", "--since", ids[0], code=2)
    assert backupfs_json(repo, "backup", "web01", f"vda={disk}", "--since", ids[1])["parent"] == ids[1]


def test_a_dry_run_tells_and_touches_nothing(repo: Path, disk: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in repo.rglob("*"))

    before = state()
    plan = backupfs_json(repo, "backup", "web01", f"vda={disk}", "--dry-run")
    assert plan == [
        {
            "name": "vda",
            "size": disk.stat().st_size,
            "source": str(disk),
            "kind": "full",
            "read": "all",
            "reason": "the first point of its chain",
        }
    ]
    assert state() == before
    backupfs(repo, "backup", "web01", f"vda={disk}")
    assert "no bitmap was named" in backupfs(repo, "backup", "web01", f"vda={disk}", "--dry-run")
    assert len(backupfs_json(repo, "points")) == 1


def test_a_raw_disk_that_turns_into_another_format_is_refused(repo: Path, disk: Path, tmp_path: Path) -> None:
    """A guest can write a qcow2 header, with any host file as the backing file, on its raw disk."""
    backupfs(repo, "backup", "web01", f"vda={disk}")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "3M"], check=True)
    assert "looks like qcow2" in backupfs(repo, "backup", "web01", f"vda={disk}", code=1)
    for words in (["--full"], ["--chain", "weekly"]):
        assert "looks like qcow2" in backupfs(repo, "backup", "web01", f"vda={disk}", *words, code=1)


def test_help_names_every_command_and_exit_code() -> None:
    shown = subprocess.run([os.sys.executable, "-m", "backupfs", "--help"], capture_output=True, text=True, check=True)
    for word in ("init", "backup", "points", "show", "map", "mount", "umount", "reindex", "130", "40"):
        assert word in shown.stdout
    for command in ("init", "backup", "points", "show", "map", "mount", "umount", "reindex"):
        one = subprocess.run(
            [os.sys.executable, "-m", "backupfs", command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example" in one.stdout


def test_a_closed_pipe_is_no_traceback(repo: Path, disk: Path) -> None:
    backupfs(repo, "backup", "web01", f"vda={disk}")
    shell = subprocess.run(
        ["bash", "-c", '"$0" -m backupfs -r "$1" map web01/latest/vda --json | true', os.sys.executable, str(repo)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in shell.stderr


def test_an_interrupt_while_modules_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*BACKUPFS, "points"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interrupt_while_a_string_is_executed(tmp_path: Path) -> None:
    program = "from backupfs import cli\ncli.cli = lambda **_: exec('raise KeyboardInterrupt')\ncli.main()\n"
    (tmp_path / "interrupted.py").write_text(program)
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "backupfs: interrupted; nothing is left half published\n")


@pytest.mark.parametrize(
    "words", [["points"], ["points", "--json"], ["show", "web01/latest"], ["map", "web01/latest/vda"]]
)
def test_a_full_disk_behind_stdout_is_no_traceback(repo: Path, disk: Path, words: list[str]) -> None:
    backupfs(repo, "backup", "web01", f"vda={disk}")
    with open("/dev/full", "w") as full:
        command = [os.sys.executable, "-m", "backupfs", "-r", str(repo), *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "backupfs: No space left on device\n"


def test_closed_standard_streams(repo: Path, disk: Path) -> None:
    """No file gets a number that others print to."""
    backupfs(repo, "backup", "web01", f"vda={disk}")
    code = "import os; from backupfs.__main__ import *; have_standard_streams(); os._exit(os.open('/', os.O_RDONLY))"
    closed = ["bash", "-c", '"$0" "$@" 0<&- 1>&- 2>&-', os.sys.executable]
    assert subprocess.run([*closed, "-c", code], check=False).returncode > 2
    for words in (["map", "web01/latest/vda", "--json"], ["points"]):
        assert subprocess.run([*closed, *BACKUPFS[1:], "-r", str(repo), *words], check=False).returncode == 0
    assert subprocess.run([*closed, *BACKUPFS[1:], "-r", str(repo), "show", "x/latest"], check=False).returncode == 10


def test_paths_that_are_not_utf_8(repo: Path, disk: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")
    assert "has to be UTF-8" in backupfs(Path(odd), "init", code=2)
    assert "has to be UTF-8" in backupfs(Path(odd), "points", code=2)
    backupfs(repo, "backup", "web01", f"vda={disk}")
    assert backupfs_json(repo, "restore", "web01/latest/vda", odd)["target"] == odd
    assert Path(odd).read_bytes() == disk.read_bytes()
    assert "odd" in backupfs(repo, "restore", "web01/latest/vda", odd, "--force")


def test_json_is_one_document(repo: Path, disk: Path) -> None:
    backupfs(repo, "backup", "web01", f"vda={disk}")
    for words in (["points"], ["show", "web01/latest"], ["map", "web01/latest/vda"]):
        assert json.loads(backupfs(repo, *words, "--json"))


def test_a_damaged_manifest_does_not_hide_the_others(repo: Path, disk: Path) -> None:
    ids = [backupfs_json(repo, "backup", "web01", f"vda={disk}")["id"] for _ in range(3)]
    manifest = repo / "vms/web01/points" / f"{ids[1]}.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"web01"', b'"web02"'))
    environment = {**os.environ, "BACKUPFS_REPOSITORY": str(repo)}
    command = [os.sys.executable, "-m", "backupfs", "points", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 20
    assert [p["id"] for p in json.loads(done.stdout)] == [ids[0], ids[2]]
    assert ids[1] in done.stderr
    command[-2:] = ["map", f"web01/{ids[2]}/vda", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["point"] == ids[0]
    assert ids[1] in done.stderr
