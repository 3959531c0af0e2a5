"""Rewriting a manifest: the one thing in a repository that is ever replaced. Under the writer lock.

A crash leaves the old manifest or the new one. Mounts that show the point go on: layers and maps are the same.
"""

import json
import logging
import os
import secrets
from collections.abc import Mapping

from backupfs.errors import RepositoryError
from backupfs.repository import catalog
from backupfs.repository.files import fsync_folder, write_new
from backupfs.repository.manifest import decode_manifest, seal, seal_of
from backupfs.repository.repository import Repository

log = logging.getLogger(__name__)


def amend(repository: Repository, vm: str, point: str, changes: Mapping[str, object]) -> None:
    """Replace members of a point's manifest; all others stay, also those that this program does not know.

    Raises:
        NotFound, Corrupt: it can't be read.
        RepositoryError: it can't be written, and is as it was.
    """
    repository.manifest(vm, point)  # its seal is checked
    document = json.loads(repository.manifest_json(vm, point))
    del document["blake3"]
    data = seal({**document, **changes})
    path = catalog.manifest_path(repository.path, vm, point)
    decode_manifest(data, path)
    temporary = os.path.join(repository.path, "tmp", f"{secrets.token_hex(16)}.json")
    try:
        write_new(temporary, data)
        os.rename(temporary, path)
        fsync_folder(os.path.dirname(path))
    except OSError as e:
        raise RepositoryError(f"{path}: can't be rewritten: {e.strerror}") from e
    try:
        repository.store.index.add(vm, point, seal_of(data), [])
    except RepositoryError as e:
        log.warning("the manifest is written, but its seal is not indexed: %s", e)
