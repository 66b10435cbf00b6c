# SPDX-License-Identifier: Apache-2.0
"""Hints about texts that are not JSON come from the cause, not from where the parser stopped.

This matters for every JSON that a person writes or a tool truncates: maps, loads, ``doctor --config``, statistics and
simulations. A cause must get its own hint and no other, at any position in the text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.unit.cli.test_cli import run
from tests.unit.files.test_expert_map import ASCEND
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map
from vllm_ascend_eplb.files.json_cause import json_cause

HINTS = {
    "a comma before": "comma before",
    "early": "ends too early",
    "single": "not in single ones",
    "shell": "single quotes",
    "word": "in lower case",
    "comment": "no comments",
    "quotes": "typographic quotes",
    "key": "needs double quotes",
    "missing": "a comma is missing",
    "colon": "colon",
    "more": "more text",
    "bracket": "too many",
    "number": "no number in JSON",
    "nan": "no NaN",
    "null": "write null",
    "open": "is not closed",
    "invisible": "invisible character",
    "full-width colon": "write : in place of",
    "other comma": "write , in place of",
    "tuple": "write [ in place of (",
    "backslash": "backslash",
}

CASES = [
    ('{"dynamic_eplb": true,}', "a comma before"),
    ('{"a": [1, 2,]}', "a comma before"),
    ('{"a": [1, 2, ] , "b": 1}', "a comma before"),
    ('{"a": {"b": 1,\n}\n}', "a comma before"),
    ('{"a": [1, 2', "early"),
    ('{"a": [1, 2,', "early"),
    ('{"a": ', "early"),
    ('{"a"', "early"),
    ('{"a', "early"),
    ("{", "early"),
    ("{'dynamic_eplb': true}", "single"),
    ("{\"mode\": 'observe'}", "single"),
    ("{dynamic_eplb: true}", "shell"),
    ("{mode: observe}", "shell"),
    ('{"dynamic_eplb": True}', "word"),
    ('{"a": [1, False]}', "word"),
    ('{"a": 1} // on', "comment"),
    ('{"a": 1, # on\n "b": 2}', "comment"),
    ('{/* on */ "a": 1}', "comment"),
    ("{\u201cdynamic_eplb\u201d: true}", "quotes"),
    ('{"mode": observe}', "key"),
    ('{"mode": "observe", min_gain: 1}', "key"),
    ('{"a": 1 "b": 2}', "missing"),
    ('{"a": [1 2]}', "missing"),
    ('{"dynamic_eplb" true}', "colon"),
    ('{"dynamic_eplb" = true}', "colon"),
    ('{"a": 1} {"b": 2}', "more"),
    ('{"a": 1}}', "bracket"),
    ('{"a": True}', "word"),
    ('{"a": TRUE, "b": 1}', "word"),
    ('{"a": yes}', "word"),
    ('{"a": Off}', "word"),
    ('{"a": tru}', "word"),
    ('{"a": None}', "null"),
    ('{"a": undefined}', "null"),
    ('{"a": Null}', "null"),
    ('{"a": nan}', "nan"),
    ('{"a": 01}', "number"),
    ('{"a": 1_000}', "number"),
    ('{"a": [0x10]}', "number"),
    ('{"a": .5}', "number"),
    ('{"a": 5.}', "number"),
    ('{"a": +1}', "number"),
    ('{"a": 1e}', "number"),
    ('{"a": "b}', "open"),
    ("{\"a': true}", "open"),
    ('{"a": "b, "c": 1}', "missing"),
    ('{"a":\u00a01}', "invisible"),
    ('{"a":\u200b1}', "invisible"),
    ('{"a"\uff1a 1}', "full-width colon"),
    ('{"a": 1\uff0c "b": 2}', "other comma"),
    ('{"a": 1; "b": 2}', "other comma"),
    ('{"a": (1, 2)}', "tuple"),
    ('{"a": `b`}', "quotes"),
    ('{\\"a\\": 1}', "backslash"),
    ('{"a": "C:\\maps"}', "backslash"),
]


def cause(text: str) -> str:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    found = json_cause(text, caught.value)
    assert found.isprintable()
    return found


@pytest.mark.parametrize(("text", "kind"), CASES, ids=[text[:40] for text, _ in CASES])
def test_hint_names_the_cause_and_no_other(text: str, kind: str) -> None:
    found = cause(text)
    assert HINTS[kind] in found
    wrong_hints = {HINTS[hint] for hint in HINTS if hint != kind} - {HINTS[kind]}
    if kind not in ("shell", "single"):
        assert not [hint for hint in wrong_hints if hint in found]


@pytest.mark.parametrize(("text", "kind"), CASES, ids=[text[:40] for text, _ in CASES])
def test_doctor_gives_the_same_hint(text: str, kind: str) -> None:
    said = run("doctor", "--quick", "--config", text, status=2)
    assert HINTS[kind] in said
    assert ("single quotes" in said) == (kind == "shell")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1,]", "a comma before ]"),
        ("", "--config is empty"),
        (" ", "--config is empty"),
        ('{"mode": "sync", "mode": "balance"}', "the key 'mode' stands twice"),
        ("$(pwd)/settings.json", "$(pwd) was not replaced"),
        ("`pwd`/settings.json", "`pwd` was not replaced"),
        ("%HOME%/settings.json", "%HOME% was not replaced"),
    ],
)
def test_doctor_names_the_cause_of_other_texts(text: str, said: str) -> None:
    assert said in run("doctor", "--quick", "--config", text, status=2)


def test_commas_and_cuts_anywhere_in_a_map(tmp_path: Path) -> None:
    """A comma before any closing bracket, and the text cut at any place, of vllm-ascend's own example."""
    text, rng = json.dumps(ASCEND, indent=1), random.Random(0)
    for at in [place for place, letter in enumerate(text) if letter in "]}"]:
        (tmp_path / "map.json").write_text(text[:at].rstrip() + "," + text[at:])
        with pytest.raises(ExpertMapError, match="comma before"):
            read_expert_map(tmp_path / "map.json")
    for at in [1, len(text) - 1, *rng.sample(range(1, len(text)), 60)]:
        (tmp_path / "map.json").write_text(text[:at])
        with pytest.raises(ExpertMapError, match="ends too early"):
            read_expert_map(tmp_path / "map.json")
