"""A chain's bitmaps: whether they can be trusted, and how they are turned, put together and taken away."""

from typing import Any

import pytest

from backupfs.sources.machine import Recorders, Track
from backupfs.sources.recording import fold, problem, retire, rotate
from backupfs.sources.vm_nodes import Bitmap, Node

NAMES = Recorders("0123456789abcdef", "main", "20260103T000000Z")
OLD, STRAY = "backupfs-01234567-main-20260101T000000Z", "backupfs-01234567-main-20260102T000000Z"
THEIRS = ("backupfs-01234567-main-2-20260102T000000Z", "backupfs-89abcdef-main-20260102T000000Z", "nightly")


def bitmap(name: str, *, recording: bool = True, busy: bool = False, bad: bool = False, grain: int = 65536) -> Bitmap:
    return Bitmap(name, grain, recording=recording, busy=busy, inconsistent=bad)


def node(*bitmaps: Bitmap, name: str = "vda-fmt", persistent: bool = True) -> Node:
    named = {b.name: b for b in (*bitmaps, *map(bitmap, THEIRS))}
    return Node(name, "qcow2" if persistent else "raw", "/images/vda", 1 << 20, False, persistent, named)


def why(image: Node, *elsewhere: Node, held: bool = False) -> str:
    return problem(image, NAMES, Track(OLD, ""), elsewhere, held=held)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (node(bitmap(OLD)), ""),
        (node(bitmap(OLD), bitmap(STRAY)), ""),
        (node(bitmap(OLD), bitmap(STRAY, bad=True)), ""),
        (node(bitmap(OLD, recording=False), bitmap(STRAY)), ""),
        (node(bitmap(OLD, recording=False)), "nothing has recorded since"),
        (node(bitmap(OLD, recording=False), bitmap(STRAY, recording=False)), "nothing has recorded since"),
        (node(bitmap(OLD, recording=False), bitmap(STRAY, bad=True)), "nothing has recorded since"),
        (node(bitmap(OLD, recording=False), bitmap(STRAY, busy=True)), "nothing has recorded since"),
        (node(bitmap(OLD, bad=True)), "inconsistent"),
        (node(bitmap(OLD, busy=True)), "in use"),
        (node(bitmap(OLD, grain=4096)), "4096"),
        (node(), "was killed since, or the bitmap was removed"),
        (node(persistent=False), "raw images keep none"),
    ],
)
def test_whether_a_recorder_is_trusted(image: Node, words: str) -> None:
    said = why(image)
    assert words in said
    assert bool(words) == bool(said)


def test_a_recorder_on_another_node() -> None:
    assert "a snapshot was taken since" in why(node(), node(bitmap(OLD), name="base"))


def test_a_killed_backups_export_holds_it() -> None:
    assert why(node(bitmap(OLD, recording=False, busy=True), bitmap(STRAY)), held=True) == ""


def test_no_recorder() -> None:
    assert problem(node(bitmap(OLD)), NAMES, Track(None, "the first point"), [], held=False) == "the first point"


def test_rotate() -> None:
    add: dict[str, Any] = {"node": "vda-fmt", "name": NAMES.new, "granularity": 65536, "persistent": True}
    assert rotate(node(), NAMES, None) == [{"type": "block-dirty-bitmap-add", "data": add}]
    stop = {"type": "block-dirty-bitmap-disable", "data": {"node": "vda-fmt", "name": OLD}}
    # The new one first: a write between the two is in both, never in none.
    assert rotate(node(bitmap(OLD)), NAMES, OLD)[1:] == [stop]
    assert rotate(node(persistent=False), NAMES, None)[0]["data"]["persistent"] is False


def verbs(actions: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return (what is done, to which bitmap or from which ones)."""
    data = [(a["type"].removeprefix("block-dirty-bitmap-"), a["data"]) for a in actions]
    return [(verb, d["bitmaps"] if verb == "merge" else d["name"]) for verb, d in data]


def test_fold() -> None:
    image = node(bitmap(OLD, recording=False), bitmap(STRAY))
    # The old one records before the stray is merged and goes.
    assert verbs(fold(image, NAMES, OLD, keep=False)) == [("enable", OLD), ("merge", [STRAY]), ("remove", STRAY)]
    assert verbs(fold(image, NAMES, OLD, keep=True)) == [("enable", OLD), ("merge", [STRAY])]
    assert fold(node(bitmap(OLD)), NAMES, OLD, keep=False) == []
    bad = node(bitmap(OLD), bitmap(STRAY, bad=True))
    assert verbs(fold(bad, NAMES, OLD, keep=False)) == [("remove", STRAY)]
    busy = node(bitmap(OLD), bitmap(STRAY, busy=True))
    assert fold(busy, NAMES, OLD, keep=False) == []


def test_retire_takes_only_the_chains_own() -> None:
    image = node(bitmap(OLD, recording=False), bitmap(STRAY, bad=True), bitmap(NAMES.new))
    assert verbs(retire(image, NAMES)) == [("remove", OLD), ("remove", STRAY)]
