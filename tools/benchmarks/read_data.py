"""What `tools/bench read` reads: three disks and their deltas, each in two repositories, as qcow2 overlays, and raw."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from backupfs.units import GiB, KiB, MiB, TiB
from benchmarks.chains import (
    CHUNK,
    CODECS,
    Disk,
    MovedChunks,
    PutTogether,
    build_file,
    build_overlays,
    build_repository,
)
from benchmarks.contenders import Chain
from benchmarks.disks import distinct, make_real_disk
from benchmarks.report import Report
from benchmarks.workplace import Workplace, run

DISK, FILES, SPARSE = "disk", "files", "sparse"
_CHANGES = 32  # chunks a delta; with more, all chains and caches together do not fit into 24 GiB
_A_FOLDER = 100  # files
T = TypeVar("T")
_MADE = "made.json"  # written last: what a chain is, and its points


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is built.

    Attributes:
        disk: bytes of the disk of real files.
        deltas: on it.
        deep: deltas on the two other disks, and of the raw file with which each is compared.
        files: in the file system.
        extents: of data on the sparse disk.
    """

    disk: int
    deltas: int
    deep: int
    files: int
    extents: int


def find_sizes(arguments: argparse.Namespace, depths: tuple[int, ...], deep: int) -> Sizes:
    """Return what the options ask for."""
    if arguments.quick:
        return Sizes(arguments.size or 128 * MiB, max(depths), deep, files=500, extents=256)
    return Sizes(arguments.size or GiB, max(depths), deep, files=20_000, extents=4096)


class Data:
    """Builds a chain when it is asked for, in a folder which the next run may use again.

    Args:
        folder: for what is made.
    """

    def __init__(self, place: Workplace, report: Report, folder: Path, sizes: Sizes) -> None:
        self._place, self._report, self._folder, self._sizes = place, report, folder, sizes
        folder.mkdir(parents=True, exist_ok=True)

    def chain(self, name: str) -> Chain:
        """Return a chain: DISK, FILES or SPARSE. One that is there is used if it is the same, and long enough."""
        make, count, what = {
            DISK: (self._make_disk, self._sizes.deltas, {"size": self._sizes.disk}),
            FILES: (self._make_files, self._sizes.deep, {"files": self._sizes.files}),
            SPARSE: (self._make_sparse, self._sizes.deep, {"extents": self._sizes.extents}),
        }[name]
        what |= {"deep": self._sizes.deep}
        folder = self._folder / name
        try:
            made = json.loads((folder / _MADE).read_text())
        except FileNotFoundError:
            made = {}
        if made.get("what") != what or made["count"] < count:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made = self._build(name, folder, make(folder), count) | {"what": what}
            (folder / _MADE).write_text(json.dumps(made))
        return Chain(folder, made["size"], made["points"])

    def _build(self, name: str, folder: Path, disk: Disk, count: int) -> dict[str, object]:
        deep = self._sizes.deep
        self._timed(f"{name}: {count} qcow2 overlays", lambda: build_overlays(folder / "qcow2", disk, count))
        (folder / "native").mkdir()
        self._timed(f"{name}: a raw file", lambda: build_file(folder / "native" / f"{deep}.raw", disk, deep))
        points = {}
        for codec in CODECS:
            what = f"{name}: a repository with {count} deltas, codec {codec}"
            points[codec] = self._timed(what, lambda c=codec: build_repository(folder / c, disk, count, c))  # type: ignore[misc]
        return {"size": disk.size, "count": count, "points": points}

    def _timed(self, what: str, make: Callable[[], T]) -> T:
        started = time.monotonic()
        made = make()
        self._report.say(f"{what}: made in {time.monotonic() - started:.1f} s")
        return made

    def _make_disk(self, folder: Path) -> Disk:
        raw = folder / "disk.raw"
        make_real_disk(raw, self._sizes.disk)
        return MovedChunks(raw, _CHANGES)

    def _make_files(self, folder: Path) -> Disk:
        """Make an ext4 with files of up to 64 KiB, 12 KiB on average, of the bytes of real ones."""
        source, tree, image = folder / "source.raw", folder / "tree", folder / "files.raw"
        make_real_disk(source, 64 * MiB)
        rng = np.random.default_rng(2)
        real = np.memmap(source, np.uint8, "r")
        lengths = np.minimum(rng.lognormal(9, 1, self._sizes.files), 64 * KiB).astype(int)
        for number, length in enumerate(lengths.tolist()):
            within = tree / f"{number // _A_FOLDER}"
            if number % _A_FOLDER == 0:
                within.mkdir(parents=True)
            start = int(rng.integers(0, len(real) - length))
            (within / f"{number}").write_bytes(real[start : start + length].tobytes())
        size = (32 * MiB + 2 * int(lengths.sum()) + 4 * KiB * len(lengths)) // MiB * MiB
        with image.open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-N", str(2 * len(lengths)), "-d", tree, image)
        shutil.rmtree(tree)
        return PutTogether(image, folder / "base.raw", self._sizes.deep)

    def _make_sparse(self, folder: Path) -> Disk:
        raw = folder / "disk.raw"
        rng = np.random.default_rng(3)
        with raw.open("wb") as file:
            file.truncate(TiB)
            for place in np.sort(distinct(rng, TiB // CHUNK, self._sizes.extents)).tolist():
                file.seek(place * CHUNK)
                file.write(rng.bytes(CHUNK))
        return MovedChunks(raw, _CHANGES)
