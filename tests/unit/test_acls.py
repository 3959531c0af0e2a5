"""What the kernel takes for an ACL, and for whom it may go by them."""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from backupfs.fuse.acls import is_sound, passes_permissions

NOBODY = 2**32 - 1
BASE = [(0x01, 6, NOBODY), (0x04, 4, NOBODY), (0x20, 4, NOBODY)]
NAMED = [(0x01, 6, NOBODY), (0x02, 6, 1000), (0x04, 4, NOBODY), (0x08, 7, 5), (0x10, 6, NOBODY), (0x20, 4, NOBODY)]


def packed(entries: list[tuple[int, int, int]], version: int = 2) -> bytes:
    return struct.pack("<I", version) + b"".join(struct.pack("<2HI", *entry) for entry in entries)


def damaged(chance: random.Random) -> bytes:
    entries = list(chance.choice((BASE, NAMED)))
    at = chance.randrange(len(entries))
    tag, permissions, who = entries[at]
    match chance.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries.insert(at, chance.choice(entries))
        case 2:
            entries[at] = (chance.choice((0, 1, 2, 3, 4, 8, 0x10, 0x20, 0x40, 0xFFFF)), permissions, who)
        case 3:
            entries[at] = (tag, chance.randrange(2**16), who)
        case 4:
            entries[at] = (tag, permissions, chance.choice((0, 77, NOBODY)))
        case 5:
            chance.shuffle(entries)
        case 6:
            return packed(entries)[: chance.randrange(4, 52)]
    return packed(entries)


def test_sound_is_what_the_kernel_takes(tmp_path: Path) -> None:
    file, chance, counts = tmp_path / "file", random.Random(1), [0, 0]
    file.touch()
    try:
        os.setxattr(file, "system.posix_acl_access", packed(NAMED))
    except OSError:
        pytest.skip(f"no ACLs in {tmp_path}")
    for _ in range(3000):
        acl = damaged(chance)
        try:
            os.setxattr(file, "system.posix_acl_access", acl)
            taken = True
        except OSError:
            taken = False
        assert is_sound(acl) == taken, acl
        counts[taken] += 1
    assert min(counts) > 500


def test_what_the_kernel_has_no_room_for_or_does_not_know() -> None:
    assert is_sound(packed(NAMED))
    assert not is_sound(packed([NAMED[0], *(NAMED[1],) * 600, *NAMED[2:]]))
    assert not is_sound(packed(NAMED, version=1))
    assert not is_sound(b"")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_passes_permissions() -> None:
    code = "from backupfs.fuse.acls import passes_permissions; print(passes_permissions())"

    def asked(*prefix: str) -> str:
        return subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert passes_permissions()
    assert asked() == "True\n"
    assert asked("setpriv", "--bounding-set=-dac_override") == "False\n"
    assert asked("setpriv", "--bounding-set=-dac_read_search") == "False\n"
    assert asked("unshare", "--user", "--map-root-user") == "False\n"
    code = code.replace("print", "import os; os.setresuid(65534, 65534, 65534); print")
    assert asked() == "False\n"
