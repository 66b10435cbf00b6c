# SPDX-License-Identifier: Apache-2.0
"""Pieces of the page: figures, cards, tables, and numbers as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from ..observe.stats import Par
from .charts import heat_map

MAX_TABLE_ROWS = 64
"""Most rows of a table on the page."""


def rank_pair(*tables: tuple[str, Sequence[Sequence[float]]]) -> list[str]:
    """Heat maps of rank load, (title, table) each, on one scale."""
    values = np.concatenate([np.ravel(np.asarray(table)) for _, table in tables])
    low, high = float(values.min()), float(values.max())
    return [
        figure(
            title,
            "divided by the layer's mean, last window",
            heat_map(table, "layers", "ranks", "load / mean", diverging=True, low=low, high=high),
        )
        for title, table in tables
    ]


def is_table(table: Sequence[Sequence[float]]) -> bool:
    """Whether a table is not empty and all its rows have the same length."""
    return bool(table) and bool(table[0]) and all(len(row) == len(table[0]) for row in table)


def figure(title: str, remark: str, content: str) -> str:
    """A chart with its title."""
    return f"<figure><figcaption>{escape(title)}<small>{escape(remark)}</small></figcaption>{content}</figure>"


def card(value: str, text: str) -> str:
    """A number with its meaning."""
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: set[int] | None = None, marked: set[int] | None = None
) -> str:
    """A table; the columns ``words`` hold text, the rows ``marked`` are highlighted. Cells know the head of their
    column, because a phone shows each row as a card (page.css)."""
    wordy = words or set()
    top = "".join(f"<th{' class=words' if i in wordy else ''}>{escape(cell)}</th>" for i, cell in enumerate(head))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td{" class=words" if i in wordy else ""} data-head="{escape(name)}">{escape(cell)}</td>'
            for i, (name, cell) in enumerate(zip(head, row, strict=True))
        )
        body.append(f"<tr{' class=best' if marked and number in marked else ''}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def escape(text: str) -> str:
    """Text as HTML."""
    return html.escape(text, quote=True)


def mean_of(par: Par | None) -> float | None:
    """The mean over layers; None without a PAR."""
    return par.mean if par is not None else None


def show_par(par: Par | None) -> str:
    """A PAR: mean of layers, worst layer."""
    return f"{par.mean:.3f} ({par.worst:.2f})" if par is not None else "-"


def show_ms(seconds: float) -> str:
    """A time with a unit that suits steps."""
    if seconds >= 10:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-4 or seconds == 0 else f"{1e6 * seconds:.1f} µs"


def show_seconds(seconds: float) -> str:
    """A time with a unit that suits runs."""
    return f"{seconds / 60:.1f} min" if abs(seconds) >= 600 else f"{seconds:.1f} s"


def show_bytes(count: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
