"""`tools/bench files`: guests' files in the mount (DISK.files) against the kernel's own mount of the same raw disk.

An ext4 with 10,000 small files in 20 folders, 10,000 names in one folder, and a large file; another one with everything
but that, whose files have SELinux labels, as all of RHEL's and Fedora's have. Each round has a mount of its own, so
nothing is known of the file system before, and `backupfs cp` has none at all; where a row says so, page caches are
dropped too. What is copied goes to a tmpfs. Root, for the loop mount, the labels and the caches.
"""

import argparse
import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backupfs.units import GiB, MiB
from benchmarks.chains import CODECS
from benchmarks.contenders import drop_caches
from benchmarks.disks import warm
from benchmarks.report import BACKUPFS, Report, Row
from benchmarks.workplace import Mount, Workplace, run, unmount

_FOLDERS, _SIZES = 20, (100, 2000, 5000, 20_000)  # bytes of the small files, in turn at random
_LABELLED_SIZES = (0, 500, 1500, 3000)
_LABELS = tuple(b"system_u:object_r:%s_t:s0\0" % kind for kind in (b"etc", b"lib", b"usr", b"var_log"))
_COPY_LIMIT, _FIRST_S, _AGAIN_S, _LARGE_MB_S = 3.0, 2.0, 0.3, 400.0


def run_benchmark(place: Workplace, report: Report, arguments: argparse.Namespace) -> None:
    """Make the disk, back it up with either codec, then measure."""
    files, large = (1000, 32 * MiB) if arguments.quick else (10_000, 500 * MiB)
    raw, labelled = place.path("disk.raw"), place.path("labelled.raw")
    report.say(f"making disks with {2 * files:,} files each")
    _make_disk(place, raw, files, large)
    _make_disk(place, labelled, files, 0, _LABELS)
    for codec in CODECS:
        repository = _back_up(place, raw, codec, codec)
        layers = [path for path in repository.rglob("*") if path.is_file()]
        _measure_copies(place, report, arguments.rounds, repository, f"{files:,} files, cold, {codec}")
        _measure_listings(place, report, arguments.rounds, repository, f"{files:,} names, {codec}")
        _measure_large(place, report, arguments.rounds, repository, layers)
        repository = _back_up(place, labelled, codec, f"{codec}-labelled")
        _measure_copies(place, report, arguments.rounds, repository, f"{files:,} files with labels, cold, {codec}")
        _measure_listings(place, report, arguments.rounds, repository, f"{files:,} names with labels, {codec}")


def _back_up(place: Workplace, raw: Path, codec: str, name: str) -> Path:
    repository = place.path(name)
    run(BACKUPFS, "-r", repository, "init")
    run(BACKUPFS, "-r", repository, "backup", "vm", f"vda={raw}", "--codec", codec)
    return repository


def _measure_copies(place: Workplace, report: Report, rounds: int, repository: Path, what: str) -> None:
    by_rsync, by_cp, rsyncs, cps = [], [], [], []
    for number in range(rounds + 1):
        with place.mounted(repository) as mount:
            mine = _copy(place, "rsync", "-aHAX", f"{_files(mount)}/tree")
            with _loop_mounted(place, mount) as mounted:
                peers = (_copy(place, *command, mounted / "tree") for command in (("rsync", "-aHAX"), ("cp", "-a")))
                rsync, cp = peers
        ours = _copy(place, BACKUPFS, "-r", repository, "cp", "vm/latest/vda:/tree")
        if number:
            by_rsync.append(mine)
            rsyncs.append(rsync)
            by_cp.append(ours)
            cps.append(cp)
    for row, values, peer, theirs, limit in (
        ("rsync -aHAX", by_rsync, "loop mount of DISK.raw", rsyncs, _COPY_LIMIT),
        ("backupfs cp, not mounted,", by_cp, "cp -a from a loop mount of DISK.raw", cps, None),
    ):
        report.add(Row(f"{row} of {what}", values, "s", peer, theirs, at_most=limit))
        report.say(f"{row} of {what}")


def _measure_listings(place: Workplace, report: Report, rounds: int, repository: Path, what: str) -> None:
    first, again = [], []
    for _ in range(rounds):
        with place.mounted(repository) as mount:
            drop_caches()
            many = _files(mount) / "many"
            first.append(_seconds("ls", "-l", many))
            again.append(_seconds("ls", "-l", many))
    for when, values, limit in (("the first time", first, _FIRST_S), ("again", again, _AGAIN_S)):
        report.add(Row(f"ls -l of {what}, {when}", values, "s", at_most=limit))
    report.say(f"ls -l of {what}")


def _measure_large(place: Workplace, report: Report, rounds: int, repository: Path, layers: list[Path]) -> None:
    ours, theirs = [], []
    for number in range(rounds + 1):
        warm(*layers)
        with place.mounted(repository) as mount:
            large = _files(mount) / "large"
            size = large.stat().st_size
            mine = size / 10**6 / _seconds("dd", f"if={large}", "of=/dev/null", "bs=1M", "status=none")
            with _loop_mounted(place, mount) as mounted:
                peer = size / 10**6 / _seconds("dd", f"if={mounted / 'large'}", "of=/dev/null", "bs=1M", "status=none")
        if number:
            ours.append(mine)
            theirs.append(peer)
    row = f"one file of {size / MiB:.0f} MiB, 1 MiB reads, {repository.name}"
    report.add(Row(row, ours, "MB/s", at_least=_LARGE_MB_S))
    report.add(Row(row, ours, "MB/s", "loop mount of DISK.raw", theirs))
    report.say(row)


def _files(mount: Mount) -> Path:
    """Return the first folder of the file system."""
    return mount.path / "vm" / _point(mount) / "vda.files" / "0"


def _point(mount: Mount) -> str:
    return (mount.path / "vm" / "latest").readlink().name


@contextlib.contextmanager
def _loop_mounted(place: Workplace, mount: Mount) -> Iterator[Path]:
    """Mount the disk's file system by the kernel while the block runs."""
    mounted = place.new_path("loop")
    mounted.mkdir()
    try:
        run("mount", "-o", "loop,ro,noload", mount.disk(_point(mount)), mounted)
        yield mounted
    finally:
        # Not lazily: the loop device has to be gone before the disk behind it is.
        subprocess.run(["umount", str(mounted)], capture_output=True, check=False)
        unmount(mounted)


def _copy(place: Workplace, *command: str | Path) -> float:
    """Have something copied to a tmpfs, which comes last in its command, with cold caches; return the seconds."""
    copied = place.new_path("tmpfs")
    copied.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=90%", "bench", copied)
    try:
        drop_caches()
        return _seconds(*command, copied)
    finally:
        unmount(copied)


def _seconds(*command: str | Path) -> float:
    started = time.monotonic()
    run(*command)
    return time.monotonic() - started


def _make_disk(place: Workplace, raw: Path, files: int, large: int, labels: Sequence[bytes] = ()) -> None:
    """Make a disk.

    Args:
        large: bytes of the large file; 0: there is none.
        labels: that everything has one of, at random; if there are none, nothing has one.
    """
    chance, folder = random.Random(1), place.new_path("filled")  # noqa: S311, contents
    sizes = _LABELLED_SIZES if labels else _SIZES
    with raw.open("wb") as file:
        file.truncate(2 * GiB)
    run("mkfs.ext4", "-q", "-F", raw)
    folder.mkdir()
    run("mount", "-o", "loop", raw, folder)
    try:
        for number in range(_FOLDERS):
            (folder / "tree" / str(number)).mkdir(parents=True)
            for name in range(files // _FOLDERS):
                content = chance.randbytes(chance.choice(sizes))
                (folder / "tree" / str(number) / f"file {name}").write_bytes(content)
        (folder / "many").mkdir()
        for number in range(files):
            (folder / "many" / f"file-{number:05}").touch()
        if large:
            with (folder / "large").open("wb") as file:
                for _ in range(large // MiB):
                    file.write(chance.randbytes(MiB))
        for inside in (folder, *folder.rglob("*")) if labels else ():
            os.setxattr(inside, "security.selinux", chance.choice(labels))
    finally:
        run("umount", folder)
