"""The units of tools/systemd: systemd takes them, and what they run are commands and options that there are."""

import os
import re
import subprocess
from pathlib import Path

import click
import pytest
from commands import BACKUPFS
from commands import backupfs as backupfs_
from mounts import needs_fuse, unmount_all, wait_until
from servers import need, run

import backupfs
from backupfs.cli import cli
from backupfs.fuse import mountpoint
from backupfs.repository import catalog
from backupfs.units import MiB

UNITS = sorted((Path(backupfs.__file__).parent.parent / "tools" / "systemd").iterdir())
SERVICES = [u for u in UNITS if u.suffix == ".service"]
PROGRAM = "/usr/local/bin/backupfs"


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_systemd_takes_it(unit: Path, tmp_path: Path) -> None:
    need("systemd-analyze")
    for other in UNITS:  # a timer is checked with its service
        # The program need not be installed.
        text = other.read_text().replace(PROGRAM, "/bin/true")
        (tmp_path / other.name.replace("@", "@web01")).write_text(text)
    path = tmp_path / unit.name.replace("@", "@web01")
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda p: p.name)
def test_all_have_one_cache_that_they_may_write_to(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of a repository on NFS is there, and the units' home is read-only."""
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"[A-Z]\w+=", line))
    name, _, folder = settings["Environment"].partition("=")
    monkeypatch.setenv(name, folder)
    # Where systemd makes it. Source: systemd.exec(5), CacheDirectory=
    assert catalog.cache_folder() == f"/var/cache/{settings['CacheDirectory']}"


@needs_fuse
def test_the_mount_has_the_rights_that_it_needs(tmp_path: Path) -> None:
    """Guests' files are read by a process that becomes nobody, and is killed in the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    unit = next(unit for unit in SERVICES if unit.name == "backupfs-mount.service")
    wanted = re.findall(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.MULTILINE)[0].split()
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in wanted)])
    (tmp_path / "disk").write_bytes(bytes(4 * MiB))
    run("mkfs.ext2", "-q", "-F", "-d", Path(__file__).parent, tmp_path / "disk")
    backupfs_(tmp_path / "repo", "init")
    backupfs_(tmp_path / "repo", "backup", "web01", f"vda={tmp_path / 'disk'}")
    mnt, log = tmp_path / "mnt", tmp_path / "log"
    mnt.mkdir()
    command = ["setpriv", f"--bounding-set={bounds}", "--no-new-privs", *BACKUPFS, "-r", tmp_path / "repo"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "mount", "--foreground", mnt], stderr=file)
    try:
        wait_until(lambda: mountpoint.find(str(mnt)) is not None)
        assert Path(__file__).name in os.listdir(mnt / "web01/latest/vda.files/0")
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        unmount_all(str(mnt))
    assert "ERROR" not in log.read_text()


@pytest.mark.parametrize("unit", SERVICES, ids=lambda p: p.name)
def test_the_commands_are_there(unit: Path) -> None:
    found = re.findall(rf"^Exec\w+=-?{PROGRAM} (\w+)(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    for name, words in found:
        command = cli.commands[name]
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", words)) <= options
