"""An NBD server that lies as a test wants it to. Source: NBD proto.md.

It knows the fixed newstyle handshake with NBD_OPT_GO, structured replies, two metadata contexts, READ, BLOCK_STATUS
and DISC; one connection at a time.
"""

import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_OPTION_REPLY = 0x3E889045565A9
_OPT_GO, _OPT_STRUCTURED, _OPT_SET_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_CONTEXT, _REP_UNSUPPORTED = 1, 3, 4, (1 << 31) + 1
_CMD_READ, _CMD_DISC, _CMD_STATUS = 0, 2, 7
_DONE, _CHUNK_NONE, _CHUNK_DATA, _CHUNK_STATUS, _CHUNK_ERROR = 1, 0, 1, 5, (1 << 15) + 1

# given offset and length: for each context the numbers length, flags, ...; bytes to be sent as chunks of a read.
Status = Callable[[int, int], dict[str, list[int]]]
Read = Callable[[int, int], bytes | None]


@dataclass
class Lies:
    """What the server says. `read` may answer fewer or more bytes than asked, or None to close the connection."""

    size: int = 1 << 20
    block_sizes: tuple[int, int, int] | None = None
    contexts: tuple[str, ...] = ("base:allocation",)
    status: Status = field(default=lambda offset, length: {"base:allocation": [length, 0]})
    read: Read = field(default=lambda offset, length: bytes(length))
    asked: list[tuple[int, int]] = field(default_factory=list)  # ranges of reads and block status


@contextmanager
def lying_server(lies: Lies) -> Iterator[str]:
    """Serve on a UNIX socket in a thread; yield the URI."""
    with tempfile.TemporaryDirectory(prefix="bfs-test-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "nbd"
        listener.bind(str(path))
        listener.listen(4)
        thread = threading.Thread(target=_serve, args=(listener, lies))
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive(), "a connection was not closed"


def _serve(listener: socket.socket, lies: Lies) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError, EOFError):
                connection.settimeout(5)
                _negotiate(connection, lies)
                _transmit(connection, lies)


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _negotiate(connection: socket.socket, lies: Lies) -> None:
    connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    _receive(connection, 4)
    while True:
        _, option, length = struct.unpack(">QII", _receive(connection, 16))
        _receive(connection, length)

        def reply(kind: int, data: bytes = b"", option: int = option) -> None:
            connection.sendall(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data)

        if option == _OPT_SET_CONTEXT:
            for number, context in enumerate(lies.contexts):
                reply(_REP_CONTEXT, struct.pack(">I", number) + context.encode())
        elif option == _OPT_GO:
            reply(_REP_INFO, struct.pack(">HQH", 0, lies.size, 1 | 2))
            if lies.block_sizes:
                reply(_REP_INFO, struct.pack(">HIII", 3, *lies.block_sizes))
        elif option != _OPT_STRUCTURED:
            reply(_REP_UNSUPPORTED)
            continue
        reply(_REP_ACK)
        if option == _OPT_GO:
            return


def _transmit(connection: socket.socket, lies: Lies) -> None:
    while True:
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", _receive(connection, 28))

        def chunk(kind: int, data: bytes, flags: int = 0, cookie: int = cookie) -> None:
            connection.sendall(struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data)

        if command == _CMD_DISC:
            return
        lies.asked.append((offset, length))
        if command == _CMD_STATUS:
            for context, numbers in lies.status(offset, length).items():
                number = lies.contexts.index(context)
                chunk(_CHUNK_STATUS, struct.pack(f">I{len(numbers)}I", number, *numbers))
        elif command == _CMD_READ:
            data = lies.read(offset, length)
            if data is None:
                return
            chunk(_CHUNK_DATA, struct.pack(">Q", offset) + data)
        chunk(_CHUNK_NONE, b"", _DONE)
