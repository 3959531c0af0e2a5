"""Mount namespaces of the tests' own that keep no other test's mounts.

A new one has all that is mounted at that moment, by tests beside this one too, and keeps it there after they have
unmounted it: a file system whose copy the kernel takes for the same one, or which is not written back. So one is made
before the first test mounts anything, and what needs one of its own begins from there.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

LET_MOUNTS_GO = r"""
cat /proc/self/mounts | while read -r source target type rest; do
  case "$source $type" in /dev/loop*|*" fuse"*) [ "$target" = / ] || umount --lazy "$(printf %b "$target")" || :;; esac
done
"""
"""For the shell in one that had to see what was mounted at that moment."""

_KEEPER = "BACKUPFS_TEST_MOUNTS"  # in the environment: the process whose namespace it is


def keep() -> "subprocess.Popen[bytes] | None":
    """Make the namespace, and keep it until the process that is returned ends; None: it can't be made."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "nsenter"))):
        return None
    command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "sleep", "infinity"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            return None  # a container may refuse
        time.sleep(0.01)
    os.environ[_KEEPER] = str(process.pid)
    return process


def in_a_new_one(*options: str, from_here: bool = False) -> list[str]:
    """Return what to put before a command that is to have a mount namespace of its own.

    Args:
        options: of unshare(1), more.
        from_here: it has to see what is mounted now.
    """
    keeper = os.environ.get(_KEEPER)
    begin = ["nsenter", f"--target={keeper}", "--mount"] if keeper and not from_here else []
    return [*begin, "unshare", "--mount", *options]
