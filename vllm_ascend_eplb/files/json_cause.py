# SPDX-License-Identifier: Apache-2.0
"""Finds the cause of a JSON error, and what to write instead.

The parser reports what it expected where it stopped. The cause is one of a few mistakes, which the text around that
place shows: a comma too many, quotes of another language or lost in a shell, words of Python, comments, a truncated
file.
"""

from __future__ import annotations

import json
import re

_WORDS = {
    "True": "write true in lower case",
    "False": "write false in lower case",
    "None": "write null",
    "NULL": "write null",
    "TRUE": "write true in lower case",
    "FALSE": "write false in lower case",
}


_TYPOGRAPHIC = "\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u2033\u00b4"


_WORD = re.compile(r"[A-Za-z_][\w.-]*")


def json_cause(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong with a text, and the way out; without the position.

    Args:
        text: a text that is not JSON.
        error: the parser's error.
    """
    at = error.pos
    rest, before = text[at:].lstrip(), text[:at].rstrip()
    # Some versions of Python stop at a trailing comma, others behind it.
    after_comma = rest[1:].lstrip() if rest.startswith(",") else rest
    if (before.endswith(",") or rest.startswith(",")) and after_comma[:1] in ("}", "]"):
        return f"there is a comma before {after_comma[0]}; take it out"
    if text.startswith("\ufeff"):
        return "it begins with a byte order mark; save it as UTF-8 without one"
    if not rest or "Unterminated string" in error.msg:
        return _ends(text, before, error)
    first = rest[0]
    if first in _TYPOGRAPHIC:
        return f"it has typographic quotes ({first}); write plain double quotes"
    if first == "'":
        return "strings stand in double quotes in JSON, not in single ones"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments; take them out"
    word = _WORD.match(rest)
    if word is not None and word.group(0) in _WORDS:
        return _WORDS[word.group(0)]
    if word is not None and ("property name" in error.msg or "Expecting value" in error.msg):
        if '"' not in text:
            return "it has no double quotes, which a shell may have taken; give it in single quotes"
        return f'{word.group(0)[:40]} needs double quotes: "{word.group(0)[:40]}"'
    if "Expecting ',' delimiter" in error.msg:
        if first in "}]":
            return f"{first} closes what was opened with another bracket"
        return "a comma is missing"
    if "Expecting ':' delimiter" in error.msg:
        return "a colon is missing after a key" if first not in "=" else "write a colon in place of ="
    if "Extra data" in error.msg:
        return "there is more text behind its end" if first not in "}]" else f"there is a {first} too many"
    if "control character" in error.msg:
        return "a line break or tab stands inside a string"
    if first == ",":
        return "there is a comma too many; take it out"
    return error.msg[:1].lower() + error.msg[1:]


def _ends(text: str, before: str, error: json.JSONDecodeError) -> str:
    """What is wrong if the parser reached the end of the text."""
    if not before:
        return "it is empty"
    if "Unterminated string" in error.msg and "\n" in text[error.pos :].strip():
        return "a string is not closed; write its double quote"
    return "it ends too early; copy it to its end"
