"""What verify is measured against: reads and decompresses every payload of a repository. Run as a script, in a process.

payloads.py REPOSITORY THREADS [blake3]: prints the seconds it took; with the last word it hashes too.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import numpy as np

from backupfs.repository import codec
from backupfs.repository.format import Rows
from backupfs.repository.layer import Layer
from backupfs.repository.payloads import Scratch
from backupfs.repository.visible import spans
from backupfs.units import KiB, MiB


def jobs(repository: Path) -> list[tuple[Layer, Rows]]:
    """Return all payloads in the order of the files, as much at a time as verify reads."""
    jobs = []
    for path in sorted(repository.rglob("*.layer")):
        layer = Layer(str(path))
        for rows in layer.rows():
            data = rows[rows["codec"] != codec.ZERO]
            data = data[np.argsort(data["offset"])]
            jobs += [(layer, data[first:end]) for first, end in spans(data, MiB, 64 * KiB)] if len(data) else []
    return jobs


def _read(job: tuple[Layer, Rows], memory: Scratch, *, hashed: bool) -> None:
    layer, rows = job
    begin, size = int(rows["offset"][0]), layer.header.chunk_size
    data = memory.take(int((rows["offset"] + rows["length"]).max()) - begin)
    layer.data.pread_into(begin, data)
    offsets = (rows["offset"] - np.uint64(begin)).tolist()
    for offset, length, codec_id in zip(offsets, rows["length"].tolist(), rows["codec"].tolist(), strict=True):
        chunk: bytes | memoryview = data[offset : offset + length]
        if codec_id == codec.ZSTD:
            chunk = codec.decompress(chunk, size)
        if hashed:
            blake3.blake3(chunk).digest(length=16)


def _peer(repository: Path, threads: int, *, hashed: bool) -> float:
    """Read and decompress every payload; return the seconds."""
    started = time.monotonic()
    memory = Scratch()
    with ThreadPoolExecutor(threads) as workers:
        for _ in workers.map(lambda job: _read(job, memory, hashed=hashed), jobs(repository)):
            pass
    return time.monotonic() - started


if __name__ == "__main__":
    print(_peer(Path(sys.argv[1]), int(sys.argv[2]), hashed=len(sys.argv) > 3))
