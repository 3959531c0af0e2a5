"""The benchmark of reads, as small as it gets: all who are compared show the same bytes, and its overlays are sound."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

_BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"
_SMALL = ["--quick", "--rounds", "1", "--size", "16MiB", "--seconds", "0.05", "--deltas", "3"]
_LIMIT_S = 240
_OF_ALL = {"none", "zstd", "pyfuse3", "passthrough", "qemu", "qemu-threads", "nbdfuse", "native"}

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("fio"), reason="mounts, empties the page cache, and reads by fio"
)


def measure(folder: Path, *options: str) -> dict[str, dict[tuple[str, int], dict[str, object]]]:
    """Run `tools/bench read`, its data kept in a folder; return the lines of its JSON by workload and deltas."""
    facts = folder / "facts.json"
    bench(folder, "read", *_SMALL, "--data", str(folder / "data"), "--json", str(facts), *options)
    return {(line["workload"], line["deltas"]): line for line in json.loads(facts.read_text())["lines"]}


def bench(folder: Path, *words: str) -> str:
    """Run `tools/bench`; return what it said."""
    command = [sys.executable, str(_BENCH), *words, "--dir", str(folder / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            said, _ = running.communicate(timeout=_LIMIT_S)
        except BaseException:
            running.terminate()  # it takes its mounts away
            raise
    assert running.returncode == 0, said
    assert list((folder / "work").iterdir()) == []
    return said


def test_two_workloads(tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    only = [f"--only={name}" for name in ("random-direct-4", "walk")]
    lines = measure(tmp_path, *only, "--chart", str(chart))
    assert sorted(lines) == [("random-direct-4", 3), ("walk", 3)]
    # That they read the same bytes the benchmark itself has seen to: it fails otherwise.
    assert lines["random-direct-4", 3]["contenders"].keys() == _OF_ALL
    assert lines["walk", 3]["contenders"].keys() >= {"none", "zstd", "qemu", "native"}
    for line in lines.values():
        for cell in line["contenders"].values():
            assert len(cell["values"]) == 1
            assert cell["values"][0] > 0

    overlays = sorted((tmp_path / "data").glob("*/qcow2/*.qcow2"))
    assert len(overlays) == 2 * 4
    for overlay in overlays:
        subprocess.run(["qemu-img", "check", "-q", str(overlay)], check=True)
    circles = ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 2 * 5  # none, zstd, pyfuse3, QEMU and nbdfuse; and the legend


def test_what_else_there_is(tmp_path: Path) -> None:
    said = bench(tmp_path, "restore", "--quick", "--rounds", "1", "--size", "16MiB")
    assert sum(line.startswith("restore to") for line in said.splitlines()) == 4
    assert sum(line.startswith("verify, ") and "memory" in line for line in said.splitlines()) == 4
    said = bench(tmp_path, "space", "--quick")
    assert sum("kept over seen" in line for line in said.splitlines()) == 4
