"""Restores to files, qcow2, loop devices and NBD exports, compared byte for byte; what is refused; what goes wrong."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from commands import backupfs
from repositories import add_point
from servers import nbdkit, need, qemu_nbd, run, storage_daemon

from backupfs.errors import BackupfsError, ConnectError, Corrupt, SourceError, TargetError, UsageError
from backupfs.extents import Extent
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.services import restore as service
from backupfs.services.restore import PARTIAL, Restored, RestoreRequest
from backupfs.sources import target as files
from backupfs.units import KiB, MiB

SIZE = 9 * MiB + 1000  # neither whole chunks nor whole sectors


def make_disk(seed: int) -> bytes:
    """Return data, zeroes in the middle, and data up to the last byte."""
    rng = random.Random(seed)
    data = bytearray(SIZE)
    data[: 2 * MiB] = rng.randbytes(2 * MiB)
    data[5 * MiB + 4096 : 6 * MiB] = rng.randbytes(MiB - 4096)
    data[-5000:] = rng.randbytes(5000)
    return bytes(data)


FIRST, SECOND = make_disk(1), make_disk(2)


@pytest.fixture(params=["zstd", "none"])
def repository(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Repository]:
    path = str(tmp_path / "repo")
    Repository.init(path, codec_name=request.param)
    with Repository.open(path) as opened:
        add_point(opened, FIRST)
        mixed = bytearray(FIRST)
        mixed[MiB : 2 * MiB] = SECOND[MiB : 2 * MiB]
        mixed[:65536] = bytes(65536)
        add_point(opened, bytes(mixed))
        yield opened


def points(repository: Repository) -> dict[str, bytes]:
    """Return what each point holds."""
    first, second = repository.points("web01")
    mixed = bytearray(FIRST)
    mixed[MiB : 2 * MiB] = SECOND[MiB : 2 * MiB]
    mixed[:65536] = bytes(65536)
    return {first: FIRST, second: bytes(mixed)}


def restore(
    repository: Repository,
    point: str,
    target: Path | str,
    *,
    image_format: Literal["raw", "qcow2"] | None = None,
    force: bool = False,
    differential: bool = False,
) -> Restored:
    request = RestoreRequest(
        vm="web01",
        point=point,
        disk="vda",
        target=str(target),
        format=image_format,
        force=force,
        differential=differential,
    )
    return service.restore(repository, request, lambda *_: None)


def raw_of(image: Path, folder: Path) -> bytes:
    """Return what a qcow2 file holds."""
    raw = folder / "of-qcow2.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", path).strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_new_raw_file_is_sparse_private_and_equal(repository: Repository, tmp_path: Path) -> None:
    for point, data in points(repository).items():
        target = tmp_path / f"{point}.raw"
        done = restore(repository, point, target)
        assert target.read_bytes() == data
        assert target.stat().st_blocks * 512 < 4 * MiB
        assert target.stat().st_mode & 0o777 == 0o600
        assert not done.resumed
        assert done.zeroed == 0
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_a_new_qcow2(repository: Repository, tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-img")
    for point, data in points(repository).items():
        target = tmp_path / "disk.qcow2"
        restore(repository, point, target, image_format="qcow2", force=target.exists())
        found = raw_of(target, tmp_path)
        assert found[:SIZE] == data
        assert not any(found[SIZE:])
        assert len(found) < SIZE + 512
        assert target.stat().st_size < 5 * MiB
        assert target.stat().st_mode & 0o777 == 0o600
        run("qemu-img", "check", "-f", "qcow2", target)


def test_what_is_there_is_not_overwritten(repository: Repository, tmp_path: Path) -> None:
    first, second = points(repository)
    target = tmp_path / "disk.raw"
    target.write_bytes(b"precious")
    with pytest.raises(TargetError, match="--force"):
        restore(repository, first, target)
    assert target.read_bytes() == b"precious"
    restore(repository, first, target, force=True)
    assert target.read_bytes() == FIRST
    link = tmp_path / "link"
    link.symlink_to(target)
    restore(repository, second, link, force=True)
    assert link.is_symlink()
    assert target.read_bytes() == points(repository)[second]
    with pytest.raises(TargetError, match="neither a file nor"):
        restore(repository, first, tmp_path, force=True)


def test_differential_writes_only_what_differs(repository: Repository, tmp_path: Path) -> None:
    (first, _), (second, expected) = points(repository).items()
    target = tmp_path / "disk.raw"
    restore(repository, first, target)
    done = restore(repository, second, target, differential=True)
    assert target.read_bytes() == expected
    assert (done.written, done.zeroed) == (MiB, 64 * KiB)
    target.write_bytes(random.Random(9).randbytes(SIZE + 70_000))
    restore(repository, second, target, differential=True)
    assert target.read_bytes() == expected
    target.write_bytes(b"short")
    restore(repository, second, target, differential=True)
    assert target.read_bytes() == expected
    done = restore(repository, second, target, differential=True)
    assert (done.written, done.zeroed, done.read) == (0, 0, 0)
    with pytest.raises(UsageError, match="is not there"):
        restore(repository, second, tmp_path / "no", differential=True)


def test_differential_qcow2(repository: Repository, tmp_path: Path) -> None:
    need("qemu-nbd")
    (first, _), (second, expected) = points(repository).items()
    target = tmp_path / "disk.qcow2"
    restore(repository, first, target, image_format="qcow2")
    with pytest.raises(UsageError, match="looks like qcow2"):
        restore(repository, second, target, differential=True)
    done = restore(repository, second, target, image_format="qcow2", differential=True)
    assert raw_of(target, tmp_path)[:SIZE] == expected
    assert (done.written, done.zeroed) == (MiB, 64 * KiB)
    run("qemu-img", "resize", "--shrink", "-q", target, str(8 * MiB))
    with pytest.raises(TargetError, match="nothing was written"):
        restore(repository, second, target, image_format="qcow2", differential=True)


@pytest.mark.parametrize("larger", [0, 3 * MiB])
def test_a_loop_device(repository: Repository, tmp_path: Path, larger: int) -> None:
    (first, _), (second, expected) = points(repository).items()
    backing = tmp_path / "backing"
    room = -(-SIZE // 4096) * 4096 + larger
    rest = random.Random(3).randbytes(room - SIZE)
    with open(backing, "wb") as file:
        file.truncate(room)
    with loop_device(backing) as device:
        done = restore(repository, first, device)
        assert device.read_bytes() == FIRST + bytes(room - SIZE)
        assert done.rest == room - SIZE
        with pytest.raises(TargetError, match="is not empty"):
            restore(repository, second, device)
        device.write_bytes(random.Random(4).randbytes(SIZE) + rest)
        restore(repository, second, device, force=True)
        assert device.read_bytes() == expected + rest
        done = restore(repository, first, device, differential=True)
        assert device.read_bytes() == FIRST + rest
        assert done.written == MiB + 64 * KiB


def test_a_device_that_is_too_small_or_mounted(repository: Repository, tmp_path: Path) -> None:
    first = repository.points("web01")[0]
    small = tmp_path / "small"
    small.write_bytes(random.Random(5).randbytes(8 * MiB))
    before = small.read_bytes()
    with loop_device(small) as device:
        with pytest.raises(TargetError, match=r"needs .*nothing was written"):
            restore(repository, first, device, force=True)
        assert device.read_bytes() == before
    with open(tmp_path / "fs", "wb") as file:
        file.truncate(16 * MiB)
    run("mkfs.ext4", "-q", tmp_path / "fs")
    folder = tmp_path / "mnt"
    folder.mkdir()
    with loop_device(tmp_path / "fs") as device:
        run("mount", device, folder)
        try:
            with pytest.raises(TargetError, match="mounted"):
                restore(repository, first, device, force=True)
        finally:
            run("umount", folder)


def test_a_file_that_qemu_uses(repository: Repository, tmp_path: Path) -> None:
    first, second = points(repository)
    target = tmp_path / "disk.raw"
    restore(repository, first, target)
    need("qemu-storage-daemon")
    node = f"driver=file,node-name=f,filename={target}"
    with storage_daemon("--blockdev", node, "--export", "nbd,id=e,node-name=f,name=disk,writable=on"):
        with pytest.raises(TargetError, match="in use"):
            restore(repository, second, target, differential=True)
        inode = target.stat().st_ino
        # What the machine writes to a file that was replaced would be lost.
        with pytest.raises(TargetError, match="in use"):
            restore(repository, second, target, force=True)
        assert target.stat().st_ino == inode
    assert target.read_bytes() == FIRST
    restore(repository, second, target, force=True)


def test_a_device_that_qemu_uses(repository: Repository, tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    first = repository.points("web01")[0]
    with open(tmp_path / "backing", "wb") as file:
        file.truncate(16 * MiB)
    with loop_device(tmp_path / "backing") as device:
        node = f"driver=host_device,node-name=f,filename={device}"
        with storage_daemon("--blockdev", node, "--export", "nbd,id=e,node-name=f,name=disk,writable=on"):
            for force in (False, True):
                with pytest.raises(TargetError, match="in use"):
                    restore(repository, first, device, force=force)
            with pytest.raises(TargetError, match="in use"):
                restore(repository, first, device, differential=True)
            assert not any(device.read_bytes())


def test_what_backupfs_keeps_is_no_target(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = points(repository)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hydrated = tmp_path / "cache" / "backupfs" / "hydrated" / "x.raw"
    hydrated.parent.mkdir(parents=True)
    hydrated.write_bytes(b"precious")
    layer = next((tmp_path / "repo").rglob("*.layer"))
    link = tmp_path / "link"
    link.symlink_to(layer)
    for target in (layer, link, layer.with_name("new"), hydrated):
        before = target.read_bytes() if target.exists() else None
        for force in (False, True):
            with pytest.raises(UsageError, match="is inside"):
                restore(repository, first, target, force=force, differential=not force)
        assert (target.read_bytes() if target.exists() else None) == before
    Repository.init(str(tmp_path / "other"))
    with pytest.raises(UsageError, match="which is a repository"):
        restore(repository, second, tmp_path / "other" / "disk.raw")


def test_a_partial_that_is_the_complete_disk_too_is_not_written_to(repository: Repository, tmp_path: Path) -> None:
    """Killed between giving the disk its name and taking the other one away."""
    first, second = points(repository)
    target = tmp_path / "disk.raw"
    restore(repository, first, target)
    inode = target.stat().st_ino
    os.link(target, f"{target}{PARTIAL}")
    with open(target, "rb") as before:
        restore(repository, second, target, force=True)
        assert before.read() == FIRST
    assert target.stat().st_ino != inode
    assert target.read_bytes() == points(repository)[second]
    assert not os.path.lexists(f"{target}{PARTIAL}")


def test_a_file_that_got_another_name_while_it_was_locked(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another restore ends between the opening of its partial file and the lock."""
    second = repository.points("web01")[1]
    target, partial = tmp_path / "disk.raw", tmp_path / f"disk.raw{PARTIAL}"
    partial.write_bytes(FIRST)
    partial.chmod(0o600)
    lock = files.lock

    def lock_late(fd: int, path: str) -> None:
        partial.rename(target)
        lock(fd, path)

    monkeypatch.setattr(files, "lock", lock_late)
    with pytest.raises(TargetError, match="renamed or replaced"):
        restore(repository, second, target)
    assert target.read_bytes() == FIRST


def test_an_export_of_qemus(repository: Repository, tmp_path: Path) -> None:
    (first, _), (second, expected) = points(repository).items()
    image = tmp_path / "export.raw"
    with open(image, "wb") as file:
        file.truncate(12 * MiB)
    with qemu_nbd(image, writable=True) as server:
        done = restore(repository, first, server.uri)
        assert image.read_bytes() == FIRST + bytes(12 * MiB - SIZE)
        assert done.rest == 12 * MiB - SIZE
        with pytest.raises(TargetError, match="is not empty"):
            restore(repository, second, server.uri)
        done = restore(repository, second, server.uri, differential=True)
        assert image.read_bytes() == expected + bytes(12 * MiB - SIZE)
        assert (done.written, done.zeroed) == (MiB, 64 * KiB)
        restore(repository, first, server.uri, force=True)
        assert image.read_bytes() == FIRST + bytes(12 * MiB - SIZE)
        with pytest.raises(UsageError, match="leave --format out"):
            restore(repository, first, server.uri, image_format="qcow2")
    with qemu_nbd(image) as server, pytest.raises(TargetError, match="read-only"):
        restore(repository, first, server.uri, force=True)
    image.write_bytes(bytes(MiB))
    with qemu_nbd(image, writable=True) as server, pytest.raises(TargetError, match="nothing was written"):
        restore(repository, first, server.uri)


@pytest.mark.parametrize(
    "filters",
    [
        ("--filter=nozero", "--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"),
        ("--filter=nozero", "zeromode=emulate", "--filter=blocksize", "maxdata=64k"),
        ("--filter=noextents", "--filter=noparallel", "serialize=connections"),
    ],
    ids=lambda f: "-".join(f)[:30],
)
def test_exports_that_can_do_little(repository: Repository, tmp_path: Path, filters: tuple[str, ...]) -> None:
    """No write-zeroes, whole blocks only, small requests, no block status, one connection."""
    point, expected = list(points(repository).items())[1]
    backing = tmp_path / "backing"
    backing.write_bytes(random.Random(6).randbytes(10 * MiB))
    before = backing.read_bytes()
    options = [f for f in filters if f.startswith("--")]
    with nbdkit("file", str(backing), *(f for f in filters if not f.startswith("--")), options=options) as server:
        restore(repository, point, server.uri, force=True)
    assert backing.read_bytes() == expected + before[SIZE:]


def test_an_export_that_fails(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("web01")[1]
    parameters = ("size=12M", "error-pwrite-rate=100%", "error=ENOSPC")
    with (
        nbdkit("memory", *parameters, options=["--filter=error"]) as server,
        pytest.raises(SourceError, match="No space left"),
    ):
        restore(repository, point, server.uri)


def test_a_full_file_system_and_going_on(repository: Repository, tmp_path: Path) -> None:
    point, expected = next(iter(points(repository).items()))
    folder = tmp_path / "full"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=3M", "backupfs-test", folder)
    try:
        (folder / "ballast").write_bytes(bytes(2 * MiB))
        with pytest.raises(TargetError, match="No space left"):
            restore(repository, point, folder / "disk.raw")
        assert not (folder / "disk.raw").exists()
        (folder / "ballast").unlink()
        run("mount", "-o", "remount,size=30M", folder)
        assert restore(repository, point, folder / "disk.raw").resumed
        assert (folder / "disk.raw").read_bytes() == expected
        assert not (folder / f"disk.raw{PARTIAL}").exists()
    finally:
        run("umount", "-l", folder)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_partial_file_is_believed_in_nothing(
    repository: Repository, tmp_path: Path, image_format: Literal["raw", "qcow2"]
) -> None:
    """What is left of an earlier restore may be of another point, or anything."""
    (first, data), (second, _) = points(repository).items()
    target, partial = tmp_path / "disk", tmp_path / f"disk{PARTIAL}"
    rubbish = random.Random(7).randbytes(SIZE + 12345)
    for left in (b"", rubbish, b"QFI\xfb" + rubbish):
        partial.write_bytes(left)
        restore(repository, first, target, image_format=image_format, force=True)
        assert (target.read_bytes() if image_format == "raw" else raw_of(target, tmp_path)[:SIZE]) == data
    restore(repository, second, target, image_format=image_format, force=True)
    target.rename(partial)
    done = restore(repository, first, target, image_format=image_format)
    assert done.resumed
    assert done.written == MiB + 64 * KiB
    assert (target.read_bytes() if image_format == "raw" else raw_of(target, tmp_path)[:SIZE]) == data
    partial.symlink_to(target)
    with pytest.raises(TargetError if image_format == "raw" else BackupfsError):
        restore(repository, first, tmp_path / "disk", image_format="raw", force=True)


def test_permission(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("web01")[0]
    with pytest.raises(TargetError, match="No such file"):
        restore(repository, point, tmp_path / "no" / "disk.raw")
    with pytest.raises(TargetError):
        restore(repository, point, "/proc/backupfs-test.raw")
    with pytest.raises(UsageError, match="not a target"):
        restore(repository, point, "http://localhost/disk")


def test_damage_is_an_error_and_nothing_gets_the_name(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("web01")[0]
    layer = Path(Layer(str(tmp_path / "repo/vms/web01/disks/vda/main/000000.layer")).data.path)
    data = bytearray(layer.read_bytes())
    data[MiB] ^= 1
    layer.chmod(0o600)
    layer.write_bytes(data)
    number = 16 if layer.suffix == ".raw" else 15  # a layer begins with its header
    where = f"offset {number * 65536} length 65536 of web01/{point}/vda"
    with pytest.raises(Corrupt, match=f"{where}.*verify web01 --repair --from vda=.*conv=noerror"):
        restore(repository, point, tmp_path / "disk.raw")
    assert not (tmp_path / "disk.raw").exists()
    (tmp_path / "source.raw").write_bytes(FIRST)
    backupfs(tmp_path / "repo", "verify", "web01", "--repair", "--from", f"vda={tmp_path / 'source.raw'}")
    assert restore(repository, point, tmp_path / "disk.raw").resumed
    assert (tmp_path / "disk.raw").read_bytes() == FIRST


def test_a_small_disk_and_an_empty_one(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    Repository.init(path)
    with Repository.open(path) as repository:
        for data in (b"x" * 777, bytes(5 * MiB)):
            point = add_point(repository, data, [Extent(0, len(data), False)])
            target = tmp_path / "disk.raw"
            restore(repository, point.id, target, force=True)
            assert target.read_bytes() == data
    assert set(os.listdir(tmp_path)) == {"repo", "disk.raw"}


@pytest.mark.parametrize(
    ("target", "words"), [("-", "standard output"), ("new/", "names no file"), ("", "names no file")]
)
def test_targets_that_name_no_file(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=words):
        restore(repository, repository.points("web01")[0], target)
    assert sorted(tmp_path.iterdir()) == before


def test_the_export_without_a_name(repository: Repository) -> None:
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1"):
        restore(repository, repository.points("web01")[0], "nbd://127.0.0.1:1/")


def test_a_device_that_is_not_there_is_not_made_as_a_file(repository: Repository) -> None:
    with pytest.raises(UsageError, match="no such device"):
        restore(repository, repository.points("web01")[0], "/dev/backupfs-nobody-has-this")
    assert not os.path.lexists("/dev/backupfs-nobody-has-this" + PARTIAL)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("theirs", ["mode", "owner"])
def test_a_partial_that_others_can_open_is_not_gone_on_with(
    repository: Repository, tmp_path: Path, theirs: str, image_format: Literal["raw", "qcow2"]
) -> None:
    target, partial = tmp_path / "new", tmp_path / f"new{PARTIAL}"
    if image_format == "qcow2":
        run("qemu-img", "create", "-q", "-f", "qcow2", partial, str(SIZE))
    else:
        partial.touch()
    if theirs == "mode":
        partial.chmod(0o666)
    elif os.geteuid():
        pytest.skip("only root can give a file away")
    else:
        partial.chmod(0o600)
        os.chown(partial, 65534, 65534)
    with partial.open("rb") as held:
        done = restore(repository, repository.points("web01")[0], target, image_format=image_format)
        assert not done.resumed
        assert os.fstat(held.fileno()).st_ino != target.stat().st_ino
    assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (os.geteuid(), 0o600)
