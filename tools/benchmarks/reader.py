"""Random 4 KiB reads of a file with O_DIRECT, one in flight: a process of its own, so no GIL is shared.

    python3 reader.py FILE SEED SECONDS|COUNTx

Prints `ready`, waits for a line on stdin, reads for so many seconds, or so many times, and prints the reads and the
seconds that they took. Needs nothing but Python's own library, so it starts fast.
"""

import mmap
import os
import random
import sys
import time

READ = 4096
_BATCH = 32  # reads between two looks at the clock


def read_randomly(path: str, seed: int, *, seconds: float = float("inf"), count: float = float("inf")) -> None:
    """Do what the module says."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    pages = os.fstat(fd).st_size // READ
    rng = random.Random(seed)  # noqa: S311, which page is no secret
    offsets = [rng.randrange(pages) * READ for _ in range(20_000)]
    buffers = [mmap.mmap(-1, READ)]  # page-aligned, as O_DIRECT wants it
    print("ready", flush=True)
    sys.stdin.readline()
    done = 0
    started = time.monotonic()
    while done < count and time.monotonic() - started < seconds:
        for i in range(done, done + _BATCH):
            if os.preadv(fd, buffers, offsets[i % len(offsets)]) != READ:
                sys.exit(f"{path}: a short read at {offsets[i % len(offsets)]}")
        done += _BATCH
    print(done, time.monotonic() - started, flush=True)


if __name__ == "__main__":
    _, file, number, span = sys.argv
    if span.endswith("x"):
        read_randomly(file, int(number), count=int(span[:-1]))
    else:
        read_randomly(file, int(number), seconds=float(span))
