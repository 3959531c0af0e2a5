"""The program `backupfs`, and `python -m backupfs`."""

import os
import signal

_INTERRUPTED = 130  # errors.INTERRUPTED, which is not imported yet


def main() -> None:
    """Load the modules and run the command line."""
    # That takes a third of a second, in which nothing has begun that would have to be undone.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    from backupfs.cli import main as run  # noqa: PLC0415, see above

    run()


if __name__ == "__main__":
    main()
