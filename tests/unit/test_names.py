"""Names: what is refused, and that an accepted one comes back from its path component."""

import os
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.errors import UsageError
from backupfs.repository import names


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "a\nb",
        "a\0b",
        "a\x1b[31m",
        "x" * 300,
        "é" * 90,
        " a",
        "a ",
        "-rf",
        "\ud800",
        "a\u202eb",
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        names.check_name(name, "VM")


@pytest.mark.parametrize("name", ["web01", "Büro-Server 2", "日本", ".hidden", "a%2Fb", "x" * 240, "a=b", "*?[$`'\"\\"])
def test_good_names_become_one_safe_path_component(name: str) -> None:
    component = names.escape(names.check_name(name, "VM"))
    assert os.path.basename(component) == component
    assert component.isascii()
    assert not component.startswith(".")
    assert len(component) <= 255
    assert names.unescape(component) == name


@given(st.text())
def test_every_name_is_refused_or_comes_back(name: str) -> None:
    try:
        names.check_name(name, "disk")
    except UsageError:
        return
    assert names.unescape(names.escape(name)) == name


@pytest.mark.parametrize("component", ["%", "%zz", "a b", "%2e", "é", "%ff", ".git"])
def test_foreign_files_are_no_names(component: str) -> None:
    assert names.unescape(component) is None


def test_points_are_ordered_by_time_and_ordinal() -> None:
    moment = datetime(2026, 11, 22, 21, 0, tzinfo=timezone(timedelta(hours=1)))
    ids = [names.point_id(moment, n) for n in (1, 2, 10)]
    assert ids == ["20261122T200000Z", "20261122T200000Z-2", "20261122T200000Z-10"]
    assert sorted(ids, key=lambda i: names.point_key(i) or ("", 0)) == ids
    assert names.point_id(datetime(2026, 1, 2, tzinfo=UTC), 1) == "20260102T000000Z"


@pytest.mark.parametrize(
    "point", ["latest", "20261122T200000Z-0", "20261122T200000Z-x", "../x", "", "２０２６1122T200000Z"]
)
def test_other_texts_are_no_points(point: str) -> None:
    assert names.point_key(point) is None


@pytest.mark.parametrize("chain", ["", "a.b", "a/b", "-x", "é", "x" * 65])
def test_bad_chain_names_are_refused(chain: str) -> None:
    with pytest.raises(UsageError):
        names.check_chain(chain)


def test_generations_of_a_chain() -> None:
    assert names.chain_of("weekly") == ("weekly", 1)
    assert names.chain_of("weekly.12") == ("weekly", 12)
    assert [names.chain_named("weekly", n) for n in (1, 2)] == ["weekly", "weekly.2"]


def test_files_of_a_chain() -> None:
    for seq, name in ((0, "000000.layer"), (123456, "123456.layer"), (1234567, "1234567.layer")):
        assert names.layer_name(seq) == name
        assert names.layer_seq(name) == seq
    assert names.layer_seq(names.layer_name(7, names.GONE)) == 7
    for name in (
        "0.layer",
        "0000000.layer",
        "000000",
        "x.layer",
        "-00001.layer",
        "000001.layer.gone",
        "000001.x",
        "00000².gone",
    ):
        assert names.layer_seq(name) is None
