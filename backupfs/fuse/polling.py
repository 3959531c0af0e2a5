"""Adaptive polling: who is asked one question behind the other stays awake between them.

In a virtual machine, to wake a process on a processor that sleeps takes some 30 us, several times what an answer does,
and `ls -l` and rsync ask thousands of times. So the next request is waited for awake, but only while requests do come
that close together: one that is late sends the reader to sleep, and it stays awake again behind the next that is not.
QEMU's event loop does the same (poll-max-ns), and so does Linux itself (guest_halt_poll_ns), where it is allowed to.
"""

import os
import select
import time

_AWAKE_NS = 100_000


class AdaptivePolling:
    """Waits until a descriptor can be read. For one thread.

    Args:
        descriptor: not closed while somebody waits.
    """

    def __init__(self, descriptor: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._alone = len(os.sched_getaffinity(0)) < 2  # who asks could not go on while we are awake
        self._close_together = False

    def wait(self) -> None:
        """Return when there is something to read, or an error to be met."""
        poll, clock = self._poll.poll, time.monotonic_ns
        since = clock()
        if self._close_together:
            until = since + _AWAKE_NS
            while clock() < until:
                if poll(0):
                    return
        poll()
        self._close_together = not self._alone and clock() - since < _AWAKE_NS
