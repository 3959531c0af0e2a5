"""What goes between a mount or command and the process that reads a guest's file system (child.py).

A stream socket; each message is its length (4 bytes, little-endian) and as much MessagePack. One question is open at a
time. While it works on one, the child asks for parts of the volume. What the child says is believed no more than the
disk that it reads: types are checked here, and numbers by who uses them.
"""

import socket
import struct
import time
from typing import Annotated

import msgspec

from backupfs.units import MiB

LARGEST = 64 * MiB  # bytes of a message
LARGEST_READ = MiB  # bytes, of a file or of the volume
LISTED = 10_000  # entries of a folder in a message, if more come
LARGEST_CONTENTS = 4 * MiB  # bytes, of several files
LARGEST_XATTRS = MiB  # bytes, of several inodes; at most as many more of the last one
_LENGTH = struct.Struct("<I")


class Order(msgspec.Struct, tag=True):
    """The first: which file system it is, and the volume's size in bytes. Answered with Opened."""

    family: str
    kind: str
    size: int


class Ask(msgspec.Struct, tag=True):
    """A question: the method of FileSystem and its arguments."""

    method: str
    arguments: list[int]


class Need(msgspec.Struct, tag=True):
    """The child wants a part of the volume: answered with Part."""

    offset: int
    length: int


class Part(msgspec.Struct, tag=True):
    """A part of the volume; None: it can't be read."""

    data: bytes | None


class Opened(msgspec.Struct, tag=True):
    """The file system can be read."""

    root: int
    notes: list[str]


Time = int | Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,30}$")]
"""In ns; in digits if it is more than MessagePack's 64 bits hold."""
StatRow = tuple[int, int, int, int, int, int, int, Time, Time, Time, int, bool]  # as in filesystem.Stat, in its order


class StatAnswer(msgspec.Struct, tag=True):
    """Of `stat`."""

    stat: StatRow


class ListAnswer(msgspec.Struct, tag=True):
    """Of `list`: LISTED entries, and another answer follows; or the last ones."""

    entries: list[tuple[bytes, StatRow]]
    more: bool = False


class BytesAnswer(msgspec.Struct, tag=True):
    """Of `read` and `readlink`."""

    data: bytes


class ExtentsAnswer(msgspec.Struct, tag=True):
    """Of `extents`: offset, length, whether it is a hole."""

    extents: list[tuple[int, int, bool]]


class ContentsAnswer(msgspec.Struct, tag=True):
    """Of `contents`, in the order of the inodes that follow the largest size among its arguments."""

    contents: list[bytes | None]


class RunsAnswer(msgspec.Struct, tag=True):
    """Of `runs`: length and offset of each; None: there are none."""

    runs: list[tuple[int, int | None]] | None


class XattrsAnswer(msgspec.Struct, tag=True):
    """Of `xattrs`."""

    xattrs: list[tuple[bytes, bytes]]


class XattrsOfAnswer(msgspec.Struct, tag=True):
    """Of `xattrs_of`: different attributes, and which of them each inode has, in order; None: it has to be asked for
    alone. Of the last inodes there may be no word: they are to be asked for again.
    """

    xattrs: list[list[tuple[bytes, bytes]]]
    which: list[int | None]


class NamesAnswer(msgspec.Struct, tag=True):
    """Of `left_out`."""

    names: list[bytes]


class Failed(msgspec.Struct, tag=True):
    """There is no answer: NotFound, or GuestError."""

    not_found: bool
    message: str


Answer = (
    Opened
    | StatAnswer
    | ListAnswer
    | BytesAnswer
    | ExtentsAnswer
    | ContentsAnswer
    | RunsAnswer
    | XattrsAnswer
    | XattrsOfAnswer
    | NamesAnswer
    | Failed
)
FromChild = Need | Answer
FromParent = Order | Ask | Part
from_child = msgspec.msgpack.Decoder(FromChild)
from_parent = msgspec.msgpack.Decoder(FromParent)
_encode = msgspec.msgpack.Encoder().encode


def send(line: socket.socket, message: FromChild | FromParent) -> None:
    """Send a message. Raises OSError."""
    body = _encode(message)
    line.sendall(_LENGTH.pack(len(body)))
    line.sendall(body)


def receive(line: socket.socket, deadline: float | None = None) -> bytearray:
    """Return the next message, not decoded.

    Args:
        deadline: when all of it has to be there, as time.monotonic counts; None: whenever.

    Raises:
        EOFError: there is none any more.
        ValueError: it is too long.
        OSError: TimeoutError among them.
    """
    (length,) = _LENGTH.unpack(_receive(line, _LENGTH.size, deadline))
    if length > LARGEST:
        raise ValueError(f"a message of {length} bytes")
    return _receive(line, length, deadline)


def _receive(line: socket.socket, length: int, deadline: float | None) -> bytearray:
    buffer = bytearray(length)
    view, done = memoryview(buffer), 0
    while done < length:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            line.settimeout(left)
        got = line.recv_into(view[done:])
        if not got:
            raise EOFError("the other end is gone")
        done += got
    return buffer
