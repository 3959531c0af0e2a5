"""A live export that comes and goes: one connection after another.

The connection is made when somebody looks, and kept: qemu-nbd ends with its last client, and only who is connected
notices that a moment is over. While the export is away it is tried again whenever somebody looks, in a thread of its
own, so that nobody but who opens the disk waits for it.
"""

import itertools
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from backupfs.errors import ConnectError, SourceError, UsageError
from backupfs.extents import Extent
from backupfs.image import Buffer
from backupfs.sources.live_image import DEADLINE_S, LiveImage
from backupfs.sources.live_link import Export

log = logging.getLogger(__name__)

_PAUSE_S = 1.0  # between two attempts


def check_uri(uri: str) -> None:
    """Refuse what names no NBD export, or names it by a place that is another one in another folder.

    Raises:
        UsageError: with what to write.
    """
    try:
        if not re.match(r"nbds?(\+unix|\+vsock)?://", uri):
            raise UsageError(f"{uri}: a live disk is an NBD export: nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH")
        sockets = parse_qs(urlsplit(uri).query).get("socket", [])
    except ValueError as e:
        raise UsageError(f"{uri}: not a URI: {e}") from e
    if any(not path.startswith("/") for path in sockets):
        raise UsageError(f"{uri}: the socket's path has to begin with a slash: a mount leaves the folder it began in")


@dataclass(frozen=True, slots=True)
class Look:
    """What can be said of a live disk without waiting.

    Attributes:
        version: another one for each connection. While the export is away it is none that `LiveDisk.open` returns.
        size, allocated: bytes; of the last connection, while the export is away.
        since_ns: when that connection was made.
    """

    version: str
    size: int
    allocated: int
    since_ns: int


class Shown:
    """A live disk's connection, lent: an Image. To close it does not end the connection."""

    def __init__(self, image: LiveImage, version: str) -> None:
        self._image = image
        self.version = version
        self.size = image.size

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """See `LiveImage.readinto`."""
        self._image.readinto(offset, buffer)

    def lend(self, offset: int, length: int) -> memoryview:
        """See `LiveImage.lend`."""
        return self._image.lend(offset, length)

    def lend_at_once(self, offset: int, length: int) -> memoryview | None:
        """See `LiveImage.lend_at_once`."""
        return self._image.lend_at_once(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `LiveImage.extents`."""
        return self._image.extents(offset, length)

    def close(self) -> None:
        """See `Image.close`."""


class LiveDisk:
    """An export that a mount shows. From any thread.

    Args:
        export: which.
        name: what messages call it.
        deadline_s: for each read, and for making a connection.
    """

    def __init__(self, export: Export, name: str, deadline_s: float = DEADLINE_S) -> None:
        self._export = export
        self._name = name
        self._deadline_s = deadline_s
        self._numbers = itertools.count(1)
        self._state = threading.Lock()  # never held while waiting
        self._connecting = threading.Lock()  # by who makes a connection
        self._image: LiveImage | None = None  # the last that was connected
        self._attempt: LiveImage | None = None  # being connected, or the last that was
        self._thread: threading.Thread | None = None
        self._last: Look | None = None
        self._not_before = 0.0
        self._problem: SourceError | None = None
        self._closed = False

    def look(self) -> Look | None:
        """Return what is known of the disk; None if it never was there. Begins to look for it, if it is away."""
        with self._state:
            if not self._up():
                self._seek()
            return self._last

    def open(self) -> Shown:
        """Return the disk; connect to it, if it is away.

        Raises:
            SourceError: it is not there.
        """
        with self._connecting:
            with self._state:
                if self._up():
                    assert self._image is not None
                    assert self._last is not None
                    return Shown(self._image, self._last.version)
                if self._problem is not None and time.monotonic() < self._not_before:
                    raise type(self._problem)(str(self._problem))
            return self._connect()

    def settle(self, timeout_s: float) -> None:
        """Wait until an attempt that `look` began has ended."""
        with self._state:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def close(self) -> None:
        """End the connection. Reads that are waiting fail."""
        with self._state:
            self._closed = True
            images = [i for i in (self._image, self._attempt) if i is not None]
            self._image = None
        for image in images:
            image.close()
        self.settle(self._deadline_s)

    def _up(self) -> bool:
        """Whether it is connected; notice when that is over. With the state locked."""
        if self._image is None:
            return False
        if self._image.alive():
            return True
        self._problem = self._image.failure
        log.warning("%s: lost: %s", self._name, self._problem)
        self._image = None
        assert self._last is not None
        self._last = Look(self._new_version(), self._last.size, self._last.allocated, self._last.since_ns)
        return False

    def _seek(self) -> None:
        """Begin an attempt in a thread, unless there is one, or it is too early. With the state locked."""
        if self._thread is not None or self._closed or time.monotonic() < self._not_before:
            return
        self._thread = threading.Thread(target=self._try, name=f"live {self._name}", daemon=True)
        self._thread.start()

    def _try(self) -> None:
        try:
            self.open()
        except SourceError:
            pass  # logged already
        except Exception:
            log.exception("%s: a bug", self._name)
        finally:
            with self._state:
                self._thread = None

    def _connect(self) -> Shown:
        """Make a connection, as the only one who does."""
        try:
            image = self._connected()
        except SourceError as e:
            with self._state:
                if str(e) != str(self._problem) and not self._closed:
                    log.warning("%s: not there: %s", self._name, e)
                self._problem = type(e)(str(e))  # without what it was raised through
            raise
        finally:
            self._not_before = time.monotonic() + _PAUSE_S
        with self._state:
            self._attempt = None
            self._image, self._problem = image, None
            self._last = Look(self._new_version(), image.size, image.allocated, image.since_ns)
            log.info("%s: there: %d bytes", self._name, image.size)
            return Shown(image, self._last.version)

    def _connected(self) -> LiveImage:
        image = LiveImage(self._export, self._name, self._deadline_s)
        try:
            with self._state:
                if self._closed:
                    raise ConnectError(f"{self._name}: closed")
                self._attempt = image  # close() ends it from here on
            image.connect()
            with self._state:
                if self._closed:
                    raise ConnectError(f"{self._name}: closed")
        except BaseException:
            image.close()
            raise
        return image

    def _new_version(self) -> str:
        return str(next(self._numbers))
