"""Extended attributes of guests' files: what is remembered of them, and what is read before somebody asks.

Where SELinux is, everything has a label, and `ls -l` and `rsync` ask for it name by name. Who asks for those of a few
files of a folder, one behind the other, is going to ask for the others; and to ask the parser for those of a hundred
files takes hardly longer than for those of one. Nearly all labels are among a few, so each set of attributes that
several inodes have is kept once. From any thread.
"""

import errno
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from backupfs.errors import BackupfsError
from backupfs.filesystem import Stat
from backupfs.units import MiB

LABEL = b"security.selinux"
_KEPT = 16 * MiB
_INODE, _SET, _PAIR = 200, 500, 200  # bytes that an inode takes, a set of attributes, and each of these
_FIRST, _MOST = 32, 512  # inodes that are asked for together
_NAMES = 50_000  # in the folders that are known
_LONGEST_NAME, _LONGEST_VALUE = 255, 65536  # XATTR_NAME_MAX, XATTR_SIZE_MAX


@dataclass(frozen=True, slots=True)
class Xattrs:
    """All extended attributes of something.

    Args:
        values: by full names.
        no_label: the errno for an SELinux label that is not among them. EOPNOTSUPP where nothing in the same file
            system has one: `ls -l` asks for no more of them then.
    """

    values: Mapping[bytes, bytes]
    no_label: int

    def missing(self, name: bytes) -> int:
        """Return the errno for an attribute that is not there."""
        return self.no_label if name == LABEL else errno.ENODATA


@dataclass(slots=True)
class _Shared:
    """Attributes that so many inodes have, and the bytes that they take."""

    xattrs: Xattrs
    pairs: tuple[tuple[bytes, bytes], ...]
    cost: int
    users: int = 0


class _Folder:
    """The inodes of a folder that may have attributes, in the orders that programs go in.

    Those are `ls`'s, as it is listed; that of the names; and `cp`'s, that of the inodes. In arrays: a folder may have a
    million names.
    """

    def __init__(self, found: Mapping[bytes, Stat]) -> None:
        self._found = found
        self._inodes = array("Q")  # sorted
        self._orders: list[tuple[array[int], array[int]]] = []  # and the place in it of each of _inodes

    def _look(self) -> None:
        """Find the orders when somebody asks for attributes, not before."""
        listed = [s.inode for s in self._found.values() if _may_have(s)]
        by_name = [self._found[name].inode for name in sorted(self._found) if _may_have(self._found[name])]
        self._found = {}
        self._inodes = array("Q", sorted(set(listed)))
        numbers = {inode: number for number, inode in enumerate(self._inodes)}
        for order in (listed, by_name, self._inodes):
            places = array("I", bytes(4 * len(numbers)))
            for place, inode in enumerate(order):
                places[numbers[inode]] = place
            self._orders.append((array("Q", order), places))

    def next(self, inode: int, known: Container[int]) -> list[int]:
        """Return what to ask for together with an inode: more, the more of those before it are known already."""
        if not self._orders:
            self._look()
        number = bisect_left(self._inodes, inode)
        longest, following = 0, array("Q")
        for order, places in self._orders:
            place = places[number]
            run = 0 if place else 1
            while run < min(place, _MOST // 2) and order[place - run - 1] in known:
                run += 1
            if run > longest:
                longest, following = run, order[place + 1 : place + min(max(2 * run, _FIRST), _MOST)]
        return [inode, *(other for other in following if other not in known)]


def _may_have(found: Stat) -> bool:
    return found.has_xattrs and found.mode != 0 and 0 <= found.inode < 2**64  # without a mode it can't be read


class GuestXattrs:
    """The extended attributes in a file system.

    Args:
        ask: returns those of an inode. May block. Raises BackupfsError.
        ask_many: returns those of several, maybe only of the first ones; None: it is to be asked for alone. The same.
        no_label: see Xattrs.
    """

    def __init__(
        self,
        ask: Callable[[int], Mapping[bytes, bytes]],
        ask_many: Callable[[Sequence[int]], Sequence[Mapping[bytes, bytes] | None]],
        no_label: int,
    ) -> None:
        self._ask = ask
        self._ask_many = ask_many
        self.none = Xattrs({}, no_label)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._folders: dict[int, _Folder] = {}  # that an inode is in
        self._known: OrderedDict[int, _Shared | None] = OrderedDict()  # None: to be asked for alone; oldest first
        self._shared: dict[tuple[tuple[bytes, bytes], ...], _Shared] = {}
        self._bytes = 0

    def note(self, found: Mapping[bytes, Stat]) -> None:
        """Know a folder that was listed."""
        folder = _Folder(found)
        inodes = [s.inode for s in found.values() if _may_have(s)]
        with self._lock:
            if len(self._folders) + len(inodes) > _NAMES:
                self._folders.clear()
            self._folders.update(dict.fromkeys(inodes, folder))

    def at_hand(self, inode: int) -> Xattrs | None:
        """Return an inode's attributes if they are known. Does not block."""
        shared = self._known.get(inode)
        return None if shared is None else shared.xattrs

    def read(self, inode: int) -> Xattrs:
        """Return an inode's attributes, and read some more. May block. Raises BackupfsError."""
        with self._reading:  # the parser does one thing at a time, and who waited for it finds more at hand
            known = self.at_hand(inode) or self._read_many(inode)
            if known is None:
                shared = self._share(self._ask(inode))
                self._keep(inode, shared)
                known = shared.xattrs
            return known

    def _read_many(self, inode: int) -> Xattrs | None:
        folder = self._folders.get(inode)
        if folder is None or inode in self._known:
            return None
        inodes = folder.next(inode, self._known)
        if len(inodes) == 1:
            return None
        try:
            found = self._ask_many(inodes)
        except BackupfsError:
            found = [None] * len(inodes)  # who asks for one alone is told, and it is one that killed the parser
        different = {id(xattrs): xattrs for xattrs in found}
        shared = {key: None if xattrs is None else self._share(xattrs) for key, xattrs in different.items()}
        for other, xattrs in zip(inodes, found, strict=False):
            self._keep(other, shared[id(xattrs)])
        return self.at_hand(inode)

    def _share(self, said: Mapping[bytes, bytes]) -> _Shared:
        xattrs = shown(said)
        pairs = tuple(xattrs.items())
        cost = _SET + sum(_PAIR + len(name) + len(value) for name, value in pairs)
        return _Shared(Xattrs(xattrs, self.none.no_label), pairs, cost)

    def _keep(self, inode: int, shared: _Shared | None) -> None:
        """Remember something; what was longest there goes. By one thread at a time."""
        if inode in self._known:
            self._forget(inode, self._known.pop(inode))
        if shared is not None:
            shared = self._shared.setdefault(shared.pairs, shared)
            self._bytes += 0 if shared.users else shared.cost
            shared.users += 1
        self._known[inode] = shared
        self._bytes += _INODE
        while self._bytes > _KEPT:
            self._forget(*self._known.popitem(last=False))

    def _forget(self, _inode: int, shared: _Shared | None) -> None:
        self._bytes -= _INODE
        if shared is not None:
            shared.users -= 1
            if not shared.users:
                del self._shared[shared.pairs]
                self._bytes -= shared.cost


def shown(xattrs: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    """Return those of what a file system says that can be shown."""
    return {
        name: value
        for name, value in xattrs.items()
        if 0 < len(name) <= _LONGEST_NAME and b"\0" not in name and b"." in name and len(value) <= _LONGEST_VALUE
    }
