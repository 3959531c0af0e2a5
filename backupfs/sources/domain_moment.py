"""A moment of a libvirt domain, running or off: what both have in common."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from backupfs import interrupts
from backupfs.sources.source import Source


@dataclass(slots=True, kw_only=True)
class DomainMoment:
    """A Moment.

    Attributes:
        holds: raises SourceError when the moment does not hold any more.
        publish: has `undo` retire the old recorders instead of the new ones.
        undo: closes the sources, settles which recorders stay, and ends what `begin` began, in this order.
    """

    sources: Mapping[str, Source]
    recorders: Mapping[str, str]
    consistency: Literal["crash", "frozen"]
    domain_xml: str | None
    holds: Callable[[], None]
    publish: Callable[[], None]
    undo: ExitStack

    def check(self) -> None:
        """See `Moment.check`."""
        self.holds()

    def published(self) -> None:
        """See `Moment.published`."""
        self.publish()

    def close(self) -> None:
        """See `Moment.close`."""
        with interrupts.deferred():
            self.undo.close()
