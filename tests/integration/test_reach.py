"""What the points of a chain see, and which ranges of a layer nobody sees, against a walk from chunk to chunk."""

import random
from pathlib import Path

import numpy as np
import pytest

from backupfs.repository import codec, reach, space
from backupfs.repository.format import NO_LAYER, ROW, LayerHeader, LayerId, Rows
from backupfs.repository.layer import Layer, LayerWriter
from backupfs.repository.point import Chain, layer_path

CHUNK, CHUNKS = 4096, 3000
REPOSITORY = bytes(16)

Version = tuple[int, int, int]  # first chunk, chunks, payload's length; 0: zeroes


def layer_id(seq: int) -> LayerId:
    return LayerId(bytes([seq + 1]) * 16)


def write_layer(root: Path, seq: int, parent: int, versions: list[Version], rng: random.Random) -> None:
    path = Path(layer_path(str(root), "vm", "vda", "main", seq))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"vm": "vm", "disk": "vda", "chain": "main"}
    parents = (NO_LAYER, 0) if seq == 0 else (layer_id(parent), parent)
    writer = LayerWriter(
        str(path), LayerHeader(REPOSITORY, layer_id(seq), *parents, seq, CHUNK, CHUNK * CHUNKS, **names)
    )
    parts = [versions[i : i + 7] for i in range(0, len(versions), 7)]
    rng.shuffle(parts)  # a backup's threads write in any order
    for part in parts:
        rows: Rows = np.zeros(len(part), ROW)
        offset = 0
        for row, (chunk, count, length) in zip(rows, part, strict=True):
            row["chunk_no"], row["id0"], row["id1"] = chunk, rng.getrandbits(63), rng.getrandbits(63)
            if length:
                row["offset"], row["length"], row["codec"] = offset, length, codec.ZSTD
            else:
                row["length"], row["codec"], row["id0"], row["id1"] = count, codec.ZERO, 0, 0
            offset += length
        writer.append(rows, [rng.randbytes(length) for _, _, length in part if length])
    writer.finish()


def random_versions(rng: random.Random, *, base: bool) -> list[Version]:
    found: list[Version] = []
    chunk = rng.randrange(9)
    while chunk < CHUNKS:
        zero = not base and rng.random() < 0.2
        count = min(rng.choice([1, 5, 400]), CHUNKS - chunk) if zero else 1
        found.append((chunk, count, 0 if zero else rng.choice([40, 1000, 3000, 4096])))
        chunk += count + (rng.choice([0, 0, 1, 30, 300]) if not base else rng.choice([0, 0, 0, 3]))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_what_is_seen(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(reach, "_WINDOW_ROWS", rng.choice([64, 700, 1 << 17]))
    monkeypatch.setattr(reach, "_OPEN_LAYERS", rng.choice([2, 200]))
    monkeypatch.setattr(space, "_SEGMENT", rng.choice([40960, 1 << 37]))
    monkeypatch.setattr(space, "_ROWS", rng.choice([5, 4096]))
    parents = {0: 0}
    versions = {0: random_versions(rng, base=True)}
    for seq in range(1, 9):
        parents[seq] = rng.choice(list(parents)) if rng.random() < 0.3 else max(parents)
        versions[seq] = random_versions(rng, base=False)
    for seq, parent in parents.items():
        write_layer(tmp_path, seq, parent, versions[seq], rng)
    roots = rng.sample(list(parents), rng.randrange(1, 6))

    seen: dict[int, set[tuple[int, int]]] = {}  # root -> (layer, chunk)
    needed = set()
    for root in roots:
        shown: dict[int, int] = {}
        path = [root]
        while path[-1] != 0:
            path.append(parents[path[-1]])
        needed.update(path)
        for seq in reversed(path):
            for chunk, count, length in versions[seq]:
                for c in range(chunk, chunk + count):
                    shown[c] = seq if length else -1
        seen[root] = {(seq, chunk) for chunk, seq in shown.items() if seq >= 0}
    visible = set().union(*seen.values())

    layers = reach.ChainLayers(Chain(str(tmp_path), "vm", "vda", "main", -1), REPOSITORY)
    found = reach.reach(layers, dict.fromkeys(roots))
    assert found.live.keys() == needed
    lengths = {(seq, chunk): length for seq, held in versions.items() for chunk, _, length in held}
    assert found.visible == sum(lengths[v] for v in visible)
    for seq in needed:
        data = [chunk for chunk, _, length in versions[seq] if length]
        assert found.live[seq].tolist() == [(seq, chunk) in visible for chunk in data]
        check_dead_ranges(layers.layer(seq), found.live[seq])
    for root in roots:
        others = set().union(*(seen[r] for r in roots if r != root))
        alone = sum(lengths[v] for v in seen[root] - others)
        assert found.only[root] >= alone
        if len({parents[s] for s in needed if s}) == len(needed) - 1:  # no fork
            assert found.only[root] == alone


def check_dead_ranges(layer: Layer, live: reach.Flags) -> None:
    rows = np.concatenate([r[r["codec"] != codec.ZERO] for r in layer.rows()] or [np.empty(0, ROW)])
    end = layer.trailer().table_offset
    used = np.zeros(end // 4096, bool)
    used[0] = True
    for row in rows[live]:
        used[int(row["offset"]) // 4096 : -(-(int(row["offset"]) + int(row["length"])) // 4096)] = True
    dead = np.zeros_like(used)
    for offset, length in space.dead_ranges(layer, live):
        assert offset % 4096 == length % 4096 == 0
        assert not dead[offset // 4096 : (offset + length) // 4096].any()
        dead[offset // 4096 : (offset + length) // 4096] = True
    assert (dead == ~used).all()
