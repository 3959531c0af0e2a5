"""The units of tools/systemd: systemd takes them, and what they run are commands and options that there are."""

import re
import subprocess
from pathlib import Path

import click
import pytest
from servers import need

import backupfs
from backupfs.cli import cli
from backupfs.repository import catalog

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


@pytest.mark.parametrize("unit", SERVICES, ids=lambda p: p.name)
def test_the_commands_are_there(unit: Path) -> None:
    found = re.findall(rf"^Exec\w+=-?{PROGRAM} (\w+)(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    for name, words in found:
        command = cli.commands[name]
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", words)) <= options
