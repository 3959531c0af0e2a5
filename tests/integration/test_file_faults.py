"""Every file operation of whatever changes a repository fails in turn, or writes less than it was given: a
BackupfsError or success, nothing published is harmed, and the next command works.
"""

import errno
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from powercut import replaced
from repositories import add_point, read_point

from backupfs.errors import BackupfsError
from backupfs.repository import space
from backupfs.repository.repository import Repository
from backupfs.services.edit import edit
from backupfs.services.gc import gc
from backupfs.services.prune import delete, prune
from backupfs.services.retention import KeepRules

LONG = bool(os.environ.get("BACKUPFS_LONG"))
CHUNK = 4096
VM = "web01"
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
WRITES = ("write", "pwrite", "pwritev")
GROWS = (*WRITES, "link", "mkdir", "open", "rename", "ftruncate")
CALLS = (*GROWS, "fsync", "fchmod", "unlink", "rmdir", "listdir", "stat", "fstat", "lseek", "pread", "statvfs")
EDITS = ("", [], False), ("new", ["t"], True)  # what a point's note, tags and pin are before and after one
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "full from then on": errno.ENOSPC, "short": 0}


class Faulty:
    """Lets the `nth` call from now on go wrong; `met` says whether it came to that."""

    def __init__(self, fault: str, nth: int) -> None:
        self._fault, self._left = fault, nth
        self.met = False

    def _due(self, name: str) -> bool:
        if name not in {"ENOSPC": GROWS, "full from then on": WRITES, "short": WRITES}.get(self._fault, CALLS):
            return False
        self._left -= 1
        due = self._left == -1 or (self._left < 0 and self._fault == "full from then on")
        self.met |= due
        return due

    def _wrong(self, name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def calling(*arguments: Any, **named: Any) -> Any:
            if not self._due(name):
                return call(*arguments, **named)
            if self._fault != "short":
                code = FAULTS[self._fault]
                raise OSError(code, os.strerror(code), *[a for a in arguments[:1] if isinstance(a, str)])
            target, data, *rest = arguments
            if name == "pwritev":
                data = [b"".join(bytes(b) for b in data)]
                return call(target, [data[0][: max(len(data[0]) // 2, 1)]], *rest)
            return call(target, data[: max(len(data) // 2, 1)], *rest)

        return calling

    def strike(self, command: Callable[[], None]) -> None:
        libc = space._libc

        def fallocate(*arguments: Any) -> int:
            if self._due("fallocate" if self._fault != "EIO" else "lseek"):
                return -1
            done: int = libc.fallocate(*arguments)
            return done

        with replaced({name: self._wrong(name) for name in CALLS}, fallocate):
            command()


@pytest.fixture(scope="module", params=["zstd", "none"])
def built(request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A repository of five points, one of them deleted, so that gc has layers and holes to do."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        path = Path(name) / "repo"
        Repository.init(str(path), chunk_size=CHUNK, codec_name=request.param)
        rng = random.Random(1)
        disk = bytearray(rng.randbytes(30 * CHUNK + 5))
        points = {}
        with Repository.open(str(path)) as repository:
            for _ in range(6):
                points[add_point(repository, bytes(disk)).id] = bytes(disk)
                for _ in range(4):
                    offset = rng.randrange(len(disk) - 9000)
                    disk[offset : offset + 8000] = rng.choice([rng.randbytes(8000), bytes(8000), b"abcdefgh" * 1000])
            gone = [sorted(points)[2], sorted(points)[5]]
            delete(repository, [(VM, point) for point in gone])
        yield path, {point: data for point, data in points.items() if point not in gone}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", ["first backup", "backup", "delete", "prune", "edit", "gc", "reindex"])
def test_every_file_operation_fails_in_turn(built: tuple[Path, dict[str, bytes]], what: str, fault: str) -> None:
    source, before = built
    place = source.parent / "struck"
    doomed = sorted(before)[1:3] if what == "delete" else sorted(before)[:2]
    new = random.Random(2).randbytes(28 * CHUNK + 99)
    refused, raw = 0, list[str]()
    for nth in range(10_000):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)

        def command() -> None:
            with Repository.open(str(place)) as repository:
                if what == "first backup":
                    add_point(repository, new, vm="other", step=8 * CHUNK)
                elif what == "backup":
                    add_point(repository, new, day=3, step=8 * CHUNK)
                elif what == "delete":
                    delete(repository, [(VM, point) for point in doomed])
                elif what == "prune":
                    prune(repository, VM, KeepRules(last=2), dry_run=False)
                elif what == "edit":
                    edit(repository, VM, doomed[0], note="new", add=["t"], remove=[], pinned=True, waiting=None)
                elif what == "reindex":
                    repository.reindex()
                else:
                    gc(repository)

        faulty, worked = Faulty(fault, nth), True
        try:
            faulty.strike(command)
        except BackupfsError:
            refused += 1
            worked = False
        except Exception as e:  # noqa: BLE001 - all of them are shown at the end
            last = traceback.extract_tb(e.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in last if "/backupfs/" in f.filename]
            raw.append(f"call {nth}: {e!r} at {ours[-3:]}")
            worked = False
        with Repository.open(str(place)) as repository:
            there = set(repository.points(VM))
            if what == "backup":
                assert there - set(before) <= {repository.points(VM)[-1]}
                assert there >= set(before)
                assert not worked or len(there) == len(before) + 1
            elif what in ("delete", "prune"):
                assert set(before) - set(doomed) <= there <= set(before)
                # A point whose manifest can't be read prune leaves where it is.
                assert not worked or there == set(before) - set(doomed) or (what, fault) == ("prune", "EIO")
            else:
                assert there == set(before)
            if what == "edit":
                edited = repository.manifest(VM, doomed[0])
                assert (edited.note, edited.tags, edited.pinned) in ((("new", ["t"], True),) if worked else EDITS)
            for point in there:
                assert read_point(repository, point) == before.get(point, new), f"{what}, {fault}, call {nth}"
            others = repository.points("other")
            assert len(others) == 1 if worked and what == "first backup" else len(others) <= 1
            for point in others:
                assert read_point(repository, point, vm="other") == new
            if nth % 5 == 0 or LONG:
                after = new[: 20 * CHUNK] + b"next" * CHUNK
                point = add_point(repository, after, day=5).id
                gc(repository)
                for held in there:
                    assert read_point(repository, held) == before.get(held, new), f"{what}, {fault}, call {nth}"
                assert read_point(repository, point) == after
                assert not list((place / "tmp").iterdir())
        if not faulty.met:
            break
    assert not raw
    assert nth > 3 or what not in ("first backup", "backup")
    assert refused or fault != "EIO"
