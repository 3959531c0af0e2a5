"""Calls that may block for ever, with a deadline: made by one thread, one after the other.

The caller's wait can be broken off at any time, by the deadline or a Ctrl-C. The call itself can't be: it goes on, and
later ones wait behind it. So what undoes a call never overtakes it.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from backupfs.errors import ConnectError

T = TypeVar("T")


class Caller:
    """A thread that makes calls.

    Args:
        peer: who is called, for messages.
        timeout_s: how long a call may take.
    """

    def __init__(self, peer: str, timeout_s: float) -> None:
        self._peer = peer
        self._timeout_s = timeout_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._late: Future[Any] | None = None
        # A daemon: a call that never comes back does not keep the process from ending.
        threading.Thread(target=_work, args=(self._calls,), name=peer, daemon=True).start()

    def call(self, what: str, function: Callable[[], T], *, timeouts: float = 1) -> T:
        """Return what `function` returns, or raise what it raises. From any thread.

        Args:
            what: is being done, for the message.
            timeouts: how many times `timeout_s` it may take.

        Raises:
            ConnectError: no answer in time, to this call or to an earlier one that is still being waited for.
        """
        if self._late is not None and not self._late.done():
            raise ConnectError(f"{what}: {self._peer} still does not answer")
        future: Future[T] = Future()
        self._calls.put((function, future))
        try:
            return future.result(self._timeout_s * timeouts)
        except TimeoutError as e:
            if future.done():
                raise
            self._late = future
            limit = self._timeout_s * timeouts
            raise ConnectError(f"{what}: {self._peer} did not answer within {limit:g} s") from e

    def finish(self, limit_s: float) -> bool:
        """Wait until all calls that were given are over, those too that nobody waits for; return whether they are."""
        over: Future[None] = Future()
        self._calls.put((lambda: None, over))
        try:
            over.result(limit_s)
        except TimeoutError:
            return False
        return True

    def end(self, last: Callable[[], object]) -> None:
        """Let the thread make one last call, after those that it was given, and end. Waits for nothing."""
        self._calls.put((last, Future()))
        self._calls.put(None)


def _work(calls: "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    while (call := calls.get()) is not None:
        function, future = call
        try:
            result = function()
        except BaseException as e:  # noqa: BLE001, the caller's to judge
            with contextlib.suppress(ValueError):
                future.set_exception(e)
        else:
            future.set_result(result)
        del call, function, future
