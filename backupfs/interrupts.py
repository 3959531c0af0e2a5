"""Keeping a Ctrl-C away from what must not be broken off in the middle."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the block is over. Off the main thread there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # Only what raises has to wait: an ignored signal, or one that ends the process, stays as it is.
    handlers = {n: h for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(h := signal.getsignal(n))}
    try:
        for number in handlers:
            signal.signal(number, lambda came_number, frame: came.append(came_number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came_number in dict.fromkeys(came):
            signal.raise_signal(came_number)
