"""Read what a guest wrote: never outside of the disk, never more than was asked for."""

from backupfs.image import Image


def read(image: Image, offset: int, length: int) -> bytes | None:
    """Return `length` bytes at `offset`, or None when they are not all inside the disk.

    Raises:
        BackupfsError: they can't be read.
    """
    if offset < 0 or length < 0 or offset + length > image.size:
        return None
    buffer = bytearray(length)
    image.readinto(offset, buffer)
    return bytes(buffer)
