"""A QEMU that runs as a user of its own, as distributions have it: libvirt gives that user what QEMU opens."""

import random

from domains import two_disks
from libvirtd import libvirtd


def test_a_qemu_with_a_user_of_its_own() -> None:
    """As distributions have it: what QEMU opens is given to its user."""
    rng = random.Random(19)
    with libvirtd(user="libvirt-qemu", dynamic_ownership=True) as daemon, two_disks(daemon) as web:
        web.start()
        web.write(rng)
        for expected in ("no point", "", ""):
            assert web.take(during=rng) == {"vda": expected, "vdb": expected}
            web.write(rng)
        with web.moment():
            (folder,) = web.scratch.iterdir()
            assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (0, 0o711)
            assert ((folder / "qemu").stat().st_uid, (folder / "qemu").stat().st_mode & 0o777) == (64055, 0o700)
