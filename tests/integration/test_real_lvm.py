"""Volume groups that LVM2 itself made, on loop devices. Nothing is activated, so no device mapper is needed."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from images import BytesImage
from servers import need, run

from backupfs.guest.scan import Division, scan
from backupfs.guest.volumes import assemble
from backupfs.units import KiB, MiB

pytestmark = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="loop devices are root's")

SIZE = 40 * MiB
_CONFIG = """
devices {{ dir = "/dev" scan = ["/dev"] use_devicesfile = 0 obtain_device_list_from_udev = 0 filter = [ {filter} ] }}
activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}
backup {{ backup = 0 archive = 0 }}
global {{ locking_dir = "{folder}/lock" event_activation = 0 use_lvmpolld = 0 }}
"""


@dataclass
class Lvm:
    """LVM2, which sees only the loop devices of one test."""

    folder: Path
    files: list[Path]
    loops: list[str] = field(default_factory=list)

    def __call__(self, command: str, *words: str) -> str:
        """Run a command of LVM's that must not need the device mapper."""
        environment = {**os.environ, "LVM_SYSTEM_DIR": str(self.folder), "LVM_SUPPRESS_FD_WARNINGS": "1"}
        arguments = ["lvm", command, "--driverloaded", "n", *words]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, stdin=-3, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def segments(self) -> dict[str, list[tuple[int, str, int, list[tuple[str, int]]]]]:
        """Return each volume's segments as LVM reports them: bytes, type, stripe size, (device, extent) of each leg."""
        fields = "lv_name,seg_size,segtype,stripe_size,devices,seg_start"
        words = ["--units", "b", "--nosuffix", "--reportformat", "json", "-o", fields, "--segments"]
        report = json.loads(self("lvs", *words))["report"][0]["seg"]
        found: dict[str, list[tuple[int, str, int, list[tuple[str, int]]]]] = {}
        for s in sorted(report, key=lambda s: int(s["seg_start"])):
            legs = [(d.partition("(")[0], int(d.partition("(")[2][:-1])) for d in s["devices"].split(",")]
            found.setdefault(s["lv_name"], []).append((int(s["seg_size"]), s["segtype"], int(s["stripe_size"]), legs))
        return found

    def data_starts(self) -> dict[str, int]:
        """Return where the extents of each device begin, in bytes."""
        words = ["--units", "b", "--nosuffix", "--reportformat", "json", "-o", "pv_name,pe_start"]
        return {pv["pv_name"]: int(pv["pe_start"]) for pv in json.loads(self("pvs", *words))["report"][0]["pv"]}

    def contents(self) -> dict[str, bytes]:
        """Return the disks, whose data areas are random bytes."""
        run("sync", *self.files)
        contents = {}
        for i, path in enumerate(self.files):
            content = path.read_bytes()
            contents[f"vd{'abc'[i]}"] = content[: 1 * MiB] + random.Random(i).randbytes(SIZE - 1 * MiB)
        return contents


@contextmanager
def lvm(folder: Path, devices: int) -> Iterator[Lvm]:
    need("lvm", "losetup")
    files = [folder / f"disk{i}" for i in range(devices)]
    (folder / "lock").mkdir()
    made = Lvm(folder, files)
    with ExitStack() as stack:
        for path in files:
            path.touch()
            os.truncate(path, SIZE)
            made.loops.append(run("losetup", "--find", "--show", path).strip())
            stack.callback(run, "losetup", "--detach", made.loops[-1])
        accepted = ", ".join([*(f'"a|^{loop}$|"' for loop in made.loops), '"r|.*|"'])
        (folder / "lvm.conf").write_text(_CONFIG.format(filter=accepted, folder=folder))
        yield made


def said_by_lvm(made: Lvm, extent: int, contents: dict[str, bytes]) -> dict[str, bytes]:
    """Put the volumes together as LVM's report says, a stripe at a time."""
    starts, disks = made.data_starts(), dict(zip(made.loops, contents.values(), strict=True))
    volumes = {}
    for name, segments in made.segments().items():
        content = bytearray()
        for size, kind, stripe, legs in segments:
            assert kind in ("linear", "striped")
            each, step = size // len(legs), stripe or size
            for position in range(0, each, step):
                for device, first in legs:
                    at = starts[device] + first * extent + position
                    content += disks[device][at : at + min(step, each)]
        volumes[name] = bytes(content)
    return volumes


def ours(contents: dict[str, bytes]) -> tuple[dict[str, Division], dict[str, bytes]]:
    """Return what is found on the disks, and the bytes of the logical volumes."""
    images = {name: BytesImage(content) for name, content in contents.items()}
    found = scan(images)
    volumes = {}
    for division in found.values():
        for volume in division.volumes:
            buffer = bytearray(volume.size)
            assemble(volume, images).readinto(0, buffer)
            assert volumes.setdefault(volume.name, bytes(buffer)) == buffer or volume.name == "0"
    volumes.pop("0", None)
    return found, volumes


NEW = ("-an", "-Zn", "-Wn", "-y")


def test_linear_and_striped_volumes_over_three_disks(tmp_path: Path) -> None:
    with lvm(tmp_path, 3) as made:
        made("pvcreate", *made.loops)
        made("vgcreate", "--physicalextentsize", "1M", "a-b", *made.loops)
        made("lvcreate", *NEW, "-n", "root", "-l", "20", "a-b", made.loops[0])
        made("lvcreate", *NEW, "-n", "fast", "-i", "2", "-I", "64k", "-l", "10", "a-b", made.loops[0], made.loops[1])
        made("lvcreate", *NEW, "-n", "wide.+_1", "-i", "3", "-I", "4k", "-l", "9", "a-b")
        made("lvcreate", *NEW, "-n", "rest", "-l", "100%FREE", "a-b")
        contents = made.contents()
        expected = said_by_lvm(made, 1 * MiB, contents)
        found, volumes = ours(contents)
    assert volumes == {f"a--b-{name}": content for name, content in expected.items()}
    assert set(expected) == {"root", "fast", "wide.+_1", "rest"}
    assert len(volumes["a--b-rest"]) > SIZE
    assert [division.problems for division in found.values()] == [()] * 3
    assert found["vda"].volumes[0].name == "0"
    assert "a--b-root" not in [v.name for v in found["vdc"].volumes]


def test_volumes_that_grew_and_went(tmp_path: Path) -> None:
    """Each change writes the text anew, further on in its area, until it wraps around."""
    with lvm(tmp_path, 2) as made:
        made("pvcreate", "--metadatasize", "64k", "--metadatacopies", "2", made.loops[0])
        made("pvcreate", "--metadatacopies", "0", made.loops[1])
        made("vgcreate", "--physicalextentsize", "128k", "vg", *made.loops)
        for i in range(12):
            made("lvcreate", *NEW, "-n", f"v{i}", "-l", "3", "vg", made.loops[i % 2])
        for i in range(0, 12, 3):
            made("lvremove", "-y", f"vg/v{i}")
        for i in range(1, 12, 3):
            made("lvextend", "-l", "+7", f"vg/v{i}")
        made("vgrename", "vg", "data")
        contents = made.contents()
        expected = said_by_lvm(made, 128 * KiB, contents)
        found, volumes = ours(contents)
    assert volumes == {f"data-{name}": content for name, content in expected.items()}
    assert len(volumes) == 8
    assert any(len(v.runs) > 1 for division in found.values() for v in division.volumes)


def test_a_disk_is_missing(tmp_path: Path) -> None:
    with lvm(tmp_path, 2) as made:
        made("pvcreate", *made.loops)
        made("vgcreate", "vg", *made.loops)
        made("lvcreate", *NEW, "-n", "here", "-l", "2", "vg", made.loops[0])
        made("lvcreate", *NEW, "-n", "there", "-l", "2", "vg", made.loops[1])
        made("lvcreate", *NEW, "-n", "both", "-i", "2", "-l", "2", "vg")
        contents = made.contents()
        expected = said_by_lvm(made, 4 * MiB, contents)
    del contents["vdb"]
    found, volumes = ours(contents)
    assert volumes == {"vg-here": expected["here"]}
    assert [problem.partition(":")[0] for problem in found["vda"].problems] == ["vg/there", "vg/both"]
    assert all("is on no disk of this point" in problem for problem in found["vda"].problems)
