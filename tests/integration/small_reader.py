"""Reads the small files of a tree over and over and compares: `python small_reader.py TREE EXPECTED SEED SECONDS`.

EXPECTED is a pickled dict: content by path in the tree. Pages are dropped all the time, so that the kernel has to ask
while others open the same files. Ends with 0 when every byte was right. Not a test.
"""

import mmap
import os
import pickle
import random
import sys
import time
from pathlib import Path


def main() -> None:
    """Read until the time is over."""
    tree, expected = sys.argv[1], pickle.loads(Path(sys.argv[2]).read_bytes())
    rng, end = random.Random(int(sys.argv[3])), time.monotonic() + float(sys.argv[4])
    names = sorted(expected)[: rng.choice((5, 100, len(expected)))]
    while time.monotonic() < end:
        name = rng.choice(names)
        fd = os.open(os.path.join(tree, name), os.O_RDONLY)
        try:
            for _ in range(rng.randrange(4)):
                if rng.random() < 0.5:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                if rng.random() < 0.2 and expected[name]:
                    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
                        found = memory[:]
                else:
                    found = os.pread(fd, 1 << 20, 0)
                if found != expected[name]:
                    sys.exit(f"{name}: {len(found)} other bytes than the {len(expected[name])} that are there")
        finally:
            os.close(fd)


if __name__ == "__main__":
    main()
