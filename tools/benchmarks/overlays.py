"""qcow2 overlays of a few changed clusters, written straight into files: a chain of a thousand takes seconds.

Source: QEMU, docs/interop/qcow2.txt. `qemu-img check` finds nothing wrong with them (tests/integration/test_bench.py).
"""

import struct
from pathlib import Path

CLUSTER = 64 << 10
_ENTRIES = CLUSTER // 8  # of an L2 table: it maps 512 MiB
_COPIED = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_BACKING_FORMAT = struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2")


def write_overlay(path: Path, size: int, changes: list[tuple[int, bytes]], backing: str) -> None:
    """Write a qcow2 whose clusters at these offsets hold these bytes, one cluster each; all else shows what is behind.

    Args:
        size: of the disk, bytes.
        changes: offset and bytes of each, in order.
        backing: the qcow2 file behind, by its name in the same folder.
    """
    tables = sorted({offset // CLUSTER // _ENTRIES for offset, _ in changes})
    entries = -(-size // CLUSTER // _ENTRIES) or 1  # of the L1 table
    first = 4 + len(tables)  # clusters before the data: header, refcount table and block, L1 table, L2 tables
    clusters = first + len(changes)
    if clusters > CLUSTER // 2 or entries > _ENTRIES:
        raise ValueError("too much for one refcount block, or one cluster of L1 table")
    name = backing.encode()
    header = _HEADER.pack(
        b"QFI\xfb", 3, _HEADER.size + 16 + 8, len(name), 16, size, 0, entries, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0,
        4, _HEADER.size,
    )  # fmt: skip
    l1, l2 = [0] * entries, {table: [0] * _ENTRIES for table in tables}
    for i, table in enumerate(tables):
        l1[table] = (4 + i) * CLUSTER | _COPIED
    for i, (offset, _) in enumerate(changes):
        table, entry = divmod(offset // CLUSTER, _ENTRIES)
        l2[table][entry] = (first + i) * CLUSTER | _COPIED
    pieces = [
        header + _BACKING_FORMAT + bytes(8) + name,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(">H", 1) * clusters,
        struct.pack(f">{entries}Q", *l1),
        *(struct.pack(f">{_ENTRIES}Q", *l2[table]) for table in tables),
    ]
    with path.open("wb") as file:
        file.writelines(piece.ljust(CLUSTER, b"\0") for piece in pieces)
        file.writelines(data for _, data in changes)
