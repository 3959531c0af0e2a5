"""Options that many commands share, and what they stand for."""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from backupfs.errors import UsageError
from backupfs.repository.repository import Repository

F = TypeVar("F", bound=Callable[..., Any])


def set_repository(ctx: click.Context, _: click.Parameter | None, value: str | None) -> None:
    if value == "":
        raise UsageError("-r names no repository: it is empty")
    if value:
        ctx.ensure_object(dict)["repository"] = value


def repository_option(function: F) -> F:
    """Add -r, which may stand before or after the command's name."""
    return click.option(
        "-r",
        "--repository",
        metavar="FOLDER",
        expose_value=False,
        callback=set_repository,
        help="The repository; without it, BACKUPFS_REPOSITORY.",
    )(function)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


scratch_option = click.option(
    "--scratch",
    default="/var/tmp",  # noqa: S108, private folders are made in it
    show_default=True,
    metavar="FOLDER",
    help="Where what the guest overwrites meanwhile is kept; better not where its disks are.",
)


def repository_path() -> str:
    path = click.get_current_context().ensure_object(dict).get("repository") or os.environ.get("BACKUPFS_REPOSITORY")
    if not path:
        raise UsageError("no repository named: use -r FOLDER or set BACKUPFS_REPOSITORY")
    return str(path)


def open_repository() -> Repository:
    return Repository.open(repository_path())


def pairs(texts: Iterable[str], what: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key or not value:
            raise UsageError(f"{text!r} is not {form}")
        if key in pairs:
            raise UsageError(f"{what}: disk {key!r} is named twice")
        pairs[key] = value
    return pairs
