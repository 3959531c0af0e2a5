"""What qemu-img says about an image, and the persistent bitmaps that it adds and removes."""

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from backupfs import interrupts
from backupfs.errors import ConnectError
from backupfs.units import MiB

_ROOM = 16 * MiB


@dataclass(frozen=True, slots=True)
class StoredBitmaps:
    """A qcow2 image's bitmaps, as its header has them.

    Attributes:
        possible: whether the image can hold any: a qcow2 of version 3 can.
        names: of those that are in it. While QEMU has the image open, what it added since is missing.
        sound: those of them that tell all that changed: they record, they were saved, and no backing file has a part
            of what they know. (libvirt's snapshots begin a bitmap of the same name in the overlay.) None while QEMU
            has the image open.
    """

    possible: bool
    names: tuple[str, ...]
    sound: frozenset[str]


def stored_bitmaps(path: str, timeout_s: float) -> StoredBitmaps:
    """Look at a qcow2 image, which may be in use.

    Raises:
        ConnectError: it can't be looked at.
    """
    words = ["info", "--force-share", "--backing-chain", "--output=json", "--image-opts", f"driver=qcow2,{_file(path)}"]
    chain: list[dict[str, Any]] = json.loads(_run(path, timeout_s, *words))
    top, *backing = [info.get("format-specific", {}).get("data", {}) for info in chain]
    flags = {bitmap["name"]: bitmap["flags"] for bitmap in top.get("bitmaps", ())}
    below = {bitmap["name"] for data in backing for bitmap in data.get("bitmaps", ())}
    sound = {name for name in flags if "auto" in flags[name] and "in-use" not in flags[name]}
    return StoredBitmaps(top.get("compat") != "0.10", tuple(flags), frozenset(sound - below))


def add_bitmap(path: str, name: str) -> None:
    """Add a bitmap that records from now on to a qcow2 image that nobody uses. Raises ConnectError."""
    _change(path, "--add", "--image-opts", f"driver=qcow2,{_file(path)}", name)


def remove_bitmap(path: str, name: str) -> None:
    """Remove a bitmap from a qcow2 image that nobody uses.

    Raises:
        ConnectError: it can't be, or must not (`too_full`).
    """
    if too_full(path):
        raise ConnectError(f"{path}: the file system is too full to remove a bitmap from the image")
    _change(path, "--remove", "--image-opts", f"driver=qcow2,{_file(path)}", name)


def too_full(path: str) -> bool:
    """Say whether an image's file system is too full to remove bitmaps from it.

    QEMU and qemu-img (7.2) write the list of an image's bitmaps anew then. Where there is no space they say that they
    did, and leave an image that is damaged. A bitmap that stays costs only that the next backup reads more. Source:
    QEMU issue 3516
    """
    if not os.path.isabs(path):
        return False
    try:
        space = os.statvfs(path)
    except (OSError, ValueError):
        return False  # not a file, or not in our sight
    return space.f_bavail * space.f_frsize < _ROOM


def _change(path: str, *words: str) -> None:
    """Have qemu-img write to an image. It must not be broken off: Ctrl-C waits, and it has no deadline."""
    with interrupts.deferred():
        _run(path, None, "bitmap", *words)


def _file(path: str) -> str:
    # A comma is doubled. Source: QEMU's manual, -drive. A path with a colon in it is no protocol here.
    return "file.filename=" + path.replace(",", ",,")


def _run(path: str, timeout_s: float | None, *words: str) -> str:
    command = ["qemu-img", *words]
    try:  # in a session of its own a terminal's Ctrl-C does not reach it
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False, start_new_session=True)
    except FileNotFoundError as e:
        raise ConnectError("qemu-img is not installed: install the package qemu-utils") from e
    except subprocess.TimeoutExpired as e:
        raise ConnectError(f"{path}: qemu-img {words[0]} took longer than {timeout_s:g} s") from e
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise ConnectError(f"{path}: {said}")
    return done.stdout.decode(errors="replace")
