"""Names from data, made fit for a terminal, a table cell and a file name: nothing in them is obeyed."""

import hashlib
import unicodedata

_NAME_BYTES = 150
"""Of a file name that we make: systems take 255, and suffixes, counters and temporary names come on top."""


def printable(text: object) -> str:
    """The text on one line, with whatever a terminal might obey written as an escape sequence.

    Those are control characters, line ends, marks that turn the direction of writing, and bytes of file names that are
    no UTF-8, which Python holds as lone surrogates.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in str(text))


def printable_lines(text: object) -> str:
    """`printable`, but for the line ends, which are kept."""
    return "\n".join(map(printable, str(text).split("\n")))


def table_cell(value: object) -> object:
    """The value for a CSV file: text that a spreadsheet would take for a formula is quoted with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def file_name(text: str) -> str:
    """A file name that stands for the text: itself where it can be, else a readable part of it and a hash.

    Never empty, hidden, "." or "..", nor longer than file systems take; different texts get different names.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    kept = "".join(c if _is_harmless(c) and c not in '/\\:*?"<>|' else "_" for c in text)
    if kept == text and len(encoded) <= _NAME_BYTES and text.strip(". ") == text and text:
        return text
    short = kept.encode("utf-8", "replace")[: _NAME_BYTES - 20].decode("utf-8", "ignore").strip(". ")
    return f"{short or 'name'}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
