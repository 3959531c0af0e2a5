"""A moment of a running QEMU that breaks: who reads it, for a backup or in a mount, gets an error, no wrong bytes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from guest import GuestDisk, Machine, machine
from moments import Chain, assert_clean, content
from mounts import wait_until
from servers import freeze, run

from backupfs.errors import SourceError
from backupfs.sources.live_image import LiveImage
from backupfs.sources.live_link import Export
from backupfs.sources.machine import Moment
from backupfs.sources.qmp import open_qmp
from backupfs.sources.qmp_moment import FleecedSource, QmpMoment
from backupfs.sources.scratch import Scratch
from backupfs.units import MiB

SIZE = 16 * MiB
OLD, NEW = b"\x11", b"\x22"


@pytest.fixture
def disk(tmp_path: Path) -> GuestDisk:
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "disk", str(SIZE))
    return GuestDisk(tmp_path / "disk", "raw")


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    """One whose scratch is full after 4 MiB, which nobody notices but QEMU."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    monkeypatch.setattr(Scratch, "free", lambda self: 1)
    (tmp_path / "scratch").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", tmp_path / "scratch")
    try:
        yield Chain(tmp_path / "scratch")
    finally:
        run("umount", tmp_path / "scratch")


def overwrite(m: Machine, disk: GuestDisk, first: int, last: int) -> None:
    for k in range(first, last):
        m.write(disk, k * MiB, MiB, NEW[0])


def test_a_backup_of_a_moment_that_breaks_is_dropped(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])
        with pytest.raises(SourceError, match=r"disk vda: the moment is lost: .* are left in .*--scratch"):
            chain.take(m, lambda moment: overwrite(m, disk, 0, 16))
        assert disk.path.read_bytes() == NEW * SIZE, "no write of the guest fails"
        assert_clean(m, chain)
        assert chain.take(m)["vda"] == NEW * SIZE
        assert_clean(m, chain)


def test_it_is_dropped_before_all_is_read(disk: GuestDisk, chain: Chain) -> None:
    """Not after hours, and no later than what was read last."""
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])

        def read_on(moment: Moment) -> None:
            overwrite(m, disk, 0, 16)
            while True:
                content(moment.sources["vda"])

        with pytest.raises(SourceError, match="the moment is lost"):
            chain.take(m, read_on)
        assert_clean(m)


@contextmanager
def shown(m: Machine, chain: Chain) -> Iterator[tuple[LiveImage, FleecedSource]]:
    """A moment as a mount reads it."""
    with closing(open_qmp(m.qmp_path, None, scratch=str(chain.scratch))) as opened, closing(opened.view()) as moment:
        source = moment.sources["vda"]
        assert source.witness is not None
        with closing(LiveImage(Export(source.uri, source.witness.uri), "vda", 20.0)) as image:
            image.connect()
            yield image, source


def test_qemu_was_silent_while_nobody_read(disk: GuestDisk, chain: Chain) -> None:
    """For longer than it may be: the witness' connection is lost, not the moment."""
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])

        def pause(moment: Moment) -> None:
            freeze(m.process.pid)
            time.sleep(7)
            m.process.send_signal(signal.SIGCONT)
            overwrite(m, disk, 0, 1)

        assert chain.take(m, pause, timeout_s=3.0)["vda"] == OLD * SIZE
        assert_clean(m, chain)


def test_a_moment_that_breaks_is_told_to_whom_it_concerns(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])

        def tell(moment: Moment) -> None:
            assert isinstance(moment, QmpMoment)
            early, late = threading.Event(), threading.Event()
            moment.call_when_broken(early.set)
            overwrite(m, disk, 0, 16)
            assert early.wait(20)
            moment.call_when_broken(late.set)
            assert late.is_set()

        with pytest.raises(SourceError, match="the moment is lost"):
            chain.take(m, tell)


def test_who_comes_after_the_break_gets_no_connection(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])
        with shown(m, chain) as (_, source):
            assert source.witness is not None
            overwrite(m, disk, 0, 16)
            late = LiveImage(Export(source.uri, source.witness.uri), "vda", 20.0)
            with closing(late), pytest.raises(SourceError, match="the moment is lost"):
                late.connect()


def test_a_moment_that_is_shown_fails_for_good_when_it_breaks(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])
        with shown(m, chain) as (image, _):
            overwrite(m, disk, 0, 2)
            assert bytes(image.lend(0, SIZE)) == OLD * SIZE
            assert [e.flag for e in image.extents(0, SIZE)] == [False]
            overwrite(m, disk, 2, 16)
            with pytest.raises(SourceError):
                image.lend(0, SIZE)
            wait_until(lambda: not image.alive())
            with pytest.raises(SourceError, match="the moment is lost"):
                image.lend(0, 512)
        assert disk.path.read_bytes() == NEW * SIZE
        assert_clean(m)


def test_readers_at_the_moment_of_the_break(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, OLD[0])
        with shown(m, chain) as (image, _):
            wrong: list[int] = []
            reads = [0] * 4

            def read(number: int) -> None:
                at = number * 4 * MiB
                while True:
                    try:
                        if image.lend(at, 4 * MiB) != OLD * 4 * MiB:
                            wrong.append(at)
                    except SourceError:
                        return
                    reads[number] += 1

            threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            wait_until(lambda: all(reads))
            overwrite(m, disk, 0, 16)
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert wrong == []
        assert_clean(m)
