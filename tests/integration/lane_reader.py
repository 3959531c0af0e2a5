"""Reads points of a mount at random and compares: `python lane_reader.py MOUNTED EXPECTED SEED SECONDS`. Not a test.

EXPECTED holds a file for each point there ever was. Ends with 0 when every byte was right; points may go at any time.
With SECONDS 0 it reads until a read fails, and prints the seconds that the last one took and its errno.
"""

import errno
import mmap
import os
import random
import sys
import time

GONE = (errno.ENOENT, errno.ESTALE)


def look(path: str, expected: bytes, rng: random.Random) -> None:
    fd = os.open(path, os.O_RDONLY | rng.choice((0, 0, os.O_DIRECT)))
    try:
        for _ in range(rng.randrange(40)):
            offset = rng.randrange(len(expected))
            if rng.random() < 0.1:
                check_seek(fd, expected, offset)
                continue
            length = rng.choice((512, 4096, 4096, 65536, 300_000, 2_000_000))
            offset = offset // 4096 * 4096
            found = pread(fd, length, offset)
            right = expected[offset : offset + length]
            if found != right:
                wrong = [i for i in range(0, len(right), 512) if found[i : i + 512] != right[i : i + 512]]
                sys.exit(f"{path}: {length} bytes at {offset}: got {len(found)}, sectors wrong at {wrong[:9]}")
    finally:
        os.close(fd)


def pread(fd: int, length: int, offset: int) -> bytes:
    """Read, also on after a short read: where a read fails in its middle, the kernel gives what came before."""
    with mmap.mmap(-1, -(-length // 4096) * 4096) as aligned, memoryview(aligned) as view:
        done = 0
        while done < length and (got := os.preadv(fd, [view[done:]], offset + done)):
            done += got
        return aligned[: min(done, length)]


def check_seek(fd: int, expected: bytes, offset: int) -> None:
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        data = len(expected)
    assert not any(expected[offset:data]), "a hole with data in it"
    hole = os.lseek(fd, offset, os.SEEK_HOLE)
    assert offset <= hole <= len(expected)
    assert offset in (hole, data)


def main() -> None:
    mounted, expected, seed, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    rng, end = random.Random(seed), time.monotonic() + seconds
    begun = time.monotonic()
    while not seconds or time.monotonic() < end:
        begun = time.monotonic()
        try:
            point = rng.choice([p for p in os.listdir(mounted) if p != "latest"])
            with open(os.path.join(expected, point), "rb") as file:
                content = file.read()
            look(os.path.join(mounted, point, "vda.raw"), content, rng)
        except OSError as e:
            if e.errno not in GONE:
                print(time.monotonic() - begun, e.errno, flush=True)
                sys.exit(1)


if __name__ == "__main__":
    main()
