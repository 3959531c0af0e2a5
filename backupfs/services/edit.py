"""Changing what a person may change of a point: its note, its tags, whether it is pinned."""

from collections.abc import Callable, Collection

from backupfs.errors import UsageError
from backupfs.repository.amend import amend
from backupfs.repository.manifest import Manifest
from backupfs.repository.repository import Repository

_LONGEST_TAG, _LONGEST_NOTE = 100, 4000  # characters


def edit(
    repository: Repository,
    vm: str,
    point: str,
    *,
    note: str | None,
    add: Collection[str],
    remove: Collection[str],
    pinned: bool | None,
    waiting: Callable[[str], None] | None,
) -> Manifest:
    """Change a point's manifest; None and empty collections change nothing. Returns the manifest as it is now.

    Raises:
        UsageError: nobody may write such a tag or note.
        NotFound, Corrupt: the point is not there, or its manifest is damaged.
        Locked: another process writes to the repository, and `waiting` is None.
    """
    for tag in add:
        if not tag.isprintable() or tag != tag.strip() or not 0 < len(tag) <= _LONGEST_TAG:
            raise UsageError(f"{tag!r} is not a tag: 1 to {_LONGEST_TAG} printable characters, no space around them")
    if note is not None and (len(note) > _LONGEST_NOTE or not all(c.isprintable() or c in "\n\t" for c in note)):
        raise UsageError(f"a note is made of at most {_LONGEST_NOTE} printable characters")
    with repository.exclusive(waiting):
        before = repository.manifest(vm, point)
        tags = [t for t in dict.fromkeys([*before.tags, *add]) if t not in remove]
        changes: dict[str, object] = {
            "tags": tags,
            "note": before.note if note is None else note,
            "pinned": before.pinned if pinned is None else pinned,
        }
        if any(getattr(before, name) != value for name, value in changes.items()):
            amend(repository, vm, point, changes)
        return repository.manifest(vm, point)
