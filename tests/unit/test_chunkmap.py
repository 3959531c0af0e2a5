"""Which version of a chunk shows: `resolve` against a walk from record to record."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backupfs.repository.chunkmap import POSITION, resolve
from backupfs.repository.format import RECORD, REGION_CHUNKS, Rows


@st.composite
def regions(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Records (chunk, seq, run, packed); a layer has each chunk at most once. packed 0 is zero."""
    found = []
    for seq in draw(st.lists(st.integers(1, 40), unique=True, max_size=12)):
        chunk = draw(st.integers(0, 250))
        while chunk < REGION_CHUNKS:
            zero = draw(st.booleans())
            run = min(draw(st.integers(1, 80)), REGION_CHUNKS - chunk) if zero else 1
            found.append((chunk, seq, run, 0 if zero else seq * 1000 + chunk + 1))
            chunk += run + draw(st.integers(0, 120))
    return sorted(found)


@given(regions(), st.integers(0, 41))
def test_the_newest_visible_version_shows(records: list[tuple[int, int, int, int]], seq: int) -> None:
    expected = [(0, 7)] * REGION_CHUNKS  # (seq, packed): the base
    for chunk, version, run, packed in sorted(records, key=lambda r: r[1]):
        if version <= seq:
            expected[chunk : chunk + run] = [(version if packed else 0, packed)] * run
    array: Rows = np.zeros(len(records), RECORD)
    for field, i in (("chunk", 0), ("seq", 1), ("run", 2), ("packed", 3)):
        array[field] = [r[i] for r in records]
    positions = np.zeros(REGION_CHUNKS, POSITION)
    positions["packed"] = 7
    resolve(array["chunk"].astype(np.intp), array, seq, positions)
    assert list(zip(positions["seq"].tolist(), positions["packed"].tolist(), strict=True)) == expected
