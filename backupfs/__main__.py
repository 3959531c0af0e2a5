"""`python -m backupfs`."""

from backupfs.cli import main

if __name__ == "__main__":
    main()
