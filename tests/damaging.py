"""Damaging layers, and what verify and --repair make of it."""

from pathlib import Path

from backupfs.repository.repository import Repository
from backupfs.services.damage import Damage, Report
from backupfs.services.repair import repair
from backupfs.services.verify import verify


def layer(repository: Repository, seq: int) -> Path:
    return Path(repository.path) / "vms/web01/disks/vda/main" / f"{seq:06d}.layer"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    path.chmod(0o444)


def flip(path: Path, offset: int) -> None:
    with open(path, "rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    overwrite(path, offset, bytes([byte ^ 0x40]))


def check(repository: Repository) -> Report:
    return verify(repository, None, None, 1, lambda *_: None)


def repaired(repository: Repository) -> list[Damage]:
    """Verify and repair; return the damage that was found."""
    report = check(repository)
    repair(repository, report, [], None)
    found = list(report.all_damage(repository.settings.chunk_size))
    assert found
    return found


def kept(repository: Repository) -> list[Path]:
    folder = Path(repository.path) / "damaged"
    return sorted(folder.iterdir()) if folder.is_dir() else []
