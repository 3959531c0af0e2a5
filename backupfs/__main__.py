"""The program `backupfs`, and `python -m backupfs`."""

import os
import signal
import sys

_INTERRUPTED = 130  # errors.INTERRUPTED, which is not imported yet


def have_standard_streams() -> None:
    """Open those of descriptors 0, 1 and 2 that are closed. Else the next file that is opened, maybe a layer, is under
    such a number, and what a library has to say to stderr gets into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it is the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def main() -> None:
    """Load the modules and run the command line."""
    have_standard_streams()
    # That takes a third of a second, in which nothing has begun that would have to be undone.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    from backupfs.cli import main as run  # noqa: PLC0415, see above

    run()


if __name__ == "__main__":
    main()
