"""backupfs: takes backups of KVM disks and mounts every point of them as a raw disk."""

__version__ = "0.1.0"
