# SPDX-License-Identifier: Apache-2.0
"""MkDocs hook for phones: cells of wide tables know the head of their column, so that each row can be shown as a card,
and a tap on a figure opens it in full size."""

from __future__ import annotations

import html
import re
from typing import Any

LEAST_COLUMNS = 3
"""Tables with fewer columns fit on a phone as they are."""

FIGURE_COLUMNS = 5
"""Tables with that many columns, or with numbers in front, hold figures: a card also shows the first head."""


def on_page_content(content: str, **_: Any) -> str:
    """Adds ``data-head`` to the cells of each table with ``LEAST_COLUMNS`` columns or more, and marks the table. Links
    each figure to its file."""
    content = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', content)
    return re.sub(r"<table>.*?</table>", lambda match: label_cells(match.group()), content, flags=re.DOTALL)


def label_cells(table: str) -> str:
    """The table with labelled cells, as HTML; unchanged if it is narrow."""
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)]
    if len(heads) < LEAST_COLUMNS:
        return table

    def label_row(row: re.Match[str]) -> str:
        names = iter(heads)
        return re.sub(
            r"<td(.*?)>(.*?)</td>",
            lambda cell: f'<td{cell[1]} data-head="{html.escape(next(names))}">{cell[2]}</td>',
            row.group(),
            flags=re.DOTALL,
        )

    numbered = re.search(r"<tr>\s*<td[^>]*>[\d.,]+</td>", table) is not None
    kind = "figures" if numbered or len(heads) >= FIGURE_COLUMNS else "words"
    labelled = re.sub(r"<tr>.*?</tr>", label_row, table, flags=re.DOTALL)
    return labelled.replace("<table>", f'<table data-wide="{kind}">', 1)
