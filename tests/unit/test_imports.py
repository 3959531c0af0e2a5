"""The direction of imports: cli -> services -> {repository, sources, fuse, guest} -> what stands at the top."""

import ast
from pathlib import Path

import pytest

import backupfs

ROOT = Path(backupfs.__file__).parent
LOW = {"interrupts", "image", "filesystem", "extents", "errors", "units"}
MAY = {
    "repository": LOW,
    "sources": LOW,
    "fuse": LOW,
    "guest": LOW,
    "services": LOW | {"repository", "sources", "fuse", "guest"},
    "cli": LOW | {"services", "repository"},
    "__main__": {"cli"},
}
ONLY = {
    "lmdb": "repository/index.py",
    "nbd": "sources/nbd.py",
    "pyfuse3": "fuse/operations.py",
    "click": "cli/",
    "libvirt": "sources/domain.py",
    "qemu": "sources/monitor.py",
}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_layer_imports_only_what_is_below(path: Path) -> None:
    inside = path.relative_to(ROOT)
    part = inside.parts[0].removesuffix(".py")
    names = {n.split(".")[1] for n in imported(path) if n.startswith("backupfs.")} - {"__version__"}
    assert names <= MAY.get(part, LOW) | {part}


@pytest.mark.parametrize(("library", "home"), ONLY.items())
def test_a_library_is_imported_in_one_place(library: str, home: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if library in {n.split(".")[0] for n in imported(p)}}
    assert all(user.startswith(home) for user in users)
