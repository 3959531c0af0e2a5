"""Is it still good? Read what points see, in the order of the layer files, and check it against all that is known.

Checked are manifests (their seals), each layer's length, header, table and trailer (against the manifest's BLAKE3),
what the tables give for each point (against the manifest's digest), the index (against the tables), and of each stored
chunk that a point sees BLAKE3 and xxh3. Each thing once, however many points there are. Other threads read, decode and
hash. gc may work meanwhile: what is being looked at is pinned.
"""

import contextlib
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import blake3
import numpy as np

from backupfs.errors import Corrupt, Missing, NotFound, RepositoryError, UnsupportedFormat
from backupfs.repository import catalog
from backupfs.repository.format import HEADER_SIZE
from backupfs.repository.index import Index
from backupfs.repository.indexcheck import index_fault
from backupfs.repository.layer import Layer
from backupfs.repository.locks import Pin
from backupfs.repository.manifest import DiskEntry, Manifest
from backupfs.repository.payloads import Scratch
from backupfs.repository.plain import stray_data
from backupfs.repository.point import Chain, layer_path
from backupfs.repository.repository import Repository
from backupfs.repository.scrub import damaged_chunks
from backupfs.repository.visible import Lineage, Pass, Visible, lineages
from backupfs.services.damage import BadRows, Damage, Report
from backupfs.units import MiB

_SPAN = 8 * MiB  # of chunks, that a thread takes at a time
_WORKERS = min(4, os.cpu_count() or 1) + 1  # one of them waits for the disk
_QUEUE = 2 * _WORKERS
_HASHED = 4 * MiB
_TRIES = 20  # of comparing the index with layers that gc is writing again meanwhile

# (vm/disk, bytes of its layers dealt with, of how many, bytes read): called from the calling thread, often.
Progress = Callable[[str, int, int, int], None]


def verify(repository: Repository, vm: str | None, point: str | None, sample: float, progress: Progress) -> Report:
    """Check all that points need.

    Args:
        vm, point: only these; None: all.
        sample: the share of chunks to read, as a fraction; what is not read in chunks is checked all the same.

    Raises:
        NotFound: there is no such VM or point.
        RepositoryError: something can't be opened, for want of rights for one. That is no damage.
    """
    began = time.monotonic()
    report = Report(sample)
    for name in repository.vms() if vm is None else [vm]:
        if vm is not None:
            repository.resolve(vm, point or "latest")
        manifests = _manifests(repository, name, point, report)
        wanted = [m for m in manifests if point in (None, m.id)]
        report.points += len(wanted)
        for disk, chain in sorted({(d.name, d.chain) for m in wanted for d in m.disks}):
            _Chain(
                repository,
                vm=name,
                disk=disk,
                chain=chain,
                wanted=wanted,
                known=manifests,
                report=report,
                progress=progress,
            ).check()
    report.seconds = round(time.monotonic() - began, 3)
    return report


def check_sources(sources: Sequence[tuple[str | None, str]]) -> None:
    """Open and close what a repair may take bytes from. Raises SourceError, UsageError."""
    from backupfs.sources import open_source  # noqa: PLC0415, libnbd is not needed to verify

    for _, spec in sources:
        open_source(spec).close()


def check_disks(repository: Repository, vm: str | None, disks: Sequence[str]) -> None:
    """Raise NotFound if one of the disks is none of the VM's; None: of any VM's."""
    known = {
        disk for name in (repository.vms() if vm is None else [vm]) for disk in catalog.disks(repository.path, name)
    }
    for disk in disks:
        if known and disk not in known:
            raise NotFound(f"--from {disk}=…: there is no such disk; there are {', '.join(sorted(known))}")


def _manifests(repository: Repository, vm: str, point: str | None, report: Report) -> list[Manifest]:
    """Return the VM's good manifests, and report those that are not, of the points that are asked for."""
    found = []
    for name in repository.points(vm):
        try:
            found.append(repository.manifest(vm, name))
        except NotFound:
            continue  # deleted meanwhile
        except (Corrupt, UnsupportedFormat) as e:
            if point in (None, name):
                report.points += 1
                path = catalog.manifest_path(repository.path, vm, name)
                report.damage.append(Damage(kind="manifest", vm=vm, points=[name], file=path, what=_what(e)))
    return found


def _what(error: RepositoryError) -> str:
    return error.what if isinstance(error, Corrupt) else str(error)


class _Chain:
    """One chain of a disk.

    Args:
        wanted: the points that are asked for.
        known: all points of the VM.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        vm: str,
        disk: str,
        chain: str,
        wanted: list[Manifest],
        known: list[Manifest],
        report: Report,
        progress: Progress,
    ) -> None:
        self._repository = repository
        self._address = Chain(repository.path, vm, disk, chain, -1)
        self._chunk_size = repository.settings.chunk_size
        self._report = report
        self._progress = progress
        self._read = 0
        self._known = {m.id: d for m in known for d in m.disks if d.name == disk}
        self._pins: list[Pin] = []
        self._entries: dict[int, tuple[str, DiskEntry]] = {}
        for m in wanted:
            entry = m.disk(disk)
            if entry and entry.chain == chain and self._pin(m.id, entry):
                self._entries[entry.seq] = m.id, entry

    def _pin(self, point: str, entry: DiskEntry) -> bool:
        """Keep gc from what the point sees; say whether the point is still there."""
        chain = self._address
        with contextlib.suppress(RepositoryError):  # a layer that is missing is reported later, if the point is there
            self._pins.append(Pin(layer_path(chain.root, chain.vm, chain.disk, chain.name, entry.seq)))
        return os.path.lexists(catalog.manifest_path(chain.root, chain.vm, point))

    def check(self) -> None:
        """Check all lineages of the chain."""
        broken: list[tuple[str, int, RepositoryError]] = []
        repository_id = bytes.fromhex(self._repository.settings.id)
        for lineage in lineages(
            self._address, repository_id, self._entries, self._known, lambda *facts: broken.append(facts)
        ):
            hurt = self._tell(lineage, "layer", broken)
            broken.clear()
            self._check_files(lineage, lambda *facts: broken.append(facts))
            hurt |= self._tell(lineage, "table", broken)
            broken.clear()
            tables = Pass(lineage, self._chunk_size, lambda *facts: broken.append(facts))
            self._check_chunks(lineage, tables)
            hurt |= self._tell(lineage, "table", broken)
            if not hurt:
                self._check_maps(tables)
            self._check_index(lineage, hurt)
            broken.clear()
        self._pins.clear()

    def _tell(self, lineage: Lineage, kind: str, broken: list[tuple[str, int, RepositoryError]]) -> set[str]:
        """Report broken layers; return the points that they hurt."""
        hurt: set[str] = set()
        for path, seq, error in broken:
            points = [point for s, (point, _) in lineage.points.items() if s >= seq]
            hurt.update(points)
            offset = error.offset if isinstance(error, Corrupt) else 0
            known = next((d for d in self._report.damage if d.file == path), None)
            if known:  # met before: by the look at the whole table, or for other points
                known.points += [point for point in points if point not in known.points]
                continue
            self._report.damage.append(
                Damage(
                    kind="layer" if isinstance(error, Missing) else kind,
                    vm=self._address.vm,
                    points=points,
                    disk=self._address.disk,
                    file=path,
                    file_offset=offset,
                    what=_what(error),
                )
            )
        return hurt

    def _check_files(self, lineage: Lineage, broken: Callable[[str, int, RepositoryError], None]) -> None:
        """Compare each layer with what its point's manifest says of it; leave those with no table out."""
        for layer in list(lineage.layers):
            self._report.layers += 1
            seq = layer.header.seq
            try:
                published = lineage.points.get(seq)
                _check_file(layer, published[1] if published else None)
                if layer.header.plain:
                    self._check_holes(layer)
            except Corrupt as e:
                broken(layer.path, seq, e)
                try:
                    layer.trailer()
                except Corrupt:
                    lineage.layers.remove(layer)

    def _check_holes(self, layer: Layer) -> None:
        """Look for data in a raw image where the table has none: no point shows it, but who reads the file does."""
        found = list(stray_data(layer))
        size = sum(length for _, length in found)
        if found:
            self._report.damage.append(
                Damage(
                    kind="image",
                    vm=self._address.vm,
                    points=[],
                    disk=self._address.disk,
                    file=layer.data.path,
                    file_offset=found[0][0],
                    what=f"{size} bytes have data where the disk has none; no mount and no restore shows them",
                )
            )

    def _check_chunks(self, lineage: Lineage, tables: Pass) -> None:
        """Read what the points see."""
        points = [(point, entry.size) for point, entry in lineage.points.values()]
        total = sum(_stored_bytes(layer) for layer in lineage.layers)
        pending: deque[tuple[Visible, Future[list[tuple[int, str]]]]] = deque()
        memory = Scratch()
        with ThreadPoolExecutor(_WORKERS, "verify") as workers:
            try:
                for found in tables.visible():
                    for span in self._spans(found):
                        pending.append(
                            (span, workers.submit(damaged_chunks, span.layer, span.rows, self._chunk_size, memory))
                        )
                        if len(pending) >= _QUEUE:
                            self._note(points, total, *pending.popleft())
                while pending:
                    self._note(points, total, *pending.popleft())
            except BaseException:
                workers.shutdown(wait=True, cancel_futures=True)
                raise

    def _check_maps(self, tables: Pass) -> None:
        """Compare what the tables give for each point with its manifest."""
        for point in tables.wrong_maps():
            path = catalog.manifest_path(self._address.root, self._address.vm, point)
            what = f"the layers of disk {self._address.disk} do not give the chunks that were published for this point"
            self._report.damage.append(
                Damage(kind="table", vm=self._address.vm, disk=self._address.disk, points=[point], file=path, what=what)
            )

    def _spans(self, found: Visible) -> Iterator[Visible]:
        """Cut what was found into pieces in the order of the file; drop what is not in the sample."""
        rows, last = found.rows, found.last
        if self._report.sample < 1:
            rng = np.random.default_rng(random.SystemRandom().getrandbits(64))
            taken = rng.random(len(rows)) < self._report.sample
            rows, last = rows[taken], last[taken]
        order = np.argsort(rows["offset"], kind="stable")
        rows, last = rows[order], last[order]
        step = max(_SPAN // self._chunk_size, 1)
        for at in range(0, len(rows), step):
            yield Visible(found.layer, rows[at : at + step], found.first, last[at : at + step])

    def _note(
        self, points: list[tuple[str, int]], total: int, span: Visible, checked: Future[list[tuple[int, str]]]
    ) -> None:
        found = checked.result()
        size = int(span.rows["length"].sum(dtype=np.int64))
        self._read += size
        self._report.chunks += len(span.rows)
        self._report.stored_bytes += size
        self._progress(f"{self._address.vm}/{self._address.disk}", min(self._read, total), total, self._read)
        if found:
            places = np.array([i for i, _ in found])
            by_number = np.argsort(span.rows["chunk_no"][places])
            places = places[by_number]
            whats = [found[i][1] for i in by_number.tolist()]
            bad = BadRows(
                vm=self._address.vm,
                disk=self._address.disk,
                layer=span.layer,
                rows=span.rows[places],
                first=span.first,
                last=span.last[places],
                points=points,
                what=whats,
                repaired=[None] * len(places),
            )
            self._report.bad.append(bad)

    def _check_index(self, lineage: Lineage, hurt: set[str]) -> None:
        """Compare what the index says of the lineage with its layers' tables; and open the newest point by it."""
        whole = [(seq, point) for seq, (point, _) in lineage.points.items() if point not in hurt]
        vm, disk = self._address.vm, self._address.disk
        while whole:
            newest, point = whole[-1]
            try:
                self._repository.open_image(vm, point, disk).close()  # indexes it, if it is newer than the index
                index = self._repository.store.index
                chain_no = index.chain_no(vm, disk, self._address.name)
                assert chain_no is not None
                fault = _index_fault(index, chain_no, [x for x in lineage.layers if x.header.seq <= newest])
            except (NotFound, Missing):
                whole.pop()  # deleted meanwhile
                continue
            except (Corrupt, UnsupportedFormat) as e:
                fault = 0, _what(e)
            if fault:
                points = [point for seq, point in whole if seq >= fault[0]]
                path = catalog.index_folder(self._repository.path, self._repository.settings.id)
                self._report.damage.append(
                    Damage(kind="index", vm=vm, disk=disk, points=points, file=path, what=fault[1])
                )
            return


def _stored_bytes(layer: Layer) -> int:
    """Return about what all of a layer's payloads take."""
    begin, end = layer.data_range
    return layer.trailer().data_chunks * layer.header.chunk_size if layer.header.plain else end - begin


def _index_fault(index: Index, chain_no: int, layers: list[Layer]) -> tuple[int, str] | None:
    """As `index_fault`; of layers that gc writes again meanwhile, or has, and was killed before it told the index.

    Raises:
        Missing: one is gone; so is a point, then.
    """
    for _ in range(_TRIES):
        for layer in layers:
            index.renew(chain_no, layer)
        fault = index_fault(index, chain_no, layers)
        if fault is None or all(layer.is_current() for layer in layers):
            return fault
        layers = [Layer(layer.path) for layer in layers]
    return fault


def _check_file(layer: Layer, entry: DiskEntry | None) -> None:
    """Check the trailer; compare the layer with its point's manifest, where that is known. Raises Corrupt."""
    trailer = layer.trailer()
    if entry is None:
        return
    if layer.length != entry.layer_bytes:
        raise Corrupt(layer.path, layer.length, f"the file should be {entry.layer_bytes} bytes long")
    digest = blake3.blake3(layer.pread(0, HEADER_SIZE))
    for offset in range(trailer.table_offset, layer.length, _HASHED):
        digest.update(layer.pread(offset, min(_HASHED, layer.length - offset)))
    if digest.hexdigest() != entry.layer_blake3:
        raise Corrupt(layer.path, trailer.table_offset, "header, table and trailer are not those that were published")
