"""Which bitmaps of a disk belong to a chain, whether they can be trusted, and the transactions that turn them.

At a point, the *old* recorder stops and the *new* one starts, in one transaction. So at any time a chain's disk has

    old, recording                    between two backups
    old, stopped + new, recording     while a point is taken, and after one was broken off

and what changed since the chain's last point is in the old one and in the others of the chain (*strays*), together.
An old one that is stopped while none of the others records has missed something.
"""

from collections.abc import Iterable
from typing import Any

from backupfs.sources.machine import Recorders, Track
from backupfs.sources.qemu_img import too_full
from backupfs.sources.vm_nodes import Bitmap, Node
from backupfs.units import KiB

GRANULARITY = 64 * KiB

Action = dict[str, Any]


def problem(node: Node, recorders: Recorders, track: Track, elsewhere: Iterable[Node], *, held: bool) -> str:
    """Say why a disk's old recorder can't be used, or return "".

    Args:
        node: the disk's image.
        elsewhere: nodes that are no disk's image.
        held: the old recorder may be held by a backup of ours that was killed, which is going to be taken over.
    """
    if track.recorder is None:
        return track.reason
    name = f"the bitmap {track.recorder}"
    old = node.bitmaps.get(track.recorder)
    if old is None:
        return _missing(node, track.recorder, elsewhere)
    if old.inconsistent:
        return f"{name} is inconsistent: QEMU was killed, and did not save it"
    if old.busy and not held:
        return f"{name} is in use by another job or export"
    if old.granularity != GRANULARITY:
        return f"{name} has a granularity of {old.granularity} bytes, not {GRANULARITY}"
    if not old.recording and not any(s.recording and (s.usable or held) for s in strays(node, recorders, old.name)):
        return f"{name} was stopped, and nothing has recorded since"
    return ""


def _missing(node: Node, recorder: str, elsewhere: Iterable[Node]) -> str:
    below = next((n for n in elsewhere if recorder in n.bitmaps), None)
    if below is not None:
        return f"the bitmap {recorder} is in {below.file}, not in {node.file}: a snapshot was taken since"
    if not node.persistent:
        return f"there is no bitmap {recorder}: QEMU ended since, and {node.driver} images keep none"
    return f"there is no bitmap {recorder}: QEMU was killed since, or the bitmap was removed"


def strays(node: Node, recorders: Recorders, old: str | None) -> list[Bitmap]:
    """Return the chain's bitmaps on a disk other than the old recorder."""
    return [b for b in node.bitmaps.values() if recorders.owns(b.name) and b.name != old]


def rotate(node: Node, recorders: Recorders, old: str | None) -> list[Action]:
    """Return what starts the new recorder and, if there is one that can be used, stops the old one."""
    new = {"node": node.name, "name": recorders.new, "granularity": GRANULARITY, "persistent": node.persistent}
    return [_action("add", **new), *([_action("disable", node=node.name, name=old)] if old else [])]


def fold(node: Node, recorders: Recorders, old: str, *, keep: bool) -> list[Action]:
    """Return what puts the strays' records into the old recorder, and lets it record; removes them, unless `keep`."""
    others = strays(node, recorders, old)
    merged = [b.name for b in others if b.usable]
    actions = [] if node.bitmaps[old].recording else [_action("enable", node=node.name, name=old)]
    if merged:
        actions.append(_action("merge", node=node.name, target=old, bitmaps=merged))
    return actions if keep else actions + remove(node, [b.name for b in others])


def remove(node: Node, names: Iterable[str]) -> list[Action]:
    """Return what removes bitmaps that are there and that nobody uses."""
    there = [node.bitmaps[name] for name in names if name in node.bitmaps]
    return [_action("remove", node=node.name, name=b.name) for b in there if not b.busy]


def retire(node: Node, recorders: Recorders) -> list[Action]:
    """Return what removes all of the chain's bitmaps but the new recorder."""
    return remove(node, [b.name for b in strays(node, recorders, recorders.new)])


def _action(verb: str, **data: object) -> Action:
    return {"type": f"block-dirty-bitmap-{verb}", "data": dict(data)}


def is_full(node: Node) -> bool:
    """Say whether bitmaps must not be removed from an image now."""
    return node.persistent and too_full(node.file)
