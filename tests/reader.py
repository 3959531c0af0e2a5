"""A process that has images of a repository open, as a mount has. `python reader.py REPOSITORY` is its far end."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VM, DISK = "web01", "vda"


class Reader:
    """Opens, reads and closes images in a process of its own."""

    def __init__(self, repository: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(repository)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed:
            self.kill()
        else:
            self.close()

    def ask(self, *words: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def open(self, point: str) -> bool:
        """Open a point's image; False if there is no such point."""
        return bool(self.ask("open", point))

    def digest(self, point: str) -> str:
        """Read all of an open image; return the SHA-256."""
        return str(self.ask("digest", point))

    def places(self, point: str) -> list[tuple[str, int, int, int]]:
        """Return what an open image sees: chain, seq, chunk, bytes."""
        return [tuple(place) for place in self.ask("places", point)]

    def close_image(self, point: str) -> None:
        self.ask("close", point)

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def places_of(image: Any, chain: str) -> list[tuple[str, int, int, int]]:
    """Return what an image sees: chain, seq, chunk, bytes. Not where: that changes when gc writes a layer again."""
    import numpy as np

    from backupfs.repository.chunkmap import POSITION
    from backupfs.repository.format import LENGTH_MASK

    found = []
    for region in image.map.occupied(0, -(-image.size // (256 * 4096))):
        for i, position in enumerate(np.frombuffer(image.map.region(region), POSITION)):
            if position["packed"]:
                place = int(position["seq"]), region * 256 + i, int(position["packed"]) & LENGTH_MASK
                found.append((chain, *place))
    return found


def serve(path: str) -> None:
    from backupfs.errors import NotFound
    from backupfs.repository.repository import Repository

    images: dict[str, Any] = {}
    chains: dict[str, str] = {}
    with Repository.open(path) as repository:
        for line in sys.stdin:
            what, point = json.loads(line)
            value: Any = True
            try:
                if what == "open":
                    try:
                        images[point] = repository.open_image(VM, point, DISK)
                        entry = repository.manifest(VM, point).disk(DISK)
                        assert entry
                        chains[point] = entry.chain
                    except NotFound:
                        value = False
                elif what == "digest":
                    data = bytearray(images[point].size)
                    images[point].readinto(0, data)
                    images[point].check_map()
                    value = hashlib.sha256(data).hexdigest()
                elif what == "places":
                    value = places_of(images[point], chains[point])
                else:
                    images.pop(point).close()
                answer = {"value": value}
            except Exception as e:  # noqa: BLE001, the other end reports it
                answer = {"error": repr(e)}
            print(json.dumps(answer), flush=True)
        for image in images.values():
            image.close()


if __name__ == "__main__":
    serve(sys.argv[1])
