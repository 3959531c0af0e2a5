"""A running QEMU without a guest: points, faults in the middle of them, and what is left in QEMU afterwards."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest import GuestDisk, Machine, machine
from moments import Chain, assert_clean, content
from qmp_client import Refused
from servers import run

from backupfs.errors import ConnectError, SourceError
from backupfs.sources import fleecing, nbd, qmp
from backupfs.sources.machine import Moment
from backupfs.units import KiB, MiB

SIZE = 16 * MiB
STEP = 64 * KiB


def image(folder: Path, name: str, image_format: str = "qcow2", attach: str = "virtio-blk") -> GuestDisk:
    path = folder / f"{name}.{image_format}"
    run("qemu-img", "create", "-q", "-f", image_format, path, str(SIZE))
    return GuestDisk(path, image_format, name, attach)


def wait_until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    (tmp_path / "scratch").mkdir()
    return Chain(tmp_path / "scratch")


@pytest.fixture(params=["filter", "job"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "job":
        monkeypatch.setattr(qmp, "has_filter", lambda monitor, blocks: False)
    return str(request.param)


@pytest.mark.parametrize("attach", ["virtio-blk", "drive", "scsi", "ide"])
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_rounds(tmp_path: Path, chain: Chain, method: str, attach: str, image_format: str) -> None:
    """Writes before, at and after the moment; a point that is not published; discards."""
    disk = image(tmp_path, "disk", image_format, attach)
    with machine([disk]) as m:
        for k in range(6):
            m.write(disk, 3 * k * STEP, 2 * STEP, k + 1)
            if k >= 3:
                m.discard(disk, 3 * (k - 3) * STEP, STEP)
            found = chain.take(
                m, lambda moment, k=k: m.write(disk, 3 * k * STEP, 4 * STEP, 0x99), publish=k not in (1, 4)
            )
            assert found["disk"][3 * k * STEP :][: 2 * STEP] == bytes([k + 1]) * (2 * STEP)
            assert (chain.reasons["disk"] == "") == (k > 0)
            assert_clean(m, chain)


WRITES = {"write": "write -P 0x99 {} {}", "zeroes": "write -z -u {} {}", "discard": "discard {} {}"}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_moment_stays_whatever_the_guest_does(
    tmp_path: Path, chain: Chain, method: str, image_format: str, write: str
) -> None:
    """QEMU's snapshot-access (7.2) shows the image as it is now where a request begins with what was copied."""
    disk = image(tmp_path, "disk", image_format)
    with machine([disk]) as m:
        m.write(disk, 0, SIZE - MiB, 0x11)
        before = b"\x11" * (SIZE - MiB) + bytes(MiB)

        def overwrite(moment: Moment) -> None:
            source = moment.sources["disk"]
            for offset, length in (
                (MiB, STEP),
                (2 * MiB, 3 * STEP),
                (5 * MiB, MiB),
                (8 * MiB, 512),
                (10 * MiB, SIZE // 4),
            ):
                m.io(disk, WRITES[write].format(offset, length), f"{length}/{length} bytes")
                assert content(source) == before
                assert [(e.offset, e.length) for e in source.extents(0, SIZE) if e.flag] == [(SIZE - MiB, MiB)]

        assert chain.take(m, overwrite)["disk"] == before
        assert_clean(m, chain)


def test_disks_are_of_one_moment(tmp_path: Path, chain: Chain, method: str) -> None:
    disks = [image(tmp_path, "a"), image(tmp_path, "b", "raw", "drive"), image(tmp_path, "c", "qcow2", "scsi")]
    with machine(disks) as m:
        for disk in disks:
            m.write(disk, 0, STEP, 1)

        def overwrite(moment: Moment) -> None:
            for disk in disks:
                m.write(disk, 0, STEP, 2)

        found = chain.take(m, overwrite)
        assert [found[d.name][:STEP] for d in disks] == [b"\1" * STEP] * 3
        assert_clean(m, chain)


@pytest.mark.parametrize("attach", ["virtio-blk", "scsi"])
def test_a_disk_in_an_iothread_is_refused(tmp_path: Path, chain: Chain, attach: str) -> None:
    """QEMU 7.2 would abort when the backup's connection is closed."""
    disk, other = image(tmp_path, "disk", "qcow2", attach), image(tmp_path, "other", "qcow2", "ide")
    bus = "virtio-blk-pci" if attach == "virtio-blk" else "virtio-scsi-pci"
    with machine([disk, other], "-object", "iothread,id=io", "-global", f"{bus}.iothread=io") as m:
        with pytest.raises(SourceError, match="disk disk runs in an I/O thread"):
            chain.take(m)
        assert_clean(m)
        chain.take(m, wanted=["other"])
        assert_clean(m, chain)


def test_two_chains_and_two_repositories(tmp_path: Path, chain: Chain) -> None:
    others = [Chain(chain.scratch, "main-2"), Chain(chain.scratch, "main", "f" * 32)]
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        for k in range(12):
            m.write(disk, k * STEP, STEP, k + 1)
            one = (chain, *others)[k * 7 % 3]
            one.take(m, lambda moment, k=k: m.write(disk, (k + 30) * STEP, STEP, 0x55), publish=k % 4 != 3)
            assert one.reasons["disk"] == "" or k < 4
            assert_clean(m, chain, *others)


def test_a_disk_grows(tmp_path: Path, chain: Chain) -> None:
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        chain.take(m)
        m.qmp("block_resize", node_name="disk-fmt", size=2 * SIZE)
        m.write(disk, SIZE + STEP, STEP, 3)
        found = chain.take(m)
        assert chain.reasons["disk"] == ""
        assert len(found["disk"]) == 2 * SIZE
        assert_clean(m, chain)


def test_a_paused_guest_stays_paused(tmp_path: Path, chain: Chain, method: str) -> None:
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        m.write(disk, 0, STEP, 1)
        m.qmp("stop")
        chain.take(m)
        assert m.qmp("query-status")["status"] == "paused"
        m.qmp("cont")
        assert_clean(m, chain)


def test_a_clean_end_of_qemu_between_and_during(tmp_path: Path, chain: Chain, method: str) -> None:
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        m.write(disk, 0, STEP, 1)
        chain.take(m)
        m.write(disk, STEP, STEP, 2)
        m.quit()
    with machine([disk]) as m:
        m.write(disk, 2 * STEP, STEP, 3)

        def end(moment: Moment) -> None:
            m.write(disk, 3 * STEP, STEP, 4)
            m.quit()

        with pytest.raises(ConnectError):
            chain.take(m, end)
    with machine([disk]) as m:
        m.write(disk, 4 * STEP, STEP, 5)
        assert chain.take(m)["disk"][: 5 * STEP] == b"".join(bytes([n]) * STEP for n in (1, 2, 3, 4, 5))
        assert chain.reasons["disk"] == ""
        assert_clean(m, chain)


def test_qemu_is_killed(tmp_path: Path, chain: Chain) -> None:
    disks = [image(tmp_path, "a"), image(tmp_path, "b", "raw")]
    with machine(disks) as m:
        chain.take(m)
        m.quit()
    with machine(disks) as m:
        m.write(disks[0], 0, STEP, 1)

        def kill(moment: Moment) -> None:
            m.process.kill()
            m.process.wait()

        began = time.monotonic()
        with pytest.raises(ConnectError):
            chain.take(m, kill)
        assert time.monotonic() - began < 10
    with machine(disks) as m:
        chain.take(m)
        assert "inconsistent" in chain.reasons["a"]
        assert "raw images keep none" in chain.reasons["b"]
        assert_clean(m, chain)
        m.write(disks[0], STEP, STEP, 2)
        chain.take(m)
        assert chain.reasons == {"a": "", "b": ""}
        assert_clean(m, chain)


def test_a_snapshot_between_two_points(tmp_path: Path, chain: Chain) -> None:
    disk, overlay = image(tmp_path, "disk"), tmp_path / "overlay"
    with machine([disk]) as m:
        m.write(disk, 0, STEP, 1)
        chain.take(m)
        m.qmp("blockdev-snapshot-sync", node_name="disk-fmt", snapshot_file=str(overlay), snapshot_node_name="top")
        m.write(disk, STEP, STEP, 2)
        found = chain.take(m)
        assert found["disk"][: 2 * STEP] == b"\1" * STEP + b"\2" * STEP
        assert "a snapshot was taken since" in chain.reasons["disk"]


@pytest.mark.parametrize("attach", ["virtio-blk", "drive"])
def test_a_snapshot_during_a_backup_is_refused(tmp_path: Path, chain: Chain, method: str, attach: str) -> None:
    """By QEMU; neither the guest nor the backup notices."""
    disk, overlay = image(tmp_path, "disk", attach=attach), tmp_path / "overlay"
    with machine([disk]) as m:
        m.write(disk, 0, STEP, 1)
        chain.take(m)

        def snapshot(moment: Moment) -> None:
            ways = [{"device": "disk"}] if attach == "drive" else [{"node_name": "disk-fmt"}]
            ways += [{"node_name": name} for name in (filter_of(m),) if name]
            for way in ways:
                arguments = {"snapshot_file": str(overlay), "snapshot_node_name": "top"}
                with pytest.raises(Refused, match="busy"):
                    m.qmp("blockdev-snapshot-sync", **way, **arguments)
            m.write(disk, 0, STEP, 9)

        found = chain.take(m, snapshot)
        assert found["disk"][:STEP] == b"\1" * STEP
        assert_clean(m, chain)
        assert chain.take(m)["disk"][:STEP] == b"\x09" * STEP
        assert chain.reasons["disk"] == ""


def filter_of(m: Machine) -> str | None:
    """Return the name of the first disk's filter."""
    nodes = [node["node-name"] for node in m.qmp("query-named-block-nodes", flat=True)]
    return next((name for name in nodes if name.startswith("backupfs-") and name.endswith("-f0")), None)


@pytest.mark.parametrize("attach", ["virtio-blk", "drive"])
@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2])
def test_a_disk_keeps_its_size_during_a_backup(
    tmp_path: Path, chain: Chain, method: str, attach: str, size: int
) -> None:
    """QEMU sees to it. What a disk loses when it gets shorter, nothing copies before."""
    disk = image(tmp_path, "disk", "raw", attach)
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, 1)

        def resize(moment: Moment) -> None:
            ways = [{"device": "disk"}] if attach == "drive" else [{"node_name": "disk-fmt"}]
            ways += [{"node_name": name} for name in (filter_of(m),) if name]
            for way in ways:
                with pytest.raises(Refused):
                    m.qmp("block_resize", **way, size=size)
            m.write(disk, SIZE - STEP, STEP, 2)

        assert chain.take(m, resize)["disk"] == b"\1" * SIZE
        assert_clean(m, chain)
        m.qmp("block_resize", **({"device": "disk"} if attach == "drive" else {"node_name": "disk-fmt"}), size=size)


def test_a_disk_that_is_resized_right_at_the_moment(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = image(tmp_path, "disk", "raw")
    with machine([disk]) as m:
        freeze = fleecing.Session.freeze

        def resized(session: fleecing.Session, *words: Any) -> None:
            freeze(session, *words)
            m.qmp("block_resize", node_name=filter_of(m), size=SIZE // 2)

        with monkeypatch.context() as patch:
            patch.setattr(fleecing.Session, "freeze", resized)
            with pytest.raises(SourceError, match="disk disk was resized just now"):
                chain.take(m)
        assert_clean(m)
        assert len(chain.take(m)["disk"]) == SIZE // 2


def test_somebody_takes_away_what_keeps_the_moment(tmp_path: Path, chain: Chain, method: str) -> None:
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        chain.take(m)
        m.write(disk, 0, STEP, 1)

        def cancel(moment: Moment) -> None:
            (job,) = m.qmp("query-jobs")
            m.qmp("block-job-cancel", device=job["id"])
            wait_until(lambda: m.qmp("query-jobs") == [])

        def unplug(moment: Moment) -> None:
            with pytest.raises(Refused, match="Permission conflict"):  # QEMU sees to it
                m.qmp("qom-set", path=disk.device, property="drive", value="disk-fmt")

        if method == "job":
            with pytest.raises(SourceError, match="somebody took away"):
                chain.take(m, cancel)
        else:
            chain.take(m, unplug)
        assert_clean(m, chain)
        assert chain.take(m)["disk"][:STEP] == b"\1" * STEP
        assert chain.reasons["disk"] == ""


def can_be_read(moment: Moment) -> bool:
    try:
        content(moment.sources["disk"])
    except SourceError:
        return False
    return True


def test_who_stops_in_the_middle_of_reading_does_not_hold_the_guest(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """QEMU waits, when an export goes, until what it has sent is read or thrown away (7.2, 10.0)."""
    disk = image(tmp_path, "disk")
    with machine([disk]) as m:
        m.write(disk, 0, SIZE, 1)

        def stop(connection: object) -> None:
            time.sleep(0.2)  # until QEMU has sent as much as the sockets take
            raise KeyboardInterrupt

        def read(moment: Moment) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(nbd._Connection, "collect", stop)
                content(moment.sources["disk"])

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):  # which keeps all frames, and what they know, until the end
            chain.take(m, read)
        assert time.monotonic() - began < 15
        assert_clean(m)


def test_scratch_runs_full(tmp_path: Path, chain: Chain, method: str) -> None:
    """The backup ends, with a clear error; no guest write fails, and the next point covers everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    disk = image(tmp_path, "disk")
    run("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", chain.scratch)
    try:
        with machine([disk]) as m:
            for k in range(16):
                m.write(disk, k * MiB, MiB, k + 1)
            chain.take(m)

            def overwrite(moment: Moment) -> None:
                # What QEMU's own writes get with the job when there is no space, a guest does not: it is stopped then.
                for k in range(16 if method == "filter" else 2):
                    m.write(disk, k * MiB, MiB, k + 0x80)
                if method == "job":
                    (chain.scratch / "other").write_bytes(bytes(1600 * KiB))
                wait_until(lambda: not can_be_read(moment))

            with pytest.raises(SourceError, match="too little space is left"):
                chain.take(m, overwrite)
            (chain.scratch / "other").unlink(missing_ok=True)
            assert_clean(m, chain)
            chain.take(m)
            assert chain.reasons["disk"] == ""
    finally:
        run("umount", chain.scratch)
