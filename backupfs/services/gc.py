"""Giving back what no point needs any more. Exclusive against whatever writes, not against readers (locks.py).

First everything is looked at, and nothing is freed if anything is missing or damaged that it takes to decide. Then:

1. In a chain that goes on, a mark (SEQ.gone) keeps the number of its last layer if that goes.
2. Layers that no remaining point stands on are removed.
3. In the others, holes are punched where no remaining point sees anything.
4. Layers in which that left too much, since compressed chunks share blocks, are written again (rewrite.py): those that
   give back most for what has to be written, until all that is kept, headers and tables too, is no more than SLACK
   beyond what is seen, or little can be won.
5. The index forgets the layers that went, and learns of those that were written again.

A point remains while its manifest is there or an image of it is open. It may be broken off anywhere: what was freed
stays freed, and the next gc does the rest.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository import catalog, locks, names
from backupfs.repository.files import fsync_folder, write_new
from backupfs.repository.format import ALIGNMENT
from backupfs.repository.layer import Layer, raw_path
from backupfs.repository.manifest import DiskEntry
from backupfs.repository.point import Chain, layer_path
from backupfs.repository.reach import ChainLayers, Flags, reach
from backupfs.repository.repository import Repository
from backupfs.repository.rewrite import needed, rewrite
from backupfs.repository.space import Puncher, allocated, dead_ranges, is_alone, stored
from backupfs.units import MiB

log = logging.getLogger(__name__)

# Of what is seen, that may be kept beyond it. Below 5 percent, which gc promises, because a file system needs some
# blocks to say where the holes are.
SLACK = 0.04
_LEAST_GAIN = 0.01  # of what is written again
_RESERVE = 16 * MiB  # that has to be free beside a layer that is written again: for the index


@dataclass(slots=True)
class GcReport:
    """What gc did, or would do. Bytes.

    Attributes:
        before: that all layers took on the file system.
        freed: of them.
        visible: payload that the remaining points see.
        layers: how many were removed.
        rewritten: how many were written again.
        written: bytes that these take now.
        open: deleted points that are kept because somebody has them open: VM/DISK/CHAIN/SEQ.
        stuck: bytes that nobody sees in files in which no holes can be made, or may be.
        linked: of them, in files that have another name, and so may be another copy's.
    """

    before: int = 0
    freed: int = 0
    visible: int = 0
    layers: int = 0
    rewritten: int = 0
    written: int = 0
    open: list[str] = field(default_factory=list)
    stuck: int = 0
    linked: int = 0


@dataclass(frozen=True, slots=True)
class _ChainPlan:
    """What is to become of one chain.

    Attributes:
        folder: of the chain.
        present: seqs of all layer files.
        stray: raw images without a layer: of a writer, or a gc, that was killed.
        marks: seqs of layers that went before.
        live: by seq, of the layers that stay, which chunks with data are seen: eight a byte; and their number.
        roots: seqs of those whose points remain.
    """

    chain: Chain
    folder: str
    present: list[int]
    stray: list[str]
    marks: list[int]
    live: dict[int, tuple[npt.NDArray[np.uint8], int]]
    roots: frozenset[int]

    def flags(self, seq: int) -> Flags:
        """Return of each chunk with data of a layer whether it is seen."""
        bits, count = self.live[seq]
        return np.unpackbits(bits, count=count).astype(np.bool_)

    @property
    def dead(self) -> list[int]:
        """Seqs of the layers that nobody needs."""
        return [seq for seq in self.present if seq not in self.live]


def gc(repository: Repository, *, dry_run: bool = False, waiting: Callable[[str], None] | None = None) -> GcReport:
    """Give back the space of what no point needs. Removes nothing that a point, or an open image, can see.

    Args:
        dry_run: only say what would be freed.
        waiting: called with a message when another process writes to the repository, before waiting for that; None:
            do not wait.

    Raises:
        Locked: another process writes to the repository.
        Corrupt, UnsupportedFormat: something is damaged or missing; nothing was freed.
        RepositoryError: a file can't be changed; what was freed until then stays freed.
    """
    try:
        return _gc(repository, dry_run, waiting)
    except OSError as e:
        raise RepositoryError(
            f"{e.filename2 or e.filename or repository.path}: {e.strerror}; what was freed stays freed"
        ) from e


def _gc(repository: Repository, dry_run: bool, waiting: Callable[[str], None] | None) -> GcReport:
    report = GcReport()
    lock = locks.writer_lock(repository.path, waiting, looking=True) if dry_run else repository.exclusive(waiting)
    with lock:
        plans = [plan for vm in catalog.vms(repository.path) for plan in _plan_vm(repository, vm, report)]
        worth: list[_Rewrite] = []
        beyond = 0
        left = _left_over(repository) if dry_run else frozenset()
        for plan in plans:
            layers = ChainLayers(plan.chain, bytes.fromhex(repository.settings.id))
            report.before += sum(allocated(path) for seq in plan.present for path in _paths(layers, seq))
            report.before += sum(map(allocated, plan.stray))
            if not dry_run:
                _mark_last(plan)
            for seq in plan.dead:
                report.layers += 1
                for path in _paths(layers, seq):
                    _remove(path, report, left, dry_run=dry_run)
            for path in plan.stray:
                _remove(path, report, left, dry_run=dry_run)
            for seq in plan.live:
                taken, stuck = _punch(layers, plan, seq, report, dry_run=dry_run)
                beyond += taken
                if seq not in plan.roots:
                    worth.append(_look_at(layers, plan, seq, taken, stuck))
        _rewrite_some(repository, worth, beyond - report.visible, report, dry_run=dry_run)
        if not dry_run:
            _clean_index(repository, plans)
            _clean_folders(plans)
    return report


def freed_by_deleting(repository: Repository, vm: str) -> dict[str, int]:
    """Return, by point, the bytes of payload that no other point of the VM sees: what gc gives back if it alone goes.

    Raises:
        Corrupt: something is damaged or missing.
    """
    freed = dict.fromkeys(repository.points(vm), 0)
    for (disk, chain), entries in _entries(repository, vm).items():
        layers = ChainLayers(Chain(repository.path, vm, disk, chain, -1), bytes.fromhex(repository.settings.id))
        only = reach(layers, {entry.seq: entry for _, entry in entries}).only
        for point, entry in entries:
            freed[point] += only[entry.seq]
    return freed


def _entries(repository: Repository, vm: str) -> dict[tuple[str, str], list[tuple[str, DiskEntry]]]:
    """Return all that the VM's manifests say, by disk and chain: the point and the entry."""
    found: dict[tuple[str, str], list[tuple[str, DiskEntry]]] = {}
    for point in repository.points(vm):
        for entry in repository.manifest(vm, point).disks:
            found.setdefault((entry.name, entry.chain), []).append((point, entry))
    return found


def _plan_vm(repository: Repository, vm: str, report: GcReport) -> Iterator[_ChainPlan]:
    root = repository.path
    there = {(disk, chain) for disk in catalog.disks(root, vm) for chain in catalog.chains(root, vm, disk)}
    folder = os.path.dirname(catalog.manifest_path(root, vm, "x"))
    if there and not os.path.isdir(folder):
        # It is made before the first layer, and never removed.
        raise Corrupt(folder, 0, f"is missing, and with it what says which layers are needed (or remove all of {vm})")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # somebody's file is no VM
        # A delete that was killed may not have done it: a manifest must not come back after what it needs is gone.
        fsync_folder(folder)
    entries = _entries(repository, vm)
    for disk, chain in sorted(there | entries.keys()):
        at = Chain(root, vm, disk, chain, -1)
        roots: dict[int, DiskEntry | None] = {entry.seq: entry for _, entry in entries.get((disk, chain), [])}
        yield _plan_chain(ChainLayers(at, bytes.fromhex(repository.settings.id)), roots, report)


def _plan_chain(layers: ChainLayers, roots: dict[int, DiskEntry | None], report: GcReport) -> _ChainPlan:
    folder = os.path.dirname(layers.path(0))
    files = catalog.chain_files(folder)
    present = sorted(seq for seq, suffix in files if suffix == names.LAYER)
    for seq in present:
        if seq not in roots and any(map(locks.is_pinned, _paths(layers, seq))):
            roots[seq] = None
            report.open.append(f"{layers.chain.vm}/{layers.chain.disk}/{layers.chain.name}/{seq}")
    found = reach(layers, roots)
    live = {seq: (np.packbits(flags), len(flags)) for seq, flags in sorted(found.live.items())}
    report.visible += found.visible
    raws = {seq for seq, suffix in files if suffix == names.RAW}
    stray = [os.path.join(folder, names.layer_name(seq, names.RAW)) for seq in sorted(raws.difference(present))]
    marks = sorted(seq for seq, suffix in files if suffix == names.GONE)
    return _ChainPlan(layers.chain, folder, present, stray, marks, live, frozenset(roots))


def _paths(layers: ChainLayers, seq: int) -> list[str]:
    """Return the files of a layer that is there; one without header has no raw image that counts."""
    path = layers.path(seq)
    return [p for p in (path, raw_path(path)) if os.path.lexists(p)]


def _mark_last(plan: _ChainPlan) -> None:
    """Keep the number of the chain's last layer if that goes: a later one must not get it again, nor follow directly
    on the one before in the eyes of a bitmap.
    """
    last = max([*plan.present, *plan.marks], default=0)
    if plan.live and last not in plan.live and last not in plan.marks:
        write_new(os.path.join(plan.folder, names.layer_name(last, names.GONE)), b"")
        fsync_folder(plan.folder)


def _left_over(repository: Repository) -> frozenset[int]:
    """Return the inodes of files of dead writers, which go before anything else does."""
    try:
        with os.scandir(os.path.join(repository.path, "tmp")) as found:
            return frozenset(entry.inode() for entry in found)
    except FileNotFoundError:
        return frozenset()


def _remove(path: str, report: GcReport, left: frozenset[int], *, dry_run: bool) -> None:
    """Remove a file of a layer. A mount may have it open without needing it: the space comes back all the same.

    Args:
        left: inodes that have another name for now, which does not count.
    """
    status = os.lstat(path)
    alone = stat.S_ISREG(status.st_mode) and status.st_nlink - (status.st_ino in left) == 1
    report.freed += status.st_blocks * 512 if alone else 0
    if dry_run:
        return
    puncher = Puncher(path) if alone else None
    try:
        os.unlink(path)
        if puncher:
            os.ftruncate(puncher.fd, 0)
    finally:
        if puncher:
            puncher.close()


def _punch(layers: ChainLayers, plan: _ChainPlan, seq: int, report: GcReport, *, dry_run: bool) -> tuple[int, int]:
    """Make holes in a layer; return what its files take then, and what of that is stuck."""
    live = plan.flags(seq)
    layer = layers.layer(seq)
    path = layer.data.path
    before = allocated(path)
    beside = allocated(layer.path) if layer.header.plain else 0
    if np.all(live):
        return before + beside, 0
    freed = stuck = 0
    alone = is_alone(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    puncher: Puncher | None = None
    able = True
    try:
        for offset, length in dead_ranges(layer, live):
            there = stored(fd, offset, length)
            if there == 0:
                continue
            if dry_run and alone:  # whether the file system can make holes is not tried
                freed += there
                continue
            if alone and able:
                puncher = puncher or Puncher(path)
                able = puncher.punch(offset, length)
            if not (alone and able):
                stuck += there
    finally:
        os.close(fd)
        if puncher:
            puncher.close()
            freed = before - allocated(path)
        report.freed += freed
        report.stuck += stuck
        report.linked += 0 if alone else stuck
    return before + beside - freed, stuck


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """A layer that may be written again.

    Attributes:
        taken: bytes that its files take now.
        stuck: of them, those in which no holes can be made.
        gain: of them, that it would not take then. 0: it must not be, or need not.
    """

    layers: ChainLayers
    plan: _ChainPlan
    seq: int
    taken: int
    stuck: int
    gain: int


def _look_at(layers: ChainLayers, plan: _ChainPlan, seq: int, taken: int, stuck: int) -> _Rewrite:
    """Say how much a layer takes beyond what is seen of it and what tells where that is."""
    size = taken
    live = plan.flags(seq)
    if not np.all(live):
        need = needed(layers.layer(seq), live)
        # Holes in what is not compressed leave nothing but rows; and another name keeps the old file.
        if need.compressed and is_alone(layers.path(seq)):
            size = need.size
    return _Rewrite(layers, plan, seq, taken, stuck, max(taken - size, 0))


def _rewrite_some(
    repository: Repository, worth: list[_Rewrite], beyond: int, report: GcReport, *, dry_run: bool
) -> None:
    """Write layers again, those that give back most for what is written first, as long as too much is kept.

    Args:
        beyond: bytes that all layers take beyond the payload that is seen.
    """
    for found in sorted(worth, key=lambda r: r.gain / max(r.taken - r.gain, 1), reverse=True):
        size = found.taken - found.gain
        if beyond <= SLACK * report.visible or found.gain < max(ALIGNMENT, _LEAST_GAIN * size):
            return
        path = found.layers.path(found.seq)
        if not dry_run:
            room = os.statvfs(repository.path)
            if room.f_bavail * room.f_frsize < size + _RESERVE:
                log.warning("%s: too little space is free to write it again without what nobody sees", path)
                continue
            if not _rewrite(repository, found, path):
                continue
            size = allocated(path)
        beyond -= found.taken - size
        report.freed += found.taken - size
        report.stuck -= found.stuck
        report.rewritten += 1
        report.written += size


def _rewrite(repository: Repository, found: _Rewrite, path: str) -> bool:
    plan, seq = found.plan, found.seq
    if seq in plan.roots:
        raise ValueError("a layer that a manifest or an open image names never changes")
    if not rewrite(Layer(path), plan.flags(seq), repository.path, repository.settings.chunk_size):
        log.error("%s: not written again, because something in it is damaged; run backupfs verify", path)
        return False
    _tell_index(repository, plan, [seq])
    return True


def _tell_index(repository: Repository, plan: _ChainPlan, seqs: Iterable[int]) -> None:
    """Bring the index to what the files say. It may fail: readers find their way by the files (point.py)."""
    at = plan.chain
    try:
        index = repository.store.index
        chain_no = index.chain_no(at.vm, at.disk, at.name)
        if chain_no is None:
            return
        for seq in seqs:
            index.renew(chain_no, Layer(layer_path(at.root, at.vm, at.disk, at.name, seq)))
    except RepositoryError as e:
        log.warning("the index does not know yet of layers that were written again: %s", e)


def _clean_index(repository: Repository, plans: list[_ChainPlan]) -> None:
    """Let the index forget the layers that went. It may fail: the records that stay are seen by no point."""
    try:
        index = repository.store.index
        for plan in plans:
            chain_no = index.chain_no(plan.chain.vm, plan.chain.disk, plan.chain.name)
            gone = set() if chain_no is None else index.layers(chain_no).keys() - plan.live.keys()
            if chain_no is not None and gone:
                index.remove(chain_no, gone)
            _tell_index(repository, plan, plan.live)
    except RepositoryError as e:
        log.warning("the index keeps records of layers that are gone: %s", e)


def _clean_folders(plans: list[_ChainPlan]) -> None:
    """Remove marks that are no longer needed, and the folders of chains that are gone. The last generation's folder
    stays: its number must not be used again either.
    """
    newest: dict[tuple[str, str, str], int] = {}
    for plan in plans:
        name, generation = names.chain_of(plan.chain.name)
        key = plan.chain.vm, plan.chain.disk, name
        newest[key] = max(generation, newest.get(key, 0))
    for plan in plans:
        name, generation = names.chain_of(plan.chain.name)
        last = max([*plan.present, *plan.marks], default=0)
        for seq in plan.marks:
            if not plan.live or last in plan.live or seq != last:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(plan.folder, names.layer_name(seq, names.GONE)))
        if not plan.live and generation < newest[plan.chain.vm, plan.chain.disk, name]:
            with contextlib.suppress(OSError):  # what somebody else put there stays
                os.rmdir(plan.folder)
