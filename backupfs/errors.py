"""The exceptions that backupfs raises on purpose, and the exit code of each.

Adapters turn a library's exception into one of these with `raise … from`. Only `cli/` prints them and exits; only
`fuse/operations.py` turns them into an errno. A message names the thing, the place and what to do next.
"""


class BackupfsError(Exception):
    """What went wrong, told to a person in one line."""

    exit_code = 1


class UsageError(BackupfsError):
    """The command line or an argument makes no sense."""

    exit_code = 2


class RepositoryError(BackupfsError):
    """The repository refuses, or can't do what was asked (for one: no space)."""


class NotFound(RepositoryError):
    """No such repository, VM, point or disk: what the user named. A file that a manifest names: `Missing`."""

    exit_code = 10


class Locked(RepositoryError):
    """Another process holds the writer lock."""

    exit_code = 11


class UnsupportedFormat(RepositoryError):
    """The repository was written in a format version, or with a codec, that this program does not know."""

    exit_code = 12


class Corrupt(RepositoryError):
    """Stored bytes are not what was written.

    Args:
        file: the damaged file's path.
        offset: where in that file, bytes.
        what: what is wrong there.
    """

    exit_code = 20

    def __init__(self, file: str, offset: int, what: str) -> None:
        super().__init__(f"{file}: damaged at offset {offset}: {what}")
        self.file = file
        self.offset = offset
        self.what = what


class Missing(Corrupt):
    """A file that a manifest names is not there: damage, as if all of its bytes were wrong.

    Args:
        file: its path.
        what: it is, and what to do.
    """

    def __init__(self, file: str, what: str) -> None:
        super().__init__(file, 0, what)
        self.args = (f"{file}: {what}",)


class SourceError(BackupfsError):
    """The place that the disk's bytes come from failed."""


class ConnectError(SourceError):
    """The source can't be opened, or it stopped answering."""

    exit_code = 30


class ProtocolError(SourceError):
    """The source answered, with an error or with nonsense."""

    exit_code = 31


class BitmapUnusable(SourceError):
    """The dirty bitmap can't be trusted: all of the disk has to be read."""

    exit_code = 32


class GuestError(BackupfsError):
    """What a guest made of its disk can't be read: damaged, of an unknown kind, or its parser died or took too long."""

    exit_code = 50


class TargetError(BackupfsError):
    """The file or device that a disk is restored to can't be written, or must not be."""


class MountError(BackupfsError):
    """Mounting or unmounting failed."""

    exit_code = 40


INTERRUPTED = 130  # exit code after Ctrl-C, as a shell counts it (128 + SIGINT)
