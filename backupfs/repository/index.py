"""The LMDB index: where the newest version of a chunk is, for any point. The only `import lmdb`.

Everything here follows from manifests and layer footers. Databases (keys big-endian, so that they sort by number):

    meta     b"repository" -> id of the repository; b"version" -> layout version
    points   VM \\0 POINT -> seal of the manifest when it was indexed
    chains   VM \\0 DISK \\0 CHAIN -> chain_no, u32
    layers   chain_no, seq -> layer id, seq of the parent (its own in a base), edition, check; of the bases too
    chunks   chain_no, region -> records of the deltas (format.RECORD), sorted by chunk and seq
    regions  chain_no, region -> number of records, sum of their checks mod 2^64

LMDB has no page checksums. A record's check covers its key; `regions`, in a tree of its own, tells when a record is
missing. So a damaged page gives `Corrupt`, not an older version of a chunk; or LMDB crashes (crashmark.py).

A chain may hold layers that are no ancestors of a later one: of points that were deleted, which a mount still has open.
`lineage` says which layers a point sees. Numbers of chains are never used again: caches and open images go by them.

Any thread may call; write transactions live inside one method. Never carried over a fork. A process opens a folder
once at a time. What is written is complete or absent: one transaction a point.
"""

import contextlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from backupfs.errors import Corrupt, RepositoryError
from backupfs.repository.crashmark import CrashMark
from backupfs.repository.files import open_regular
from backupfs.repository.format import (
    RECORD,
    REGION_CHUNKS,
    LayerId,
    Rows,
    Words,
    checks,
)
from backupfs.repository.layer import Layer
from backupfs.repository.lmdb_files import READERS, address_of, allocate_lock, unmap
from backupfs.repository.records import cut, decode_layer, encode_layer, gathered, record_seeds, records_of

LAYOUT = b"4"
_MAP_SIZE = 1 << 40  # address space, not memory; the file grows as it fills
_U32 = struct.Struct(">I")
_PAIR = struct.Struct(">II")
_SUMMARY = struct.Struct("<QQ")
_MASK64 = (1 << 64) - 1
_KEYED_RECORD = np.dtype([("chain", ">u4"), ("region", ">u4"), ("record", RECORD)])
_LOOK_UPS = 128  # of regions, before the pages that they touched are unmapped
_BATCH = 16 * 1024  # rows that are indexed, or looked at when layers go, at a time
_REGIONS = 256  # whose records are replaced at a time


class StaleIndex(Exception):
    """The index holds what manifests and layers no longer say: it has to be built again."""


@dataclass(frozen=True, slots=True)
class IndexedLayer:
    """A layer to be indexed: its address, its edition, and its rows (an iterator; empty for a base)."""

    vm: str
    disk: str
    chain: str
    seq: int
    parent_seq: int | None  # None for a base
    layer_id: LayerId
    edition: int
    rows: Iterable[Rows]


class Index:
    """An open index.

    Args:
        folder: where it is or is to be.
        repository_id: 32 hexadecimal digits.
        durable: whether each transaction is on the disk when it returns. If not, `sync` does it for all.

    Raises:
        Corrupt: LMDB can't open what is in the folder.
        StaleIndex: it is of another repository or layout.
        RepositoryError: the folder, or a file in it, can't be written, or is a symbolic link.
    """

    def __init__(self, folder: str, repository_id: str, *, durable: bool = True) -> None:
        self.folder = folder
        self._file = os.path.join(folder, "data.mdb")
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as e:
            raise RepositoryError(f"{folder}: the index can't be opened: {e.strerror}") from e
        self._mark = CrashMark(folder)
        try:
            self._env = self._open(durable=durable)
            try:
                self._map_address = address_of(self._file)
                self._look_ups = 0
                self._open_databases(repository_id)
            except BaseException:
                self._env.close()
                raise
        except BaseException:
            self._mark.close()
            raise

    def _open(self, *, durable: bool) -> "lmdb.Environment":
        try:
            if os.path.exists(self._file) and os.path.getsize(self._file) == 0:
                raise Corrupt(self._file, 0, "the file is empty")
            allocate_lock(os.path.join(self.folder, "lock.mdb"))
            with contextlib.suppress(FileNotFoundError):
                # LMDB follows links, and calls what it may not open damaged.
                os.close(open_regular(self._file, os.O_RDWR | os.O_NOFOLLOW))
            return lmdb.open(
                self.folder,
                map_size=_MAP_SIZE,
                max_dbs=8,
                max_readers=READERS,
                mode=0o600,
                readahead=False,
                meminit=False,
                sync=durable,
            )
        except lmdb.Error as e:
            raise self._corrupt(e) from e
        except OSError as e:
            raise RepositoryError(f"{e.filename or self.folder}: the index can't be opened: {e.strerror}") from e

    def _open_databases(self, repository_id: str) -> None:
        try:
            # Pages beyond the end of a truncated file would be a SIGBUS, not an error.
            pages = os.path.getsize(self._file) // self._env.stat()["psize"]
            if self._env.info()["last_pgno"] >= pages:
                raise Corrupt(self._file, os.path.getsize(self._file), "the file was cut off; run backupfs reindex")
            self._env.reader_check()
            with self._env.begin(write=True) as txn:
                self._meta = self._env.open_db(b"meta", txn=txn)
                self._points = self._env.open_db(b"points", txn=txn)
                self._chains = self._env.open_db(b"chains", txn=txn)
                self._layers = self._env.open_db(b"layers", txn=txn)
                self._chunks = self._env.open_db(b"chunks", txn=txn, dupsort=True, dupfixed=True)
                self._regions = self._env.open_db(b"regions", txn=txn)
                held = txn.get(b"repository", db=self._meta), txn.get(b"version", db=self._meta)
                if held == (None, None):
                    txn.put(b"repository", repository_id.encode(), db=self._meta)
                    txn.put(b"version", LAYOUT, db=self._meta)
                elif held != (repository_id.encode(), LAYOUT):
                    raise StaleIndex("the index belongs to another repository or layout")
        except lmdb.Error as e:
            raise self._corrupt(e) from e
        except OSError as e:
            raise RepositoryError(f"{self._file}: the index can't be opened: {e.strerror}") from e

    def close(self) -> None:
        """Close the environment; no other thread may be inside."""
        self._env.close()
        self._mark.close()

    def sync(self) -> None:
        """Put everything on the disk."""
        try:
            self._env.sync(True)
        except lmdb.Error as e:
            raise RepositoryError(f"{self._file}: {e}") from e

    def _corrupt(self, error: Exception) -> Corrupt:
        return Corrupt(self._file, 0, f"{error}; run backupfs reindex")

    def points(self) -> dict[tuple[str, str], bytes]:
        """Return the points that are indexed, (vm, id), each with its manifest's seal."""
        try:
            with self._env.begin(db=self._points) as txn:
                return {self._point_of(bytes(k)): bytes(v) for k, v in txn.cursor()}
        except lmdb.Error as e:
            raise self._corrupt(e) from e

    def _point_of(self, key: bytes) -> tuple[str, str]:
        try:
            vm, point = key.decode().split("\0")
        except ValueError as e:
            raise self._corrupt(e) from e
        return vm, point

    def chain_no(self, vm: str, disk: str, chain: str) -> int | None:
        """Return the chain's number in this index, or None."""
        try:
            with self._env.begin(db=self._chains) as txn:
                value = txn.get(_chain_key(vm, disk, chain))
            return None if value is None else int(_U32.unpack(value)[0])
        except (lmdb.Error, struct.error) as e:
            raise self._corrupt(e) from e

    def layer_id(self, chain_no: int, seq: int) -> LayerId | None:
        """Return the id of the layer that is indexed under this address, or None."""
        key = _PAIR.pack(chain_no, seq)
        try:
            with self._env.begin(db=self._layers) as txn:
                value = txn.get(key)
            return None if value is None else decode_layer(key, value)[0]
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._corrupt(e) from e

    def edition(self, chain_no: int, seq: int) -> int | None:
        """Return the edition of the layer whose rows are indexed under this address, or None. Raises Corrupt."""
        key = _PAIR.pack(chain_no, seq)
        try:
            with self._env.begin(db=self._layers) as txn:
                value = txn.get(key)
            return None if value is None else decode_layer(key, value)[2]
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._corrupt(e) from e

    def layers(self, chain_no: int) -> dict[int, int]:
        """Return, by seq, the parent's seq of every layer of a chain; a base's is its own.

        Raises:
            Corrupt: an entry is damaged.
        """
        found = {}
        try:
            with self._env.begin(db=self._layers) as txn:
                cursor = txn.cursor()
                going = cursor.set_range(_PAIR.pack(chain_no, 0))
                while going:
                    key = bytes(cursor.key())
                    chain, seq = _PAIR.unpack(key)
                    if chain != chain_no:
                        break
                    found[seq] = decode_layer(key, bytes(cursor.value()))[1]
                    going = cursor.next()
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._corrupt(e) from e
        return found

    def lineage(self, chain_no: int, seq: int) -> npt.NDArray[np.bool_]:
        """Say of each seq from 0 to `seq` whether a point at `seq` sees that layer; one more, False, for all after it.

        Raises:
            Corrupt: an ancestor is not in the index.
        """
        layers = self.layers(chain_no)
        seen = np.zeros(seq + 2, np.bool_)
        while not seen[seq]:
            seen[seq] = True
            parent = layers.get(seq)
            if parent is None or parent > seq:
                raise self._corrupt(ValueError(f"the parent of layer {seq} is not known"))
            seq = parent
        return seen

    def last_seq(self, chain_no: int) -> int:
        """Return the highest seq that is indexed of a chain."""
        try:
            with self._env.begin(db=self._layers) as txn:
                cursor = txn.cursor()
                found = cursor.prev() if cursor.set_range(_PAIR.pack(chain_no + 1, 0)) else cursor.last()
                chain, seq = _PAIR.unpack(cursor.key()) if found else (chain_no, 0)
            return int(seq) if chain == chain_no else 0
        except (lmdb.Error, struct.error) as e:
            raise self._corrupt(e) from e

    def records(self, chain_no: int, first: int, end: int) -> tuple[Words, Rows]:
        """Return all records of the regions in [first, end), checked: the region of each, and the records.

        They are sorted by region, chunk and seq.

        Raises:
            Corrupt: a record is damaged or missing.
        """
        keys, summaries = [], []
        try:
            with self._env.begin(buffers=True) as txn:
                cursor = txn.cursor(self._regions)
                going = cursor.set_range(_PAIR.pack(chain_no, first))
                while going:
                    key, value = bytes(cursor.key()), _SUMMARY.unpack(cursor.value())
                    if _PAIR.unpack(key) >= (chain_no, end):
                        break
                    keys.append(key)
                    summaries.append(value)
                    going = cursor.next()
                if end - first == 1:  # a record without a summary is damage too; of many regions check_map finds it
                    keys, summaries = [_PAIR.pack(chain_no, first)], summaries or [(0, 0)]
                multi = txn.cursor(self._chunks).getmulti
                data = bytes(multi(keys, dupdata=True, dupfixed_bytes=RECORD.itemsize, keyfixed=True))
            keyed = np.frombuffer(data, _KEYED_RECORD)
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._corrupt(e) from e
        regions = keyed["region"].astype(np.uint64)
        records = keyed["record"].copy()
        self._check_records(chain_no, regions, records, summaries)
        self._look_ups += end - first  # a lost update of another thread does no harm
        if self._look_ups >= _LOOK_UPS:
            self._look_ups = 0
            self._release_pages()
        return regions, records

    def _release_pages(self) -> None:
        """Unmap the file's pages; the next access maps them again from the page cache.

        They count as this process' memory, and each fault maps 64 KiB: without this an index of 7 million records
        takes 500 MiB.
        """
        if self._map_address:
            unmap(self._map_address, (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def _check_records(self, chain_no: int, regions: Words, records: Rows, summaries: list[tuple[int, int]]) -> None:
        """Raise Corrupt unless each region has as many records as its summary says, with the right checks."""
        counts = np.array([count for count, _ in summaries], np.int64)
        if len(records) != int(counts.sum()):
            raise self._corrupt(ValueError(f"there are {len(records)} records and should be {counts.sum()}"))
        if not len(records):
            return
        found = checks(records, record_seeds(chain_no, regions))
        starts = np.concatenate(([0], np.cumsum(counts[:-1])))
        totals = np.array([total for _, total in summaries], np.uint64)
        if np.any(np.add.reduceat(found, starts) != totals) or np.any(found.astype(np.uint32) != records["check"]):
            raise self._corrupt(ValueError("a record's check does not match"))

    def next_region(self, chain_no: int, first: int) -> int | None:
        """Return the first region at or after `first` that has records, or None."""
        try:
            with self._env.begin(db=self._regions) as txn:
                cursor = txn.cursor()
                if not cursor.set_range(_PAIR.pack(chain_no, first)):
                    return None
                found_chain, region = _PAIR.unpack(cursor.key())
            return int(region) if found_chain == chain_no else None
        except (lmdb.Error, struct.error) as e:
            raise self._corrupt(e) from e

    def add(self, vm: str, point: str, seal: bytes, layers: Iterable[IndexedLayer]) -> None:
        """Index a point and those of its layers that are new, in one transaction. A second time changes nothing.

        Layers of one chain come in order of seq.

        Raises:
            StaleIndex: the index holds another layer at one of the addresses.
            RepositoryError: no space.
        """
        try:
            with self._env.begin(write=True) as txn:
                for layer in layers:
                    self._add_layer(txn, layer)
                txn.put(f"{vm}\0{point}".encode(), seal, db=self._points)
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._write_error(e) from e

    def _write_error(self, error: Exception) -> RepositoryError:
        if isinstance(error, lmdb.DiskError) or "Input/output error" in str(error) or "No space" in str(error):
            return RepositoryError(f"{self._file}: {error}")  # LMDB says EIO of a full disk, too
        return self._corrupt(error)

    def forget(self, points: Iterable[tuple[str, str]]) -> None:
        """Take points off the list of what is indexed; their layers stay for the points that follow them.

        Raises:
            RepositoryError: no space.
        """
        try:
            with self._env.begin(write=True, db=self._points) as txn:
                for vm, point in points:
                    txn.delete(f"{vm}\0{point}".encode())
        except lmdb.Error as e:
            raise self._write_error(e) from e

    def remove(self, chain_no: int, dead: set[int]) -> None:
        """Remove layers that nothing sees any more, by seq, with their records. The chain's number stays taken.

        Broken off, it leaves a part of the records; no point sees them, and doing it again removes them.

        Raises:
            RepositoryError: no space.
            Corrupt: a record is damaged or missing.
        """
        seqs = np.array(sorted(dead), np.uint32)
        try:
            region = self.next_region(chain_no, 0)
            while region is not None:
                with self._env.begin(write=True) as txn:  # until it ends nobody else adds records
                    done = 0
                    while region is not None and done < _BATCH:
                        regions, records = self.records(chain_no, region, region + 1)
                        kept = ~np.isin(records["seq"].astype(np.uint32), seqs)
                        if not np.all(kept):
                            self._replace(txn, chain_no, region, regions[kept], records[kept])
                        done += len(records)
                        region = self.next_region(chain_no, region + 1)
            with self._env.begin(write=True, db=self._layers) as txn:
                for seq in dead:
                    txn.delete(_PAIR.pack(chain_no, seq))
        except (lmdb.Error, struct.error) as e:
            raise self._write_error(e) from e

    def renew(self, chain_no: int, layer: Layer) -> None:
        """Put the records of a layer's file in the place of those of another edition, in one transaction.

        Nothing changes if they are this edition's, if the layer is not indexed, or if another file has its name by now.

        Raises:
            RepositoryError: no space.
            Corrupt: a record, or the layer's table, is damaged.
        """
        header = layer.header
        if self.edition(chain_no, header.seq) in (None, header.edition):
            return
        address = _PAIR.pack(chain_no, header.seq)
        try:
            with self._env.begin(write=True) as txn:  # until it ends nobody else adds records
                held = txn.get(address, db=self._layers)
                layer_id, parent, edition = decode_layer(address, held) if held else (None, 0, header.edition)
                # Asked in here: who renames it comes for a transaction afterwards, so the last file has the last word.
                if layer_id != header.layer_id or edition == header.edition or not layer.is_current():
                    return
                txn.put(address, encode_layer(address, layer_id, parent, header.edition), db=self._layers)
                region = None if header.is_base else self._next_of(chain_no, layer, 0)
                while region is not None:
                    self._renew_regions(txn, chain_no, layer, region)
                    region = self._next_of(chain_no, layer, region + _REGIONS)
        except (lmdb.Error, struct.error, ValueError) as e:
            raise self._write_error(e) from e

    def _next_of(self, chain_no: int, layer: Layer, first: int) -> int | None:
        """Return the first region at or after `first` that has records in the index, or rows in the layer."""
        chunk = layer.next_chunk(first * REGION_CHUNKS)
        found = [self.next_region(chain_no, first), None if chunk is None else chunk // REGION_CHUNKS]
        return min((region for region in found if region is not None), default=None)

    def _renew_regions(self, txn: "lmdb.Transaction[bytes]", chain_no: int, layer: Layer, first: int) -> None:
        seq, end = layer.header.seq, first + _REGIONS
        regions, records = self.records(chain_no, first, end)
        was = records["seq"] == seq
        span = first * REGION_CHUNKS, end * REGION_CHUNKS
        new = [records_of(cut(rows, *span), seq) for rows in layer.rows(*span)]
        touched = np.unique(np.concatenate([regions[was], *(r for r, _ in new)]))
        kept = ~was & np.isin(regions, touched)
        regions = np.concatenate([regions[kept], *(r for r, _ in new)])
        # numpy joins structures in the machine's byte order.
        records = np.concatenate([records[kept], *(found for _, found in new)]).astype(RECORD)
        for region in touched.tolist():
            for db in (self._chunks, self._regions):
                txn.delete(_PAIR.pack(chain_no, region), db=db)
        order = np.lexsort((records["seq"], records["chunk"], regions))
        if len(order):
            self._put_records(txn, chain_no, regions[order], records[order])

    def _replace(self, txn: "lmdb.Transaction[bytes]", chain_no: int, region: int, regions: Words, rest: Rows) -> None:
        key = _PAIR.pack(chain_no, region)
        txn.delete(key, db=self._chunks)
        txn.delete(key, db=self._regions)
        if len(rest):
            self._put_records(txn, chain_no, regions, rest)

    def _add_layer(self, txn: "lmdb.Transaction[bytes]", layer: IndexedLayer) -> None:
        name = _chain_key(layer.vm, layer.disk, layer.chain)
        value = txn.get(name, db=self._chains)
        if value is None:
            value = _U32.pack(txn.stat(self._chains)["entries"])
            txn.put(name, value, db=self._chains)
        (chain_no,) = _U32.unpack(value)
        address = _PAIR.pack(chain_no, layer.seq)
        held = txn.get(address, db=self._layers)
        if held is not None:
            if decode_layer(address, held)[0] != layer.layer_id:
                raise StaleIndex(f"another layer is indexed as {layer.vm}/{layer.disk}/{layer.chain}/{layer.seq}")
            return
        parent = layer.seq if layer.parent_seq is None else layer.parent_seq
        txn.put(address, encode_layer(address, layer.layer_id, parent, layer.edition), db=self._layers)
        for rows in gathered(layer.rows, _BATCH):
            self._put_records(txn, chain_no, *records_of(rows, layer.seq))

    def _put_records(self, txn: "lmdb.Transaction[bytes]", chain_no: int, regions: Words, records: Rows) -> None:
        found = checks(records, record_seeds(chain_no, regions))
        records["check"] = found.astype(np.uint32)
        starts = np.flatnonzero(np.append(True, regions[1:] != regions[:-1]))
        totals = np.add.reduceat(found, starts)
        counts = np.diff(np.append(starts, len(regions)))
        keys = [_PAIR.pack(chain_no, region) for region in regions[starts].tolist()]
        data, size = records.tobytes(), RECORD.itemsize
        values = (data[i : i + size] for i in range(0, len(data), size))
        repeated = (key for key, count in zip(keys, counts.tolist(), strict=True) for _ in range(count))
        txn.cursor(self._chunks).putmulti(zip(repeated, values, strict=True), dupdata=True)
        for key, added, plus in zip(keys, counts.tolist(), totals.tolist(), strict=True):
            summary = txn.get(key, db=self._regions)
            count, total = (0, 0) if summary is None else _SUMMARY.unpack(summary)
            txn.put(key, _SUMMARY.pack(count + added, (total + plus) & _MASK64), db=self._regions)


def _chain_key(vm: str, disk: str, chain: str) -> bytes:
    key = f"{vm}\0{disk}\0{chain}".encode()
    # LMDB's keys hold 511 bytes; names may be longer together.
    return key if len(key) <= 480 else xxhash.xxh3_128_digest(key)
