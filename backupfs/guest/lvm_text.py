"""The text in which LVM writes down a volume group: sections in braces, and `key = value` with numbers, strings, lists.

Source: LVM2, libdm/libdm-config.c.
"""

import re
from collections.abc import Iterator

from backupfs.errors import BackupfsError

Value = int | str | list["Value"]
Section = dict[str, "Value | Section"]

_MOST_TOKENS = 1_000_000  # a volume group with 10,000 logical volumes has as many
_DEEPEST = 16  # sections in sections; LVM's are 4
_TOKEN = re.compile(
    r"""(?: [ \t\r\n]++ | \#[^\n]*+ )*+
        (?: (?P<string> "[^"\\]*+ (?: \\. [^"\\]*+ )*+ " )
          | (?P<mark> [={}\[\],] )
          | (?P<word> [^ \t\r\n={}\[\],"\#]++ )
          | (?P<end> \Z ) )""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class BadText(BackupfsError):
    """The text is not what LVM writes."""


def parse(text: str) -> Section:
    """Return what the text says, as nested sections.

    Raises:
        BadText: it is not LVM's, or larger than what LVM could have written.
    """
    tokens = _tokens(text)
    root: Section = {}
    open_sections = [root]
    for kind, token in tokens:
        if (kind, token) == ("mark", "}"):
            open_sections.pop()
            if not open_sections:
                raise BadText("a brace too many")
            continue
        if kind == "end":
            break
        key = token if kind == "word" else _unquoted(token) if kind == "string" else ""
        section = open_sections[-1]
        _, mark = next(tokens)
        if not key or key in section or mark not in ("=", "{"):
            raise BadText(f"no key, or one that comes twice, before {mark[:20]!r}")
        if mark == "=":
            section[key] = _value(tokens)
            continue
        inner: Section = {}
        section[key] = inner
        open_sections.append(inner)
        if len(open_sections) > _DEEPEST:
            raise BadText("sections in sections without an end")
    if len(open_sections) != 1:
        raise BadText("a brace is missing")
    return root


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    for _ in range(_MOST_TOKENS):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise BadText(f"nothing known at {position}")
        position = match.end()
        yield match.lastgroup, match[match.lastgroup]
        if match.lastgroup == "end":
            raise BadText("it ends too early")  # who takes the end for an end asks for no more
    raise BadText("it is too long")


def _value(tokens: Iterator[tuple[str, str]]) -> Value:
    kind, token = next(tokens)
    if (kind, token) != ("mark", "["):
        return _scalar(kind, token)
    values: list[Value] = []
    kind, token = next(tokens)
    while (kind, token) != ("mark", "]"):
        values.append(_scalar(kind, token))
        kind, token = next(tokens)
        if (kind, token) == ("mark", ","):
            kind, token = next(tokens)
        elif (kind, token) != ("mark", "]"):
            raise BadText("a list without a comma")
    return values


def _scalar(kind: str, token: str) -> Value:
    if kind == "string":
        return _unquoted(token)
    if kind == "word":
        return int(token) if _NUMBER.fullmatch(token) else token
    raise BadText(f"{token[:20]!r} is no value")


def _unquoted(token: str) -> str:
    return _ESCAPED.sub(r"\1", token[1:-1])
