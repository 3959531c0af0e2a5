"""The command line: parse, call a service, print. The only place that prints errors and exits."""

import io
import logging
import os
import resource
import signal
import sys
from typing import Any

import click

from backupfs import __version__
from backupfs.cli import check, edit, files, hydrate, keep, look, mounts, restore, take
from backupfs.cli.options import repository_option, set_repository
from backupfs.errors import INTERRUPTED, BackupfsError

_SECTIONS = {
    "Take backups": [take.init, take.backup],
    "Look": [look.points, look.show, look.map_, look.diff],
    "Mount": [mounts.mount, mounts.live, mounts.umount, hydrate.hydrate, hydrate.dehydrate],
    "Get back": [restore.restore, files.ls, files.cp, files.find, files.history],
    "Keep": [edit.edit, keep.delete, keep.prune, keep.gc],
    "Check": [check.status, check.verify],
    "Repair": [keep.reindex],
}


class SectionedGroup(click.Group):
    """Lists the commands by the work that they do."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections of --help."""
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(80)) for c in commands])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Take `backupfs REPO MOUNTPOINT [-o OPTIONS]`, mount(8)'s way to call, for `-r REPO mount MOUNTPOINT`."""
        if len(args) >= 2 and args[0] not in self.commands and "/" in args[0]:
            set_repository(ctx, None, args[0])
            args = ["mount", *args[1:]]
        return super().resolve_command(ctx, args)


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@repository_option
@click.version_option(__version__, message="backupfs %(version)s")
def cli() -> None:
    """Take agentless backups of KVM disks; mount every backup point as a read-only raw disk.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 10 not found, 11 locked, 12 unsupported format, 20 damaged,
    30 no connection to a source, 31 a source's error, 32 bitmap unusable, 40 mount failed,
    50 a guest's files can't be read, 130 interrupted.
    """


for _commands in _SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _prepare() -> None:
    logging.basicConfig(format="backupfs: %(levelname)s: %(message)s", level=logging.WARNING)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # trio asks for this one
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)  # what was set up in a machine must be undone
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a path that is not UTF-8; JSON has the same escape
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a repository keeps its layers open


def main() -> None:
    """Run the program and exit with its code."""
    try:
        _prepare()
        cli(standalone_mode=False, prog_name="backupfs")
    except BackupfsError as e:
        _fail(str(e), e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as e:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))  # a second one: all is undone already
        # One that came while a string was executed, as `dataclass` does, makes `python -m` end by SIGINT and not with
        # our code, even if it was caught; unless a later string ends well. Source: CPython 3.11, run_eval_code_obj.
        exec("")  # noqa: S102
        # What is left, where it is not nothing. click raises its Abort from the interrupt.
        words = str(e.__cause__ if isinstance(e, click.Abort) else e)
        _fail(f"interrupted; {words or 'nothing is left half published'}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as e:  # that nobody put into words: a full disk behind stdout, no descriptors left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what could not be written would be tried again at the exit
        _fail(f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"backupfs: {message}", err=True)
    sys.exit(code)
