"""The bytes that are measured with: real files, and sparse qcow2 images with something written here and there."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import numpy as np

from backupfs.units import MiB
from benchmarks.workplace import Failed, Workplace, run

BITMAP = "b0"


def make_real_disk(path: Path, size: int) -> int:
    """Write a tar of /usr, cut at `size`, into a raw file and read it once. Returns its size, a multiple of 1 MiB."""
    tar = subprocess.Popen(
        ["tar", "--create", "--sort=name", "--directory=/", "usr"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert tar.stdout is not None
    try:
        with path.open("wb") as file:
            while file.tell() < size:
                data = tar.stdout.read(min(4 * MiB, size - file.tell()))
                if not data:
                    break
                file.write(data)
            made = file.tell() // MiB * MiB
            file.truncate(made)
    finally:
        tar.stdout.close()
        tar.kill()
        tar.wait()
    if not made:
        raise Failed("tar gave nothing of /usr")
    warm(path)
    return made


def warm(*paths: Path) -> None:
    """Read files, so that they are in the page cache, and clean."""
    os.sync()
    buffer = bytearray(4 * MiB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(path: Path) -> None:
    """Drop a file's pages from the page cache, of a file in a FUSE mount the kernel's own. Source: posix_fadvise(2)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def make_sparse(path: Path, size: int) -> None:
    """Make an empty qcow2."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))


def add_bitmap(path: Path) -> None:
    """Add a persistent bitmap that records from now on."""
    run("qemu-img", "bitmap", "--add", path, BITMAP)


def scatter(place: Workplace, path: Path, total: int, piece: int, seed: int) -> None:
    """Write `total` random bytes to a qcow2 in pieces at random aligned offsets, through a writable qemu-nbd."""
    rng = np.random.default_rng(seed)
    with writing(place, path, "qcow2") as handle:
        for number in distinct(rng, handle.get_size() // piece, total // piece):
            handle.pwrite(rng.bytes(piece), int(number) * piece)


@contextlib.contextmanager
def writing(place: Workplace, image: Path, image_format: str) -> Iterator[nbd.NBD]:
    """Connect to an image for writing; at the end it is flushed."""
    with place.serving(image, image_format, writable=True) as uri:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        try:
            yield handle
            handle.flush()
        finally:
            handle.shutdown()


def distinct(rng: np.random.Generator, limit: int, count: int) -> np.ndarray:
    """Return `count` different numbers below `limit`, in random order; without a permutation of all of them."""
    if count > limit:
        raise ValueError(f"{count} different numbers below {limit}")
    if count * 3 > limit:
        return rng.permutation(limit)[:count]
    found = np.empty(0, np.int64)
    while len(found) < count:
        found = np.unique(np.append(found, rng.integers(0, limit, count + count // 4 + 16)))
    return rng.permutation(found)[:count]
