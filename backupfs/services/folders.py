"""How folders lie to each other."""

import os


def is_inside(path: str, other: str) -> bool:
    """Return whether a folder is another or lies in it; by what they are, so that a bind mount does not hide it."""
    path, other = os.path.realpath(path), os.path.realpath(other)
    try:
        status = os.stat(other)
        above = path
        while not os.path.samestat(os.stat(above), status):
            if above == os.path.dirname(above):
                return False
            above = os.path.dirname(above)
        return True
    except OSError:  # it is not there, or it is a dead mount
        return os.path.commonpath([path, other]) == other
