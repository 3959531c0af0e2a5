"""A domain for tests, what has to be on its disks, and points taken of it as a backup takes them."""

import random
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import servers
from libvirtd import Disk, Libvirt, write

from backupfs.sources.domain import open_domain
from backupfs.sources.machine import Machine, Moment, Recorders, Track
from backupfs.units import MiB

SIZE = 8 * MiB
REPOSITORY = "0123456789abcdef"


class Web:
    """A domain with disks, what has to be on them, and the chains that are taken of it.

    Attributes:
        content: by disk, what the guest sees now.
    """

    def __init__(self, daemon: Libvirt, folder: Path) -> None:
        self.daemon = daemon
        self.scratch = folder / "scratch"
        self.disks = [Disk("vda", folder / "a.qcow2"), Disk("vdb", folder / "b.qcow2")]
        self.content = {}
        for disk in self.disks:
            self.make(disk)
        self.domain: Any = None
        self._number = 0
        self.points: dict[tuple[str, str], tuple[str | None, bytes]] = {}  # by chain and disk: recorder, content
        self.described: dict[tuple[str, str], str | None] = {}  # the domain, at that point

    def make(self, disk: Disk, *options: str) -> None:
        servers.run("qemu-img", "create", "-q", "-f", disk.image_format, *options, disk.path, str(SIZE))
        self.content[disk.name] = bytearray(SIZE)

    def start(self, **how: Any) -> None:
        self.domain = self.daemon.start("web", self.disks, **how)

    def open(self, *names: str, **how: Any) -> Machine:
        how = {"freeze": "auto", "scratch": str(self.scratch), "timeout_s": 20.0, **how}
        return open_domain(self.daemon.uri, "web", names or None, **how)

    def write(self, rng: random.Random, *disks: str) -> None:
        for disk in disks or self.content:
            for _ in range(3):
                offset, length = rng.randrange(SIZE // 4096 - 32) * 4096, rng.randrange(1, 32) * 4096
                value = rng.randrange(4)
                what = f"write -P {value}" if value else "write -z"
                write(self.domain, disk, f"{what} {offset} {length}")
                self.content[disk][offset : offset + length] = bytes([value]) * length

    def recorders(self, chain: str = "main", repository: str = REPOSITORY) -> Recorders:
        self._number += 1
        return Recorders(repository, chain, f"20260101T{self._number:06d}Z")

    def tracks(self, machine: Machine, chain: str = "main") -> dict[str, Track]:
        tracks = {}
        for disk in machine.disks:
            recorder = self.points.get((chain, disk.name), (None, b""))[0]
            tracks[disk.name] = Track(recorder, "" if recorder else "no point", self.described.get((chain, disk.name)))
        return tracks

    @contextmanager
    def moment(self, *names: str, chain: str = "main", **how: Any) -> Iterator[Moment]:
        with closing(self.open(*names, **how)) as machine:
            recorders, tracks = self.recorders(chain), self.tracks(machine, chain)
            plan = machine.plan(recorders, tracks)
            with closing(machine.begin(recorders, tracks)) as moment:
                assert {name: s.bitmap_problem or "" for name, s in moment.sources.items()} == plan
                yield moment

    def publish(self, moment: Moment, chain: str = "main") -> dict[str, bytes]:
        """Read all, as a backup does; return the disks' content."""
        read = {}
        for name, source in moment.sources.items():
            end = self.points.get((chain, name))
            disk = bytearray(end[1] if end and source.bitmap else SIZE)
            dirty = source.dirty(0, SIZE) if source.bitmap else ()
            ranges = [(e.offset, e.length) for e in dirty if e.flag] if source.bitmap else [(0, SIZE)]
            for offset, part in source.read_many(ranges):
                disk[offset : offset + len(part)] = part
            read[name] = bytes(disk)
        moment.check()
        moment.published()
        for name, content in read.items():
            self.points[chain, name] = moment.recorders.get(name), content
            self.described[chain, name] = moment.domain_xml
        return read

    def take(self, *names: str, chain: str = "main", during: random.Random | None = None, **how: Any) -> dict[str, str]:
        """Take a point, and check it; return why disks were read in full."""
        with self.moment(*names, chain=chain, **how) as moment:
            expected = {name: bytes(self.content[name]) for name in moment.sources}
            if during is not None:
                self.write(during)
            assert self.publish(moment, chain) == expected
            return {name: source.bitmap_problem or "" for name, source in moment.sources.items()}

    def checkpoints(self) -> set[str]:
        return {checkpoint.getName() for checkpoint in self.domain.listAllCheckpoints()}

    def kill_qemu(self) -> None:
        for disk in self.content:
            write(self.domain, disk, "flush")  # what was not flushed may be lost
        self.daemon.kill_qemu(self.domain)


@contextmanager
def two_disks(daemon: Libvirt) -> Iterator[Web]:
    """Make a domain's disks, vda and vdb; at the end nothing of it is left."""
    folder = daemon.folder / "images"
    folder.mkdir()
    web = Web(daemon, folder)
    try:
        yield web
        assert not list(web.scratch.glob("*")), "a backup's folder was left"
    finally:
        daemon.clear()
        shutil.rmtree(folder)
