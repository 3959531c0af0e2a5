"""The names of what records changes."""

import pytest

from backupfs.sources.machine import Recorders

REPOSITORY = "0123456789abcdef0123456789abcdef"


def test_a_name_is_made_once() -> None:
    """Two copies of a repository may take a point at the same time: each has its own recorder."""
    first, second = (Recorders(REPOSITORY, "main", "20260101T000000Z") for _ in range(2))
    assert first.new != second.new
    assert first.of("vda").new != first.of("vdb").new
    assert first.of("vda").new == first.of("vda").new


@pytest.mark.parametrize("disk", ["", "vda", "2", "a-b"])
def test_a_chain_knows_its_own_names(disk: str) -> None:
    names = Recorders(REPOSITORY, "main", "20260101T000000Z-2").of(disk)
    assert names.new.startswith("backupfs-01234567-main-20260101T000000Z-2-")
    assert names.owns(names.new)
    for other in (Recorders(REPOSITORY, "weekly", names.point), Recorders(REPOSITORY[::-1], "main", names.point)):
        assert not other.owns(names.new)
    assert not Recorders(REPOSITORY, "main-2", names.point).owns(names.new)
    assert not names.owns(Recorders(REPOSITORY, "main-2", names.point).new)
    assert not names.owns("backupfs-01234567-main")
