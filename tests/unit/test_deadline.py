"""Calls with a deadline: what comes back, and what happens to those that do not."""

import threading

import pytest

from backupfs.errors import ConnectError
from backupfs.sources.deadline import Caller


def test_results_and_errors_come_back() -> None:
    caller = Caller("peer", 5)
    assert caller.call("add", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        caller.call("divide", lambda: 1 / 0)
    caller.end(lambda: None)


def test_a_call_that_blocks_is_given_up_and_later_ones_never_overtake_it() -> None:
    caller, gate, order = Caller("peer", 0.05), threading.Event(), list[str]()

    def blocked() -> None:
        gate.wait()
        order.append("blocked")

    with pytest.raises(ConnectError, match=r"wait: peer did not answer within 0\.05 s"):
        caller.call("wait", blocked)
    with pytest.raises(ConnectError, match="more: peer still does not answer"):
        caller.call("more", lambda: order.append("refused"))
    ended = threading.Event()
    caller.end(lambda: (order.append("end"), ended.set()))
    gate.set()
    assert ended.wait(5)
    assert order == ["blocked", "end"]


def test_a_call_that_came_late_frees_the_way() -> None:
    caller, gate = Caller("peer", 0.05), threading.Event()
    with pytest.raises(ConnectError):
        caller.call("wait", gate.wait)
    gate.set()
    while True:
        try:
            assert caller.call("again", lambda: 7, timeouts=100) == 7
            break
        except ConnectError as e:
            assert "still" in str(e)  # noqa: PT017, it may take a moment
    caller.end(lambda: None)
