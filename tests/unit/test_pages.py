# SPDX-License-Identifier: Apache-2.0
"""What the guide says is shown by a test is: the test is there, and what is refused has its case."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.test_start import CASES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFUSALS = [message for _, _, message in CASES.values()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    names = set(re.findall(r"`((?:\w+/)+test_\w+\.py)`", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(names) if not (ROOT / "tests" / name.removeprefix("tests/")).exists()] == []
    assert names or page.name not in ("README.md", "ways.md")


def refused_options(text: str) -> set[str]:
    """The options of all rows that say "refused" and nothing else."""
    rows = re.findall(r"^\| (.*?) \| refused(?:;[^|]*)? \| `e2e/test_start.py`", text, re.MULTILINE)
    return {option for row in rows for option in re.findall(r"`(-?[^`]*[-.][^`]*)`", row)}


def test_every_option_that_is_refused_has_its_case() -> None:
    options = refused_options((ROOT / "docs" / "ways.md").read_text(encoding="utf-8"))
    assert len(options) >= 12
    assert [option for option in sorted(options) if not any(option in message for message in REFUSALS)] == []


def test_an_option_without_a_case_is_noticed() -> None:
    row = "| `--no-such-option`, `--enable-lora` | refused | `e2e/test_start.py` |"
    assert refused_options(row) == {"--no-such-option", "--enable-lora"}
    assert not any("--no-such-option" in message for message in REFUSALS)
