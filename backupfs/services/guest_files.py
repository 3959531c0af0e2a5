"""The files that a guest has on a disk of a point: which volumes there are, what is on each, and its file system."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from backupfs.errors import BackupfsError, GuestError
from backupfs.filesystem import Run
from backupfs.guest.detect import Found, detect
from backupfs.guest.scan import scan
from backupfs.guest.volumes import JoinedImage, Volume, assemble
from backupfs.image import Image, SliceImage, ZeroImage
from backupfs.repository.repository import Repository
from backupfs.services.guest_process import Crew, GuestFileSystem


class GuestVolume:
    """A partition, a logical volume or a whole disk.

    Attributes:
        name: as in DISK.parts: `1`, `vg0-root`; 0 for a disk without partitions.
        size: bytes.
        disks: names of those that it lies on.
        kind: of what is on it, for people; None: nothing that is known.
        problem: why its files can't be read; None: they can.
        unreadable: the disk below is to blame for that: what is on it nobody knows.
    """

    def __init__(self, volume: Volume, images: Callable[[], dict[str, Image]], crew: Crew) -> None:
        self.name = volume.name
        self.size = volume.size
        self.disks = volume.disks
        self._volume = volume
        self._images = images
        self._crew = crew
        self.unreadable = False
        self._found = self._look()
        self.kind = self._found.kind or None
        self.problem = self._found.problem

    def _look(self) -> Found:
        try:
            with _closing(self._open_image()) as volume:
                return detect(volume)
        except BackupfsError as e:
            self.unreadable = True
            return Found(None, "", f"it can't be read: {e}")

    def _open_image(self) -> Image:
        images = self._images()
        try:
            return assemble(self._volume, images)
        except BaseException:
            for image in images.values():
                image.close()
            raise

    def open(self) -> GuestFileSystem:
        """Return its file system; to be closed.

        Raises:
            GuestError: it can't be read, as said in `problem` or more.
        """
        if self._found.family is None:
            raise GuestError(f"{self.name}: {self.problem}")
        return GuestFileSystem(self.name, self._open_image(), self._found.family, self._found.kind, self._crew)

    def file(self, runs: Sequence[Run]) -> Image:
        """Return a file's content, as the volume has it.

        Raises:
            ValueError: there is no such run on the volume.
            BackupfsError: the volume can't be read.
        """
        volume = self._open_image()
        try:
            # All are closed with the first that lies on the volume.
            parts = [ZeroImage(r.length) if r.offset is None else SliceImage(volume, r.offset, r.length) for r in runs]
            return JoinedImage([*parts, SliceImage(volume, 0, 0)])  # the last: something has to close the volume
        except BaseException:
            volume.close()
            raise


class GuestFiles:
    """What is on a disk.

    Attributes:
        volumes: by name, in order.
        problems: what can't be shown, and why, a line each.
        complete: whether all could be read that had to be looked at. If not, there may be more volumes.
    """

    def __init__(self, volumes: Mapping[str, GuestVolume], problems: tuple[str, ...], *, complete: bool) -> None:
        self.volumes = volumes
        self.problems = problems
        self.complete = complete


def find_files(disks: Mapping[str, Callable[[], Image]], disk: str, crew: Crew) -> GuestFiles:
    """Return what is on a disk.

    Args:
        disks: opens each of the point's disks, by name: a volume may lie on several.
        crew: bounds the processes that read file systems.

    Raises:
        BackupfsError: the disk can't be read.
    """
    with ExitStack() as stack:
        images: dict[str, Image] = {}
        opened_all = True
        for name, opener in disks.items():
            try:
                images[name] = stack.enter_context(_closing(opener()))
            except BackupfsError:
                if name == disk:
                    raise
                opened_all = False  # a volume may lie on it, too
        division = scan(images)[disk]
    volumes = {}
    for volume in division.volumes:

        def open_disks(volume: Volume = volume) -> dict[str, Image]:
            return {needed: disks[needed]() for needed in volume.disks}

        volumes[volume.name] = GuestVolume(volume, open_disks, crew)
    return GuestFiles(volumes, division.problems, complete=division.complete and opened_all)


@contextmanager
def _closing(image: Image) -> Iterator[Image]:
    try:
        yield image
    finally:
        image.close()


@contextmanager
def open_point(repository: Repository, vm: str, point: str, disk: str) -> Iterator[GuestFiles]:
    """Give what is on a disk of a point.

    Raises:
        NotFound: there is no such point or disk.
        Corrupt: it is damaged.
    """
    names = [entry.name for entry in repository.manifest(vm, point).disks]
    if disk not in names:
        repository.open_image(vm, point, disk).close()  # says what there is not

    checked: set[str] = set()

    def opener(name: str) -> Callable[[], Image]:
        def opened() -> Image:
            image = repository.open_image(vm, point, name)
            try:
                if name not in checked:
                    image.check_map()
                    checked.add(name)
            except BaseException:
                image.close()
                raise
            return image

        return opened

    yield find_files({name: opener(name) for name in names}, disk, Crew())
