"""Indexes that another was put in the place of while points could not be indexed. Under the index's lock.

A delta's records in the index are the rows of its table. When the table is damaged, and the index is built again from
the tables, the old index may be all that is left of them; so it is kept, for `verify --repair`, in `index.kept` beside
the new one, until all points are indexed. Of two only the first is kept, unless the second knows layers that it does
not; so there are never more than there were losses.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository.crashmark import fault_of
from backupfs.repository.format import LayerId
from backupfs.repository.index import Index, StaleIndex
from backupfs.repository.manifest import Manifest


def kept_folder(folder: str) -> str:
    """Return where the indexes are kept that were in `folder` before."""
    return f"{folder}.kept"


def keep(folder: str, repository_id: str, fresh: Index, left_out: Sequence[Manifest]) -> None:
    """Move the index away from `folder`, to where it is kept, if it knows what no other does of a layer.

    Args:
        fresh: what will be in its place.
        left_out: the points that could not be indexed.

    Raises:
        OSError: it can't be moved.
    """
    chains = {(m.vm, d.name, d.chain) for m in left_out for d in m.disks}
    with _opened(folder, repository_id) as old:
        known = _layers(old, chains) if old else set()
    known -= _layers(fresh, chains)
    for place in _places(folder):
        with _opened(place, repository_id) as other:
            known -= _layers(other, chains) if other else set()
    if known:
        os.makedirs(kept_folder(folder), mode=0o700, exist_ok=True)
        taken = {os.path.basename(place) for place in _places(folder)}
        name = next(str(n) for n in range(1, len(taken) + 2) if str(n) not in taken)
        os.rename(folder, os.path.join(kept_folder(folder), name))


def drop(folder: str) -> None:
    """Take the kept ones away: all points are in the index again."""
    if os.path.lexists(kept_folder(folder)):
        shutil.rmtree(kept_folder(folder), ignore_errors=True)


@contextlib.contextmanager
def opened(folder: str, repository_id: str) -> Iterator[list[Index]]:
    """Yield the kept ones, open; those that can't be opened are passed over."""
    with contextlib.ExitStack() as stack:
        found = (stack.enter_context(_opened(place, repository_id)) for place in _places(folder))
        yield [index for index in found if index]


def _places(folder: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [os.path.join(kept_folder(folder), name) for name in sorted(os.listdir(kept_folder(folder)))]
    return []


@contextlib.contextmanager
def _opened(place: str, repository_id: str) -> Iterator[Index | None]:
    """Yield an index, or None: one that a process died of is not tried again."""
    index = None
    if os.path.isdir(place) and not fault_of(place):
        with contextlib.suppress(StaleIndex, RepositoryError):
            index = Index(place, repository_id)
    try:
        yield index
    finally:
        if index:
            index.close()


def _layers(index: Index, chains: set[tuple[str, str, str]]) -> set[LayerId]:
    """Return the layers of these chains that an index has; those whose entries are damaged are left out."""
    found = set()
    for chain in chains:
        with contextlib.suppress(Corrupt):
            number = index.chain_no(*chain)
            for seq in range(index.last_seq(number) + 1) if number is not None else ():
                with contextlib.suppress(Corrupt):
                    layer_id = index.layer_id(number or 0, seq)
                    found |= {layer_id} if layer_id else set()
    return found
