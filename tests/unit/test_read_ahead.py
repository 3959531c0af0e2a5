"""What is read ahead of small files, without a file system."""

import stat
from collections.abc import Callable, Sequence

import pytest

from backupfs.errors import GuestError
from backupfs.filesystem import Stat
from backupfs.fuse.read_ahead import LARGEST, ReadAhead, is_small


def file(inode: int, size: int, *, mode: int = stat.S_IFREG | 0o644, allocated: int = 1 << 20) -> Stat:
    return Stat(inode, mode, 1, 0, 0, size, allocated, 0, 0, 0)


def content(inode: int) -> bytes:
    return b"%d" % inode * (inode % 50)


class Parser:
    """Answers with the contents of any inodes, and counts."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.answer: Callable[[int], bytes | None] = content

    def contents(self, inodes: Sequence[int], largest: int) -> list[bytes | None]:
        assert largest == LARGEST
        self.asked.append(list(inodes))
        return [self.answer(inode) for inode in inodes]


FOLDER = {b"%d" % (inode * 7919 % 1000): file(inode, len(content(inode))) for inode in range(1000, 1500)}


@pytest.mark.parametrize("order", [list, sorted])
def test_who_goes_in_order_is_read_for_ahead(order: Callable[[object], list[bytes]]) -> None:
    parser = Parser()
    ahead = ReadAhead(parser.contents)
    ahead.note(FOLDER)
    at_hand = 0
    for name in order(FOLDER):
        inode = FOLDER[name].inode
        found = ahead.take(inode)
        if found is None:
            found = ahead.read(inode)
        else:
            at_hand += 1
            if ahead.wants_more(inode):
                ahead.read_on(inode)
        assert found == content(inode)
        assert ahead.take(inode) is None, "only once"
    assert at_hand >= 498  # the first is first in both orders
    assert len(parser.asked) < 15
    assert {inode for batch in parser.asked for inode in batch} == {s.inode for s in FOLDER.values()}


def test_who_jumps_is_not() -> None:
    parser = Parser()
    ahead = ReadAhead(parser.contents)
    ahead.note(FOLDER)
    for inode in (1400, 1200, 1300, 1100):
        assert ahead.take(inode) is None
        assert ahead.read(inode) is None
    assert ahead.read(9999) is None
    assert not ahead.wants_more(9999)
    ahead.read_on(9999)
    assert parser.asked == []


def test_a_content_of_another_size_is_not_believed() -> None:
    parser = Parser()
    ahead = ReadAhead(parser.contents)
    ahead.note(FOLDER)
    parser.answer = lambda inode: content(inode) + (b"x" if inode == 1003 else b"")
    assert ahead.read(1000) == content(1000)
    assert {inode for inode in parser.asked[0] if ahead.take(inode) is None} == {1000, 1003}
    parser.answer = lambda inode: None
    ahead.read_on(1000)
    assert len(parser.asked) == 2
    assert {ahead.take(inode) for inode in parser.asked[1]} == {None}


def test_a_parser_that_fails_tells_who_asks_for_one_alone() -> None:
    def fail(_inodes: Sequence[int], _largest: int) -> list[bytes | None]:
        raise GuestError("it died")

    ahead = ReadAhead(fail)
    ahead.note(FOLDER)
    assert ahead.read(1000) is None
    assert ahead.take(1001) is None


@pytest.mark.parametrize(
    ("found", "small"),
    [
        (file(1, 0, allocated=0), True),
        (file(1, 4096, allocated=0), True),
        (file(1, 4097, allocated=0), False),
        (file(1, LARGEST), True),
        (file(1, LARGEST + 1), False),
        (file(1, 10, mode=stat.S_IFLNK | 0o777), False),
        (file(1, 10, mode=stat.S_IFDIR | 0o755), False),
    ],
)
def test_what_is_small(found: Stat, small: bool) -> None:
    assert is_small(found) is small
