"""What stands in an NTFS' reparse points: links, and files of which Windows keeps the content elsewhere.

Source: MS-FSCC 2.1.2.
"""

import struct

LONGEST = 16 << 10
"""Bytes of a reparse point."""

_LONGEST_LINK = 4096
_LINKS = {0xA000000C: 20, 0xA0000003: 16}  # symbolic link, junction: where the names begin
_WSL_LINK = 0xA000001D
_FILES = {0x80000017: "compressed by Windows (WOF)", 0x80000013: "deduplicated by Windows"}


def tag(content: bytes) -> int:
    """Return of which kind it is; 0: there is none."""
    return int(struct.unpack_from("<I", content)[0]) if len(content) >= 8 else 0


def reason(content: bytes, *, has_holes: bool) -> str:
    """Return why a file can't be read; "" if it can.

    Args:
        content: its reparse point; b"": it has none.
        has_holes: whether a part of the file is not stored.
    """
    kind = tag(content)
    if kind in _FILES:
        return f"is {_FILES[kind]}, which is not read"
    if kind and has_holes:
        # What OneDrive has on demand only looks like this, and would read as zeroes.
        return f"is a reparse point ({kind:#x}): a part of what it holds is kept elsewhere"
    return ""


def link(content: bytes) -> bytes | None:
    """Return the target of a symbolic link or junction, with slashes; None: it is none."""
    if tag(content) == _WSL_LINK:
        # A version, then the target, as it was made in Linux.
        end = 8 + int(struct.unpack_from("<H", content, 4)[0])
        return content[12:end].replace(b"\0", b"")[:_LONGEST_LINK] or b"/"
    if len(content) < 16:
        return None
    kind, _, _, at, length, print_at, print_length = struct.unpack_from("<IHHHHHH", content)
    begin = _LINKS.get(kind)
    if begin is None:
        return None
    if print_length:
        at, length = print_at, print_length
    target = content[begin + at : begin + at + length].decode("utf-16-le", "surrogatepass").replace("\\", "/")
    return target.encode("utf-8", "surrogatepass").replace(b"\0", b"")[:_LONGEST_LINK] or b"/"
