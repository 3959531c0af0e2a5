"""The files of guests in the mount: DISK.files/ beside DISK.raw. From any thread."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from backupfs.fuse.catalogue import DiskFile, GuestFolder
from backupfs.image import Image
from backupfs.repository.cache import LruCache
from backupfs.services.by_hand import how
from backupfs.services.guest_files import GuestVolume, find_files
from backupfs.services.guest_process import Crew

_SUFFIX = ".raw"


class GuestFolders:
    """Makes them, and remembers which disks were found sound."""

    def __init__(self) -> None:
        self._crew = Crew()
        self._checked: LruCache[tuple[str, str, str, str], bool] = LruCache(10_000)

    def folders(self, vm: str, point: str, disks: Sequence[DiskFile]) -> list[GuestFolder]:
        """Return a folder for each of a point's disks. Nothing is read before one is looked into."""
        by_name = {disk.name.removesuffix(_SUFFIX): disk for disk in disks}
        # A volume may lie on several disks.
        versions = repr([(disk.name, disk.version) for disk in disks])
        version = hashlib.blake2b(versions.encode(), digest_size=16).hexdigest()
        return [
            GuestFolder(
                name=f"{name}.files",
                version=version,
                volumes=partial(self._volumes, vm, point, by_name, name),
                by_hand=partial(how, f"{name}.parts"),
            )
            for name in by_name
        ]

    @contextmanager
    def _volumes(
        self, vm: str, point: str, disks: Mapping[str, DiskFile], disk: str
    ) -> Iterator[Mapping[str, GuestVolume]]:
        openers = {name: self._opener(vm, point, disk) for name, disk in disks.items()}
        yield find_files(openers, disk, self._crew).volumes

    def _opener(self, vm: str, point: str, disk: DiskFile) -> Callable[[], Image]:
        key = vm, point, disk.name, disk.version

        def opened() -> Image:
            image = disk.open()
            try:
                # A parser that was fed with a wrong map would say anything: it has to be right before, not in a while.
                if disk.check is not None and not self._checked.get(key):
                    disk.check(image)
                    self._checked.put(key, True, 1)
            except BaseException:
                image.close()
                raise
            return image

        return opened
