"""ls, cp, find and history on disks that mkfs made, as a user runs them: without root and without a mount."""

import base64
import hashlib
import json
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from commands import BACKUPFS, backupfs, backupfs_json
from guest_disks import DATA_AT, group, logical, put, put_pv, segment
from servers import run

from backupfs.units import MiB

SIZE = 16 * MiB
BEFORE, BETWEEN, AFTER = "20260101T000000Z", "20260102T000000Z", "20260103T000000Z"
ODD = b"odd\xff\x1b[2Jname"


def ext4(path: Path, source: Path) -> bytes:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", "-d", source, path)
    return path.read_bytes()


def back_up(repo: Path, point: str, disk: bytes) -> None:
    path = repo.parent / "disk.raw"
    path.write_bytes(disk)
    backupfs(repo, "backup", "web01", f"vda={path}", "--time", point)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "etc/many").mkdir(parents=True)
    for number in range(50):
        (source / f"etc/many/{number}").write_text(f"{number}\n" * number)
    (source / "etc/hosts").write_text("old\n")
    (source / "etc/link").symlink_to("hosts")
    Path(os.fsdecode(os.fsencode(source) + b"/etc/odd link")).symlink_to(os.fsdecode(ODD))
    Path(os.fsdecode(os.fsencode(source) + b"/etc/" + ODD)).write_text("odd")
    with (source / "sparse").open("wb") as file:
        file.truncate(4 * MiB)
        file.seek(2 * MiB)
        file.write(b"middle")
    return source


@pytest.fixture
def repo(tmp_path: Path, source: Path) -> Path:
    """Three points; a file changes and another one goes between the second and the third."""
    repo = tmp_path / "repo"
    backupfs(repo, "init")
    disk = ext4(tmp_path / "fs", source)
    back_up(repo, BEFORE, disk)
    back_up(repo, BETWEEN, disk)
    (source / "etc/hosts").write_text("new one\n")
    (source / "etc/many/7").unlink()
    (source / "etc/later").write_text("later")
    back_up(repo, AFTER, ext4(tmp_path / "fs", source))
    return repo


def test_a_file_that_was_deleted_comes_back(repo: Path, tmp_path: Path) -> None:
    """The README's minute: which volumes, what is there, where is it, and back."""
    assert backupfs_json(repo, "ls", "web01/latest/vda") == [
        {"volume": "0", "size": SIZE, "kind": "ext4", "problem": None}
    ]
    (found,) = backupfs_json(repo, "find", "web01", "7")
    assert (found["disk"], found["volume"], found["path"]) == ("vda", "0", "/etc/many/7")
    assert [(p["point"], p["change"], p.get("last")) for p in found["points"]] == [
        (BEFORE, "new", BETWEEN),
        (AFTER, "gone", None),
    ]
    said = backupfs(repo, "cp", f"web01/{BETWEEN}/vda:/etc/many/7", tmp_path / "seven")
    assert said.startswith("1 files copied")
    assert (tmp_path / "seven").read_text() == "7\n" * 7
    assert backupfs(repo, "cp", f"web01/{BETWEEN}/vda:0/etc/many/7", "-") == "7\n" * 7


def test_a_file_whose_time_was_set_back_is_found_to_have_changed(tmp_path: Path, source: Path) -> None:
    repo, disk = tmp_path / "repo", tmp_path / "fs"
    backupfs(repo, "init")
    back_up(repo, BEFORE, ext4(disk, source))
    run("debugfs", "-w", "-R", "set_inode_field /etc/hosts ctime 20300101000000", disk)
    back_up(repo, AFTER, disk.read_bytes())
    (found,) = backupfs_json(repo, "find", "web01", "/etc/hosts")
    assert [(p["point"], p["change"]) for p in found["points"]] == [(BEFORE, "new"), (AFTER, "changed")]
    assert found["points"][0]["mtime_ns"] == found["points"][1]["mtime_ns"]


def test_ls(repo: Path) -> None:
    listed = backupfs_json(repo, "ls", "web01/latest/vda:/etc")
    names = {entry["name"]: entry for entry in listed}
    assert set(names) == {"hosts", "link", "odd link", "later", "many", "odd\\xff\x1b[2Jname"}
    assert names["hosts"]["size"] == 8
    assert (names["link"]["type"], names["link"]["target"]) == ("link", "hosts")
    assert "target_base64" not in names["link"]
    assert base64.b64decode(names["odd link"]["target_base64"]) == ODD
    odd = names["odd\\xff\x1b[2Jname"]
    assert base64.b64decode(odd["name_base64"]) == ODD
    shown = backupfs(repo, "ls", "web01/latest/vda:/etc")
    assert "\x1b" not in shown
    assert "odd\\xff\\x1b[2Jname" in shown
    assert "link -> hosts" in shown
    assert backupfs(repo, "ls", "web01/latest/vda:0/etc/hosts").startswith("-rw-r--r--")


def test_a_folder_is_copied_with_all_it_has(repo: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    report = backupfs_json(repo, "cp", "web01/latest/vda:/etc", "web01/latest/vda:/sparse", target)
    assert report["failed"] == []
    compared = subprocess.run(
        ["rsync", "-aHAXcni", "--delete", f"{source}/etc", f"{source}/sparse", target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (compared.returncode, compared.stdout) == (0, "")
    assert (target / "sparse").stat().st_blocks * 512 < MiB
    again = backupfs_json(repo, "cp", "web01/latest/vda:/etc", "web01/latest/vda:/sparse", target)
    assert (again["files"], again["there"]) == (0, report["files"])
    (target / "etc/hosts").write_text("mine")
    said = backupfs(repo, "cp", "web01/latest/vda:/etc", target, code=50)
    assert "etc/hosts: is there already, and differs; --force replaces it" in said
    assert (target / "etc/hosts").read_text() == "mine"
    backupfs(repo, "cp", "--force", "web01/latest/vda:/etc", target)
    assert (target / "etc/hosts").read_text() == "new one\n"


def test_all_of_a_volume(repo: Path, source: Path, tmp_path: Path) -> None:
    backupfs(repo, "cp", "web01/latest/vda:/", tmp_path / "all")
    names = {p.name for p in (tmp_path / "all").iterdir()}
    assert names == {"etc", "sparse", "lost+found"}
    assert stat.S_IMODE((tmp_path / "all/lost+found").stat().st_mode) == 0o700


def test_the_same_command_again(repo: Path, tmp_path: Path) -> None:
    """With a slash at its end a folder that is not there is made, and copied into each time."""
    etc, sparse, everything = "web01/latest/vda:/etc", "web01/latest/vda:0/sparse", "web01/latest/vda:/"
    for sources, inside in (
        ((sparse,), {"sparse"}),
        ((etc, sparse), {"etc", "sparse"}),
        ((everything,), {"etc", "sparse", "lost+found"}),
    ):
        target = tmp_path / f"restored{len(inside)}"
        first = backupfs_json(repo, "cp", *sources, f"{target}/")
        (target / ".backupfs-0123456789abcdef.part").write_text("left by a kill")
        again = backupfs_json(repo, "cp", *sources, f"{target}/")
        assert (again["files"], again["there"]) == (0, first["files"])
        assert {p.name for p in target.iterdir()} == inside
    backupfs(repo, "cp", etc, tmp_path / "new")
    assert (tmp_path / "new/hosts").exists()
    backupfs(repo, "cp", etc, tmp_path / "new")
    assert (tmp_path / "new/etc/hosts").exists(), "as cp(1)"
    (tmp_path / "file").touch()
    assert "file/: File exists" in backupfs(repo, "cp", etc, f"{tmp_path}/file/", code=1)
    assert "no such folder" in backupfs(repo, "cp", etc, f"{tmp_path}/nothing/restored/", code=2)


def test_history(repo: Path) -> None:
    versions = backupfs_json(repo, "history", "web01", "vda:/etc/hosts")
    assert [(v["first"], v["last"], v["size"], v["sha256"]) for v in versions] == [
        (BEFORE, BETWEEN, 4, hashlib.sha256(b"old\n").hexdigest()),
        (AFTER, AFTER, 8, hashlib.sha256(b"new one\n").hexdigest()),
    ]
    assert [v["sha256"] for v in backupfs_json(repo, "history", "web01", "vda:/etc/many/7")][1] is None
    assert "not there" in backupfs(repo, "history", "web01", "vda:/etc/many/7")
    assert [v["first"] for v in backupfs_json(repo, "history", "web01", "vda:0/etc/later")] == [AFTER]


def test_globs(repo: Path) -> None:
    def paths(pattern: str) -> list[str]:
        return [found["path"] for found in backupfs_json(repo, "find", "web01", pattern)]

    assert paths("host*") == ["/etc/hosts"]
    assert sorted(paths("many/4?")) == [f"/etc/many/{n}" for n in range(40, 50)]
    assert paths("/etc/many/[12]") == ["/etc/many/1", "/etc/many/2"]
    command = [*BACKUPFS, "-r", repo, "find", "web01", "nothing"]
    for options, printed in (((), ""), (("--json",), "[]\n")):
        said = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert (said.returncode, said.stdout, said.stderr) == (1, printed, "backupfs: nothing found\n")
    assert paths("odd?*name") == ["/etc/odd\\xff\x1b[2Jname"]
    assert "\x1b" not in backupfs(repo, "find", "web01", "odd*")


def test_what_can_not_be(repo: Path, tmp_path: Path) -> None:
    for words, code, said in (
        (("ls", "web01/latest/vda:/nothing"), 10, "there is no nothing"),
        (("ls", "web01/latest/vda:9/etc"), 10, "no volume '9'; there are: 0 (ext4)"),
        (("ls", "web01/latest/vdz:/etc"), 10, "vdz"),
        (("ls", "web01/latest"), 2, "VM/POINT/DISK"),
        (("cp", "web01/latest/vda:/etc", "web01/latest/vda:/sparse", str(tmp_path / "nothing")), 2, "no such folder"),
        (("cp", "web01/latest/vda:/etc", "-"), 50, "only a file"),
        (("cp", "web01/latest/vda:/etc", ""), 2, "TARGET is empty"),
        (("cp", "web01/latest/vda:/etc", str(tmp_path / "no/1/")), 2, f"{tmp_path / 'no'}: there is no such folder"),
        (("find", "web02", "x"), 10, "web02"),
        (("find", "web01", "hosts", "--disk", "vdz"), 10, "no point of web01 has a disk 'vdz'"),
        (("history", "web01", "vda:/nothing"), 10, "no point of web01 has it"),
        (("history", "web01", "/etc/hosts"), 2, "DISK:[VOLUME]/path"),
    ):
        assert said in backupfs(repo, *words, code=code), words


def test_one_of_several_that_is_missing_costs_itself(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "target/link").mkdir(parents=True)
    wanted = [f"web01/latest/vda:/etc/{name}" for name in ("hosts", "nope", "later", "link")]
    command = [*BACKUPFS, "-r", repo, "cp", *wanted, tmp_path / "target", "--force", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 50
    report = json.loads(said.stdout)
    assert [entry["path"] for entry in report["failed"]] == [wanted[1], "link"]
    assert "a folder of that name is there" in report["failed"][1]["error"]
    assert sorted(os.listdir(tmp_path / "target")) == ["hosts", "later", "link"]


def test_one_of_several_in_a_damaged_point_costs_itself(repo: Path, tmp_path: Path) -> None:
    manifest = repo / f"vms/web01/points/{BETWEEN}.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace("vda", "vdb", 1))
    (tmp_path / "target").mkdir()
    wanted = [
        f"web01/{point}/vda:/etc/{name}" for point, name in ((BEFORE, "hosts"), (BETWEEN, "link"), (AFTER, "later"))
    ]
    said = backupfs(repo, "cp", *wanted, tmp_path / "target", code=50)
    assert f"{BETWEEN}.json: damaged" in said
    assert sorted(os.listdir(tmp_path / "target")) == ["hosts", "later"]


def damage(repo: Path, content: bytes) -> None:
    """Flip a byte of what the newest layer has stored as it is."""
    layer = sorted(repo.rglob("*.layer"))[-1]
    layer.chmod(0o600)
    at = layer.read_bytes().index(content)
    with layer.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[0] ^ 1]))


def test_what_can_not_be_read_is_not_gone(tmp_path: Path, source: Path) -> None:
    """The newest point has a damaged chunk: the superblock's, or the one with a folder in it."""
    for name, place in (("superblock", slice(1024, 1100)), ("folder", None)):
        repo = tmp_path / name
        backupfs(repo, "init", "--codec", "none", "--chunk-size", "4KiB")
        (source / "etc/hosts").write_text("old\n")
        disk = ext4(tmp_path / "fs", source)
        back_up(repo, BEFORE, disk)
        (source / "etc/hosts").write_text("new one\n")
        (source / "etc/another").write_text(name)
        disk = ext4(tmp_path / "fs", source)
        back_up(repo, AFTER, disk)
        entry = disk.index(b"another") if place is None else 0
        damage(repo, disk[place] if place else disk[entry - 8 : entry + 16])
        words = "could not be read"
        assert words in backupfs(repo, "find", "web01", "hosts", code=50)
        command = [*BACKUPFS, "-r", repo, "find", "web01", "hosts", "--json"]
        said = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
        assert [p["change"] for found in said for p in found["points"]] == ["new"], name
        assert words in backupfs(repo, "history", "web01", "vda:0/etc/hosts", code=50)
        assert "read" in backupfs(repo, "ls", "web01/latest/vda:0/etc", code=50)
        assert "read" in backupfs(repo, "cp", "web01/latest/vda:0/etc", tmp_path / f"out-{name}", code=50)
        assert backupfs(repo, "cp", f"web01/{BEFORE}/vda:0/etc/hosts", "-") == "old\n"


def test_several_volumes(tmp_path: Path, source: Path) -> None:
    """A partition that can be read, one that can't, and two that could be meant."""
    repo, inner = tmp_path / "repo", ext4(tmp_path / "fs", source)
    backupfs(repo, "init")

    def disk(second: bytes) -> bytes:
        table = bytearray(MiB)
        for number, kind in enumerate((0x83, 0x83)):
            first = 2048 + number * SIZE // 512
            struct.pack_into("<B3xB3xII", table, 446 + 16 * number, 0, kind, first, SIZE // 512)
        table[510:512] = b"\x55\xaa"
        return bytes(table) + inner + second

    swap = tmp_path / "swap"
    swap.write_bytes(bytes(SIZE))
    subprocess.run(["mkswap", swap], check=True, capture_output=True)
    back_up(repo, BEFORE, disk(swap.read_bytes()))
    volumes = backupfs_json(repo, "ls", "web01/latest/vda")
    assert [(v["volume"], v["kind"]) for v in volumes] == [("1", "ext4"), ("2", "swap space")]
    assert "swap space" in backupfs(repo, "ls", "web01/latest/vda:2/", code=50)
    assert backupfs(repo, "cp", "web01/latest/vda:/etc/hosts", "-") == "old\n"
    back_up(repo, AFTER, disk(inner))
    assert "several volumes" in backupfs(repo, "ls", "web01/latest/vda:/etc", code=2)
    back_up(repo, "20260104T000000Z", disk(inner))
    said = backupfs(repo, "history", "web01", "vda:/etc/hosts", code=50)  # what the first point has is told
    assert said.count("several volumes") == 1
    backupfs(repo, "delete", f"web01/{BEFORE}")
    assert backupfs(repo, "history", "web01", "vda:/etc/hosts", code=2).count("several volumes") == 1
    assert backupfs(repo, "cp", "web01/latest/vda:2/etc/hosts", "-") == "old\n"
    assert json.loads(backupfs(repo, "find", "web01", "hosts", "--json"))[1]["volume"] == "2"


def test_a_volume_on_two_disks(tmp_path: Path, source: Path) -> None:
    """Where only the other disk changed, its files did too."""
    repo, extent, count = tmp_path / "repo", 64 * 1024, SIZE // (64 * 1024)
    backupfs(repo, "init")
    root = logical("root", segment(0, count - 1, '"pv0", 0'), segment(count - 1, 1, '"pv1", 0'))
    text, size = group(root, pvs=(0, 1), extents=count), DATA_AT + SIZE
    for point, hosts in ((BEFORE, "old\n"), (AFTER, "new one\n")):
        (source / "etc/hosts").write_text(hosts)
        content, command = ext4(tmp_path / "fs", source), ["backup", "web01", "--time", point]
        for number, part in enumerate((content[: (count - 1) * extent], content[(count - 1) * extent :])):
            disk = bytearray(size)
            put_pv(disk, 0, size, number, text)
            put(disk, DATA_AT, part)
            path = tmp_path / f"disk{number}"
            path.write_bytes(disk)
            command.append(f"vd{'ab'[number]}={path}")
        backupfs(repo, *command)
    for disk_name in ("vda", "vdb"):
        versions = backupfs_json(repo, "history", "web01", f"{disk_name}:vg0-root/etc/hosts")
        assert [v["sha256"] for v in versions] == [hashlib.sha256(t).hexdigest() for t in (b"old\n", b"new one\n")]
    found = {f["disk"]: [p["change"] for p in f["points"]] for f in backupfs_json(repo, "find", "web01", "hosts")}
    assert found == {disk: ["new", "changed"] for disk in ("vda", "vdb")}
