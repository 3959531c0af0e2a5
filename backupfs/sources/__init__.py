"""Where a disk's bytes come from, by what the user wrote: the scheme of a URI, or a path."""

import re
from collections.abc import Callable

from backupfs.errors import UsageError
from backupfs.sources.export import NbdSource
from backupfs.sources.qemu_nbd import open_image
from backupfs.sources.source import Source

__all__ = ["Source", "open_source"]

# To add a source: one file beside this one, one line here.
_SCHEMES: dict[str, Callable[[str, str | None, float], Source]] = {
    "nbd": NbdSource,
    "nbds": NbdSource,
    "nbd+unix": NbdSource,
    "nbds+unix": NbdSource,
    "nbd+vsock": NbdSource,
    "nbds+vsock": NbdSource,
}


def open_source(spec: str, bitmap: str | None = None, *, timeout_s: float = 30.0) -> Source:
    """Open a disk for reading.

    Args:
        spec: an NBD URI, or the path of an image in any format that qemu-img knows.
        bitmap: the dirty bitmap to use. One that can't be used is no error: see `Source.bitmap_problem`.
        timeout_s: how long the source may be silent.

    Raises:
        UsageError: `spec` has a scheme that is not known, or `bitmap` is no possible name.
        ConnectError: it can't be opened.
        ProtocolError: what answers talks nonsense.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", spec)
    if scheme is None:
        return open_image(spec, bitmap, timeout_s)
    opener = _SCHEMES.get(scheme[1].lower())
    if opener is None:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise UsageError(f"{spec}: not a source; write a path or one of {known} (a file of that name: ./{spec})")
    return opener(spec, bitmap, timeout_s)
