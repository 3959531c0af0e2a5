"""How a volume can be read by hand whose files can't be shown: what stands in UNSUPPORTED.txt."""

from collections.abc import Sequence

from backupfs.guest import containers, detect

_OPTIONS = {"ext2": "ro,loop,noload", "ext3": "ro,loop,noload", "ext4": "ro,loop,noload"}
_OPTIONS |= {"xfs": "ro,loop,norecovery,nouuid", "btrfs": "ro,loop,rescue=nologreplay"}
_OPTIONS |= {detect.F2FS: "ro,loop,norecovery"}
_RAW = "The volume itself can be read as the raw file {raw} in the point's folder."
_MOUNT = (
    _RAW
    + """ By hand, as root:

    mount -o {options} {raw} /mnt
"""
)
_OPEN = (
    _RAW
    + """ With its password or key, as root:

    cryptsetup open --readonly{kind} {raw} guest
    mount -o ro /dev/mapper/guest /mnt
"""
)
_RAID = (
    _RAW
    + """ By hand, as root, with all members that there are:

    losetup --read-only --find --show {raw}
    mdadm --assemble --readonly /dev/md/guest /dev/loop…
    mount -o ro /dev/md/guest /mnt
"""
)


def how(parts: str, name: str, kind: str | None, others: Sequence[str]) -> str:
    """Return what can be done to read a volume, in lines.

    Args:
        parts: the folder with the disk's volumes as raw files, in the point's folder.
        name: of the volume.
        kind: what is on it, as `detect` calls it.
        others: names of the disk's other volumes.
    """
    raw = f"{parts}/{name}.raw"
    match kind:
        case detect.SWAP | detect.JOURNAL:
            return "There are no files in it.\n"
        case containers.LVM:
            logical = [other for other in others if not other.isdecimal()]
            if logical:
                return f"The files of its logical volumes are beside this folder: see {', '.join(logical)}.\n"
            return f"No logical volume of this disk can be shown; {parts}/ERROR.txt says why.\n"
        case containers.LUKS:
            return _OPEN.format(raw=raw, kind="")
        case containers.BITLOCKER:
            return _OPEN.format(raw=raw, kind=" --type bitlk")
        case containers.RAID:
            return _RAID.format(raw=raw)
        case detect.REFS | detect.APFS:
            return _RAW.format(raw=raw) + " Linux itself has no driver for it.\n"
    return _MOUNT.format(raw=raw, options=_OPTIONS.get(kind or "", "ro,loop"))
