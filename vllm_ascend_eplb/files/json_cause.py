# SPDX-License-Identifier: Apache-2.0
"""Finds the cause of a JSON error, and what to write instead.

The parser says what it expected where it stopped. What a person did is one of a few things, which show around that
place: a comma too many, quotes of another language or lost in a shell, words and numbers of another language, letters
that look like others, comments, a file cut off.
"""

from __future__ import annotations

import difflib
import json
import re

_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "on", "enabled"), "write true in lower case"),
    **dict.fromkeys(("false", "f", "no", "off", "disabled"), "write false in lower case"),
    **dict.fromkeys(("none", "null", "nil", "undefined"), "write null"),
    **dict.fromkeys(("nan", "inf", "infinity"), "JSON has no NaN and no infinities; write digits"),
}
"""Words for values, in lower case, and what JSON has instead."""


_TYPOGRAPHIC = "\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u2033\u00b4\u0060"


_LOOKALIKES = {"\uff1a": ":", "\uff0c": ",", ";": ",", "(": "["}
"""Letters of other keyboards or languages, and what to write instead."""


_WORD = re.compile(r"[A-Za-z_][\w.-]*")


_NUMBER = re.compile(r"[+-]?\.?[0-9][\w.+]*|[+-](?:inf\w*|nan)", re.ASCII | re.IGNORECASE)
"""What is meant as a number; not all of it is one in JSON."""


_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)


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
    if (not first.isascii() and not first.isprintable()) or (text[at : at + 1] != first and not text[at].isascii()):
        return f"there is an invisible character, U+{ord(text[at]):04X}; take it out"
    if first in _TYPOGRAPHIC:
        return f"it has typographic quotes ({first}); write plain double quotes"
    if first == "'":
        return "strings stand in double quotes in JSON, not in single ones"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments; take them out"
    if first in _LOOKALIKES:
        return f"write {_LOOKALIKES[first]} in place of {first}"
    if rest.startswith('\\"'):
        return "there are backslashes before the quotes, which a shell did not take; take them out"
    if "\\escape" in error.msg:
        return "a backslash stands alone in a string; write two"
    number = _number_at(text, at)
    if number:
        return f"{number[:40]} is no number in JSON; write it in plain digits, such as 0.5 or 1000"
    word = _WORD.match(rest)
    if word is not None and "Expecting value" in error.msg and '"' in text:
        meant = _WORDS.get(word.group(0).lower()) or _WORDS.get(_near(word.group(0)))
        if meant is not None:
            return meant
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


def _number_at(text: str, at: int) -> str:
    """A number of another language at or around a place; empty where there is none."""
    begin = at
    while begin and (text[begin - 1].isalnum() or text[begin - 1] in "+-._"):
        begin -= 1
    found = _NUMBER.match(text, begin)
    if found is None or found.end() <= at or _JSON_NUMBER.fullmatch(found.group(0)):
        return ""
    return found.group(0)


def _near(word: str) -> str:
    """The word of JSON that a misspelt one means; empty where none is near."""
    near = difflib.get_close_matches(word[:20].lower(), ("true", "false", "null"), n=1, cutoff=0.75)
    return near[0] if near else ""


def _ends(text: str, before: str, error: json.JSONDecodeError) -> str:
    """What is wrong if the parser reached the end of the text."""
    if not before:
        return "it is empty"
    rest = text[error.pos :].strip()
    if "Unterminated string" in error.msg and ("\n" in rest or rest.endswith(("}", "]"))):
        return "a string is not closed; write its double quote"
    return "it ends too early; copy it to its end"
