"""The read lane at a device that is one end of a socket pair; the test is the kernel, and pyfuse3."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import trio
from images import BytesImage
from mounts import wait_until

from backupfs.errors import GuestError
from backupfs.extents import Extent
from backupfs.fuse import kernel, lane
from backupfs.fuse.guest_xattrs import Xattrs
from backupfs.fuse.lane import Lane
from backupfs.fuse.nodes import Stale
from backupfs.image import Buffer
from backupfs.units import KiB

LOOKUP = 1


class BrokenImage(BytesImage):
    def readinto(self, offset: int, buffer: Buffer) -> None:
        raise ZeroDivisionError("a bug")

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        raise ZeroDivisionError("another")


class ShortImage(BytesImage):
    """Gives a byte less than it is asked for."""

    def gather(self, offset: int, length: int) -> list[bytes]:
        return [self.data[offset : offset + length - 1]]

    def at_once(self, offset: int, into: list[memoryview]) -> bool:
        return False


BARE, LABELLED = 77, 78  # inodes without extended attributes; beside files with labels
GUEST = 1000  # first of a guest's files
GUESTS_FOLDER = 9000  # of ours, for them
SOME = {b"security.selinux": b"a label\0", b"user.empty": b"", b"user.large": bytes(range(256)) * 256}
NAMES = b"security.selinux\0user.empty\0user.large\0"


class Device:
    """The kernel's side, pyfuse3's side, and who else answers, on a trio thread."""

    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(10)
        self.lane = Lane(device.detach())
        self.pyfuse3 = socket.socket(fileno=self.lane.session)
        self.pyfuse3.settimeout(10)
        self.complaints: list[str] = []
        self.read_on_behind: list[int] = []
        self.known: dict[int, Xattrs] = {}
        self.broken = {GUEST + 13}
        self.greeted, self.started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._live,))
        self._thread.start()
        assert self.started.wait(10)

    async def _live(self) -> None:
        self._token, self._over = trio.lowlevel.current_trio_token(), trio.Event()
        self.lane.start(self, self.greeted.set, self._over.set)
        self.started.set()
        await self._over.wait()
        self.lane.close()

    def start_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        content = repr((handle, offset, size)).encode()
        self.lane.answer(unique, [content], len(content))

    def xattrs_at_hand(self, inode: int) -> Xattrs | None:
        codes = {BARE: errno.EOPNOTSUPP, LABELLED: errno.ENODATA}
        return Xattrs({}, codes[inode]) if inode in codes else self.known.get(inode)

    def xattrs(self, inode: int) -> Xattrs:
        if inode == GUEST + 13:
            raise GuestError("damaged")
        if inode == GUEST + 14:
            raise Stale("gone")
        return Xattrs(SOME, errno.ENODATA)

    def is_guests(self, inode: int) -> bool:
        return inode >= GUEST

    def volume_number(self, inode: int) -> int | None:
        return 1 if inode >= GUEST and inode != GUESTS_FOLDER else None

    def small_content(self, inode: int) -> bytes | None:
        if inode in self.broken:
            raise GuestError("damaged")
        return b"content of %d" % inode if inode < GUEST + 100 else None

    def small_at_hand(self, inode: int) -> tuple[bytes | None, bool]:
        return (b"at hand", True) if inode == GUEST + 7 else (None, False)

    def read_on(self, inode: int) -> None:
        self.read_on_behind.append(inode)

    def is_constant(self, inode: int) -> bool:
        return inode == BARE

    def start_seek(self, unique: int, handle: int, offset: int, whence: int) -> None:
        self.lane.answer_seek(unique, offset + whence)

    def complain(self, inode: int, doing: str, error: Exception) -> None:
        self.complaints.append(f"{inode} {doing}: {error}")

    def ask(self, opcode: int, unique: int, handle: int = 0, offset: int = 0, wanted: int = 0) -> None:
        self.kernel.send(kernel.REQUEST.pack(opcode, unique, handle, offset, wanted).ljust(80, b"\0"))

    def answered(self) -> tuple[int, int, bytes]:
        """Return an answer: unique, errno, content."""
        message = self.kernel.recv(1 << 21)
        length, code, unique = kernel.ANSWER.unpack_from(message)
        assert length == len(message)
        return unique, -code, message[kernel.ANSWER_SIZE :]

    def add(self, handle: int, inode: int, image: BytesImage) -> SimpleNamespace:
        held = SimpleNamespace(image=image, condemned=None)
        trio.from_thread.run_sync(self.lane.add, handle, inode, held, trio_token=self._token)
        return held

    def remove(self, handle: int) -> None:
        trio.from_thread.run(self.lane.remove, handle, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run(self.lane.finish, trio_token=self._token)
        self.ask(kernel.FORGET, 0)  # wakes the reader, as the end of a mount does
        self.pyfuse3.close()
        trio.from_thread.run_sync(self._over.set, trio_token=self._token)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.kernel.close()
        wait_until(lambda: not any(thread.name.startswith("lane-") for thread in threading.enumerate()))


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    try:
        yield device
    finally:
        device.close()


def test_reads_are_answered_in_full_up_to_the_end(device: Device) -> None:
    data = os.urandom(10_000)
    device.add(7, 70, BytesImage(data))
    for number, (offset, wanted) in enumerate([(0, 4096), (9_000, 4096), (9_999, 1), (10_000, 4096), (1 << 63, 1)], 1):
        device.ask(kernel.READ, number, 7, offset, wanted)
        assert device.answered() == (number, 0, data[offset : offset + wanted])


def test_an_exception_ends_no_thread(device: Device) -> None:
    device.add(7, 70, BrokenImage(bytes(10_000)))
    for number in range(1, 101):
        device.ask((kernel.READ, kernel.LSEEK)[number % 2], number, 7, number, os.SEEK_DATA)
        assert device.answered() == (number, errno.EIO, b"")
        assert len(device.complaints) == number, "it is in the log before the reader knows"
    assert device.complaints[:2] == ["70 seek at 1: another", f"70 read of {os.SEEK_DATA} bytes at 2: a bug"]
    device.add(8, 80, BytesImage(b"abc"))
    device.ask(kernel.READ, 101, 8, 0, 3)
    assert device.answered() == (101, 0, b"abc")


def test_an_image_that_gives_too_little_is_an_error(device: Device) -> None:
    device.add(7, 70, ShortImage(bytes(100)))
    device.ask(kernel.READ, 1, 7, 0, 50)
    assert device.answered() == (1, errno.EIO, b"")
    assert "another number of bytes" in device.complaints[0]


def test_what_was_not_added_is_passed_on(device: Device) -> None:
    device.ask(kernel.READ, 5, 99, 4096, 512)
    assert device.answered() == (5, 0, b"(99, 4096, 512)")
    device.ask(kernel.LSEEK, 6, 99, 10, os.SEEK_HOLE)
    assert device.answered() == (6, 0, struct.pack("=Q", 10 + os.SEEK_HOLE))


def test_all_else_goes_through_the_pair_and_back(device: Device) -> None:
    for opcode in kernel.UNANSWERED:
        device.ask(opcode, 1)
    device.ask(LOOKUP, 2, 11, 22, 1 << 30)
    request = device.pyfuse3.recv(1 << 20)
    assert kernel.REQUEST.unpack_from(request) == (LOOKUP, 2, 11, 22, 1 << 30)
    assert len(request) == 80
    device.pyfuse3.send(kernel.ANSWER.pack(20, 0, 2) + b"name")
    assert device.answered() == (2, 0, b"name")
    assert device.greeted.wait(10)


def test_listings_are_asked_for_in_parts_that_fit(device: Device) -> None:
    for opcode in (kernel.READDIR, kernel.READDIRPLUS):
        device.ask(opcode, 3, 4, 0, 1 << 20)
        size = kernel.REQUEST.unpack_from(device.pyfuse3.recv(1 << 20))[4]
        device.pyfuse3.send(kernel.ANSWER.pack(kernel.ANSWER_SIZE + size, 0, 3) + bytes(size))
        assert device.answered() == (3, 0, bytes(128 * KiB))


def test_a_busy_pyfuse3_holds_no_reader_up(device: Device) -> None:
    device.add(7, 70, BytesImage(b"abc"))
    count = 20_000  # more than the pair holds
    for number in range(count):
        device.ask(LOOKUP, number + 10)
    device.ask(kernel.READ, 1, 7, 0, 3)
    assert device.answered() == (1, 0, b"abc")
    uniques = {kernel.REQUEST.unpack_from(device.pyfuse3.recv(1 << 20))[1] for _ in range(count)}
    assert uniques == set(range(10, count + 10))


def test_a_removed_handle_and_a_condemned_image(device: Device) -> None:
    held = device.add(7, 70, BytesImage(b"abc"))
    held.condemned = ValueError("its map is another")
    for opcode in (kernel.READ, kernel.LSEEK):
        device.ask(opcode, 1, 7, 0, 3)
        assert device.answered() == (1, errno.EIO, b"")
    assert "its map is another" in device.complaints[0]
    device.remove(7)
    device.ask(kernel.READ, 2, 7, 0, 3)
    assert device.answered() == (2, 0, b"(7, 0, 3)")


def test_after_the_end_of_pyfuse3_everything_is_refused(device: Device) -> None:
    device.pyfuse3.close()
    wait_until(lambda: not any(t.name == "lane-relay" for t in threading.enumerate()))
    device.ask(LOOKUP, 1)
    unique, code, content = device.answered()
    assert (unique, content) == (1, b"")
    assert code in (errno.EIO, errno.ENOTCONN)


def test_a_pair_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_LARGEST_LISTING", 1 << 30)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="wmem_max"):
        Lane(-1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_data_that_is_known_is_not_looked_for_again() -> None:
    image = BytesImage(bytes(64 * KiB))
    asked: list[int] = []

    def extents(offset: int, length: int) -> Iterator[Extent]:
        asked.append(offset)
        return iter([Extent(offset, length, False)])

    image.extents = extents  # type: ignore[method-assign]
    file = lane.File(70, SimpleNamespace(image=image, condemned=None))
    assert file.seek(10, os.SEEK_HOLE) == 64 * KiB
    assert [file.seek(20, whence) for whence in (os.SEEK_HOLE, os.SEEK_DATA)] == [64 * KiB, 20]
    assert asked == [10]


# Guests' files (guest_lane.py).


def ask(device: Device, opcode: int, unique: int, request: bytes) -> None:
    """Send a request; of `request` what is behind its unique number counts."""
    device.kernel.send(kernel.REQUEST.pack(opcode, unique, 0, 0, 0)[:16] + request[16:].ljust(64, b"\0"))


def ask_xattr(device: Device, opcode: int, unique: int, inode: int, name: bytes = b"", *, size: int = 255) -> None:
    """Ask; size 0: how large is the answer?"""
    ask(device, opcode, unique, kernel.XATTR_REQUEST.pack(inode, size).ljust(kernel.XATTR_AT, b"\0") + name + b"\0")


@pytest.mark.parametrize(("inode", "label"), [(BARE, errno.EOPNOTSUPP), (LABELLED, errno.ENODATA)])
def test_attributes_that_there_are_none_of(device: Device, inode: int, label: int) -> None:
    for unique, (name, code) in enumerate(
        [(b"security.selinux", label), (b"user.backupfs.vm", errno.ENODATA), (b"user.x", errno.ENODATA)], 1
    ):
        ask_xattr(device, kernel.GETXATTR, unique, inode, name)
        assert device.answered() == (unique, code, b"")
    ask_xattr(device, kernel.LISTXATTR, 8, inode)
    assert device.answered() == (8, 0, b"")
    ask_xattr(device, kernel.LISTXATTR, 9, inode, size=0)
    assert device.answered() == (9, 0, bytes(8))


def test_attributes_that_there_may_be(device: Device) -> None:
    ask_xattr(device, kernel.GETXATTR, 1, 70, b"security.capability")
    assert device.answered() == (1, errno.ENODATA, b""), "a file of ours has no others than ours"
    for opcode, inode, name in (
        (kernel.GETXATTR, 70, b"user.backupfs.vm"),
        (kernel.LISTXATTR, 70, b""),
        (kernel.GETXATTR, GUESTS_FOLDER, b"security.selinux"),
        (kernel.LISTXATTR, GUESTS_FOLDER, b""),
    ):
        ask_xattr(device, opcode, 2, inode, name)
        assert kernel.REQUEST.unpack_from(device.pyfuse3.recv(1 << 16))[:2] == (opcode, 2)


@pytest.mark.parametrize("at_hand", [True, False])
def test_attributes_that_there_are(device: Device, at_hand: bool) -> None:
    inode = GUEST + 3
    if at_hand:
        device.known[inode] = Xattrs(SOME, errno.ENODATA)
    for name, value in SOME.items():
        for size in {1, max(len(value) - 1, 1), max(len(value), 1), 65536}:
            ask_xattr(device, kernel.GETXATTR, 1, inode, name, size=size)
            assert device.answered() == ((1, errno.ERANGE, b"") if len(value) > size else (1, 0, value))
        ask_xattr(device, kernel.GETXATTR, 2, inode, name, size=0)
        assert device.answered() == (2, 0, struct.pack("=II", len(value), 0))
    for name in (b"user.empt", b"user.empty1", b"user.backupfs.vm", b""):
        ask_xattr(device, kernel.GETXATTR, 3, inode, name)
        assert device.answered() == (3, errno.ENODATA, b"")
    for size in (1, len(NAMES) - 1, len(NAMES), 65536):
        ask_xattr(device, kernel.LISTXATTR, 4, inode, size=size)
        assert device.answered() == ((4, errno.ERANGE, b"") if len(NAMES) > size else (4, 0, NAMES))
    ask_xattr(device, kernel.LISTXATTR, 5, inode, size=0)
    assert device.answered() == (5, 0, struct.pack("=II", len(NAMES), 0))


def test_few_attributes_are_remembered_in_the_lane(device: Device) -> None:
    for inode, xattrs in ((GUEST + 4, {b"user.x": b"1"}), (GUEST + 5, {b"user.x": b"1" * 200})):
        device.known[inode] = Xattrs(xattrs, errno.ENODATA)
        ask_xattr(device, kernel.GETXATTR, 1, inode, b"user.x")
        assert device.answered() == (1, 0, xattrs[b"user.x"])
    assert list(device.lane._guests._known) == [GUEST + 4]


def test_attributes_that_can_not_be_read(device: Device) -> None:
    for inode, code in ((GUEST + 13, errno.EIO), (GUEST + 14, errno.ESTALE)):
        ask_xattr(device, kernel.GETXATTR, 1, inode, b"user.x")
        assert device.answered() == (1, code, b"")
        ask_xattr(device, kernel.LISTXATTR, 2, inode, size=0)
        assert device.answered() == (2, code, b"")
    assert device.complaints == [f"{GUEST + 13} getxattr: damaged", f"{GUEST + 13} listxattr: damaged"]


def ask_open(device: Device, unique: int, inode: int, flags: int = os.O_RDONLY) -> None:
    ask(device, kernel.OPEN, unique, kernel.OPEN_REQUEST.pack(inode, flags))


def test_small_files_are_opened_and_released(device: Device) -> None:
    for unique, (inode, content) in enumerate([(GUEST + 1, b"content of 1001"), (GUEST + 7, b"at hand")], 1):
        ask_open(device, unique, inode)
        assert stored(device) == (inode, content)
        answered, code, opened = device.answered()
        assert (answered, code) == (unique, 0)
        handle, flags = struct.unpack_from("=QI", opened)
        assert flags == kernel.FOPEN_KEEP_CACHE
        device.ask(kernel.READ, 10, handle, 0, 4096)
        assert device.answered() == (10, 0, content)
        device.ask(kernel.READ, 11, handle, 3, 2)
        assert device.answered() == (11, 0, content[3:5])
        device.ask(kernel.LSEEK, 12, handle, 0, os.SEEK_HOLE)
        assert device.answered() == (12, 0, struct.pack("=Q", len(content)))
        device.ask(kernel.RELEASE, 13, handle)
        assert device.answered() == (13, 0, b"")
    wait_until(lambda: device.read_on_behind == [GUEST + 7])


def stored(device: Device) -> tuple[int, bytes]:
    """Return what the kernel is given for its cache: the inode, and its content from its begin on."""
    message = device.kernel.recv(1 << 21)
    length, code, unique, inode, offset, size = kernel.STORE.unpack_from(message)
    assert (length, code, unique, offset) == (len(message), kernel.NOTIFY_STORE, 0, 0)
    content = message[kernel.STORE.size :]
    assert len(content) == size
    return inode, content


@pytest.mark.parametrize("inode", [GUEST + 7, GUEST + 8], ids=["at hand", "read"])
def test_what_somebody_may_be_reading_is_not_given_to_the_kernel(device: Device, inode: int) -> None:
    def opened(unique: int) -> None:
        ask_open(device, unique, inode)
        assert device.answered()[:2] == (unique, 0)

    def release(unique: int) -> None:
        ask(device, kernel.RELEASE, unique, kernel.INODE.pack(inode))
        device.pyfuse3.recv(1 << 16)  # this handle is none of ours

    ask_open(device, 1, inode)
    assert stored(device)[0] == inode
    assert device.answered()[:2] == (1, 0)
    opened(2)
    release(3)
    opened(4)
    release(5)
    release(6)
    ask_open(device, 7, inode)
    assert stored(device)[0] == inode
    assert device.answered()[:2] == (7, 0)


def test_what_is_not_small_or_no_guests_is_opened_by_pyfuse3(device: Device) -> None:
    for inode, flags in ((GUEST + 200, os.O_RDONLY), (70, os.O_RDONLY), (GUEST + 1, os.O_RDWR)):
        ask_open(device, 5, inode, flags)
        assert kernel.REQUEST.unpack_from(device.pyfuse3.recv(1 << 16))[:2] == (kernel.OPEN, 5)
    ask_open(device, 6, GUEST + 13)
    assert device.answered() == (6, errno.EIO, b"")
    assert device.complaints == [f"{GUEST + 13} open: damaged"]
    device.broken.clear()
    ask_open(device, 7, GUEST + 13)
    assert stored(device)[0] == GUEST + 13, "nobody has it open"


def test_a_guests_folder_may_be_kept_by_the_kernel(device: Device) -> None:
    for inode, flags in ((BARE, kernel.FOPEN_KEEP_CACHE | kernel.FOPEN_CACHE_DIR), (70, 0)):
        ask(device, kernel.OPENDIR, inode, kernel.INODE.pack(inode))
        device.pyfuse3.recv(1 << 16)
        device.pyfuse3.send(kernel.OPEN_ANSWER.pack(kernel.OPEN_ANSWER.size, 0, inode, 3, 0, 0))
        assert device.answered() == (inode, 0, struct.pack("=QIi", 3, flags, 0))
