"""A repository that version 1 of the format wrote has to open, and show the same bytes, for ever; and one in which gc
wrote layers again, which have version 2.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from repositories import add_point, read_point

from backupfs.repository.repository import Repository


def decode_version(layer: Path) -> int:
    return int.from_bytes(layer.read_bytes()[8:12], "little")


DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("name", ["repository-v1", "repository-v1-plain", "repository-v1-rewritten"])
def test_the_repository_of_version_1_opens_and_grows(tmp_path: Path, name: str) -> None:
    path = tmp_path / "repo"
    shutil.copytree(DATA / name, path)
    expected = json.loads((DATA / f"{name}.json").read_text())
    versions = {decode_version(layer) for layer in path.rglob("*.layer")}
    assert versions == {"repository-v1": {1}, "repository-v1-plain": {1, 3}, "repository-v1-rewritten": {1, 2}}[name]
    with Repository.open(str(path)) as repository:
        found = {}
        for vm in repository.vms():
            for point in repository.points(vm):
                for disk in repository.manifest(vm, point).disks:
                    data = read_point(repository, point, vm=vm, disk=disk.name)
                    repository.open_image(vm, point, disk.name).check_map()
                    found[f"{vm}/{point}/{disk.name}"] = {
                        "size": len(data),
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "chain": disk.chain,
                        "kind": disk.kind,
                    }
        assert found == expected
        point = add_point(repository, b"more", vm="web01")
        assert point.disks[0].kind == "delta"
        assert read_point(repository, point.id) == b"more"
