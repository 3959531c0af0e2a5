"""Mounted disks that can be written to: read back, kept, dropped, refused; and the repository untouched."""

import contextlib
import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mounts import LANES, choose_lane, fails_with, needs_fuse
from places import Place, a_place
from servers import run

from backupfs.errors import MountError, UsageError
from backupfs.fuse import mountpoint
from backupfs.services.scratch import KEPT
from backupfs.units import KiB, MiB

pytestmark = [pytest.mark.timeout(120), needs_fuse]

PUNCH, ZERO, KEEP = 2, 16, 1
_libc = ctypes.CDLL(None, use_errno=True)


FIRST = random.Random(1).randbytes(3 * MiB + 700)
SECOND = FIRST[: 64 * KiB] + bytes(512 * KiB) + FIRST[576 * KiB :]


@pytest.fixture(params=LANES)
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Two points; answered with the lane, and without it."""
    choose_lane(monkeypatch, request.param)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with a_place(tmp_path, FIRST, SECOND) as place:
        yield place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Two points."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with a_place(tmp_path, FIRST, SECOND) as place:
        yield place


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Return the errno."""
    done = _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    return ctypes.get_errno() if done else 0


def read_all(path: str) -> bytes:
    return Path(path).read_bytes()


def test_what_is_written_is_read_and_is_gone_with_the_mount(both: Place) -> None:
    before = both.hashes()
    both.mount()
    expected = bytearray(FIRST)
    fd, other = os.open(both.file(), os.O_RDWR), os.open(both.file(), os.O_RDONLY)
    try:
        rng = random.Random(2)
        for _ in range(200):
            offset = rng.randrange(len(FIRST))
            data = rng.randbytes(min(rng.choice((1, 512, 4096, 70_000)), len(FIRST) - offset))
            assert os.pwrite(fd, data, offset) == len(data)
            expected[offset : offset + len(data)] = data
            assert (
                os.pread(other, len(data) + 100, max(offset - 50, 0))
                == (expected[max(offset - 50, 0) :][: len(data) + 100])
            )
        os.fsync(fd)
        assert os.pread(other, len(FIRST) + 1, 0) == expected
    finally:
        os.close(fd)
        os.close(other)
    assert read_all(both.file()) == expected  # opened again
    assert read_all(both.file(1)) == SECOND
    assert read_all(both.file(kind="raw")) == FIRST
    assert "ERROR" not in both.log()
    both.unmount()
    assert list(both.scratch.iterdir()) == []
    assert both.hashes() == before
    both.mount()
    assert read_all(both.file()) == FIRST


def test_direct_mapped_and_buffered_writes_see_each_other(both: Place) -> None:
    both.mount()
    size = 2 * MiB
    memory = mmap.mmap(-1, 1 * MiB)
    buffered, direct = os.open(both.file(), os.O_RDWR), os.open(both.file(), os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(buffered, size) as mapped:
            assert mapped[:size] == FIRST[:size]
            memory[:] = b"d" * MiB
            assert os.pwritev(direct, [memory], 512 * KiB) == MiB
            assert mapped[512 * KiB : 1536 * KiB] == b"d" * MiB
            mapped[600 * KiB : 600 * KiB + 5] = b"mmap!"
            mapped.flush()
            assert os.preadv(direct, [memory], 512 * KiB) == MiB
            assert memory[88 * KiB : 88 * KiB + 5] == b"mmap!"
            os.pwrite(buffered, b"buffered", 601 * KiB)
            assert mapped[601 * KiB : 601 * KiB + 8] == b"buffered"
            assert os.preadv(direct, [memory], 512 * KiB) == MiB
            assert memory[89 * KiB : 89 * KiB + 8] == b"buffered"
    finally:
        os.close(buffered)
        os.close(direct)


def test_parts_of_blocks_written_at_once(place: Place) -> None:
    place.mount()
    count = 2048

    def write(seed: int) -> None:
        fd, memory = os.open(place.file(), os.O_RDWR | os.O_DIRECT), mmap.mmap(-1, 512)
        try:
            for number in range(seed, count, 8):
                memory[:] = bytes([number % 251]) * 512
                assert os.pwritev(fd, [memory], number * 512) == 512
        finally:
            os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert read_all(place.file()) == b"".join(bytes([n % 251]) * 512 for n in range(count)) + FIRST[count * 512 :]


def test_holes(place: Place) -> None:
    place.mount()
    fd = os.open(place.file(), os.O_RDWR)
    size = len(FIRST)
    try:
        os.pwrite(fd, b"x" * 8 * KiB, MiB)
        assert fallocate(fd, PUNCH | KEEP, 100 * KiB + 10, 1000 * KiB) == 0
        assert fallocate(fd, ZERO, 2 * MiB, 512 * KiB) == 0
        assert fallocate(fd, PUNCH | KEEP, size - 100, 10 * MiB) == 0
        expected = bytearray(FIRST)
        expected[MiB : MiB + 8 * KiB] = b"x" * 8 * KiB
        expected[100 * KiB + 10 : 1100 * KiB + 10] = bytes(1000 * KiB)
        expected[2 * MiB : 2560 * KiB] = bytes(512 * KiB)
        expected[size - 100 :] = bytes(100)
        assert read_all(place.file()) == expected
        assert os.lseek(fd, 200 * KiB, os.SEEK_DATA) == 1100 * KiB
        assert os.lseek(fd, 1500 * KiB, os.SEEK_HOLE) == 2 * MiB
        os.pwrite(fd, b"y", 300 * KiB)
        assert os.lseek(fd, 200 * KiB, os.SEEK_DATA) == 300 * KiB
        assert os.lseek(fd, 300 * KiB, os.SEEK_HOLE) == 304 * KiB
        assert fallocate(fd, 0, 0, size) == errno.EOPNOTSUPP
        assert fallocate(fd, KEEP, 0, size) == errno.EOPNOTSUPP
        assert fallocate(fd, ZERO, size - 10, 20) == errno.ENOSPC
    finally:
        os.close(fd)
    read_only = os.open(place.file(kind="raw"), os.O_RDONLY)
    assert fallocate(read_only, PUNCH | KEEP, 0, 4096) == errno.EBADF
    os.close(read_only)


def test_what_stat_says_and_what_is_refused(both: Place) -> None:
    both.mount(allow_other=True)
    path, folder = both.file(), os.path.dirname(both.file())
    status = os.stat(path)
    assert (status.st_size, status.st_mode & 0o7777, status.st_uid) == (len(FIRST), 0o600, os.geteuid())
    assert os.stat(both.file(kind="raw")).st_mode & 0o777 == 0o444
    assert status.st_mtime == os.stat(both.file(kind="raw")).st_mtime
    assert sorted(os.listxattr(path)) == ["user.backupfs.disk", "user.backupfs.point", "user.backupfs.vm"]
    fails_with(errno.ENODATA, os.getxattr, path, "security.capability")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fails_with(errno.ENOSPC, os.write, fd, b"x")
        os.truncate(fd, len(FIRST))
        for size in (0, 5, len(FIRST) + 1):
            fails_with(errno.EPERM, os.truncate, fd, size)
            fails_with(errno.EPERM, os.truncate, path, size)
    finally:
        os.close(fd)
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, b"xyz", len(FIRST) - 2) == 2  # as a device does it
    os.close(fd)
    assert read_all(path) == FIRST[:-2] + b"xy"
    assert os.stat(path).st_mtime_ns > status.st_mtime_ns
    assert os.stat(path).st_blocks <= -(-len(FIRST) // 512)
    os.utime(path)
    fails_with(errno.EPERM, os.open, path, os.O_RDWR | os.O_TRUNC)
    fails_with(errno.EPERM, os.chmod, path, 0o777)
    fails_with(errno.EPERM, os.chown, path, 1, 1)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        fails_with(errno.EROFS, os.open, both.file(kind="raw"), flags)
    fails_with(errno.EROFS, os.truncate, both.file(kind="raw"), 0)
    fails_with(errno.EROFS, os.utime, folder)
    fails_with(errno.EROFS, os.open, folder + "/new", os.O_CREAT | os.O_WRONLY)
    fails_with(errno.EROFS, os.unlink, path)
    fails_with(errno.EROFS, os.rename, path, path + "x")
    fails_with(errno.EROFS, os.link, path, path + "x")
    fails_with(errno.EROFS, os.mkdir, folder + "/new")
    fails_with(errno.EROFS, os.setxattr, path, "user.x", b"")
    assert os.statvfs(both.path).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_RDONLY) == 14


def test_a_mount_without_scratch_has_no_such_files_and_is_read_only(place: Place) -> None:
    place.mount(scratch=None)
    assert sorted(os.listdir(os.path.dirname(place.file()))) == ["point.json", "vda.files", "vda.parts", "vda.raw"]
    assert os.statvfs(place.path).f_flag & os.ST_RDONLY


def test_what_is_kept_survives_an_unmount_and_a_kill(both: Place) -> None:
    both.mount(keep_scratch=True)
    before = both.hashes()
    fd = os.open(both.file(), os.O_RDWR)
    os.pwrite(fd, b"one", 100)
    os.close(fd)
    both.unmount()
    both.mount(options=["keep_scratch"])
    fd = os.open(both.file(), os.O_RDWR)
    os.pwrite(fd, b"two", MiB)
    os.fsync(fd)
    os.pwrite(fd, b"never flushed", 2 * MiB)
    both.kill()
    with contextlib.suppress(OSError):  # ENOTCONN
        os.close(fd)
    both.mount(keep_scratch=True)
    data = read_all(both.file())
    assert data[: 2 * MiB] == FIRST[:100] + b"one" + FIRST[103:MiB] + b"two" + FIRST[MiB + 3 : 2 * MiB]
    assert data[2 * MiB :] in (FIRST[2 * MiB :], b"never flushed" + FIRST[2 * MiB + 13 :])
    assert read_all(both.file(1)) == SECOND
    both.unmount()
    with pytest.raises(MountError, match="holds what a mount with --keep-scratch wrote"):
        both.mount()
    assert both.hashes() == before
    assert mountpoint.find(str(both.path)) is None


def test_another_repository_and_another_point_are_refused(place: Place, tmp_path: Path) -> None:
    place.mount(keep_scratch=True)
    Path(place.file()).open("r+b").close()
    with open(place.file(), "r+b", buffering=0) as file:
        file.write(b"x")
    (tmp_path / "b").mkdir()
    with a_place(tmp_path / "b", FIRST) as other:
        with pytest.raises(MountError, match="another mount uses it"):
            other.mount(scratch=str(place.scratch))
        place.unmount()
        with pytest.raises(MountError, match="another repository"):
            other.mount(scratch=str(place.scratch), keep_scratch=True)
    about = next(place.scratch.glob(f"{KEPT}/web01/*/vda/about.json"))
    about.write_text(about.read_text().replace('"version": "', '"version": "0'))
    place.mount(keep_scratch=True)
    fails_with(errno.EIO, os.open, place.file(), os.O_RDONLY)
    assert "was written over another disk" in place.log()
    assert read_all(place.file(kind="raw")) == FIRST
    assert read_all(place.file(1)) == SECOND


def test_folders_that_must_not_be(place: Place) -> None:
    for folder, words in (
        (place.repository, "lies in the repository"),
        (place.path / "x", "lies in the mount point"),
        (Path("/var/tmp"), "others can write"),
    ):
        with pytest.raises(MountError, match=words):
            place.mount(scratch=str(folder))
    with pytest.raises(UsageError, match="needs --scratch"):
        place.mount(scratch=None, keep_scratch=True)
    with pytest.raises(MountError, match="no ro beside"):
        place.mount(scratch=None, options=[f"ro,scratch={place.scratch}"])
    assert mountpoint.find(str(place.path)) is None
    place.mount(scratch=None, options=["rw,nodev", f"scratch={place.scratch}"])
    assert os.path.exists(place.file())


def test_a_full_scratch_is_enospc_to_who_writes(both: Place) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "none", both.scratch)
    try:
        both.mount()
        fd = os.open(both.file(), os.O_RDWR | os.O_DIRECT)
        memory = mmap.mmap(-1, 64 * KiB)
        memory[:] = b"n" * 64 * KiB
        written = failed_with = 0
        try:
            while written < len(FIRST) - 64 * KiB:
                assert os.pwritev(fd, [memory], written) == 64 * KiB
                written += 64 * KiB
        except OSError as e:
            failed_with = e.errno
        assert failed_with == errno.ENOSPC
        assert 0 < written <= MiB
        data = read_all(both.file())
        assert data[:written] == b"n" * written
        for block in range(written, written + 64 * KiB, 4 * KiB):
            assert data[block : block + 4 * KiB] in (b"n" * 4 * KiB, FIRST[block : block + 4 * KiB])
        assert data[written + 64 * KiB :] == FIRST[written + 64 * KiB :]
        os.pwritev(fd, [memory], 0)  # where there is room already
        os.close(fd)
        assert both.log().count("No space left") == 1
        assert "Traceback" not in both.log()
        both.unmount()
    finally:
        both.clean()
        run("umount", "-l", both.scratch)


def test_damage_below_is_eio_there_and_nowhere_else(both: Place) -> None:
    layer = next(both.repository.glob("vms/web01/disks/vda/main/000000.layer"))
    layer.chmod(0o600)
    with open(layer, "r+b") as file:
        file.seek(100_000)
        file.write(b"damage")
    both.mount()
    memory = mmap.mmap(-1, 4 * KiB)
    fd = os.open(both.file(), os.O_RDWR | os.O_DIRECT)
    bad, codes = [], set()
    try:
        for offset in range(0, 3 * MiB, 4 * KiB):
            try:
                assert os.preadv(fd, [memory], offset) == 4 * KiB
                assert memory[:] == FIRST[offset : offset + 4 * KiB]
            except OSError as e:
                bad.append(offset)
                codes.add(e.errno)
        assert (len(bad), codes) == (16, {errno.EIO})
        fails_with(errno.EIO, os.pwritev, fd, [memoryview(memory)[:512]], bad[0])
        memory[:] = b"g" * 4 * KiB
        for offset in bad:
            assert os.pwritev(fd, [memory], offset) == 4 * KiB
    finally:
        os.close(fd)
    assert read_all(both.file()) == FIRST[: bad[0]] + b"g" * 64 * KiB + FIRST[bad[0] + 64 * KiB :]
