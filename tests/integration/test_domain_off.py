"""A domain that stops, well or not, and one that is off: what was recorded is used where it was saved."""

import os
import random
from pathlib import Path

import pytest
import servers
from domains import SIZE, Web
from libvirtd import Disk

from backupfs.errors import ConnectError, SourceError
from backupfs.sources import qemu_img

ROUNDS = 20 if os.environ.get("BACKUPFS_LONG") else 2


def test_a_transient_domain(web: Web) -> None:
    """libvirt forgets its checkpoints when it stops; the bitmaps stay in the images."""
    rng = random.Random(12)
    for number in range(3):
        web.start(persistent=False)
        web.write(rng)
        assert web.take(during=rng) == dict.fromkeys(("vda", "vdb"), "" if number else "no point")
        web.write(rng)
        web.domain.destroy()


def test_a_killed_qemu(web: Web) -> None:
    """Its bitmaps were not saved: what changed since the last point is known to nobody."""
    rng = random.Random(13)
    web.start()
    web.take()
    web.domain.destroy()  # QEMU ends well: the bitmaps are saved
    web.domain.create()
    web.write(rng)
    web.kill_qemu()
    web.domain.create()
    web.write(rng)
    reasons = web.take(during=rng)
    assert all("no sound bitmap" in reason for reason in reasons.values())
    assert web.checkpoints() == {web.points["main", "vda"][0]}
    web.write(rng)
    assert web.take() == {"vda": "", "vdb": ""}
    info = servers.run("qemu-img", "info", "-U", web.disks[0].path)
    assert info.count("backupfs-") <= 1


def test_one_disks_bitmap_is_gone(web: Web) -> None:
    rng = random.Random(14)
    web.start()
    web.take()
    recorder = web.points["main", "vda"][0]
    web.domain.destroy()
    servers.run("qemu-img", "bitmap", "--remove", web.disks[1].path, recorder)
    web.domain.create()
    web.write(rng)
    assert web.take() == {"vda": "", "vdb": f"checkpoint {recorder} has no sound bitmap of the disk"}
    web.write(rng)
    assert web.take() == {"vda": "", "vdb": ""}
    assert web.checkpoints() == {web.points["main", "vda"][0]}
    web.domain.destroy()
    assert servers.run("qemu-img", "info", web.disks[0].path).count("backupfs-") == 1


@pytest.mark.parametrize("how", ["destroyed", "killed"])
def test_a_domain_that_ends_in_the_middle(web: Web, how: str) -> None:
    rng = random.Random(15)
    web.start()
    web.take()
    web.write(rng)
    with web.moment() as moment:
        web.domain.destroy() if how == "destroyed" else web.kill_qemu()
        with pytest.raises(SourceError):
            web.publish(moment)
    web.domain.create()
    web.write(rng)
    reasons = web.take(during=rng)
    assert all((reason == "") == (how == "destroyed") for reason in reasons.values()), reasons
    assert web.checkpoints() == {web.points["main", "vda"][0]}


def test_off_and_on_again(web: Web) -> None:
    rng = random.Random(16)
    web.start()
    web.write(rng)
    web.take()
    for _ in range(ROUNDS):
        web.write(rng)
        web.domain.destroy()
        assert web.take() == {"vda": "", "vdb": ""}
        assert web.checkpoints() == {web.points["main", "vda"][0]}
        with web.moment():
            pass
        assert web.take() == {"vda": "", "vdb": ""}
        web.domain.create()
        web.write(rng)
        assert web.take(during=rng) == {"vda": "", "vdb": ""}
        assert web.checkpoints() == {web.points["main", "vda"][0]}
    web.domain.destroy()
    for disk in web.disks:
        assert servers.run("qemu-img", "info", disk.path).count("name: backupfs-") == 1


def test_off_and_without_libvirts_memory(web: Web) -> None:
    """A transient domain's disks, defined again: bitmaps that no checkpoint knows of."""
    rng = random.Random(17)
    web.start(persistent=False)
    web.write(rng)
    web.take()
    web.write(rng)
    web.domain.destroy()
    web.domain = web.daemon.define("web", web.disks)
    assert web.take() == {"vda": "", "vdb": ""}
    web.domain.undefineFlags(16)  # with what libvirt knows of checkpoints
    web.start(persistent=False)
    web.write(rng)
    assert web.take(during=rng) == {"vda": "", "vdb": ""}


def test_off_a_domain_can_not_be_started_while_it_is_read(web: Web) -> None:
    import libvirt

    web.domain = web.daemon.define("web", web.disks)
    with web.moment() as moment:
        with pytest.raises(libvirt.libvirtError, match="lock"):
            web.domain.create()
        web.publish(moment)
    web.domain.create()
    web.take()


def test_off_a_raw_disk_with_another_formats_header(web: Web) -> None:
    raw = Disk("vda", web.scratch.parent / "a.raw", "raw")
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", raw.path, str(SIZE))
    web.domain = web.daemon.define("web", [raw])
    with pytest.raises(SourceError, match="looks like qcow2"), web.moment():
        pass


def test_an_overlay_between_two_points(web: Web) -> None:
    """What changed before the overlay came is in a bitmap of the file below."""
    rng = random.Random(19)
    web.start()
    web.write(rng)
    web.take()
    for number in range(2):
        web.write(rng)
        overlays = "".join(
            f"<disk name='{disk.name}'><source file='{disk.path}.{number}'/></disk>" for disk in web.disks
        )
        snapshot = f"<domainsnapshot><name>s{number}</name><disks>{overlays}</disks></domainsnapshot>"
        web.domain.snapshotCreateXML(snapshot, 16 | 4)  # DISK_ONLY, NO_METADATA
        web.write(rng)
        if number == 0:
            assert web.take(during=rng) == {"vda": "", "vdb": ""}
            web.write(rng)
            web.domain.destroy()
            assert web.take() == {"vda": "", "vdb": ""}
        else:
            web.domain.destroy()
            assert all("knows all changes" in reason for reason in web.take().values())
        web.domain.create()
        web.write(rng)
        assert web.take(during=rng) == {"vda": "", "vdb": ""}


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("running", [True, False])
def test_two_disks_that_change_places(web: Web, running: bool, lost: bool) -> None:
    """Each has a sound bitmap of the right name: the other one's. libvirt may have lost what it knew of that."""
    rng = random.Random(20)
    web.start()
    web.write(rng)
    web.take()
    web.write(rng)
    for checkpoint in web.domain.listAllCheckpoints() if lost else ():
        checkpoint.delete(2)  # METADATA_ONLY
    web.domain.destroy()
    first, second = web.disks
    web.disks = [Disk("vda", second.path), Disk("vdb", first.path)]
    web.content["vda"], web.content["vdb"] = web.content["vdb"], web.content["vda"]
    web.domain = web.daemon.define("web", web.disks, uuid=web.domain.UUIDString())
    if running:
        web.domain.create()
    reasons = web.take()
    assert reasons["vda"] == f"its image was {first.path} at its chain's last point"
    assert reasons["vdb"] == f"its image was {second.path} at its chain's last point"
    assert web.take() == {"vda": "", "vdb": ""}


def test_a_bitmap_stays_when_there_is_no_space_to_remove_it(tmp_path: Path) -> None:
    """qemu-img would say that it did it, and leave the others unusable."""
    servers.run("mount", "-t", "tmpfs", "-o", "size=8M", "none", tmp_path)
    try:
        image = tmp_path / "disk"
        servers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
        for name in ("a", "b"):
            qemu_img.add_bitmap(str(image), name)
        with pytest.raises(ConnectError, match="too full"):
            qemu_img.remove_bitmap(str(image), "a")
        assert qemu_img.stored_bitmaps(str(image), 20.0).sound == {"a", "b"}
    finally:
        servers.run("umount", tmp_path)
