"""What every Source keeps: NBD exports of two servers, and files of several formats."""

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from servers import nbdkit, need, qemu_nbd, run

from backupfs.errors import BitmapUnusable, ConnectError
from backupfs.extents import Extent
from backupfs.sources import Source, open_source
from backupfs.units import KiB, MiB

SIZE = 9 * MiB
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "qed", "parallels", "vpc")
KINDS = ("nbdkit file", "nbdkit memory", "nbdkit data", "nbdkit without extents", "qemu-nbd qcow2", "odd raw", *FORMATS)

# nbdkit 1.32 may abort (assertion `sock >= 0' in raw_send_socket) when a client goes away with requests in flight.
ONE_THREAD = ["--threads=1"]


def make_content() -> bytes:
    """Return random bytes with holes, some of them not of whole chunks."""
    rng = random.Random(7)
    content = bytearray(SIZE)
    for offset, length in ((0, 70 * KiB), (3 * MiB - 5, 1 * MiB + 99), (SIZE - 4 * KiB, 4 * KiB)):
        content[offset : offset + length] = rng.randbytes(length)
    return bytes(content)


@pytest.fixture(scope="module", params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, bytes]]:
    """A place that holds a disk, and what is on it."""
    need("qemu-img", "qemu-nbd", "nbdkit")
    folder = tmp_path_factory.mktemp("disk")
    content = make_content()
    raw = folder / "disk.raw"
    with ExitStack() as stack:
        kind = request.param
        if kind == "odd raw":
            content = content[: SIZE - 4 * KiB + 333]
        with raw.open("wb") as f:
            for offset in range(0, len(content), 64 * KiB):
                if any(content[offset : offset + 64 * KiB]):
                    f.seek(offset)
                    f.write(content[offset : offset + 64 * KiB])
            f.truncate(len(content))
        if kind == "nbdkit file":
            spec = stack.enter_context(nbdkit("file", str(raw), options=ONE_THREAD)).uri
        elif kind == "nbdkit memory":
            spec = stack.enter_context(nbdkit("memory", str(SIZE), options=ONE_THREAD)).uri
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(raw), spec)
        elif kind == "nbdkit data":
            content = bytes(1 * MiB) + b"backupfs" * 512 + bytes(5 * MiB + 77)
            data = f"@{1 * MiB} ( 0x{b'backupfs'.hex(' ').replace(' ', ' 0x')} )*512 @{len(content) - 1} 0"
            spec = stack.enter_context(nbdkit("data", f"data={data}", options=ONE_THREAD)).uri
        elif kind == "nbdkit without extents":
            spec = stack.enter_context(nbdkit("file", str(raw), options=["--no-sr", *ONE_THREAD])).uri
        elif kind == "qemu-nbd qcow2":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "disk.qcow2")
            spec = stack.enter_context(qemu_nbd(folder / "disk.qcow2", image_format="qcow2")).uri
        elif kind == "odd raw":
            spec = str(raw)
        else:
            options = ["-o", "force_size=on"] if kind == "vpc" else []
            run("qemu-img", "convert", "-f", "raw", "-O", kind, *options, raw, folder / f"image.{kind}")
            spec = str(folder / f"image.{kind}")
        yield spec, content


@pytest.fixture
def source(disk: tuple[str, bytes]) -> Iterator[Source]:
    opened = open_source(disk[0], timeout_s=10)
    yield opened
    opened.close()


@pytest.fixture
def content(disk: tuple[str, bytes]) -> bytes:
    return disk[1]


def covers(extents: list[Extent], offset: int, length: int) -> bool:
    position = offset
    for extent in extents:
        if extent.offset != position or extent.length <= 0:
            return False
        position = extent.end
    return position == offset + length


def test_the_size_is_exact(source: Source, content: bytes) -> None:
    assert source.size == len(content)


def test_the_format_is_told(source: Source, disk: tuple[str, bytes]) -> None:
    spec = disk[0]
    image_format = spec.rpartition(".")[2]
    assert source.format == ("nbd" if spec.startswith("nbd") else image_format)
    assert source.description == spec


def test_readinto_fills_a_buffer_of_any_size(source: Source, content: bytes) -> None:
    end = len(content)
    ranges = [(0, 0), (0, 1), (0, 512), (1, 511), (511, 2), (65535, 3), (3 * MiB - 7, 1234), (end - 1, 1), (end, 0)]
    for offset, length in [*ranges, (end - 700, 700), (0, end)]:
        buffer = bytearray(b"\xaa" * (length + 2))
        source.readinto(offset, memoryview(buffer)[1:-1])
        assert buffer[1:-1] == content[offset : offset + length]
        assert buffer[0] == buffer[-1] == 0xAA


@pytest.mark.parametrize("offset_length", [(-1, 1), (0, None), (None, 1)])
def test_a_range_outside_is_refused(source: Source, offset_length: tuple[int | None, int | None]) -> None:
    offset = source.size if offset_length[0] is None else offset_length[0]
    length = source.size + 1 if offset_length[1] is None else offset_length[1]
    with pytest.raises(ValueError, match="not inside a disk"):
        source.readinto(offset, bytearray(length))
    with pytest.raises(ValueError, match="not inside a disk"):
        list(source.extents(offset, length))
    with pytest.raises(ValueError, match="not inside a disk"):
        list(source.status(offset, length))
    with pytest.raises(ValueError, match="not inside a disk"):
        list(source.read_many([(offset, length)]))


def test_extents_cover_any_range_and_zero_is_zero(source: Source, content: bytes) -> None:
    end = len(content)
    for offset, length in [(0, end), (1, end - 1), (513, 70000), (end - 1, 1), (3 * MiB - 6, 2), (0, 0), (end, 0)]:
        extents = list(source.extents(offset, length))
        assert covers(extents, offset, length)
        assert all(a.flag != b.flag for a, b in itertools.pairwise(extents))
        for extent in extents:
            assert not (extent.flag and any(content[extent.offset : extent.end]))


def test_status_without_a_bitmap_is_all_dirty(source: Source, content: bytes) -> None:
    pairs = list(source.status(5, len(content) - 5))
    assert covers([zero for zero, _ in pairs], 5, len(content) - 5)
    assert all((z.offset, z.length) == (d.offset, d.length) and d.flag for z, d in pairs)
    assert source.bitmap is None
    assert source.bitmap_problem is None
    with pytest.raises(BitmapUnusable):
        list(source.dirty(0, 1))


def test_read_many_returns_every_byte_once(source: Source, content: bytes) -> None:
    ranges = [(0, 5), (5, 2 * MiB + 1), (3 * MiB - 100, 0), (3 * MiB - 100, 2 * MiB), (len(content) - 77, 77)]
    seen: dict[int, bytes] = {}
    for offset, part in source.read_many(ranges):
        assert offset not in seen
        seen[offset] = bytes(part)
    found = sorted((offset, len(part)) for offset, part in seen.items())
    for offset, length in ranges:
        parts = [(o, n) for o, n in found if offset <= o < offset + length]
        assert covers([Extent(o, n, True) for o, n in parts], offset, length)
    assert sum(n for _, n in found) == sum(n for _, n in ranges)
    assert all(content[o : o + len(part)] == part for o, part in seen.items())


def test_parts_are_whole_chunks_from_the_beginning_of_a_range(source: Source, content: bytes) -> None:
    parts = [(o, len(part)) for o, part in source.read_many([(64 * KiB, len(content) - 64 * KiB)])]
    assert all((o % (64 * KiB), n % (64 * KiB)) == (0, 0) for o, n in parts if o + n != len(content))


def test_a_part_belongs_to_the_caller(source: Source, content: bytes) -> None:
    kept = list(source.read_many([(0, len(content))]))
    kept += list(source.read_many([(0, len(content))]))
    source.close()
    for offset, part in kept:
        assert part == content[offset : offset + len(part)]
        part[:1] = b"x"


def test_status_may_be_asked_while_reading(source: Source, content: bytes) -> None:
    def ranges() -> Iterator[tuple[int, int]]:
        for zero, _ in source.status(0, len(content)):
            assert any(source.extents(zero.offset, 1))
            if not zero.flag:
                yield zero.offset, zero.length

    image = bytearray(len(content))
    for offset, part in source.read_many(ranges()):
        image[offset : offset + len(part)] = part
        source.readinto(0, bytearray(10))
    assert image == content


def test_reading_may_be_given_up(source: Source, content: bytes) -> None:
    parts = source.read_many((o, 64 * KiB) for o in range(0, 2 * MiB, 64 * KiB))
    next(parts)
    del parts
    buffer = bytearray(100)
    source.readinto(3 * MiB, buffer)
    assert buffer == content[3 * MiB : 3 * MiB + 100]


def test_close_is_idempotent_and_ends_reading(disk: tuple[str, bytes], tmp_path: Path) -> None:
    opened = open_source(disk[0], timeout_s=10)
    parts = opened.read_many([(0, opened.size)] * 5)
    next(parts)
    opened.close()
    opened.close()
    with pytest.raises(ConnectError, match="closed"):
        list(parts)
    with pytest.raises(ConnectError, match="closed"):
        opened.readinto(0, bytearray(1))
