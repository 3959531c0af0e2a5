"""Live exports without a mount: right bytes, or an error within the deadline; nothing left behind."""

import gc
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from exports import Export, readers_of, talker
from fakenbd import Lies, lying_server
from mounts import wait_until
from servers import freeze, nbdkit, need, run, storage_daemon

from backupfs.errors import ConnectError, ProtocolError, SourceError, UsageError
from backupfs.extents import Extent
from backupfs.sources.live import LiveDisk, check_uri
from backupfs.sources.live_image import LiveImage
from backupfs.sources.live_link import Export as LiveExport
from backupfs.units import KiB, MiB

SIZE = 9 * MiB + 512


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert readers_of(os.getpid()) == set()
    wait_until(lambda: threading.active_count() <= threads)
    gc.collect()  # an error that was raised holds on to the memory that it came through
    assert len(os.listdir("/proc/self/fd")) <= fds


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    export = Export(tmp_path)
    try:
        yield export
    finally:
        export.clean()


@contextmanager
def connected(uri: str, deadline_s: float = 5.0) -> Iterator[LiveImage]:
    image = LiveImage(LiveExport(uri), "web/vda", deadline_s)
    try:
        image.connect()
        yield image
    finally:
        image.close()


@contextmanager
def live(uri: str, deadline_s: float = 5.0) -> Iterator[LiveDisk]:
    disk = LiveDisk(LiveExport(uri), "web/vda", deadline_s)
    try:
        yield disk
    finally:
        disk.close()


def read(image: object, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.readinto(offset, buffer)  # type: ignore[attr-defined]
    return bytes(buffer)


def in_order(image: LiveImage, step: int) -> bytes:
    return b"".join(read(image, o, min(step, image.size - o)) for o in range(0, image.size, step))


# Bytes.


def test_right_bytes_in_order_and_at_random(export: Export) -> None:
    data = export.fill(1, SIZE)
    export.start()
    generator = random.Random(2)
    with connected(export.uri) as image:
        assert image.size == SIZE
        for step in (MiB, 100_000, 64 * KiB, 3 * MiB + 1):
            assert in_order(image, step) == data
        for _ in range(200):
            offset = generator.randrange(SIZE)
            length = min(generator.choice([1, 4096, 70_000, MiB, 3 * MiB]), SIZE - offset)
            assert read(image, offset, length) == data[offset : offset + length]
            if offset + length < SIZE and generator.random() < 0.5:  # and on
                more = min(generator.randrange(1, 2 * MiB), SIZE - offset - length)
                assert read(image, offset + length, more) == data[offset + length :][:more]
        assert (read(image, SIZE, 0), image.lend(SIZE, 0), image.lend(5, 0)) == (b"", b"", b"")
        for offset, length in ((SIZE, 1), (-1, 2), (0, SIZE + 1)):
            with pytest.raises(ValueError, match="not inside"):
                read(image, offset, length)


def test_what_is_lent_stays_what_it_is(export: Export) -> None:
    data = export.fill(1, 40 * MiB)
    export.start()
    with connected(export.uri) as image:
        held = [image.lend(o, 64 * KiB) for o in range(0, 20 * 64 * KiB, 64 * KiB)]
        at_once = 0
        for offset in range(0, image.size, 256 * KiB):  # more than there are slots
            part = image.lend_at_once(offset, 256 * KiB)
            at_once += part is not None
            assert (part or image.lend(offset, 256 * KiB)) == data[offset:][: 256 * KiB]
        assert b"".join(held) == data[: 20 * 64 * KiB]
        assert at_once > 0
    assert b"".join(held) == data[: 20 * 64 * KiB]  # even then


def test_sixteen_readers_at_once(export: Export) -> None:
    data = export.fill(3, 24 * MiB)
    export.start()
    with connected(export.uri) as image, ThreadPoolExecutor(16) as pool:

        def work(seed: int) -> bool:
            offset, step = (seed // 2) * MiB, (MiB, 48 * KiB)[seed % 2]  # two by two at the same place
            end = min(offset + 6 * MiB, image.size)
            return all(
                read(image, o, min(step, end - o)) == data[o : min(o + step, end)] for o in range(offset, end, step)
            )

        assert all(pool.map(work, range(32)))


@pytest.mark.parametrize("size", [1, 511, 4097, 3 * MiB + 7])
def test_the_smallest_request_is_the_servers(size: int) -> None:
    data = random.Random(4).randbytes(size)
    asked = []

    def answer(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return data[offset : offset + length]

    with (
        lying_server(Lies(size=size, block_sizes=(4096, 4096, 128 * KiB), read=answer)) as uri,
        connected(uri) as image,
    ):
        assert in_order(image, 5000) == data
        assert in_order(image, 300_000) == data
    assert all(o % 4096 == 0 and (n % 4096 == 0 or o + n == size) and n <= 128 * KiB for o, n in asked)


def test_a_qcow2_of_qemu(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "200M")
    run("qemu-io", "-c", "write -P 7 1M 64k", "-c", "write -P 8 150M 3M", path)
    node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={path}"
    with (
        storage_daemon("--blockdev", node, "--export", "type=nbd,id=e,node-name=n,name=disk") as server,
        connected(server.uri) as image,
    ):
        assert image.allocated == 3 * MiB + 64 * KiB
        expected = bytearray(200 * MiB)
        expected[MiB : MiB + 64 * KiB] = b"\7" * (64 * KiB)
        expected[150 * MiB : 153 * MiB] = b"\x08" * (3 * MiB)
        assert in_order(image, MiB) == expected
        found = [e for e in image.extents(0, image.size) if not e.flag]
        assert found == [Extent(MiB, 64 * KiB, False), Extent(150 * MiB, 3 * MiB, False)]
        assert list(image.extents(150 * MiB - 1, 2)) == [
            Extent(150 * MiB - 1, 1, True),
            Extent(150 * MiB, 1, False),
        ]


def test_holes_are_not_read() -> None:
    def status(offset: int, length: int) -> dict[str, list[int]]:
        return {"base:allocation": [length, 3]}

    lies = Lies(size=80 * MiB, status=status, read=lambda offset, length: None)
    with lying_server(lies) as uri, connected(uri) as image:
        assert image.allocated == 0
        assert in_order(image, MiB) == bytes(80 * MiB)
        assert in_order(image, 128 * KiB) == bytes(80 * MiB)


def test_an_export_that_is_written_to_is_never_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backupfs.sources.live_image._FRESH_S", 0.2)
    now = [b"a"]

    def status(offset: int, length: int) -> dict[str, list[int]]:
        return {"base:allocation": [length, 0 if now[0] else 3]}

    with (
        lying_server(Lies(size=8 * MiB, status=status, read=lambda o, n: now[0] * n)) as uri,
        connected(uri) as image,
    ):
        for content, seen in ((b"a", b"a"), (b"b", b"b"), (b"", b"\0"), (b"c", b"c")):
            now[0] = content
            time.sleep(0.3)
            assert in_order(image, 512 * KiB) == seen * image.size


# Servers that lie.

NONSENSE = [[], [0, 0], [4096], [2**32 - 1, 2, 1, 2], [1, 2] * 3]


@pytest.mark.parametrize("numbers", NONSENSE, ids=str)
def test_nonsense_about_holes_is_not_believed(numbers: list[int]) -> None:
    lies = Lies(size=3 * MiB, status=lambda o, n: {"base:allocation": numbers}, read=lambda o, n: b"x" * n)
    if numbers == [2**32 - 1, 2, 1, 2]:
        lies.status = lambda o, n: {"base:allocation": [n, 0, 1, 2]}
    with lying_server(lies) as uri:
        try:
            with connected(uri, 3) as image:
                content = in_order(image, MiB)
                zeroes = 3 if numbers == [1, 2] * 3 else 0
                assert content.count(b"x") >= image.size - zeroes
        except SourceError:
            pass  # libnbd gave the connection up: an error is right, too


@pytest.mark.parametrize("size", [0, 1 << 63, (1 << 64) - 1])
def test_a_size_that_is_none(size: int) -> None:
    with (
        lying_server(Lies(size=size)) as uri,
        pytest.raises(SourceError, match="the server says that the disk has"),
        connected(uri, 5),
    ):
        pass


@pytest.mark.parametrize("block_sizes", [(1 << 20, 1 << 20, 1 << 25), (4096, 4096, 1000), (3, 7, 9)])
def test_block_sizes_that_are_none(block_sizes: tuple[int, int, int]) -> None:
    lies = Lies(size=4 * MiB, block_sizes=block_sizes, read=lambda o, n: b"x" * n)
    with lying_server(lies) as uri:
        try:
            with connected(uri, 3) as image:
                assert in_order(image, MiB) == b"x" * (4 * MiB)
        except SourceError:
            pass


def test_an_answer_of_another_length() -> None:
    for wrong in (lambda o, n: bytes(n - 1), lambda o, n: bytes(n + 1), lambda o, n: b""):
        with (
            lying_server(Lies(size=MiB, read=wrong)) as uri,
            pytest.raises(SourceError),
            connected(uri, 2) as image,
        ):
            read(image, 0, MiB)


def test_a_range_that_can_not_be_read_spoils_no_other() -> None:
    bad, part = 20 * 128 * KiB, 128 * KiB
    fails = f"if [ $4 -le {bad} -a $(( $4 + $3 )) -gt {bad} ]; then echo EIO no >&2; exit 1; fi"
    with (
        nbdkit("eval", "get_size=echo 6M", f"pread={fails}; head -c $3 /dev/zero | tr '\\0' x") as server,
        connected(server.uri) as image,
    ):
        for _ in range(2):
            for offset in range(0, 6 * MiB, part):
                if offset == bad:
                    with pytest.raises(ProtocolError, match="EIO"):
                        read(image, offset, part)
                else:
                    assert read(image, offset, part) == b"x" * part
        assert image.alive()


def test_a_server_that_sends_byte_by_byte() -> None:
    def drip(connection: socket.socket) -> None:
        for byte in b"NBDMAGICIHAVEOPT" * 100:
            connection.send(bytes([byte]))
            time.sleep(0.05)

    with talker(drip) as uri:
        begun = time.monotonic()
        with pytest.raises(ConnectError, match="no answer"), connected(uri, 1):
            pass
        assert time.monotonic() - begun < 4


def test_a_server_that_takes_its_time_is_given_up_by_the_deadline() -> None:
    stop = threading.Event()

    def slow(offset: int, length: int) -> bytes:
        stop.wait(20)
        return bytes(length)

    with lying_server(Lies(size=8 * MiB, read=slow)) as uri, connected(uri, 1) as image:
        begun = time.monotonic()
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(read, image, i * 4096, 4096) for i in range(20)]
            assert all(isinstance(f.exception(), ConnectError) for f in futures)
        assert time.monotonic() - begun < 4
        assert not image.alive()
        with pytest.raises(ConnectError, match="no answer"):
            read(image, 0, 1)
        stop.set()


def test_words_that_are_no_export() -> None:
    for uri in ("", "/tmp/disk", "http://x/", "nbd:unix:x", "nbd+unix:///?socket=relative", "nbd://[x", "file:///x"):
        with pytest.raises(UsageError):
            check_uri(uri)
    for uri in ("nbd://host/x", "nbds+unix:///x?socket=/a b", "nbd+vsock://3/"):
        check_uri(uri)


# An export that goes and comes.


def test_a_killed_server_and_its_successor(export: Export) -> None:
    old = export.fill(1, 4 * MiB)
    export.start()
    with live(export.uri) as disk:
        assert disk.look() is None
        disk.settle(5)
        first = disk.look()
        assert first is not None
        assert (first.size, first.allocated) == (4 * MiB, 4 * MiB)
        shown = disk.open()
        assert shown.version == first.version
        assert read(shown, 5, 4096) == old[5:4101]
        export.stop()
        with pytest.raises(ConnectError):
            read(shown, 3 * MiB + 4096, 4096)
        away = disk.look()
        assert away is not None
        assert (away.size, away.version != first.version) == (4 * MiB, True)
        with pytest.raises(ConnectError):
            disk.open()
        new = export.fill(2, 6 * MiB)
        export.start()
        wait_until(lambda: disk.look() != away)
        again = disk.open()
        assert len({again.version, away.version, first.version}) == 3
        assert again.size == 6 * MiB
        assert read(again, 0, 6 * MiB) == new
        with pytest.raises(ConnectError):  # never the bytes of another moment
            read(shown, 0, 1)
        look = disk.look()
        assert look is not None
        assert (look.size, look.version) == (6 * MiB, again.version)


def test_a_loss_is_noticed_without_a_read(export: Export) -> None:
    export.fill(1, MiB)
    export.start()
    with live(export.uri) as disk:
        first = disk.open()
        export.fill(2, MiB)
        export.start()
        wait_until(lambda: (look := disk.look()) is not None and look.version != first.version)
        with pytest.raises(ConnectError):
            read(first, 0, 1)


def test_a_stopped_server_and_its_awakening(export: Export) -> None:
    data = export.fill(1, 4 * MiB)
    export.start()
    with live(export.uri, 1.0) as disk:
        shown = disk.open()
        export.freeze()
        begun = time.monotonic()
        with pytest.raises(ConnectError, match="no answer"):
            read(shown, 0, MiB)
        with pytest.raises(ConnectError, match="no answer"):
            wait_until(lambda: disk.open() and False)
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        disk.look()
        assert time.monotonic() - begun < 0.5
        export.thaw()
        time.sleep(1.1)  # it is not tried more often than once a second
        assert read(disk.open(), 0, 4 * MiB) == data


def test_a_killed_child_is_replaced(export: Export) -> None:
    data = export.fill(1, 4 * MiB)
    export.start()
    with live(export.uri) as disk:
        shown = disk.open()
        time.sleep(1.1)
        (child,) = readers_of(os.getpid())
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ConnectError, match="died"):
            in_order(shown, MiB)  # type: ignore[arg-type]
        assert read(disk.open(), 0, 4 * MiB) == data
        assert readers_of(os.getpid()) != {child}


def test_a_stopped_child_is_killed(export: Export) -> None:
    export.fill(1, 4 * MiB)
    export.start()
    with live(export.uri, 1.0) as disk:
        shown = disk.open()
        (child,) = readers_of(os.getpid())
        freeze(child)
        with pytest.raises(ConnectError, match="no answer"):
            read(shown, 0, MiB)
        assert readers_of(os.getpid()) == set()


def test_closing_ends_what_waits(export: Export) -> None:
    export.fill(1, 4 * MiB)
    export.start()
    with live(export.uri, 60) as disk, ThreadPoolExecutor(4) as pool:
        shown = disk.open()
        export.freeze()
        futures = [pool.submit(read, shown, i * MiB, MiB) for i in range(4)]
        time.sleep(0.2)
        disk.close()
        assert all(isinstance(f.exception(5), ConnectError) for f in futures)
        with pytest.raises(ConnectError, match="closed"):
            disk.open()
    with talker(lambda connection: connection.recv(1) and None) as uri, live(uri, 60) as disk:
        disk.look()
        wait_until(lambda: readers_of(os.getpid()))
        disk.close()
