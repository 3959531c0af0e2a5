"""kill -9 at random, thousands of times: `python kill_often.py FOLDER ROUNDS SEED`. Run by test_kill_often.py.

Each round forks a child that takes, deletes or prunes points, collects garbage or builds the index again, and kills it
at a random moment. Then every point must be there that was not to be deleted, and hold the bytes that it was given; a
new one is there whole or not at all. Prints {"rounds": …, "killed": …, "points": …}; a wrong byte or a lost
point ends it with an AssertionError.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from repositories import add_point, read_point

from backupfs.repository.repository import Repository
from backupfs.services.gc import gc
from backupfs.services.prune import delete, prune
from backupfs.services.retention import KeepRules

VM = "web01"
SIZE = 320 << 10
CHUNK = 4096
KEPT = 4
OPERATIONS = ("backup", "delete", "gc", "prune", "reindex")


class Life:
    """A repository, what each of its points holds, and what is done to it next."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.rng = str(path), random.Random(seed)
        self.data = bytearray(self.rng.randbytes(SIZE))
        self.points: dict[str, bytes] = {}
        self.day = 0
        self.usual = dict.fromkeys(OPERATIONS, 0.02)  # seconds
        Repository.init(self.path, chunk_size=CHUNK, codec_name=self.rng.choice(("none", "zstd")))

    def change(self) -> None:
        """Change the disk: noise, text that compresses, zeroes."""
        for _ in range(6):
            offset, length = self.rng.randrange(SIZE - 30_000), self.rng.randrange(30_000)
            new = self.rng.choice(
                (self.rng.randbytes(length), bytes(length), (b"text %d " % self.day * 5_000)[:length])
            )
            self.data[offset : offset + length] = new

    def fill_up(self) -> None:
        """Take points, undisturbed, until there are KEPT."""
        with Repository.open(self.path) as repository:
            while len(self.points) < KEPT:
                self.change()
                self.day += 1
                full = self.rng.random() < 0.1
                self.points[add_point(repository, bytes(self.data), day=self.day - 10_000, full=full).id] = bytes(
                    self.data
                )

    def round(self, what: str) -> bool:
        """Do one thing, broken off; check everything. Returns whether it was broken off before it ended."""
        self.fill_up()
        doomed = self.rng.sample(sorted(self.points), 2)
        self.change()
        self.day += 1
        new = bytes(self.data)

        def act() -> None:
            with Repository.open(self.path) as repository:
                if what == "backup":
                    add_point(repository, new, day=self.day - 10_000)
                elif what == "delete":
                    delete(repository, [(VM, point) for point in doomed])
                elif what == "prune":
                    prune(repository, VM, KeepRules(last=2), dry_run=False)
                elif what == "gc":
                    gc(repository)
                else:
                    repository.reindex()

        if what == "prune":
            doomed = sorted(self.points)[:-2]
        killed = self._broken_off(what, act)
        self.check(what, new, doomed, killed=killed)
        return killed

    def _broken_off(self, what: str, act: Callable[[], None]) -> bool:
        began = time.monotonic()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                act()
                os._exit(0)
            os._exit(1)
        end = began + self.rng.uniform(0, 1.15) * self.usual[what]
        while time.monotonic() < end:
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            self.usual[what] *= 1.01
            return True
        assert os.waitstatus_to_exitcode(status) == 0, what
        self.usual[what] = 0.9 * self.usual[what] + 0.1 * (time.monotonic() - began)
        return False

    def check(self, what: str, new: bytes, doomed: list[str], *, killed: bool) -> None:
        """Compare every point with what it was given."""
        with Repository.open(self.path) as repository:
            there = set(repository.points(VM))
            added, gone = there - set(self.points), set(self.points) - there
            assert len(added) <= (what == "backup"), what
            assert gone <= (set(doomed) if what in ("delete", "prune") else set()), what
            if not killed:
                assert len(added) == (what == "backup"), what
                assert gone == (set(doomed) if what in ("delete", "prune") else set()), what
            self.points = {point: self.points.get(point, new) for point in there}
            for point, held in self.points.items():
                assert read_point(repository, point) == held, f"{what}: {point} is wrong"
                image = repository.open_image(VM, point, "vda")
                image.check_map()
                image.close()


def main() -> None:
    folder, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    life, killed = Life(folder / "repo", seed), 0
    for number in range(rounds):
        killed += life.round(OPERATIONS[number % len(OPERATIONS)])
    with Repository.open(life.path) as repository:
        gc(repository)
        repository.reindex()
    life.check("gc", b"", [], killed=False)
    assert not list(Path(life.path, "tmp").iterdir())
    print(json.dumps({"rounds": rounds, "killed": killed, "points": life.day}))


if __name__ == "__main__":
    main()
