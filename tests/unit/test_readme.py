"""The README's commands against the program's own."""

import re
from pathlib import Path

import click
import pytest

import backupfs
from backupfs import errors
from backupfs.cli import cli

README = (Path(backupfs.__file__).parent.parent / "README.md").read_text()
ROWS = dict(re.findall(r"^\| `backupfs (\w+)([^`]*)` \|", README, re.MULTILINE))


def test_the_table_has_every_command() -> None:
    assert set(ROWS) == set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_a_commands_options_are_those_of_the_table(name: str) -> None:
    command = cli.commands[name]
    options = {
        o
        for p in command.params
        if isinstance(p, click.Option)
        for o in (*p.opts, *p.secondary_opts)
        if o.startswith("--")
    }
    shown = set(re.findall(r"--[a-z-]+", ROWS[name]))
    assert shown == options - {"--repository"}
    assert command.epilog.startswith(("Example: backupfs", "Examples:"))


def test_every_command_in_the_text_exists() -> None:
    used = set(re.findall(r"(?:^\$ |`)backupfs ([a-z]+)", README, re.MULTILINE))
    assert used <= set(cli.commands)


def test_exit_codes_are_those_of_the_table() -> None:
    found = {cls.exit_code for cls in vars(errors).values() if isinstance(cls, type)}
    found |= {0, errors.INTERRUPTED}
    for text in (README, cli.help or ""):
        listed = re.search(r"Exit codes: (.*?130 interrupted)", text, re.DOTALL)
        assert listed
        assert {int(n) for n in re.findall(r"\b(\d+) [a-z]", listed[1])} == found
