# SPDX-License-Identifier: Apache-2.0
"""README and guide: all paths they name exist, every refused option has a test case, and README stays short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.e2e.test_start import CASES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
REFUSALS = [message for _, _, message in CASES.values()]
BASES = (ROOT, ROOT / "vllm_ascend_eplb", ROOT / "tests", ROOT / "benchmarks" / "results")
"""The folders that a path in a page may be relative to."""

SUFFIXES = ("py", "md", "json", "sh", "yml", "yaml", "toml", "svg", "png", "css", "npz", "cpp", "cu")
OTHERS = {
    "demo.json",
    "demo-pd.json",
    "map.json",
    "map.load.npz",
    "planned.json",
    "sglang.json",
    "stats.json",
    "result.json",
}
"""Files that a user makes; they are not in the repository."""

README_LINES, README_WORDS, CELL_WORDS = 150, 1500, 20


def named_paths(text: str) -> set[str]:
    """The repository paths in backticks: files with a known suffix, and folders."""
    found = set()
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in code.split():
            file = re.fullmatch(rf"(?:[\w.-]+/)*[\w-]+\.(?:{'|'.join(SUFFIXES)})", word)
            folder = re.fullmatch(r"(?:[a-z_0-9]+/)+(?:[a-z_0-9]+)?", word)
            if (file or folder) and not word.startswith(("build/", "vllm/")) and word not in OTHERS:
                found.add(word)
    return found


def missing_paths(text: str) -> list[str]:
    return [name for name in sorted(named_paths(text)) if not any((base / name).exists() for base in BASES)]


def long_cells(text: str, limit: int = CELL_WORDS) -> list[str]:
    """The table cells with more words than ``limit``."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
    return [cell for cell in cells if len(cell.split()) > limit]


def refused_options(text: str) -> set[str]:
    """The command-line options of all rows whose behaviour with vLLM is "unsupported"."""
    upstream = text.split("\n## On Ascend")[0]
    rows = re.findall(r"^\| ([^|]*) \| unsupported \|", upstream, re.MULTILINE)
    return {option for row in rows for option in re.findall(r"`(--[\w-]+|[\w-]+\.[\w.-]+)[^`]*`", row)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_missing_paths_are_found() -> None:
    text = "`tests/unit/test_gone.py`, `vllm_ascend_eplb/gone/`, `docs/`, `pytest -m cuda tests/e2e/test_gone.py`"
    assert missing_paths(text) == ["tests/e2e/test_gone.py", "tests/unit/test_gone.py", "vllm_ascend_eplb/gone/"]


def test_pages_name_the_tests_behind_their_claims() -> None:
    for name in ("limits.md", "verification.md", "migrating.md"):
        paths = named_paths((ROOT / "docs" / name).read_text(encoding="utf-8"))
        assert len([path for path in paths if "/test_" in path]) >= 10


def modules_and_targets(text: str) -> tuple[set[str], set[str]]:
    """The commands in a page: modules of this repository after ``python -m``, and targets of ``make``."""
    modules = set(re.findall(r"python3? -m ((?:benchmarks|examples|tests|vllm_ascend_eplb)[\w.]*)", text))
    targets = set(re.findall(r"(?:`|^ {4,})make ([a-z0-9-]+)", text, re.MULTILINE))
    return modules, targets


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    modules, targets = modules_and_targets(page.read_text(encoding="utf-8"))
    assert sorted(name for name in modules if not is_module(name)) == []
    assert sorted(targets - known) == []


def test_missing_commands_are_found() -> None:
    modules, targets = modules_and_targets("`make no-such-test` and `python -m benchmarks.nothing`\n    make demo")
    assert (modules, targets) == ({"benchmarks.nothing"}, {"no-such-test", "demo"})
    assert not is_module("benchmarks.nothing")


@pytest.mark.parametrize("page", PAGES[:3], ids=lambda page: page.name)
def test_links_of_root_pages_lead_to_files(page: Path) -> None:
    """``make docs`` checks the links inside the guide, but not those of README, CONTRIBUTING and CHANGELOG."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES[:3], ids=lambda page: page.name)
def test_anchors_that_root_pages_link_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)#([^)]*)\)", page.read_text(encoding="utf-8"))
    assert links
    for target, anchor in links:
        assert anchor in anchors((ROOT / target).read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert len(text.split()) <= README_WORDS


@pytest.mark.parametrize("name", ["README.md", "docs/limits.md", "docs/verification.md", "docs/troubleshooting.md"])
def test_table_cells_are_short(name: str) -> None:
    assert long_cells((ROOT / name).read_text(encoding="utf-8")) == []


def test_long_cells_are_found() -> None:
    assert long_cells("| a | " + "word " * 21 + "|") == [" ".join(["word"] * 21)]
    assert long_cells("| " + "word " * 20 + "| b |") == []


def test_readme_support_matrix_links_its_proof() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    matrix = text.split("## Where it works")[1].split("\n## ")[0]
    rows = [line for line in matrix.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 10
    for row in rows:
        assert re.search(r"\]\(docs/(?:verification|limits)\.md#[\w-]+\) \|$", row), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page: Path) -> None:
    """Every run of rows begins with a head: a blank line inside a table would turn the second half into plain text."""
    assert headless_tables(page.read_text(encoding="utf-8")) == []


def headless_tables(text: str) -> list[int]:
    """The numbers of the lines at which a run of rows begins without a head."""
    lines = [*text.splitlines(), ""]
    starts = [at for at, line in enumerate(lines) if line.startswith("|") and (at == 0 or lines[at - 1][:1] != "|")]
    return [at + 1 for at in starts if not re.fullmatch(r"\|(?: -+ \|)+", lines[at + 1])]


def test_tables_that_are_cut_in_two_are_found() -> None:
    assert headless_tables("x\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| 3 | 4 |") == [7]


def test_cells_of_wide_tables_know_their_column() -> None:
    """On a phone the guide shows a row of a wide table as a card, with the column's head before every cell."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "theme" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    head = "<table><thead><tr><th>a</th><th><code>b</code></th><th>c</th></tr></thead>"
    made = tables.on_page_content(f"<p>x</p>{head}<tr><td>1</td><td style='x'>2</td><td></td></tr></table>")
    assert re.findall(r"<td(.*?)>", made) == [' data-head="a"', " style='x' data-head=\"b\"", ' data-head="c"']
    assert 'data-wide="figures"' in made
    narrow = "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
    assert tables.on_page_content(narrow) == narrow
    picture = '<img alt="x" src="images/a.svg" />'
    assert tables.on_page_content(f"<p>{picture}</p>") == f'<p><a href="images/a.svg">{picture}</a></p>'


def test_every_option_that_is_refused_has_its_case() -> None:
    options = refused_options((ROOT / "docs" / "limits.md").read_text(encoding="utf-8"))
    assert len(options) >= 12
    assert [option for option in sorted(options) if not any(option in message for message in REFUSALS)] == []


def test_options_without_a_case_are_found() -> None:
    row = "| `--no-such-option`, `--enable-lora` | unsupported | no proof yet |"
    assert refused_options(row) == {"--no-such-option", "--enable-lora"}
    assert not any("--no-such-option" in message for message in REFUSALS)
