"""What lies in a repository's folder: names of VMs, chains and points, and where each thing is. Reads folders only."""

import os
import re
from collections.abc import Iterator

from backupfs.errors import Corrupt, NotFound, RepositoryError
from backupfs.repository import names
from backupfs.repository.files import is_damage, open_regular
from backupfs.repository.format import LayerId
from backupfs.repository.index import Index, IndexedLayer
from backupfs.repository.layer import Layer
from backupfs.repository.manifest import DiskEntry, Manifest
from backupfs.repository.point import Chain, check_address, disk_folder, layer_path

# File systems where LMDB's shared memory and locks do not hold.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs", "virtiofs"}


def read_file(path: str, missing: str) -> bytes:
    """Return a small file's bytes.

    Raises:
        NotFound: there is none; `missing` is the message.
        Corrupt: the disk can't read it, or it is no file.
        RepositoryError: it can't be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFound(missing) from e
    except OSError as e:
        if is_damage(e):
            raise Corrupt(path, 0, f"can't be read: {e.strerror}") from e
        raise RepositoryError(f"{path}: {e.strerror}") from e


def manifest_path(root: str, vm: str, point: str) -> str:
    """Return the path of a point's manifest."""
    return os.path.join(root, "vms", names.escape(vm), "points", f"{point}.json")


def vms(root: str) -> list[str]:
    """Return the names of all VMs, in order. Raises Corrupt: the folder that they are in is missing."""
    folder = os.path.join(root, "vms")
    found = [names.unescape(name) for name in _listdir(folder)]
    if not found and not os.path.isdir(folder):
        raise Corrupt(folder, 0, "is missing")
    return sorted(name for name in found if name)


def points(root: str, vm: str) -> list[str]:
    """Return the ids of a VM's points, oldest first; files with other names are passed over."""
    found = []
    for name in _listdir(os.path.dirname(manifest_path(root, vm, "x"))):
        key = names.point_key(name[:-5]) if name.endswith(".json") else None
        if key:
            found.append((key, name[:-5]))
    return [point for _, point in sorted(found)]


def chains(root: str, vm: str, disk: str) -> list[str]:
    """Return the full names of a disk's chains."""
    return sorted(_listdir(disk_folder(root, vm, disk)))


def disks(root: str, vm: str) -> list[str]:
    """Return the names of a VM's disks, in order."""
    found = (names.unescape(name) for name in _listdir(os.path.dirname(disk_folder(root, vm, "x"))))
    return sorted(name for name in found if name)


def chain_files(folder: str) -> list[tuple[int, str]]:
    """Return the seq and the suffix of a chain's files (`names.LAYER` and the like); other names are passed over."""
    found = ((names.layer_seq(name), os.path.splitext(name)[1]) for name in _listdir(folder))
    return [(seq, suffix) for seq, suffix in found if seq is not None]


def _listdir(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise RepositoryError(f"{folder}: {e.strerror}") from e


def layers_to_index(root: str, index: Index, manifest: Manifest) -> list[IndexedLayer]:
    """Return the layers of a point, and their ancestors, that the index does not have; each chain in order of seq.

    The way back goes by the parents' ids in the layers' headers, so a layer that is no ancestor stays out.

    Raises:
        Corrupt: an ancestor is missing or damaged: an older version of a chunk would show.
    """
    found: list[IndexedLayer] = []
    for entry in manifest.disks:
        chain_no = index.chain_no(manifest.vm, entry.name, entry.chain)
        chain = Chain(root, manifest.vm, entry.name, entry.chain, -1 if chain_no is None else chain_no)
        found += reversed(list(_missing(index, chain, bytes.fromhex(manifest.repository), entry)))
    return found


def _missing(index: Index, chain: Chain, repository_id: bytes, entry: DiskEntry) -> Iterator[IndexedLayer]:
    seq, layer_id = entry.seq, LayerId(bytes.fromhex(entry.layer_id))
    while chain.no < 0 or index.layer_id(chain.no, seq) != layer_id:
        path = layer_path(chain.root, chain.vm, chain.disk, chain.name, seq)
        layer = Layer(path)
        check_address(layer, repository_id, chain, seq, layer_id)
        layer.trailer()
        header = layer.header
        base = header.is_base
        if base != (seq == 0) or (not base and header.parent_seq >= seq):
            raise Corrupt(path, 0, "the layer's place in its chain can't be")
        yield IndexedLayer(
            chain.vm,
            chain.disk,
            chain.name,
            seq,
            None if base else header.parent_seq,
            layer_id,
            header.edition,
            [] if base else layer.rows(),
        )
        if base:
            return
        seq, layer_id = header.parent_seq, header.parent_id


def index_folder(root: str, repository_id: str) -> str:
    """Return where the index is kept: in the repository, or, where LMDB can't work or we can't write, in a cache.

    It is derived, so two copies of it do no harm.
    """
    inside = os.path.join(root, "index")
    if os.access(inside if os.path.isdir(inside) else root, os.W_OK) and _filesystem(root) not in _NETWORK:
        return inside
    return os.path.join(cache_folder(), repository_id)


def cache_folder() -> str:
    """Return where a user's copies of what repositories hold are kept, of all repositories."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "backupfs")


def _filesystem(path: str) -> str:
    """Return the type of the file system that holds `path`, as the kernel names it. Source: proc(5), mountinfo."""
    best, kind = "", ""
    path = os.path.realpath(path)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                mounted = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
                inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
                if inside and len(mounted) >= len(best):
                    best, kind = mounted, right.split()[0]
    except OSError:
        return ""
    return kind.removeprefix("fuse.")
