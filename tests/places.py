"""A repository, mounted with a scratch: for tests of disks that can be written to."""

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mounts import process_of, unmount_all, wait_until
from repositories import add_point

from backupfs.fuse import mountpoint
from backupfs.repository.repository import Repository
from backupfs.services import background
from backupfs.services import mount as service


class Place:
    """A repository of points, where it is mounted, and the scratch."""

    def __init__(self, folder: Path, *contents: bytes) -> None:
        self.repository, self.path, self.scratch = folder / "repo", folder / "mnt", folder / "scratch"
        Repository.init(str(self.repository))
        with Repository.open(str(self.repository)) as repository:
            self.points = [add_point(repository, data).id for data in contents]
        self.path.mkdir()
        self.scratch.mkdir(mode=0o700)

    def mount(self, **how: Any) -> None:
        how = {"foreground": False, "allow_other": False, "options": [], "scratch": str(self.scratch), **how}
        service.mount(str(self.repository), str(self.path), **how)

    def file(self, number: int = 0, kind: str = "rw") -> str:
        return f"{self.path}/web01/{self.points[number]}/vda.{kind}"

    def kill(self) -> None:
        os.kill(process_of(str(self.path)), signal.SIGKILL)
        wait_until(lambda: mountpoint.is_dead(str(self.path)))

    def unmount(self) -> None:
        pid = process_of(str(self.path))
        service.unmount(str(self.path))
        with contextlib.suppress(ChildProcessError):
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def hashes(self) -> dict[str, str]:
        """Return the hash of each file of the repository, but of the index' own locks."""
        files = [p for p in self.repository.rglob("*") if p.is_file() and not p.name.startswith("lock")]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def log(self) -> str:
        return Path(background.log_path(str(self.path))).read_text()

    def clean(self) -> None:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(process_of(str(self.path)), signal.SIGKILL)
        unmount_all(str(self.path))


@contextlib.contextmanager
def a_place(folder: Path, *contents: bytes) -> Iterator[Place]:
    place = Place(folder, *contents)
    try:
        yield place
    finally:
        place.clean()
