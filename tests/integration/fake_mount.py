"""Mounts images in memory: `python fake_mount.py CONTROL MOUNTPOINT [allow_other]`, until it is unmounted.

The points are the folders CONTROL/VM/POINT; so a test adds and removes them while it is mounted. A file NOTE in such a
folder is the content of `point.json`; a file VERSION says which content the disks have. Not a test itself.
"""

import logging
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence

from images import BytesImage

from backupfs.errors import Corrupt, NotFound
from backupfs.fuse import session
from backupfs.fuse.catalogue import DiskFile, PointEntry, TextFile
from backupfs.image import Buffer, Image, ZeroImage
from backupfs.units import KiB, MiB, parse_time

ODD = 3 * MiB + 1234
BAD_AT = 1 * MiB  # where `bad` and `buggy` begin to fail, for 64 KiB
SLOW_S = 1.5


def content(disk: str, version: str = "") -> bytes:
    """Return what a disk holds."""
    return random.Random(disk + version).randbytes(ODD)


class BadImage(BytesImage):
    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self.error = error

    def readinto(self, offset: int, buffer: Buffer) -> None:
        if offset < BAD_AT + 64 * KiB and offset + len(buffer) > BAD_AT:
            raise self.error
        super().readinto(offset, buffer)


class SlowImage(BytesImage):
    def __init__(self, data: bytes, delay_s: float) -> None:
        super().__init__(data)
        self.delay_s = delay_s

    def readinto(self, offset: int, buffer: Buffer) -> None:
        time.sleep(self.delay_s)
        super().readinto(offset, buffer)


def image(disk: str, version: str) -> Image:
    data = content(disk, version)
    match disk:
        case "bad":
            return BadImage(data, Corrupt("base.layer", 4096, "the chunk's checksum does not match"))
        case "buggy":
            return BadImage(data, ValueError("a bug"))
        case "slow":
            return SlowImage(data, SLOW_S)
        case "stuck":
            return SlowImage(data, 3600)
        case "empty":
            return ZeroImage(0)
        case "missing":
            raise NotFound("a layer is missing")
    return BytesImage(data)


def condemn(_: Image) -> None:
    time.sleep(0.7)
    raise Corrupt("index", 0, "the chunk map is another; run backupfs reindex")


DISKS = ("good", "bad", "buggy", "slow", "stuck", "empty", "missing", "condemned", "weiß 💾")


class FakeCatalogue:
    def __init__(self, control: str) -> None:
        self.control = control

    def vms(self) -> Sequence[str]:
        return sorted(os.listdir(self.control))

    def points(self, vm: str) -> Mapping[str, int]:
        return {p: self.time_ns(p) for p in sorted(os.listdir(os.path.join(self.control, vm)))}

    def point(self, vm: str, point: str) -> PointEntry:
        if not os.path.isdir(os.path.join(self.control, vm, point)):
            raise NotFound(f"no {vm}/{point}")
        version = self.read(vm, point, "VERSION")
        disks = [self.disk(vm, point, name, version) for name in DISKS]
        note = TextFile("point.json", self.read(vm, point, "NOTE").encode())
        return PointEntry(self.time_ns(point), [*disks, note])

    def usage(self) -> os.statvfs_result:
        return os.statvfs(self.control)

    def disk(self, vm: str, point: str, name: str, version: str) -> DiskFile:
        xattrs = {"user.backupfs.vm": vm.encode(), "user.backupfs.point": point.encode()}
        size = 0 if name == "empty" else ODD
        check = condemn if name == "condemned" else None
        return DiskFile(f"{name}.raw", size, size // 4096 * 512, version, xattrs, lambda: image(name, version), check)

    def read(self, *names: str) -> str:
        try:
            with open(os.path.join(self.control, *names)) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    @staticmethod
    def time_ns(point: str) -> int:
        return int(parse_time(point).timestamp()) * 10**9


def main() -> None:
    control, path, *options = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    allow_other = "allow_other" in session.check_options(options)
    all_returned = session.run(
        FakeCatalogue(control), path, source="fake:ä, b\\c", allow_other=allow_other,
        on_ready=lambda: print("ready", flush=True),
    )  # fmt: skip
    logging.info("all returned: %s", all_returned)
    logging.shutdown()
    os._exit(0)  # a thread may be stuck


if __name__ == "__main__":
    main()
