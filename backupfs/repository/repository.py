"""A repository: made, opened, listed, written to by one process at a time. From any thread.

Who excludes whom: locks.py. Reading waits for nobody; `Repository.writer` and `exclusive` take the writer lock.
"""

import contextlib
import logging
import os
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

from backupfs.errors import Corrupt, Missing, NotFound, RepositoryError, UsageError
from backupfs.repository import catalog, codec, kept, names
from backupfs.repository.crashmark import fault_of
from backupfs.repository.files import fsync_folder, write_new
from backupfs.repository.format import DEFAULT_CHUNK, MAX_CHUNK, MIN_CHUNK, VERSION
from backupfs.repository.index import Index, StaleIndex
from backupfs.repository.locks import Pin, index_lock, writer_lock
from backupfs.repository.manifest import DiskEntry, Manifest, Settings, decode_manifest, decode_settings, seal, seal_of
from backupfs.repository.point import CHUNK_CACHE, Chain, LayerStore, PointImage, layer_path
from backupfs.repository.writer import ChainEnd, PointWriter

log = logging.getLogger(__name__)

SETTINGS = "backupfs.json"
_RESERVE = 64 << 20  # bytes that have to be free before a writer begins: the index must still fit after the layers

# Points that can't be indexed, (vm, id), and why.
LeftOut = dict[tuple[str, str], Exception]


class Repository:
    """An open repository."""

    def __init__(self, path: str, settings: Settings, chunk_cache: int = CHUNK_CACHE) -> None:
        self.path = path
        self.settings = settings
        self._chunk_cache = chunk_cache
        codec.by_name(settings.codec)  # an unknown one is refused here, not at the first read
        self._lock = threading.RLock()
        self._index: Index | None = None
        self._store: LayerStore | None = None
        self._left_out: LeftOut = {}
        try:
            # As long as this is open its file system can't be unmounted.
            self._folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise RepositoryError(f"{path}: {e.strerror}") from e

    @staticmethod
    def init(path: str, *, chunk_size: int = DEFAULT_CHUNK, codec_name: str = "zstd") -> None:
        """Make an empty repository in a new or empty folder.

        Raises:
            UsageError: the folder is not empty, or a setting makes no sense.
            RepositoryError: it can't be written.
        """
        codec.by_name(codec_name)
        _check_path(path)
        if chunk_size & (chunk_size - 1) or not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
            raise UsageError(f"a chunk of {chunk_size} bytes: it has to be a power of two from 4 KiB to 1 MiB")
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            if not _is_empty(path):
                raise UsageError(f"{path} is not empty: a repository begins in an empty folder")
            os.chmod(path, 0o700)
            for folder in ("vms", "tmp"):
                os.mkdir(os.path.join(path, folder), 0o700)
            write_new(os.path.join(path, "lock"), b"")
            settings = Settings(
                format=VERSION,
                id=secrets.token_hex(16),
                chunk_size=chunk_size,
                codec=codec_name,
                created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            )
            temporary = os.path.join(path, "tmp", SETTINGS)
            write_new(temporary, seal(settings))
            os.rename(temporary, os.path.join(path, SETTINGS))  # last: there is a whole repository or none
            fsync_folder(path)
            fsync_folder(os.path.dirname(os.path.abspath(path)))
        except OSError as e:
            raise RepositoryError(f"{e.filename or path}: {e.strerror}") from e

    @classmethod
    def open(cls, path: str, *, chunk_cache: int = CHUNK_CACHE) -> "Repository":
        """Open a repository for reading, and for writing through `writer`.

        Args:
            path: its folder.
            chunk_cache: bytes of decoded chunks to keep, for those who read in small parts.

        Raises:
            UsageError: its path is not UTF-8.
            NotFound: there is none.
            UnsupportedFormat, Corrupt: as they say.
        """
        path = _check_path(os.path.abspath(path))
        data = catalog.read_file(os.path.join(path, SETTINGS), f"{path} is not a repository: it has no {SETTINGS}")
        return cls(path, decode_settings(data, os.path.join(path, SETTINGS)), chunk_cache)

    def close(self) -> None:
        """Give everything back. Images of it are not to be read afterwards."""
        with self._lock:
            self._close_index()
            if self._folder >= 0:
                os.close(self._folder)
            self._folder = -1

    def _close_index(self) -> None:
        if self._store:
            self._store.close()
        if self._index:
            self._index.close()
        self._store = self._index = None

    def __enter__(self) -> "Repository":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def vms(self) -> list[str]:
        """Return the VMs that have points, in order of name.

        Raises:
            RepositoryError: the repository is not where it was.
            Corrupt: the folder that they are in is missing.
        """
        self._check_place()
        return [vm for vm in catalog.vms(self.path) if catalog.points(self.path, vm)]

    def points(self, vm: str) -> list[str]:
        """Return the ids of a VM's points, oldest first; none for a VM that is not there.

        Raises:
            RepositoryError: the repository is not where it was.
        """
        self._check_place()
        return catalog.points(self.path, vm)

    def _check_place(self) -> None:
        """An empty folder in its place must not be taken for a repository without points: rsync empties a mirror."""
        if self._folder < 0:
            return  # closed, and used again: nothing says where it was
        try:
            is_same = os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError as e:
            raise RepositoryError(f"{self.path}: {e.strerror}; it was there when this began") from e
        if not is_same:
            raise RepositoryError(f"{self.path} is another folder than when this began")

    def resolve(self, vm: str, point: str) -> str:
        """Return the id that `point` stands for: itself, or the newest one for `latest`.

        Raises:
            NotFound: there is no such point.
        """
        points = self.points(vm)
        if not points:
            raise NotFound(f"no points of VM {vm!r} in {self.path}; `backupfs points` lists what there is")
        if point == "latest":
            return points[-1]
        if point not in points:
            raise NotFound(f"VM {vm!r} has no point {point!r}; `backupfs points` lists what there is")
        return point

    def manifest_json(self, vm: str, point: str) -> bytes:
        """Return a manifest's bytes, unchecked. Raises NotFound."""
        if names.point_key(point) is None:
            raise NotFound(f"{point!r} is not a point's id")
        path = catalog.manifest_path(self.path, vm, point)
        return catalog.read_file(path, f"VM {vm!r} has no point {point!r} in {self.path}")

    def manifest(self, vm: str, point: str) -> Manifest:
        """Return a point's checked manifest. Raises NotFound, Corrupt, UnsupportedFormat."""
        path = catalog.manifest_path(self.path, vm, point)
        found = decode_manifest(self.manifest_json(vm, point), path)
        if (found.repository, found.vm, found.id) != (self.settings.id, vm, point):
            raise Corrupt(path, 0, "this is the manifest of another point")
        return found

    def chain_end(self, vm: str, disk: str, chain: str) -> tuple[str, DiskEntry] | None:
        """Return the last point of the newest generation of the chain that the user calls `chain`, and its entry."""
        best: tuple[tuple[int, int], str, DiskEntry] | None = None
        for point in self.points(vm):
            try:
                entry = self.manifest(vm, point).disk(disk)
            except Corrupt as e:
                log.warning("%s", e)  # if it was the chain's end, its layer shows that, and no bitmap is trusted
                continue
            if entry is None:
                continue
            name, generation = names.chain_of(entry.chain)
            if name == chain and (best is None or (generation, entry.seq) > best[0]):
                best = (generation, entry.seq), point, entry
        return best[1:] if best else None

    def open_image(self, vm: str, point: str, disk: str) -> PointImage:
        """Return a disk at a point as an Image.

        Raises:
            NotFound: no such point or disk.
            Corrupt: the manifest, the index or the chain's base is damaged, or the layer is missing.
        """
        entry = self._entry(vm, point, disk)
        try:
            image = self._image(vm, point, entry)
        except Missing:
            self._check_there(vm, point, entry)  # else it was deleted meanwhile, and gc was there
            raise
        # It pins what it sees only now. If the point was taken away before that, gc may be at work.
        self._check_there(vm, point, entry)
        return image

    def _check_there(self, vm: str, point: str, entry: DiskEntry) -> None:
        """Raise NotFound unless the point is there, and still the one that `entry` is of."""
        if self._entry(vm, point, entry.name).layer_id != entry.layer_id:
            raise NotFound(f"point {vm}/{point} was deleted, and another made under its id")

    def _entry(self, vm: str, point: str, disk: str) -> DiskEntry:
        entry = self.manifest(vm, point).disk(disk)
        if entry is None:
            raise NotFound(f"point {vm}/{point} has no disk {disk!r}")
        return entry

    def _image(self, vm: str, point: str, entry: DiskEntry) -> PointImage:
        pin = Pin(layer_path(self.path, vm, entry.name, entry.chain, entry.seq))
        with self._lock:
            store = self.store
            chain_no = self._chain_no(vm, entry)
            if chain_no is None:
                # The point is newer than the index that was caught up with at its opening.
                with contextlib.suppress(StaleIndex):
                    error = self._catch_up(store.index, [(vm, point)]).get((vm, point))
                    if error is not None:
                        raise self._unreadable({(vm, point): error}) from error
                chain_no = self._chain_no(vm, entry)
                if chain_no is None:
                    raise Corrupt(store.index.folder, 0, f"point {vm}/{point} can't be indexed; run backupfs reindex")
        return PointImage(store, Chain(self.path, vm, entry.name, entry.chain, chain_no), entry, pin)

    def _chain_no(self, vm: str, entry: DiskEntry) -> int | None:
        """Return the chain's number if the entry's layer is indexed."""
        index = self.store.index
        chain_no = index.chain_no(vm, entry.name, entry.chain)
        if chain_no is None or index.layer_id(chain_no, entry.seq) != bytes.fromhex(entry.layer_id):
            return None
        return chain_no

    def _unreadable(self, left_out: LeftOut) -> RepositoryError:
        """Return what to tell of points that can't be indexed: another index would not have them either."""
        (vm, point), error = next(iter(left_out.items()))
        path, offset, what = catalog.manifest_path(self.path, vm, point), 0, str(error)
        if isinstance(error, Corrupt):
            path, offset, what = error.file, error.offset, error.what
        named = ", ".join(f"{vm}/{point}" for vm, point in left_out)
        return Corrupt(path, offset, f"{what}; it keeps {named} out of the index; run backupfs verify --repair")

    @property
    def store(self) -> LayerStore:
        """The layers and the index, opened and caught up with at first use."""
        with self._lock:
            if self._store is None:
                self._index = self._open_index()
                self._store = LayerStore(
                    self._index, bytes.fromhex(self.settings.id), self.settings.chunk_size, self._chunk_cache
                )
            return self._store

    def _open_index(self) -> Index:
        folder = catalog.index_folder(self.path, self.settings.id)
        with index_lock(folder):
            return self._open_or_build(folder)

    def _open_or_build(self, folder: str) -> Index:
        try:
            fault = fault_of(folder)
            if fault:
                raise StaleIndex(f"a process that had it open died ({fault})")
            index = Index(folder, self.settings.id)
            try:
                self._left_out = self._catch_up(index)
            except BaseException:
                index.close()
                raise
            if not self._left_out:
                kept.drop(folder)
        except (StaleIndex, Corrupt) as e:
            if isinstance(e, Corrupt) and not e.file.startswith(folder):
                raise
            log.warning("%s: building the index again", e)
            return self._build_index(folder)
        return index

    def _build_index(self, folder: str) -> Index:
        """Build the index from nothing, beside the old one, and put it in its place. Under the index's lock.

        The old one is kept while it has what --repair may need: see kept.py.
        """
        fresh = f"{folder}.new"
        _remove_built(fresh)  # by one that was killed
        try:
            index = Index(fresh, self.settings.id, durable=False)
            try:
                self._left_out = self._catch_up(index)
                index.sync()
                # A mount that has the old one open goes on with it: it is complete for what it shows.
                kept.keep(folder, self.settings.id, index, self._whose_manifests_are_good(self._left_out))
            finally:
                index.close()
            if os.path.lexists(folder):
                os.rename(folder, fresh + ".old")
            os.rename(fresh, folder)
            if not self._left_out:
                kept.drop(folder)
        except OSError as e:
            raise RepositoryError(f"{folder}: the index can't be built: {e.strerror}") from e
        finally:
            _remove_built(fresh)
        return Index(folder, self.settings.id)

    def _whose_manifests_are_good(self, points: Iterable[tuple[str, str]]) -> list[Manifest]:
        found = []
        for vm, point in points:
            with contextlib.suppress(RepositoryError):
                found.append(self.manifest(vm, point))
        return found

    def reindex(self) -> int:
        """Build the index again from manifests and layers. Returns the number of points in it.

        Raises:
            Locked: a backup is running.
        """
        with writer_lock(self.path, None):
            return self._reindex()

    def check_indexed(self) -> None:
        """Raise Corrupt if points could not be indexed when the index was opened or built."""
        _ = self.store
        if self._left_out:
            raise self._unreadable(self._left_out)

    @contextlib.contextmanager
    def indexes(self) -> Iterator[list[Index]]:
        """Yield the index, and those that were kept for what it may not have. Raises RepositoryError."""
        with contextlib.ExitStack() as stack:
            index = self.store.index
            with index_lock(index.folder):
                others = stack.enter_context(kept.opened(index.folder, self.settings.id))
            yield [index, *others]

    def _reindex(self) -> int:
        with self._lock:
            self._close_index()
            folder = catalog.index_folder(self.path, self.settings.id)
            with index_lock(folder):
                self._index = self._build_index(folder)
            self._store = LayerStore(
                self._index, bytes.fromhex(self.settings.id), self.settings.chunk_size, self._chunk_cache
            )
            return len(self._index.points())

    def _catch_up(self, index: Index, extra: list[tuple[str, str]] | None = None) -> LeftOut:
        """Index what was published since; forget what was taken away.

        A point that can't be indexed, damaged for one, is logged and left out: the others must stay readable.
        """
        left_out: LeftOut = {}
        indexed = index.points()
        present = {(vm, point) for vm in catalog.vms(self.path) for point in catalog.points(self.path, vm)}
        wanted = sorted(present - indexed.keys(), key=lambda p: names.point_key(p[1]) or ("", 0))
        for vm, point in [*wanted, *(extra or [])]:
            try:
                manifest = self.manifest(vm, point)
                layers = catalog.layers_to_index(self.path, index, manifest)
                index.add(vm, point, seal_of(self.manifest_json(vm, point)), layers)
            except (RepositoryError, ValueError, struct.error) as e:
                if isinstance(e, Corrupt) and e.file.startswith(index.folder):
                    raise
                if os.path.lexists(catalog.manifest_path(self.path, vm, point)):  # else it was deleted meanwhile
                    log.error("point %s/%s can't be indexed: %s", vm, point, e)
                    left_out[vm, point] = e
        gone = indexed.keys() - present
        if gone:
            try:
                index.forget(gone)
            except Corrupt:
                raise
            except RepositoryError as e:
                log.warning("deleted points stay in the index for now: %s", e)  # a full disk; it does no harm
        return left_out

    @contextlib.contextmanager
    def writer(self, waiting: Callable[[str], None] | None = None) -> Iterator["Writer"]:
        """Take the writer lock for the `with` block, and remove what dead writers left.

        Args:
            waiting: called with a message when another process has it, before waiting for that; None: do not wait.

        Raises:
            Locked: another process has it, and it is not waited for.
            RepositoryError: there is hardly any space left.
        """
        with self.exclusive(waiting):
            try:
                space = os.statvfs(self.path)
            except OSError as e:
                raise RepositoryError(f"{self.path}: {e.strerror}") from e
            if space.f_bavail * space.f_frsize < _RESERVE:
                raise RepositoryError(f"{self.path}: no space left on the file system (less than 64 MiB free)")
            _ = self.store
            yield Writer(self)

    @contextlib.contextmanager
    def exclusive(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Take the writer lock for the `with` block, and remove what dead writers left; needs no free space.

        Args:
            waiting: as for `writer`.

        Raises:
            Locked: another process has it, and it is not waited for.
        """
        with writer_lock(self.path, waiting):
            try:
                tmp = os.path.join(self.path, "tmp")
                os.makedirs(tmp, mode=0o700, exist_ok=True)
                for name in os.listdir(tmp):
                    os.unlink(os.path.join(tmp, name))
            except OSError as e:
                raise RepositoryError(f"{e.filename or self.path}: {e.strerror}") from e
            yield

    def remove_points(self, points: Iterable[tuple[str, str]]) -> None:
        """Take points, (vm, id), away; inside `exclusive`. When it returns that is on the disk. Moves no data.

        Raises:
            RepositoryError: one can't be removed, or may come back after a power cut; others may be gone.
        """
        folders = set()
        try:
            for vm, point in points:
                path = catalog.manifest_path(self.path, vm, point)
                folders.add(os.path.dirname(path))
                os.unlink(path)
        except OSError as e:
            raise RepositoryError(f"{e.filename}: can't be removed: {e.strerror}") from e
        finally:
            for folder in folders:
                try:
                    fsync_folder(folder)
                except OSError as e:
                    raise RepositoryError(
                        f"{folder}: {e.strerror}; points that were removed may come back after a power cut"
                    ) from e


def _is_empty(path: str) -> bool:
    """Whether nothing is in a folder but what mkfs.ext4 puts there, with nothing in it that we could see."""
    found = os.listdir(path)
    if found != ["lost+found"]:
        return not found
    inside = os.path.join(path, *found)
    try:
        return os.path.isdir(inside) and not os.path.islink(inside) and not os.listdir(inside)
    except PermissionError:  # it is root's
        return True


def _check_path(path: str) -> str:
    """Return the path of a repository if it may be there: LMDB takes UTF-8 only. Raises UsageError."""
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{path!r}: the path of a repository has to be UTF-8") from e
    return path


def _remove_built(fresh: str) -> None:
    """Remove what was not put in the index's place, and what was there before. What stays the next one removes."""
    for rest in (fresh, f"{fresh}.old"):
        with contextlib.suppress(OSError):  # rmtree does not ignore every error
            shutil.rmtree(rest, ignore_errors=True)


class Writer:
    """The right to write, while `Repository.writer` holds the lock."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def chain_ends(self, vm: str, disks: Iterable[str], chain: str) -> dict[str, ChainEnd | None]:
        """Return, by disk, the last point of the newest generation of the chain that the user calls `chain`, or None.

        Raises:
            Corrupt: a manifest or a chain's base is damaged.
        """
        disks = list(disks)
        try:
            return {disk: self._chain_end(vm, disk, chain) for disk in disks}
        except Corrupt as e:
            # What is compared with a wrong map would make a wrong point, for ever. But where a layer is damaged another
            # index helps nobody, and the old one may be all that is left of another layer's rows: see rebuild.py.
            if not e.file.startswith(catalog.index_folder(self._repository.path, self._repository.settings.id)):
                raise
            log.warning("%s: building the index again", e)
            self._repository._reindex()
            return {disk: self._chain_end(vm, disk, chain) for disk in disks}

    def _chain_end(self, vm: str, disk: str, chain: str) -> ChainEnd | None:
        repository = self._repository
        found = repository.chain_end(vm, disk, chain)
        if found is None:
            return None
        point, entry = found
        image = repository._image(vm, point, entry)
        image.check_map()
        index = repository.store.index
        return ChainEnd(point, entry, image, index.last_seq(index.chain_no(vm, disk, entry.chain) or 0))

    def last_format(self, vm: str, disk: str) -> str | None:
        """Return the image format of the newest point of a disk that was taken from a file, or None."""
        for point in reversed(self._repository.points(vm)):
            try:
                entry = self._repository.manifest(vm, point).disk(disk)
            except Corrupt:
                continue
            if entry and entry.source_format not in (None, "nbd"):
                return entry.source_format
        return None

    def next_chain(self, vm: str, disk: str, chain: str) -> str:
        """Return the full name of a new generation of `chain`."""
        generations = [names.chain_of(c) for c in catalog.chains(self._repository.path, vm, disk)]
        return names.chain_named(chain, max((g for name, g in generations if name == chain), default=0) + 1)

    def begin(self, vm: str, moment: datetime, codec_name: str | None = None) -> PointWriter:
        """Begin a point. `codec_name`: for its chunks; None: the repository's."""
        settings = self._repository.settings
        return PointWriter(self._repository.path, settings, vm, moment, codec_name or settings.codec)

    def commit(self, point: PointWriter, *, parent: str | None, tags: list[str] | None = None) -> Manifest:
        """Publish the point, then index it. When only the index fails, the point is there all the same: the next
        open catches up.

        Raises:
            RepositoryError: it could not be published.
        """
        manifest, data = point.publish(parent=parent, tags=tags)
        repository = self._repository
        index = repository.store.index
        try:
            layers = catalog.layers_to_index(repository.path, index, manifest)
            index.add(manifest.vm, manifest.id, seal_of(data), layers)
        except StaleIndex as e:
            log.info("%s: building the index again", e)
            repository._reindex()
        except RepositoryError as e:
            log.warning("the point is published, but not indexed yet: %s", e)
        return manifest
