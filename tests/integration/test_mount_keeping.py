"""A mount while points are deleted and gc runs: open files read on, new points appear, then the space comes back."""

import contextlib
import errno
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import backupfs, backupfs_json
from mounts import fails_with, needs_fuse, unmount_all, wait_until
from repositories import add_point

from backupfs.repository.repository import Repository

pytestmark = [pytest.mark.timeout(120), needs_fuse]
CHUNK = 65536


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    repo, path = tmp_path / "repo", tmp_path / "mnt"
    path.mkdir()
    Repository.init(str(repo), codec_name="none")
    try:
        yield repo, path
    finally:
        unmount_all(str(path))
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and str(path).encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


def test_what_is_not_damaged_comes_out_with_dd(mounted: tuple[Path, Path]) -> None:
    """As README says where `restore` ends because of a damaged chunk."""
    repo, path = mounted
    content = random.Random(2).randbytes(40 * CHUNK + 5000)
    with Repository.open(str(repo)) as repository:
        point = add_point(repository, content).id
    raw = repo / "vms/web01/disks/vda/main/000000.raw"
    raw.chmod(0o600)
    with open(raw, "r+b") as file:
        file.seek(7 * CHUNK + 100)
        file.write(b"?")
    assert f"offset {7 * CHUNK} length {CHUNK} of web01/{point}/vda" in backupfs(
        repo, "restore", "web01/latest/vda", repo.parent / "disk.raw", code=20
    )
    backupfs(repo, "mount", path)
    copy = repo.parent / "copy.raw"
    words = [f"if={path}/web01/latest/vda.raw", f"of={copy}", "bs=64K", "conv=noerror,sync,sparse"]
    assert b"error" in subprocess.run(["dd", *words], capture_output=True, check=False).stderr
    os.truncate(copy, len(content))
    assert copy.read_bytes() == content[: 7 * CHUNK] + bytes(CHUNK) + content[8 * CHUNK :]
    backupfs(repo, "umount", path)


def test_delete_and_gc_beside_a_mount(mounted: tuple[Path, Path]) -> None:
    repo, path = mounted
    rng = random.Random(1)
    disk = bytearray(rng.randbytes(80 * CHUNK))
    contents = {}
    with Repository.open(str(repo)) as repository:
        for number in range(4):
            contents[add_point(repository, bytes(disk), day=number).id] = bytes(disk)
            disk[number * 20 * CHUNK : (number + 1) * 20 * CHUNK] = rng.randbytes(20 * CHUNK)
    ids = list(contents)
    backupfs(repo, "mount", path)
    with open(path / "web01" / ids[3] / "vda.raw", "rb", buffering=0) as newest:
        assert newest.read(CHUNK) == contents[ids[3]][:CHUNK]
        with open(path / "web01" / ids[0] / "vda.raw", "rb", buffering=0) as first:
            backupfs(repo, "delete", f"web01/{ids[0]}", "web01/latest")
            report = backupfs_json(repo, "gc")
            assert sorted(report["open"]) == ["web01/vda/main/0", "web01/vda/main/3"]
            assert report["freed"] == 0
            assert sorted(os.listdir(path / "web01")) == [*ids[1:3], "latest"]
            first.seek(0)
            assert first.read(len(disk)) == contents[ids[0]]
        with Repository.open(str(repo)) as repository:  # back to what the deleted point was made of
            new = add_point(repository, contents[ids[2]], day=9).id
        assert (path / "web01" / new / "vda.raw").read_bytes() == contents[ids[2]]
        wait_until(lambda: os.readlink(path / "web01/latest") == new, 1)
        wait_until(lambda: backupfs_json(repo, "gc")["open"] == ["web01/vda/main/3"])
        newest.seek(0)
        assert newest.read(len(disk)) == contents[ids[3]]
        for point in ids[1:3]:
            assert (path / "web01" / point / "vda.raw").read_bytes() == contents[point]
    wait_until(lambda: backupfs_json(repo, "gc")["open"] == [])
    assert not (repo / "vms/web01/disks/vda/main/000003.layer").exists()
    for point in (ids[0], ids[3]):
        fails_with(errno.ENOENT, (path / "web01" / point / "vda.raw").read_bytes)
    for point in ids[1:3]:
        assert (path / "web01" / point / "vda.raw").read_bytes() == contents[point]
    assert (path / "web01" / new / "vda.raw").read_bytes() == contents[ids[2]]
    backupfs(repo, "umount", path)
