"""Who waits for requests: awake while they come close together, asleep else."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from backupfs.fuse import polling
from backupfs.fuse.polling import AdaptivePolling


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def spent(waiting: AdaptivePolling, pipe: tuple[int, int], after_s: float) -> float:
    """Return the processor time that it takes this thread to wait so long for a byte."""
    timer = threading.Timer(after_s, os.write, (pipe[1], b"x"))
    timer.start()
    before = time.thread_time()
    waiting.wait()
    took = time.thread_time() - before
    assert os.read(pipe[0], 1) == b"x"
    timer.join()
    return took


@pytest.mark.parametrize("processors", [1, 2])
def test_it_stays_awake_for_what_comes_close_together(
    pipe: tuple[int, int], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setattr(polling, "_AWAKE_NS", 200_000_000)
    waiting = AdaptivePolling(pipe[0])
    assert spent(waiting, pipe, 0.05) < 0.02, "nothing came before"
    assert (spent(waiting, pipe, 0.1) > 0.03) == (processors > 1)
    assert spent(waiting, pipe, 0.5) < 0.3, "until it is late"
    assert spent(waiting, pipe, 0.1) < 0.02, "asleep behind one that was late"
    assert (spent(waiting, pipe, 0.1) > 0.03) == (processors > 1)


def test_it_returns_when_the_other_side_is_gone() -> None:
    ours, theirs = os.pipe()
    waiting = AdaptivePolling(ours)
    os.close(theirs)
    waiting.wait()
    assert os.read(ours, 1) == b""
    os.close(ours)
