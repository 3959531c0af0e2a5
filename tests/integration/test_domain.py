"""A running domain as a Machine, against a real libvirtd and QEMU: a point is what the disks were at its moment."""

import os
import random
from contextlib import closing

import pytest
from domains import Web
from libvirtd import Disk, wait_until

from backupfs.errors import BackupfsError, ConnectError, Locked, NotFound, UsageError
from backupfs.sources.domain import open_domain
from backupfs.sources.machine import Recorders, Track

ROUNDS = 20 if os.environ.get("BACKUPFS_LONG") else 4


def test_rounds_of_two_disks(web: Web) -> None:
    rng = random.Random(1)
    web.start()
    web.write(rng)
    assert web.take(during=rng) == {"vda": "no point", "vdb": "no point"}
    for _ in range(ROUNDS):
        web.write(rng)
        assert web.take(during=rng) == {"vda": "", "vdb": ""}
        assert web.checkpoints() == {web.points["main", "vda"][0]}


def test_a_failed_backup_loses_nothing(web: Web) -> None:
    rng = random.Random(2)
    web.start()
    web.write(rng)
    web.take()
    for _ in range(ROUNDS):
        web.write(rng)
        with web.moment():
            web.write(rng)
        assert web.checkpoints() == {web.points["main", "vda"][0]}
        web.write(rng, "vda")
        assert web.take(during=rng) == {"vda": "", "vdb": ""}


def test_a_backup_that_was_killed_is_taken_over(web: Web) -> None:
    """What is left: the job, its folder, and a checkpoint that no point has."""
    rng = random.Random(3)
    web.start()
    web.write(rng)
    web.take()
    web.write(rng)
    elsewhere = web.scratch.parent / "elsewhere"
    child = os.fork()
    if child == 0:
        machine = web.open(scratch=str(elsewhere))
        machine.begin(web.recorders(), web.tracks(machine))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    web.recorders()  # the child's number
    assert list(elsewhere.iterdir())
    assert web.domain.backupGetXMLDesc()
    assert len(web.checkpoints()) == 2
    web.write(rng)
    assert web.take(during=rng) == {"vda": "", "vdb": ""}
    assert web.checkpoints() == {web.points["main", "vda"][0]}
    assert not list(elsewhere.iterdir())


def test_a_backup_that_goes_on_is_not_taken_over(web: Web) -> None:
    web.start()
    with web.moment() as moment:
        with pytest.raises(Locked, match="another backupfs takes a backup"), web.moment():
            pass
        web.publish(moment)
    web.take()


def test_another_programs_backup_and_checkpoints_are_left_alone(web: Web) -> None:
    rng = random.Random(4)
    web.start()
    web.take()
    job = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{web.daemon.folder}/nbd'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{web.daemon.folder}/other-vda'/></disk></disks></domainbackup>"
    )
    checkpoint = "<domaincheckpoint><name>other</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    web.domain.backupBegin(job, checkpoint)
    with pytest.raises(ConnectError, match="another program's backup"), web.moment():
        pass
    with closing(web.open()) as machine, pytest.raises(ConnectError, match="another program's backup"):
        machine.plan(web.recorders(), web.tracks(machine))
    web.domain.abortJob()
    wait_until(lambda: "type" not in web.domain.jobStats() or web.domain.jobStats()["type"] == 0)
    web.write(rng)
    assert web.take() == {"vda": "", "vdb": ""}
    assert web.checkpoints() == {web.points["main", "vda"][0], "other"}


def test_chains_and_repositories_side_by_side(web: Web) -> None:
    rng = random.Random(5)
    web.start()
    web.write(rng)
    for chain in ("main", "main-2", "weekly"):
        web.take(chain=chain)
    foreign = Recorders("fedcba98", "main", "20250101T000000Z").new
    web.domain.checkpointCreateXML(
        f"<domaincheckpoint><name>{foreign}</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    )
    for number in range(2 * ROUNDS):
        web.write(rng)
        chain = "weekly" if number % 4 == 3 else "main-2" if number % 4 == 1 else "main"
        if number % 3 == 1:
            with web.moment(chain=chain):
                web.write(rng)
        assert web.take(chain=chain, during=rng) == {"vda": "", "vdb": ""}
        assert web.checkpoints() == {recorder for recorder, _ in web.points.values()} | {foreign}


def test_a_disk_alone_leaves_the_others_chain_as_it_is(web: Web) -> None:
    rng = random.Random(6)
    web.start()
    web.write(rng)
    web.take()
    for _ in range(3):
        web.write(rng)
        before = set(web.scratch.parent.iterdir())
        with web.moment("vda"):
            assert set(web.scratch.parent.iterdir()) <= before | {web.scratch}, "libvirt takes a backup of vdb, too"
        assert web.take("vda", during=rng) == {"vda": ""}
    assert web.take(during=rng) == {"vda": "", "vdb": ""}
    assert web.checkpoints() == {web.points["main", "vda"][0]}


def test_a_new_full_backup_that_fails_does_not_cost_the_chain_its_checkpoint(web: Web) -> None:
    rng = random.Random(7)
    web.start()
    web.take()
    web.write(rng)
    with closing(web.open()) as machine:
        tracks = {disk.name: Track(None, "a new chain was asked for") for disk in machine.disks}
        machine.begin(web.recorders(), tracks).close()
        assert web.take() == {"vda": "", "vdb": ""}
        web.write(rng)
        recorders = web.recorders()
        with closing(machine.begin(recorders, tracks)) as moment:
            web.points.clear()
            web.publish(moment)
    assert web.checkpoints() == {recorders.new}


def test_a_disk_more_and_a_raw_one_and_an_old_qcow2(web: Web) -> None:
    rng = random.Random(8)
    web.start()
    web.take()
    more = [Disk("vdc", web.scratch.parent / "c.raw", "raw"), Disk("vdd", web.scratch.parent / "d.qcow2")]
    web.make(more[0])
    web.make(more[1], "-o", "compat=0.10")
    web.domain.attachDeviceFlags(more[0].xml())
    web.domain.attachDeviceFlags(more[1].xml())
    for _ in range(2):
        web.write(rng)
        reasons = web.take(during=rng)
        assert (reasons["vda"], reasons["vdb"]) == ("", "")
        assert reasons["vdc"] == "a raw image has no persistent bitmaps"
        assert reasons["vdd"] == "a qcow2 image of version 2 has no persistent bitmaps"
        assert web.points["main", "vdc"][0] is web.points["main", "vdd"][0] is None


def test_a_disk_that_others_write_to_has_no_bitmap_to_trust(web: Web) -> None:
    web.disks[1].path.unlink()
    web.disks[1] = Disk("vdb", web.disks[1].path, "raw", "<shareable/>")
    web.make(web.disks[1])
    web.start()
    for _ in range(2):
        reasons = web.take()
    assert (reasons["vda"], reasons["vdb"][:20]) == ("", "other machines write")


def test_a_disk_that_is_passed_through(web: Web) -> None:
    direct = (
        "<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/null'/>"
        "<target dev='sda' bus='scsi'/></disk>"
    )
    web.domain = web.daemon.define("web", web.disks, direct)
    with pytest.raises(ConnectError, match="sda is passed through"):
        web.open()
    with closing(web.open("vda")) as machine:
        assert [disk.name for disk in machine.disks] == ["vda"]


def test_a_disk_in_an_io_thread(web: Web) -> None:
    """QEMU before 9.0 aborts, with its guest, when the backup's reader leaves."""
    description = web.daemon.define("web", web.disks).XMLDesc(0)
    threaded = description.replace("<vcpu", "<iothreads>1</iothreads><vcpu").replace(
        "<driver name='qemu' type='qcow2'", "<driver name='qemu' type='qcow2' iothread='1'", 1
    )
    assert threaded.count("iothread=") == 1
    web.domain = web.daemon.connection.defineXML(threaded)
    web.domain.create()
    if web.daemon.connection.getVersion() < 9_000_000:
        with closing(web.open()) as machine, pytest.raises(ConnectError, match="vda runs in an I/O thread"):
            machine.plan(Recorders("0" * 32, "main", "20260101T000000Z"), {"vda": Track(None, "")})
    assert web.domain.isActive()


def test_a_machine_that_is_closed_closes_its_moment(web: Web) -> None:
    """A Ctrl-C may come before the caller has the moment in hand."""
    rng = random.Random(21)
    web.start()
    web.take()
    for _ in range(2):  # running, then off
        with closing(web.open()) as machine:
            machine.begin(web.recorders(), web.tracks(machine))
            if web.domain.isActive():
                web.write(rng)
        assert web.domain.jobStats()["type"] == 0 if web.domain.isActive() else True
        assert web.take() == {"vda": "", "vdb": ""}
        if web.domain.isActive():
            web.domain.destroy()


def test_only_raw_disks(web: Web) -> None:
    raw = Disk("vda", web.scratch.parent / "a.raw", "raw")
    web.disks = [raw]
    web.content.clear()
    web.make(raw)
    web.start()
    rng = random.Random(9)
    for _ in range(2):
        web.write(rng)
        assert web.take(during=rng)["vda"].startswith("a raw image")
    assert web.checkpoints() == set()


def test_checkpoints_that_libvirt_lost(web: Web) -> None:
    rng = random.Random(10)
    web.start()
    web.write(rng)
    web.take()
    for _ in range(2):
        recorder = web.points["main", "vda"][0]
        web.daemon.restart(lambda recorder=recorder: web.daemon.forget_checkpoint(web.domain, recorder))
        web.domain = web.daemon.connection.lookupByName("web")
        assert web.checkpoints() == set()
        web.write(rng)
        with closing(web.open()) as machine:
            assert machine.plan(web.recorders(), web.tracks(machine)) == {"vda": "", "vdb": ""}
        assert web.checkpoints() == set()
        assert web.take(during=rng) == {"vda": "", "vdb": ""}
        assert web.checkpoints() == {web.points["main", "vda"][0]}


def test_a_restarted_libvirtd_in_the_middle(web: Web) -> None:
    rng = random.Random(11)
    web.start()
    web.take()
    web.write(rng)
    with web.moment() as moment:
        web.daemon.restart()
        with pytest.raises(BackupfsError):
            web.publish(moment)
    web.domain = web.daemon.connection.lookupByName("web")
    web.write(rng)
    assert web.take(during=rng) == {"vda": "", "vdb": ""}


def test_what_is_refused(web: Web) -> None:
    web.start()
    with pytest.raises(NotFound, match="has no disk sdz; it has vda, vdb"):
        web.open("vda", "sdz")
    with pytest.raises(NotFound, match="no domain db; it knows web"):
        open_domain(web.daemon.uri, "db", None, freeze="auto", scratch="/tmp", timeout_s=5)
    with pytest.raises(ConnectError, match="can't connect"):
        open_domain("qemu:///system?socket=/nowhere", "web", None, freeze="auto", scratch="/tmp", timeout_s=5)
    with pytest.raises(ConnectError, match="run backupfs there"):
        open_domain("qemu+ssh://host.example/system", "web", None, freeze="auto", scratch="/tmp", timeout_s=5)
    with closing(web.open(freeze="require")) as machine, pytest.raises(ConnectError, match="no channel"):
        machine.begin(web.recorders(), web.tracks(machine))
    with closing(web.open(scratch=f"/tmp/{'x' * 80}")) as machine, pytest.raises(UsageError, match="too long"):
        machine.begin(web.recorders(), web.tracks(machine))
    assert web.checkpoints() == set()


def test_a_block_job_is_waited_for(web: Web) -> None:
    web.start()
    target = f"<disk type='file'><driver type='qcow2'/><source file='{web.scratch.parent}/copy.qcow2'/></disk>"
    web.domain.blockCopy("vda", target, {}, 4)  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    with pytest.raises(ConnectError, match="block job goes on at vda"), web.moment():
        pass
    web.domain.blockJobAbort("vda")
    wait_until(lambda: not web.domain.blockJobInfo("vda"))
    web.take()


def test_a_paused_domain(web: Web) -> None:
    rng = random.Random(18)
    web.start()
    web.domain.suspend()
    web.write(rng)
    web.take(during=rng)
    assert web.take() == {"vda": "", "vdb": ""}


def test_a_libvirtd_that_hangs(web: Web) -> None:
    web.start()
    with closing(web.open(timeout_s=1.0)) as machine:
        pid = web.daemon.daemon()
        os.kill(pid, 19)
        try:
            with pytest.raises(ConnectError, match="did not answer within 1 s"):
                machine.begin(web.recorders(), web.tracks(machine))
            with pytest.raises(ConnectError, match="still does not answer"):
                machine.begin(web.recorders(), web.tracks(machine))
        finally:
            os.kill(pid, 18)
    web.take()
