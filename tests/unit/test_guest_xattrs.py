"""What is remembered, and read ahead, of guests' extended attributes, without a file system."""

import errno
import random
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from backupfs.errors import GuestError
from backupfs.filesystem import Stat
from backupfs.fuse import guest_xattrs
from backupfs.fuse.guest_xattrs import LABEL, GuestXattrs
from backupfs.units import KiB, MiB


def file(inode: int, *, mode: int = stat.S_IFREG | 0o644, has_xattrs: bool = True) -> Stat:
    return Stat(inode, mode, 1, 0, 0, 0, 0, 0, 0, 0, has_xattrs=has_xattrs)


def label(inode: int) -> dict[bytes, bytes]:
    return {LABEL: b"kind %d" % (inode % 3)}


class Parser:
    """Answers with the attributes of any inode, and counts."""

    def __init__(self) -> None:
        self.together: list[list[int]] = []
        self.alone: list[int] = []
        self.answer: Callable[[int], dict[bytes, bytes] | None] = label
        self.most = 10_000
        self.xattrs = GuestXattrs(self.ask, self.ask_many, errno.EOPNOTSUPP)

    def ask(self, inode: int) -> Mapping[bytes, bytes]:
        self.alone.append(inode)
        found = self.answer(inode)
        if found is None:
            raise GuestError(f"{inode} is damaged")
        return found

    def ask_many(self, inodes: Sequence[int]) -> Sequence[Mapping[bytes, bytes] | None]:
        self.together.append(list(inodes))
        return [self.answer(inode) for inode in inodes[: self.most]]

    def get(self, inode: int) -> Mapping[bytes, bytes]:
        return (self.xattrs.at_hand(inode) or self.xattrs.read(inode)).values


FOLDER = {b"%d" % (place * 7919 % 10_007): file(place * 6007 % 10_009 + 1) for place in range(5000)}
LISTED = [s.inode for s in FOLDER.values()]


@pytest.fixture
def parser() -> Parser:
    parser = Parser()
    parser.xattrs.note(FOLDER)
    return parser


@pytest.mark.parametrize(
    "order", [LISTED, [FOLDER[name].inode for name in sorted(FOLDER)], sorted(LISTED)], ids=["listed", "name", "inode"]
)
def test_who_goes_in_order_asks_the_parser_seldom(parser: Parser, order: list[int]) -> None:
    assert all(parser.get(inode) == label(inode) for inode in order)
    assert len(parser.together) < 25
    assert parser.alone == []
    assert all(len(inodes) <= 512 for inodes in parser.together)
    assert sorted(inode for inodes in parser.together for inode in inodes) == sorted(LISTED), "each once"
    parser.together.clear()
    assert all(parser.get(inode) == label(inode) for inode in order)
    assert parser.together == []


def test_two_at_once_in_different_orders(parser: Parser) -> None:
    orders = [LISTED, sorted(LISTED), list(reversed(LISTED)), random.Random(1).sample(LISTED, len(LISTED))] * 2
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda order: [parser.get(inode) for inode in order], orders):
            assert {frozenset(xattrs.items()) for xattrs in found} == {frozenset(label(i).items()) for i in range(3)}
    assert [parser.get(inode) for inode in LISTED] == [label(inode) for inode in LISTED]


def test_who_jumps_asks_for_one(parser: Parser) -> None:
    for place in (4000, 2000, 3000, 1000):
        parser.get(LISTED[place])
    parser.get(99_999)  # in no folder that is known
    assert parser.together == []
    assert len(parser.alone) == 5


def test_what_has_none_and_what_can_not_be_read_is_not_asked_for() -> None:
    parser = Parser()
    bare = {b"bare %d" % inode: file(inode, has_xattrs=False) for inode in range(1, 100, 2)}
    unreadable = {b"unreadable": file(50, mode=0)}
    parser.xattrs.note(bare | {b"%d" % inode: file(inode) for inode in range(2, 50, 2)} | unreadable)
    for inode in range(2, 50, 2):
        parser.get(inode)
    assert [inode for inodes in parser.together for inode in inodes] == list(range(2, 50, 2))


def test_damage_is_told_to_who_asks_for_it(parser: Parser) -> None:
    bad = set(LISTED[10:3000:7])
    parser.answer = lambda inode: None if inode in bad else label(inode)
    for inode in LISTED:
        if inode in bad:
            for _ in range(2):
                with pytest.raises(GuestError, match=f"{inode} is damaged"):
                    parser.get(inode)
        else:
            assert parser.get(inode) == label(inode)
    assert set(parser.alone) == bad
    assert len(parser.together) < 20, "they were not asked for again with others"


def test_a_parser_that_dies_of_several_is_asked_for_each(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(inodes: Sequence[int]) -> Sequence[None]:
        parser.together.append(list(inodes))
        raise GuestError("it died")

    monkeypatch.setattr(parser.xattrs, "_ask_many", die)
    assert [parser.get(inode) for inode in LISTED[:32]] == [label(inode) for inode in LISTED[:32]]
    assert len(parser.together) == 1, "what it died of is not asked for with others again"


def test_answers_for_the_first_ones_only(parser: Parser) -> None:
    parser.most = 3
    assert [parser.get(inode) for inode in LISTED[:300]] == [label(inode) for inode in LISTED[:300]]
    assert len(parser.together) <= 101
    assert parser.alone == []


def test_what_is_kept_is_bounded(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_xattrs, "_KEPT", MiB)
    parser.most = 40
    parser.answer = lambda inode: {b"user.large": b"%d" % inode * 4000}
    for inode in LISTED[:600]:
        assert parser.get(inode) == parser.answer(inode)
        kept = {id(shared): shared for shared in parser.xattrs._known.values() if shared}
        held = sum(len(value) for shared in kept.values() for value in shared.xattrs.values.values())
        assert held <= parser.xattrs._bytes <= MiB
        assert len(parser.xattrs._shared) == len(kept)
    assert parser.get(LISTED[0]) == parser.answer(LISTED[0]), "forgotten, and read again"


def test_what_many_have_is_kept_once(parser: Parser) -> None:
    parser.answer = lambda inode: {b"user.huge": bytes(64 * KiB), b"user.more": bytes(65_000)}
    assert {id(parser.get(inode)) for inode in LISTED[:1000]} == {id(parser.get(LISTED[0]))}
    assert parser.xattrs._bytes < 500 * KiB
    assert len(parser.xattrs._shared) == 1


def test_what_differs_only_in_what_is_not_shown_is_kept_once(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_xattrs, "_KEPT", 10 * KiB)
    parser.answer = lambda inode: {b"nothing %d" % inode: b"", b"user.x": bytes(inode % 2 * 3000)}
    for inode in (*LISTED, *LISTED[::-1]):
        assert parser.get(inode) == {b"user.x": bytes(inode % 2 * 3000)}
        users = [shared for shared in parser.xattrs._known.values() if shared]
        assert sum(shared.users for shared in parser.xattrs._shared.values()) == len(users)
    assert parser.xattrs._bytes <= 10 * KiB


def test_what_is_too_large_to_be_kept_is_told(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_xattrs, "_KEPT", 10 * KiB)
    parser.answer = lambda inode: {b"user.large": bytes(20 * KiB)}
    for inode in LISTED[:3]:
        assert parser.get(inode) == {b"user.large": bytes(20 * KiB)}
        assert parser.xattrs._bytes == 0
        assert parser.xattrs._shared == {}


def test_folders_that_are_known_are_bounded(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_xattrs, "_NAMES", 6000)
    for number in range(5):
        parser.xattrs.note({b"%d" % inode: file(inode) for inode in range(number * 2000, number * 2000 + 2000)})
        assert len(parser.xattrs._folders) <= 6000
    assert parser.get(9000) == label(9000)


def test_what_can_not_be_shown_is_not(parser: Parser) -> None:
    good = {b"user.x": b"", b"user." + b"n" * 250: bytes(64 * KiB)}
    bad = {b"": b"1", b"user.a\0b": b"1", b"nothing": b"1", b"user." + b"n" * 251: b"1", b"user.y": bytes(64 * KiB + 1)}
    parser.answer = lambda inode: good | bad
    assert parser.get(LISTED[0]) == good  # together with others
    assert parser.get(LISTED[4000]) == good  # alone
    assert parser.together
    assert parser.alone


def test_what_is_said_of_an_attribute_that_is_not_there(parser: Parser) -> None:
    found = parser.xattrs.read(LISTED[0])
    assert found.missing(b"user.x") == errno.ENODATA
    assert found.missing(LABEL) == parser.xattrs.none.missing(LABEL) == errno.EOPNOTSUPP
