"""What a power cut can leave of a folder: a record of every change that was made to it, and the states that follow.

A file's bytes are safe once the file was synced, a name once its folder was: no more is believed, although most file
systems keep more. What LMDB writes is not recorded: the index is derived.
"""

import contextlib
import io
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backupfs.repository import space

Op = tuple[Any, ...]
SECTOR = 512


class Raw(io.RawIOBase):
    """A file object whose writes go through os.write, where they can be seen."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        return os.write(self._fd, bytes(data))

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


@contextlib.contextmanager
def replaced(calls: dict[str, Callable[..., Any]], fallocate: Callable[..., int]) -> Iterator[None]:
    """Put functions in the places of those of `os`, and one in that of libc's fallocate, for the `with` block."""

    class Libc:
        pass

    Libc.fallocate = staticmethod(fallocate)  # type: ignore[attr-defined]
    before = {name: getattr(os, name) for name in [*calls, "fdopen"]}
    libc = space._libc
    try:
        for name, call in calls.items():
            setattr(os, name, call)
        os.fdopen = lambda fd, _mode: io.BufferedWriter(Raw(fd))  # type: ignore[assignment]
        space._libc = Libc  # type: ignore[assignment]
        yield
    finally:
        space._libc = libc
        for name, call in before.items():
            setattr(os, name, call)


class Recorder:
    """Records what is done in a folder, below `recording`; `index*` is left out.

    Attributes:
        ops: what was done, in order: a kind, then a path or the number of an opened file, then arguments.
    """

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self.ops: list[Op] = []
        self._handles: dict[int, int] = {}
        self._opened = 0

    def _inside(self, path: Any) -> str | None:
        path = os.fspath(path)
        if not isinstance(path, str) or not (path + "/").startswith(self._root):
            return None
        inside = path[len(self._root) :]
        return None if inside.startswith("index") else inside

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("open", "close", "write", "pwrite", "pwritev", "ftruncate")}
        lseek = os.lseek
        libc = space._libc

        def opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            fd: int = real["open"](path, flags, *rest, **named)
            inside = self._inside(path)
            if inside is not None:
                self._opened += 1
                self._handles[fd] = self._opened
                self.ops.append(("open", inside, self._opened))
            return fd

        def closing(fd: int) -> None:
            self._handles.pop(fd, None)
            real["close"](fd)

        def note(kind: str, fd: int, *rest: Any) -> None:
            if fd in self._handles:
                self.ops.append((kind, self._handles[fd], *rest))

        def write(fd: int, data: bytes) -> int:
            offset = lseek(fd, 0, os.SEEK_CUR)
            done: int = real["write"](fd, data)
            note("write", fd, offset, data[:done])
            return done

        def pwrite(fd: int, data: Any, offset: int) -> int:
            done: int = real["pwrite"](fd, data, offset)
            note("write", fd, offset, bytes(data)[:done])
            return done

        def pwritev(fd: int, buffers: Any, offset: int) -> int:
            done: int = real["pwritev"](fd, buffers, offset)
            note("write", fd, offset, b"".join(bytes(b) for b in buffers)[:done])
            return done

        def ftruncate(fd: int, length: int) -> None:
            real["ftruncate"](fd, length)
            note("truncate", fd, length)

        def fsync(fd: int) -> None:  # not really done: what it would guarantee is what the states are made of
            note("sync", fd)

        def fallocate(fd: int, mode: int, offset: Any, length: Any) -> int:
            done: int = libc.fallocate(fd, mode, offset, length)
            if done == 0:
                note("punch", fd, offset.value, length.value)
            return done

        def named(kind: str) -> Callable[..., None]:
            call = getattr(os, kind)

            def calling(path: Any, *rest: Any, **options: Any) -> None:
                call(path, *rest, **options)
                inside = None if options.get("dir_fd") is not None else self._inside(path)
                if inside is not None:
                    others = [self._inside(rest[0])] if kind in ("link", "rename") else []
                    self.ops.append((kind, inside, *others))

            return calling

        calls: dict[str, Callable[..., Any]] = {
            "open": opening,
            "close": closing,
            "write": write,
            "pwrite": pwrite,
            "pwritev": pwritev,
            "ftruncate": ftruncate,
            "fsync": fsync,
        }
        calls |= {kind: named(kind) for kind in ("link", "rename", "unlink", "mkdir", "rmdir")}
        with replaced(calls, fallocate):
            yield


@dataclass(eq=False)
class File:
    """Bytes that are safe, and what was done since."""

    safe: bytes = b""
    since: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    """Names that are safe, and what was done since: each with what it stands for then, None: nothing."""

    safe: dict[str, "File | Folder"] = field(default_factory=dict)
    since: list[tuple[str, "File | Folder | None"]] = field(default_factory=list)

    def now(self) -> dict[str, "File | Folder"]:
        return names_after(self.safe, self.since)


def names_after(
    safe: dict[str, File | Folder], changes: list[tuple[str, File | Folder | None]]
) -> dict[str, File | Folder]:
    names = dict(safe)
    for name, thing in changes:
        if thing is None:
            names.pop(name, None)
        else:
            names[name] = thing
    return names


def bytes_after(safe: bytes, ops: list[Op]) -> bytes:
    data = bytearray(safe)
    for kind, *rest in ops:
        if kind == "truncate":
            del data[rest[0] :]
            data.extend(bytes(rest[0] - len(data)))
        elif kind == "punch":
            offset, end = rest[0], min(rest[0] + rest[1], len(data))
            data[offset:end] = bytes(max(end - offset, 0))
        else:
            offset, written = rest
            data.extend(bytes(max(offset - len(data), 0)))
            data[offset : offset + len(written)] = written
    return bytes(data)


ALL, NOTHING, NAMES_ONLY, BYTES_ONLY, TORN, SOME = "all", "nothing", "names only", "bytes only", "torn", "some"
KINDS = (ALL, NOTHING, NAMES_ONLY, BYTES_ONLY, TORN, SOME)


class Disk:
    """The folder as of some place in the record: what is safe, and what is not yet."""

    def __init__(self) -> None:
        self._root = Folder()
        self._handles: dict[int, File | Folder] = {}
        self._last: File | None = None  # written to by the last op

    def _at(self, path: str) -> tuple[Folder, str]:
        folder = self._root
        *parents, name = path.split("/")
        for parent in parents:
            found = folder.now()[parent]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def apply(self, op: Op) -> None:
        """Do the next op of the record."""
        kind, at, *rest = op
        self._last = None
        if kind == "open":
            folder, name = self._at(at) if at else (self._root, "")
            thing = folder.now().get(name) if at else self._root
            if thing is None:
                thing = File()
                folder.since.append((name, thing))
            self._handles[rest[0]] = thing
        elif kind in ("write", "truncate", "punch"):
            thing = self._handles[at]
            assert isinstance(thing, File)
            thing.since.append((kind, *rest))
            self._last = thing
        elif kind == "sync":
            thing = self._handles[at]
            if isinstance(thing, File):
                thing.safe = bytes_after(thing.safe, thing.since)
            else:
                thing.safe = thing.now()
            thing.since = []
        else:
            folder, name = self._at(at)
            if kind == "mkdir":
                folder.since.append((name, Folder()))
                return
            thing = folder.now()[name]
            if kind in ("link", "rename"):
                target, other = self._at(rest[0])
                target.since.append((other, thing))
            if kind != "link":
                folder.since.append((name, None))

    def state(self, kind: str, rng: random.Random) -> dict[str, bytes | None]:
        """Return what a power cut may leave now, by path: a file's bytes, None for a folder.

        Args:
            kind: `all` that was done; `nothing` that was not synced; of that the `names only`, or the `bytes only`;
                all, but half of the last write (`torn`); or `some` of it, sector by sector and name by name.
        """
        found: dict[str, bytes | None] = {}
        self._collect(self._root, "", kind, rng, found, {})
        return found

    def _collect(  # noqa: PLR0917
        self,
        folder: Folder,
        path: str,
        kind: str,
        rng: random.Random,
        found: dict[str, bytes | None],
        held: dict[File, bytes],
    ) -> None:
        changes = folder.since if kind in (ALL, NAMES_ONLY, TORN) else []
        if kind == SOME:
            changes = [c for c in folder.since if rng.random() < 0.5]
        for name, thing in sorted(names_after(folder.safe, changes).items(), key=lambda entry: entry[0]):
            if isinstance(thing, Folder):
                found[path + name] = None
                self._collect(thing, f"{path}{name}/", kind, rng, found, held)
                continue
            if thing not in held:  # one with two names is one
                held[thing] = bytes_after(thing.safe, self._kept(thing, kind, rng))
            found[path + name] = held[thing]

    def _kept(self, file: File, kind: str, rng: random.Random) -> list[Op]:
        if kind in (NOTHING, NAMES_ONLY):
            return []
        ops = list(file.since)
        if kind == TORN and ops and file is self._last and ops[-1][0] == "write":
            _, offset, data = ops[-1]
            ops[-1] = "write", offset, data[: len(data) // 2]
        if kind == SOME:
            parts: list[Op] = []
            for op in ops:
                if op[0] == "write":
                    _, offset, data = op
                    steps = range(0, len(data), max(SECTOR, len(data) // 8 // SECTOR * SECTOR))
                    step = steps.step
                    parts += [("write", offset + i, data[i : i + step]) for i in steps if rng.random() < 0.5]
                elif rng.random() < 0.5:
                    parts.append(op)
            return parts
        return ops


def lay_down(state: dict[str, bytes | None], root: Path) -> None:
    """Make a folder hold a state."""
    root.mkdir()
    for name, data in state.items():  # a folder comes before what is in it
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
