"""The text in which LVM writes down a volume group: sections in braces, and `key = value` with numbers, strings, lists.

Source: LVM2, libdm/libdm-config.c.
"""

import re

from backupfs.errors import BackupfsError

Scalar = int | str
Value = Scalar | list[Scalar]
Section = dict[str, "Value | Section"]

_MOST_VALUES = 400_000  # a volume group with 10,000 logical volumes has some 200,000
_LONGEST_STRING = 64 << 10
_DEEPEST = 16  # sections in sections; LVM's are 4

# Possessive (`*+`): what matched is not tried another way, so the time it takes grows with the text only. But before
# Python 3.11.5 a possessive group keeps what it took of a turn that then failed: no group here can fail on its way.
_SKIP = r"(?: [ \t\r\n]++ | \#[^\n]*+ )*+"
_SCALAR = r'(?: "[^"\\]*+ (?: \\. [^"\\]*+ )*+ " | [^ \t\r\n={}\[\],"\#]++ )'
_STATEMENT = re.compile(
    rf"""{_SKIP} (?: (?P<end> \Z ) | (?P<close> \}} )
      | (?P<key> {_SCALAR} ) {_SKIP} (?: (?P<open> \{{ )
          | = {_SKIP} (?: (?P<scalar> {_SCALAR} ) | (?P<none> \[ {_SKIP} \] ) | (?P<list> \[ ) ) ) )""",
    re.VERBOSE | re.DOTALL,
)
_ITEM = re.compile(rf"{_SKIP} ({_SCALAR}) {_SKIP} ([,\]])", re.VERBOSE | re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class BadText(BackupfsError):
    """The text is not what LVM writes."""


def parse(text: str) -> Section:
    """Return what the text says, as nested sections.

    Raises:
        BadText: it is not LVM's, or larger than what LVM could have written.
    """
    root: Section = {}
    open_sections = [root]
    position, values = 0, 0
    while True:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise BadText(f"it makes no sense at {position}")
        position, what = match.end(), match.lastgroup
        if what == "end":
            break
        if what == "close":
            open_sections.pop()
            if not open_sections:
                raise BadText("a brace too many")
            continue
        key, section = str(_scalar(match["key"], number=False)), open_sections[-1]
        if not key or key in section:
            raise BadText(f"there is no key, or it comes twice, before {position}")
        values += 1
        if what == "open":
            inner: Section = {}
            section[key] = inner
            open_sections.append(inner)
        elif what == "scalar":
            section[key] = _scalar(match["scalar"])
        elif what == "none":
            section[key] = []
        else:
            items, position = _list(text, position)
            section[key] = items
            values += len(items)
        if values > _MOST_VALUES or len(open_sections) > _DEEPEST:
            raise BadText("it is too long, or has too many sections in sections")
    if len(open_sections) != 1:
        raise BadText("a brace is missing")
    return root


def _list(text: str, position: int) -> tuple[list[Scalar], int]:
    """Return what a list holds that begins at `position`, and where it ends."""
    found: list[Scalar] = []
    while len(found) <= _MOST_VALUES:
        match = _ITEM.match(text, position)
        if match is None:
            break
        found.append(_scalar(match[1]))
        position = match.end()
        if match[2] == "]":
            return found, position
    raise BadText(f"a list makes no sense at {position}, or is too long")


def _scalar(token: str, *, number: bool = True) -> Scalar:
    if token[0] != '"':
        return int(token) if number and _NUMBER.fullmatch(token) else token
    if len(token) > _LONGEST_STRING:
        raise BadText("a string is too long")
    return _ESCAPED.sub(r"\1", token[1:-1])
