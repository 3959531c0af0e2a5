"""Names of VMs, disks, chains and points: what is allowed, and how each becomes part of a path.

Nothing from outside becomes a path as it is: a name is checked first, then every character outside
`A-Z a-z 0-9 _ . - ~` is percent-encoded.
"""

import os
import re
from datetime import UTC, datetime
from urllib.parse import quote, unquote

from backupfs.errors import UsageError

_LONGEST = 240  # bytes of the escaped name: a path component holds 255, and some carry a suffix

_POINT = re.compile(r"(\d{8}T\d{6}Z)(?:-([1-9]\d{0,5}))?", re.ASCII)
_CHAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_GENERATION = re.compile(r"(.+)\.(\d+)", re.ASCII)


def check_name(name: str, what: str) -> str:
    """Return `name` if a VM or a disk may be called so.

    Args:
        name: the name, as a person gave it.
        what: `VM` or `disk`, for the message.

    Raises:
        UsageError: it may not.
    """
    problem = None
    if name in ("", ".", ".."):
        problem = "is not a name"
    elif "/" in name:
        problem = "has a slash in it"
    elif any(not c.isprintable() for c in name):
        problem = "has a character in it that can't be printed"
    elif name != name.strip():
        problem = "begins or ends with a space"
    elif name.startswith("-"):
        problem = "begins with a dash"
    elif len(escape(name)) > _LONGEST:
        problem = f"is too long: at most {_LONGEST} bytes, where a byte that is not ASCII counts three times"
    if problem:
        shown = name if len(name) <= 60 else name[:60] + "…"
        raise UsageError(f"{what} {shown!r} {problem}")
    return name


def check_chain(name: str) -> str:
    """Return `name` if a chain may be called so.

    Raises:
        UsageError: it may not.
    """
    if not _CHAIN.fullmatch(name):
        raise UsageError(f"chain {name[:80]!r}: a chain's name is made of 1 to 64 of A-Z a-z 0-9 _ - and no dash first")
    return name


def escape(name: str) -> str:
    """Return the path component for a checked name."""
    escaped = quote(name, safe="", errors="surrogatepass")
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


def unescape(component: str) -> str | None:
    """Return the name behind a path component, or None when no name has it."""
    try:
        name = unquote(component, errors="strict")
    except UnicodeDecodeError:
        return None
    return name if escape(name) == component else None


def chain_of(chain: str) -> tuple[str, int]:
    """Return the name that the user gave and the generation: `weekly` is (weekly, 1), `weekly.3` is (weekly, 3)."""
    match = _GENERATION.fullmatch(chain)
    return (match[1], int(match[2])) if match else (chain, 1)


def chain_named(name: str, generation: int) -> str:
    """Return the chain's full name; every full backup after the first of a name starts a new generation."""
    return name if generation == 1 else f"{name}.{generation}"


# A layer; the payloads of a plain one; the mark of one that gc removed, whose number must not be used again.
LAYER, RAW, GONE = ".layer", ".raw", ".gone"


def layer_seq(name: str) -> int | None:
    """Return the seq in the name of a chain's file; None for any other file."""
    stem, suffix = os.path.splitext(name)
    if (
        suffix not in (LAYER, RAW, GONE)
        or not stem.isascii()
        or not stem.isdecimal()
        or name != layer_name(int(stem), suffix)
    ):
        return None
    return int(stem)


def layer_name(seq: int, suffix: str = LAYER) -> str:
    """Return the name of a chain's file."""
    return f"{seq:06d}{suffix}"


def point_id(moment: datetime, ordinal: int) -> str:
    """Return the id of the `ordinal`th point (from 1) of one second."""
    moment = moment.astimezone(UTC)
    stamp = f"{moment.year:04d}" + moment.strftime("%m%dT%H%M%SZ")  # glibc's %Y does not pad
    return stamp if ordinal == 1 else f"{stamp}-{ordinal}"


def point_key(point: str) -> tuple[str, int] | None:
    """Return what points are ordered by, or None when `point` is not a point's id."""
    match = _POINT.fullmatch(point)
    if match is None:
        return None
    try:
        datetime.fromisoformat(match[1])
    except ValueError:
        return None
    return match[1], int(match[2] or 1)
