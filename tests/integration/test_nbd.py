"""NBD servers that work, that break, that hang and that lie."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakenbd import Lies, lying_server
from servers import Server, freeze, nbdkit, need, qemu_nbd, run, storage_daemon

from backupfs.errors import ConnectError, ProtocolError, UsageError
from backupfs.extents import Extent
from backupfs.sources import nbd as nbd_module
from backupfs.sources import open_source
from backupfs.units import KiB, MiB

ALLOCATION, BITMAP = "base:allocation", "qemu:dirty-bitmap:b0"


def qcow2_with_bitmap(path: Path) -> list[Extent]:
    """Make an image with a bitmap b0 (64 KiB); return what is dirty in it."""
    need("qemu-img", "qemu-io")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 2M", path)
    run("qemu-img", "bitmap", "--add", "-g", "64K", path, "b0")
    run("qemu-io", "-c", "write -P 2 1M 1k", "-c", "write -z 1536k 64k", "-c", "write -P 3 63M 1M", path)
    return [
        Extent(0, MiB, False),
        Extent(MiB, 64 * KiB, True),
        Extent(MiB + 64 * KiB, 448 * KiB, False),
        Extent(MiB + 512 * KiB, 64 * KiB, True),
        Extent(MiB + 576 * KiB, 63 * MiB - MiB - 576 * KiB, False),
        Extent(63 * MiB, MiB, True),
    ]


@pytest.fixture(params=["qemu-nbd", "qemu-storage-daemon"])
def bitmap_export(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[Extent]]]:
    path = tmp_path / "disk.qcow2"
    dirty = qcow2_with_bitmap(path)
    if request.param == "qemu-nbd":
        with qemu_nbd(path, "--bitmap=b0", image_format="qcow2") as server:
            yield server.uri, dirty
    else:
        node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={path}"
        export = "type=nbd,id=e,node-name=n,name=disk,writable=on,bitmaps.0=b0"
        with storage_daemon("--blockdev", node, "--export", export) as server:
            yield server.uri, dirty


def test_dirty_is_what_was_written(bitmap_export: tuple[str, list[Extent]]) -> None:
    uri, expected = bitmap_export
    source = open_source(uri, "b0", timeout_s=10)
    try:
        assert (source.bitmap, source.bitmap_problem) == ("b0", None)
        assert list(source.dirty(0, source.size)) == expected
        assert list(source.dirty(MiB + 1, 2)) == [Extent(MiB + 1, 2, True)]
        pairs = list(source.status(0, source.size))
        assert sum(z.length for z, d in pairs if d.flag and z.flag) == 64 * KiB
        assert sum(z.length for z, d in pairs if not d.flag and not z.flag) == 2 * MiB - 2 * 64 * KiB
    finally:
        source.close()


def test_a_bitmap_that_is_not_exported_is_a_problem_in_words() -> None:
    with nbdkit("memory", "1M") as server:
        source = open_source(server.uri, "b0", timeout_s=10)
        assert source.bitmap is None
        assert source.bitmap_problem == "the export has no dirty bitmap 'b0'"
        assert list(source.status(0, MiB)) == [(Extent(0, MiB, True), Extent(0, MiB, True))]
        source.close()


@pytest.mark.parametrize("bitmap", ["", "a\0b", "a\nb", "x" * 5000])
def test_an_impossible_name_of_a_bitmap_is_refused(bitmap: str) -> None:
    with pytest.raises(UsageError):
        open_source("nbd://localhost", bitmap)


@pytest.mark.parametrize("uri", ["nbd+unix:///?socket=/nonexistent/s", "nbd://127.0.0.1:1", "nbd+unix:///", "nbd://["])
def test_no_server(uri: str) -> None:
    with pytest.raises(ConnectError, match="can't connect"):
        open_source(uri, timeout_s=5)


def test_an_unknown_export() -> None:
    with nbdkit("file", "dir=/usr/lib") as server, pytest.raises(ConnectError):
        open_source(server.uri.replace(":///", ":///no-such-export"), timeout_s=5)


def test_a_scheme_that_is_none() -> None:
    with pytest.raises(UsageError, match="nbd://"):
        open_source("http://example.org/disk")


# Servers that hang or die.


def test_a_slow_answer_ends_the_source() -> None:
    with nbdkit("memory", "8M", "rdelay=20", options=["--filter=delay"]) as server:
        source = open_source(server.uri, timeout_s=0.3)
        began = time.monotonic()
        with pytest.raises(ConnectError, match=r"no answer from nbd\+unix.* for 0\.3 s"):
            list(source.read_many([(0, 8 * MiB)]))
        with pytest.raises(ConnectError, match="no answer"):
            source.readinto(0, bytearray(1))
        source.close()
        assert time.monotonic() - began < 2


def test_a_stopped_server_is_told_from_a_slow_one() -> None:
    with nbdkit("memory", "8M", "rdelay=150ms", options=["--filter=delay"]) as server:
        source = open_source(server.uri, timeout_s=0.5)
        assert sum(len(part) for _, part in source.read_many([(o, KiB) for o in range(0, MiB, 16 * KiB)])) == 64 * KiB
        freeze(server.process.pid)
        with pytest.raises(ConnectError, match="no answer"):
            list(source.status(0, 8 * MiB))
        source.close()


def test_a_handshake_that_never_ends() -> None:
    with nbdkit("memory", "8M") as server:
        freeze(server.process.pid)
        began = time.monotonic()
        with pytest.raises(ConnectError, match="no answer"):
            open_source(server.uri, timeout_s=0.3)
        assert time.monotonic() - began < 2


def test_close_from_another_thread_ends_a_wait() -> None:
    with nbdkit("memory", "8M", "rdelay=60", options=["--filter=delay"]) as server:
        source = open_source(server.uri, timeout_s=60)
        timer = threading.Timer(0.2, source.close)
        timer.start()
        began = time.monotonic()
        with pytest.raises(ConnectError, match="closed"):
            source.readinto(0, bytearray(1))
        timer.join()
        assert time.monotonic() - began < 5


def test_a_server_killed_half_way() -> None:
    with nbdkit("memory", "64M", "rate=400M", options=["--filter=rate"]) as server:
        source = open_source(server.uri, timeout_s=10)
        parts = source.read_many([(0, 64 * MiB)])
        next(parts)
        server.process.kill()
        with pytest.raises(ConnectError):
            list(parts)
        with pytest.raises(ConnectError):
            list(source.extents(0, MiB))
        source.close()


def test_a_read_error_names_the_offset_and_the_errno() -> None:
    with nbdkit("memory", "8M", "error-pread=ENOSPC", "error-pread-rate=100%", options=["--filter=error"]) as server:
        source = open_source(server.uri, timeout_s=10)
        with pytest.raises(ProtocolError, match=r"reading 7 bytes at offset 4097 failed: .*\(ENOSPC\)"):
            source.readinto(4097, bytearray(7))
        source.close()


def test_a_status_error_names_the_offset_and_the_errno() -> None:
    options = ["--filter=error"]
    with nbdkit("memory", "8M", "error-extents=EIO", "error-extents-rate=100%", options=options) as server:
        source = open_source(server.uri, timeout_s=10)
        with pytest.raises(ProtocolError, match=r"block status of 10 bytes at offset 5 failed: .*\(EIO\)"):
            list(source.extents(5, 10))
        source.close()


def test_a_rare_read_error_ends_a_full_read() -> None:
    with nbdkit("memory", "64M", "error-pread-rate=40%", options=["--filter=error"]) as server:
        source = open_source(server.uri, timeout_s=10)
        with pytest.raises(ProtocolError, match="reading"):
            list(source.read_many([(0, 64 * MiB)]))
        source.close()


def test_ctrl_c_is_not_lost_while_asking_for_status(tmp_path: Path) -> None:
    """The signal comes while libnbd runs more often than not; it must end the program each time."""
    with nbdkit("memory", "8M") as server:
        program = (
            "import sys; from backupfs.sources import open_source\n"
            f"s = open_source({server.uri!r}); print(flush=True)\n"
            "while True:\n  list(s.status(0, s.size))\n"
        )
        for delay_s in (0.0, 0.003, 0.007, 0.011, 0.017, 0.023, 0.031, 0.037):
            with subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(delay_s)
                child.send_signal(signal.SIGINT)
                try:
                    _, errors = child.communicate(timeout=10)
                finally:
                    child.kill()
            assert errors.decode().rstrip().endswith("KeyboardInterrupt")
            assert errors.count(b"Traceback") == 1


# What servers ask for.


@pytest.mark.parametrize(("minimum", "maximum"), [(4096, 65536), (512, 4096), (65536, 1 << 20)])
def test_the_servers_sizes_are_respected(minimum: int, maximum: int) -> None:
    sizes = [f"blocksize-minimum={minimum}", f"blocksize-preferred={max(minimum, 4096)}"]
    sizes += [f"blocksize-maximum={maximum}", "blocksize-error-policy=error"]
    with nbdkit("pattern", "1M", *sizes, options=["--filter=blocksize-policy"]) as server:
        source = open_source(server.uri, timeout_s=10)
        whole = bytearray(MiB)
        source.readinto(0, whole)
        assert all(whole[o : o + 8] == o.to_bytes(8) for o in range(0, MiB, 4096))
        for offset, length in ((1, 1), (4095, 2), (70000, 70001), (MiB - 3, 3)):
            piece = bytearray(length)
            source.readinto(offset, piece)
            assert piece == whole[offset : offset + length]
            assert sum(e.length for e in source.extents(offset, length)) == length
        source.close()


@pytest.mark.parametrize(("mode", "connections"), [("disable", 1), ("emulate", 4)])
def test_several_connections_only_where_the_server_allows(
    mode: str, connections: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with nbdkit("memory", "64M", f"multi-conn-mode={mode}", options=["--filter=multi-conn"]) as server:
        source = open_source(server.uri, timeout_s=10)
        seen = 0
        for _ in source.read_many([(0, 64 * MiB)]):
            seen = max(seen, connections_to(server))
        assert seen == connections
        source.close()


def connections_to(server: Server) -> int:
    path = server.uri.partition("socket=")[2]
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(1 for s in sockets if s[-1] == path and s[5] == "03")


def test_tls_with_a_key_file(tmp_path: Path) -> None:
    need("nbdkit")
    if "tls=yes" not in run("nbdkit", "--dump-config"):
        pytest.skip("nbdkit without TLS")
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{'5a' * 32}\n")
    with nbdkit("pattern", "1M", options=["--tls=require", f"--tls-psk={keys}"]) as server:
        uri = server.uri.replace("nbd+unix:///?", f"nbds+unix://alice@/?tls-psk-file={keys}&")
        source = open_source(uri, timeout_s=10)
        piece = bytearray(8)
        source.readinto(4096, piece)
        assert piece == (4096).to_bytes(8)
        source.close()
        with pytest.raises(ConnectError):
            open_source(server.uri, timeout_s=10)


def test_many_threads_may_read() -> None:
    with nbdkit("pattern", "16M") as server:
        source = open_source(server.uri, timeout_s=10)
        wrong: list[int] = []

        def read(first: int) -> None:
            for offset in range(first, 16 * MiB, 16 * 64 * KiB):
                piece = bytearray(8)
                source.readinto(offset, piece)
                if piece != offset.to_bytes(8):
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(n * 64 * KiB,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert wrong == []
        source.close()


# Servers that lie.


@pytest.mark.parametrize("size", [0, 1 << 63, (1 << 64) - 1])
def test_a_size_that_is_none(size: int) -> None:
    with lying_server(Lies(size=size)) as uri, pytest.raises(ProtocolError, match=f"{size} bytes"):
        open_source(uri, timeout_s=5)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([], id="nothing"),
        pytest.param([100], id="half a descriptor"),
        pytest.param([0, 0], id="empty extent"),
        pytest.param([512, 0, 0, 0, 512, 0], id="empty extent inside"),
        pytest.param([MiB, 0, 512, 0], id="after the request"),
        pytest.param(None, id="no context at all"),
    ],
)
def test_an_illegal_status_is_refused(numbers: list[int] | None) -> None:
    lies = Lies(status=lambda offset, length: {} if numbers is None else {ALLOCATION: numbers})
    with lying_server(lies) as uri:
        source = open_source(uri, timeout_s=5)
        with pytest.raises(ProtocolError, match=r"nbd\+unix"):
            list(source.status(0, MiB))
        source.close()


def test_over_long_and_unknown_flags_are_clipped_and_ignored() -> None:
    lies = Lies(status=lambda offset, length: {ALLOCATION: [0xFFFFFFFF, 0xFFFFFFF2]})
    with lying_server(lies) as uri:
        source = open_source(uri, timeout_s=5)
        assert list(source.extents(10, 100)) == [Extent(10, 100, True)]
        assert list(source.extents(0, MiB)) == [Extent(0, MiB, True)]
        source.close()


def test_a_hole_alone_is_not_zero() -> None:
    lies = Lies(status=lambda offset, length: {ALLOCATION: [512, 1, length, 3]})
    with lying_server(lies) as uri:
        source = open_source(uri, timeout_s=5)
        assert list(source.extents(0, MiB)) == [Extent(0, 512, False), Extent(512, MiB - 512, True)]
        source.close()


def test_two_contexts_of_different_reach_are_put_together() -> None:
    def status(offset: int, length: int) -> dict[str, list[int]]:
        return {ALLOCATION: [min(length, 200 * KiB), 3], BITMAP: [64 * KiB, offset // (64 * KiB) % 2]}

    lies = Lies(contexts=(ALLOCATION, BITMAP), status=status)
    with lying_server(lies) as uri:
        source = open_source(uri, "b0", timeout_s=5)
        dirty = list(source.dirty(0, MiB))
        assert dirty == [Extent(n * 64 * KiB, 64 * KiB, n % 2 == 1) for n in range(16)]
        assert list(source.extents(0, MiB)) == [Extent(0, MiB, True)]
        assert lies.asked[:3] == [(0, MiB), (64 * KiB, MiB - 64 * KiB), (128 * KiB, MiB - 128 * KiB)]
        source.close()


def test_a_missing_second_context_is_refused() -> None:
    lies = Lies(contexts=(ALLOCATION, BITMAP), status=lambda offset, length: {ALLOCATION: [length, 3]})
    with lying_server(lies) as uri:
        source = open_source(uri, "b0", timeout_s=5)
        with pytest.raises(ProtocolError):
            list(source.dirty(0, MiB))
        source.close()


@pytest.mark.parametrize("answered", [0, 100, 8192])
def test_too_few_or_too_many_bytes_are_refused(answered: int) -> None:
    with lying_server(Lies(read=lambda offset, length: b"x" * answered)) as uri:
        source = open_source(uri, timeout_s=5)
        with pytest.raises(ProtocolError):
            source.readinto(0, bytearray(4096))
        source.close()


def test_a_connection_that_is_cut() -> None:
    with lying_server(Lies(read=lambda offset, length: None)) as uri:
        source = open_source(uri, timeout_s=5)
        with pytest.raises(ConnectError, match="connection lost"):
            source.readinto(0, bytearray(4096))
        source.close()


def test_the_last_bytes_of_a_disk_that_is_no_multiple_of_the_minimum_are_asked_for() -> None:
    lies = Lies(size=10000, block_sizes=(4096, 4096, 65536))
    with lying_server(lies) as uri:
        source = open_source(uri, timeout_s=5)
        source.readinto(9999, bytearray(1))
        source.readinto(4000, bytearray(100))
        assert lies.asked == [(8192, 1808), (0, 8192)]
        source.close()


@pytest.mark.parametrize("turn", [1, 2, 3, 99])
def test_a_handshake_that_is_broken_off_is_cut(monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """Even while the exception is still held: QEMU hangs when its server is stopped while a client is half-way in."""
    turns = 0
    notify = nbd_module._Connection.notify

    def interrupted(connection: nbd_module._Connection, events: int) -> None:
        nonlocal turns
        turns += 1
        if turns == turn:
            raise KeyboardInterrupt
        notify(connection, events)
        if connection.handle.aio_is_ready():
            raise KeyboardInterrupt  # the server was so quick that there were fewer turns

    monkeypatch.setattr(nbd_module._Connection, "notify", interrupted)
    with nbdkit("memory", "1M") as server:
        process = f"/proc/{server.process.pid}/fd"
        before = len(os.listdir(process))
        with pytest.raises(KeyboardInterrupt) as caught:
            open_source(server.uri, timeout_s=10)
        deadline = time.monotonic() + 10
        while len(os.listdir(process)) > before:
            assert time.monotonic() < deadline, "the server still has the connection"
            time.sleep(0.01)
        assert caught.value.__traceback__ is not None
