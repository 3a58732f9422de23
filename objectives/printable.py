"""Text of others, such as names in files, fit for a line that is printed. Light: the command line starts with it."""

from __future__ import annotations


def shown(text: str) -> str:
    """A name out of a file, fit for one line: control characters escaped, 120 characters at most."""
    return printable(text, limit=120)


def printable(text: str, keep: str = "", limit: int | None = None) -> str:
    r"""Text with control, direction and undecodable characters shown as escapes, cut to `limit` characters.

    Args:
        keep: characters that are left as they are.

    >>> printable("a\x1b[31m\n\u202eb", keep="\n")
    'a\\x1b[31m\n\\u202eb'
    >>> printable("a long name", limit=9)
    'a long...'
    """
    if limit is not None:
        text = text[: limit + 1]  # it may be of any length
    shown = "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 3]}..."
