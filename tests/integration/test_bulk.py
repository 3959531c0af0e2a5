"""Bulk reads against the bytes that were written, over a chain with rewritten and zeroed chunks and many regions."""

import os
import random
from pathlib import Path

import pytest
from repositories import add_point

from backupfs.errors import Corrupt
from backupfs.repository.bulk import read_chunks
from backupfs.repository.layer import Layer
from backupfs.repository.repository import Repository
from backupfs.units import KiB

CHUNK = 4 * KiB


@pytest.mark.parametrize("codec_name", ["zstd", "none"])
def test_against_what_was_written(tmp_path: Path, codec_name: str) -> None:
    path = str(tmp_path / "repo")
    Repository.init(path, chunk_size=CHUNK, codec_name=codec_name)
    rng = random.Random(1)
    size = 700 * CHUNK + 77  # more than two regions
    data = bytearray(b"".join(rng.randbytes(CHUNK // 2) * 2 for _ in range(701))[:size])
    with Repository.open(path) as repository:
        states = {}
        for _ in range(5):
            states[add_point(repository, bytes(data)).id] = bytes(data)
            for _ in range(60):
                at = rng.randrange(700) * CHUNK
                data[at : at + CHUNK] = bytes(CHUNK) if rng.random() < 0.3 else rng.randbytes(CHUNK // 2) * 2
        for point, expected in states.items():
            image = repository.open_image("web01", point, "vda")
            for _ in range(40):
                first = rng.randrange(701)
                end = min((first + rng.choice([1, 2, 60, 512])) * CHUNK, size)
                buffer = bytearray(b"x" * (end - first * CHUNK))
                read_chunks(image, first * CHUNK, memoryview(buffer))
                assert buffer == expected[first * CHUNK : end]
            image.close()
        layer = Layer(str(tmp_path / "repo/vms/web01/disks/vda/main/000000.layer"))
        begin, end = layer.data_range
        os.chmod(layer.data.path, 0o600)
        with open(layer.data.path, "r+b") as file:  # all of its payloads; the table stays
            file.seek(begin)
            file.write(bytes(end - begin))
        for point in states:
            image = repository.open_image("web01", point, "vda")
            with pytest.raises(Corrupt, match=r"000000\."):
                read_chunks(image, 0, memoryview(bytearray(512 * CHUNK)))
            image.close()
