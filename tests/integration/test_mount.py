"""What a real mount shows and answers. Each is answered by a process of its own (fake_mount.py)."""

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_mount import BAD_AT, ODD, SLOW_S, content
from mounts import LANES, P1, P2, P3, FakeMount, choose_lane, fails_with, needs_fuse, pread, wait_until

from backupfs.fuse import mountpoint
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(60), needs_fuse]


@pytest.fixture(params=LANES)
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeMount]:
    choose_lane(monkeypatch, request.param)
    fake = FakeMount(tmp_path)
    try:
        yield fake
    finally:
        fake.clean()


def test_what_is_read(mounted: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "expected").write_bytes(content("good"))
    subprocess.run(["cmp", tmp_path / "expected", mounted.disk("good")], check=True)
    for name in ("good", "weiß 💾"):
        data = content(name)
        assert Path(mounted.disk(name)).read_bytes() == data
        for offset, length in ((0, 1), (4095, 2), (ODD - 1, 1), (ODD - 10, 4096), (1 * MiB - 7, 1 * MiB + 14)):
            assert pread(mounted.disk(name), length, offset) == data[offset : offset + length]
        assert pread(mounted.disk(name), 100, ODD) == b""
        assert pread(mounted.disk(name), 100, ODD + MiB) == b""
        fd = os.open(mounted.disk(name), os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            os.close(fd)
            assert mapped[:] == data
    assert Path(mounted.disk("empty")).read_bytes() == b""
    assert mounted.said() == ""


def test_direct_reads(mounted: FakeMount) -> None:
    data, buffer = content("good"), mmap.mmap(-1, 1 * MiB)
    fd = os.open(mounted.disk("good"), os.O_RDONLY | os.O_DIRECT)
    try:
        for offset in (0, 4096, 1 * MiB, 3 * MiB):
            got = os.preadv(fd, [buffer], offset)
            assert buffer[:got] == data[offset : offset + 1 * MiB]
        assert os.preadv(fd, [buffer], 4 * MiB) == 0
    finally:
        os.close(fd)


def test_what_stat_and_the_tools_say(mounted: FakeMount) -> None:
    status = os.stat(mounted.disk("good"))
    day = 1767225600
    assert (status.st_size, status.st_blocks, status.st_nlink) == (ODD, ODD // 4096, 1)
    assert (status.st_mode & 0o7777, status.st_uid) == (0o400, os.geteuid())
    assert (status.st_mtime_ns, status.st_ctime_ns) == (day * 10**9, day * 10**9)
    assert os.stat(mounted.path / "web" / P1).st_mtime == day
    assert [os.stat(mounted.path / p).st_nlink for p in ("", "web", f"web/{P1}")] == [3, 4, 1]
    assert os.readlink(mounted.path / "web" / "latest") == P2
    files = subprocess.run(["find", mounted.path, "-type", "f"], capture_output=True, text=True, check=True).stdout
    assert len(files.splitlines()) == 2 * 10
    du = subprocess.run(["du", "-k", "--apparent-size", mounted.disk("good")], capture_output=True, check=True)
    assert int(du.stdout.split()[0]) == -(-ODD // 1024)
    assert mountpoint.find(str(mounted.path)).source == "fake:ä, b\\c"  # type: ignore[union-attr]
    assert os.statvfs(mounted.path).f_blocks == os.statvfs(mounted.control).f_blocks
    assert os.statvfs(mounted.path).f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == 15


def test_extended_attributes(mounted: FakeMount) -> None:
    path = mounted.disk("good")
    assert sorted(os.listxattr(path)) == ["user.backupfs.point", "user.backupfs.vm"]
    assert os.getxattr(path, "user.backupfs.vm") == b"web"
    for name in ("user.backupfs.none", "user.other", "security.capability"):
        fails_with(errno.ENODATA, os.getxattr, path, name)
    assert os.listxattr(mounted.path / "web") == []
    assert os.listxattr(mounted.path / "web" / P1 / "point.json") == []


def test_nothing_can_be_written(mounted: FakeMount) -> None:
    folder, path = str(mounted.path / "web"), mounted.disk("good")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC):
        fails_with(errno.EROFS, os.open, path, flags)
    fails_with(errno.EROFS, os.open, folder + "/new", os.O_CREAT | os.O_WRONLY)
    fails_with(errno.EROFS, os.mkdir, folder + "/new")
    fails_with(errno.EROFS, os.rmdir, f"{folder}/{P1}")
    fails_with(errno.EROFS, os.unlink, path)
    fails_with(errno.EROFS, os.rename, path, path + "x")
    fails_with(errno.EROFS, os.symlink, "x", folder + "/new")
    fails_with(errno.EROFS, os.link, path, path + "x")
    fails_with(errno.EROFS, os.truncate, path, 0)
    fails_with(errno.EROFS, os.chmod, path, 0o777)
    fails_with(errno.EROFS, os.chown, path, 1, 1)
    fails_with(errno.EROFS, os.utime, path)
    fails_with(errno.EROFS, os.setxattr, path, "user.x", b"")
    fails_with(errno.EROFS, os.removexattr, path, "user.backupfs.vm")
    fails_with(errno.EROFS, os.mkfifo, folder + "/new")


@pytest.mark.parametrize("name", ["bad", "buggy"])
def test_a_damaged_range_is_eio_and_the_rest_is_right(mounted: FakeMount, name: str) -> None:
    data = content(name)
    for flags in (0, os.O_DIRECT):
        fd = os.open(mounted.disk(name), os.O_RDONLY | flags)
        buffer = mmap.mmap(-1, 4 * KiB)
        try:
            for offset in range(BAD_AT - 8 * KiB, BAD_AT + 72 * KiB, 4 * KiB):
                if BAD_AT <= offset < BAD_AT + 64 * KiB:
                    fails_with(errno.EIO, os.preadv, fd, [buffer], offset)
                else:
                    assert os.preadv(fd, [buffer], offset) == 4 * KiB
                    assert buffer[:] == data[offset : offset + 4 * KiB]
        finally:
            os.close(fd)
    assert Path(mounted.disk("good")).read_bytes() == content("good")
    assert f"web/{P1}/{name}.raw" in mounted.said()
    assert mounted.said().count("ERROR") == 1
    assert mounted.said().count("Traceback") == (name == "buggy")


def test_an_image_that_cannot_be_opened(mounted: FakeMount) -> None:
    fails_with(errno.EIO, os.open, mounted.disk("missing"), os.O_RDONLY)
    assert "missing.raw: open failed: a layer is missing" in mounted.said()
    assert Path(mounted.disk("good")).read_bytes() == content("good")


def test_a_condemned_image_answers_nothing_more_not_even_what_was_read(mounted: FakeMount) -> None:
    fd = os.open(mounted.disk("condemned"), os.O_RDONLY)
    try:
        assert os.pread(fd, 64 * KiB, 0) == content("condemned")[: 64 * KiB]
        wait_until(lambda: "condemned.raw: every read of it fails" in mounted.said())
        time.sleep(0.1)  # the pages are dropped right after
        fails_with(errno.EIO, os.pread, fd, 64 * KiB, 0)
        fails_with(errno.EIO, os.pread, fd, 64 * KiB, 2 * MiB)
    finally:
        os.close(fd)
    assert Path(mounted.disk("good")).read_bytes() == content("good")


def test_a_slow_read_blocks_nobody_else(mounted: FakeMount) -> None:
    with ThreadPoolExecutor(20) as pool:
        begun = time.monotonic()
        slow = [pool.submit(pread, mounted.disk("slow"), 4096, i * 128 * KiB, os.O_RDONLY) for i in range(8)]
        time.sleep(0.2)
        assert Path(mounted.disk("good")).read_bytes() == content("good")
        assert len(os.listdir(mounted.path / "web")) == 3
        assert time.monotonic() - begun < SLOW_S
        assert b"".join(f.result() for f in slow) == b"".join(content("slow")[i * 128 * KiB :][:4096] for i in range(8))


def test_many_readers_at_once(mounted: FakeMount) -> None:
    data = content("good")

    def read(seed: int) -> bool:
        fd = os.open(mounted.disk("good", (P1, P2)[seed % 2]), os.O_RDONLY)
        try:
            offsets = [(seed * 7919 + i * 104729) % ODD for i in range(30)]
            return all(os.pread(fd, 5000, o) == data[o : o + 5000] for o in offsets)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(read, range(128)))
    assert mounted.said() == ""


def test_points_arrive_and_latest_moves(mounted: FakeMount) -> None:
    folder = mounted.path / "web"
    fails_with(errno.ENOENT, os.stat, folder / P3)
    mounted.add(P3)
    assert (folder / P3 / "good.raw").read_bytes() == content("good")
    assert sorted(os.listdir(folder)) == [P1, P2, P3, "latest"]
    assert os.readlink(folder / "latest") == P3
    assert (folder / "latest" / "good.raw").stat().st_mtime == (folder / P3).stat().st_mtime


def test_a_listing_holds_still_while_points_come_and_go(mounted: FakeMount) -> None:
    points = [f"2026{month:02}{day:02}T000000Z" for month in range(3, 11) for day in range(1, 29)]
    mounted.add(*points)
    with os.scandir(mounted.path / "web") as entries:
        seen = [next(entries).name for _ in range(10)]
        for point in points[::2]:
            (mounted.control / "web" / point).rmdir()
        mounted.add("20260201T000000Z")
        seen += [e.name for e in entries]
    assert sorted(seen) == sorted([P1, P2, "latest", *points])


def test_what_is_open_stays_readable_when_the_point_goes(mounted: FakeMount) -> None:
    with open(mounted.disk("good"), "rb") as file:
        (mounted.control / "web" / P1).rmdir()
        assert file.read() == content("good")
    fails_with(errno.ENOENT, os.open, mounted.disk("good"), os.O_RDONLY)


def test_a_point_made_again_shows_its_own_bytes(mounted: FakeMount) -> None:
    path = Path(mounted.disk("good"))
    assert path.read_bytes() == content("good")
    (mounted.control / "web" / P1 / "VERSION").write_text("2")
    assert path.read_bytes() == content("good", "2")


def test_an_edited_point_json_shows(mounted: FakeMount) -> None:
    path, note = mounted.path / "web" / P1 / "point.json", mounted.control / "web" / P1 / "NOTE"
    note.write_text("first")
    assert path.read_text() == "first"
    note.write_text("the second, longer")
    assert path.read_text() == "the second, longer"
    wait_until(lambda: path.stat().st_size == len("the second, longer"), 3)
