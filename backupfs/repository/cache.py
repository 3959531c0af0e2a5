"""A bounded cache of byte-like values, least recently used out first. May be called from any thread."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Keeps values whose costs add up to at most `limit` (bytes, or a count where each costs 1)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """Return what was put under `key`, or None."""
        # Without the lock, which would cost more than the rest: both steps are one each for other threads.
        held = self._values.get(key)
        if held is None:
            return None
        if 2 * self._used > self._limit:  # otherwise nothing is about to be dropped
            try:  # noqa: SIM105, suppress() would cost a microsecond of each read
                self._values.move_to_end(key)
            except KeyError:  # dropped in between
                pass
        return held[0]

    def put(self, key: K, value: V, cost: int) -> None:
        """Keep `value`; drop the least recently used ones beyond the limit."""
        with self._lock:
            old = self._values.pop(key, None)
            self._used += cost - (old[1] if old else 0)
            self._values[key] = (value, cost)
            while self._used > self._limit and len(self._values) > 1:
                _, (_, freed) = self._values.popitem(last=False)
                self._used -= freed

    def drop(self, key: K) -> None:
        """Drop what was put under `key`, if anything was."""
        with self._lock:
            _, cost = self._values.pop(key, (None, 0))
            self._used -= cost

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
            self._used = 0
