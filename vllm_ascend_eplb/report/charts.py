# SPDX-License-Identifier: Apache-2.0
"""Charts as text: SVG for lines and bars, PNG inside the page for heat maps. No script, no library.

Drawings are small (400 units wide), so that their letters are readable on a phone. Colours come from the page's style
sheet by class, so that dark mode and print have colours of their own.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 400.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 10.0, 34.0
MAX_TIPS = 256
"""Most values of a series with a tooltip; in longer series every n-th value has one."""

Anchors = tuple[tuple[float, tuple[int, int, int]], ...]

SEQUENTIAL: Anchors = (
    (0.0, (247, 249, 252)),
    (0.2, (193, 221, 235)),
    (0.45, (92, 170, 203)),
    (0.7, (26, 109, 165)),
    (1.0, (8, 32, 84)),
)
"""From little to much; readable in grey."""

DIVERGING: Anchors = (
    (0.0, (42, 98, 168)),
    (0.25, (146, 189, 222)),
    (0.5, (250, 250, 247)),
    (0.75, (241, 160, 118)),
    (1.0, (176, 32, 38)),
)
"""Below, at and above the mean."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: text in the legend.
        style: CSS class, ``s0``..``s4``.
        values: values by position; None leaves a gap.
    """

    label: str
    style: str
    values: Sequence[float | None]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, x_values: Sequence[int] | None = None) -> str:
    """An SVG chart of lines over common positions. The y axis begins at the least value, rounded down.

    Args:
        lines: of equal length, at least one value in all.
        x_label, y_label: what the axes say.
        x_values: numbers at the positions; default 0, 1, ...
    """
    known = [value for line in lines for value in line.values if value is not None]
    count = max(len(line.values) for line in lines)
    numbers = list(x_values) if x_values is not None else list(range(count))
    low, high, ticks = axis_of(min(known), max(known))

    def at(index: int, value: float) -> tuple[float, float]:
        across = index / (count - 1) if count > 1 else 0.5
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_frame(ticks, low, high, x_label, y_label), _x_numbers(numbers, lambda i: at(i, low)[0])]
    for line in lines:
        path, pen = [], "M"
        for index, value in enumerate(line.values):
            if value is None:
                pen = "M"
                continue
            x, y = at(index, value)
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        if path:
            parts.append(f'<path class="line {line.style}" d="{"".join(path)}"/>')
        every = max(1, math.ceil(len(line.values) / MAX_TIPS))
        shown = count <= 40
        for index, value in enumerate(line.values):
            if value is None or index % every:
                continue
            x, y = at(index, value)
            tip = html.escape(f"{line.label}, {x_label} {numbers[index]}: {value:.3f}")
            parts.append(
                f'<circle class="{"dot" if shown else "tip"} {line.style}" cx="{x:.1f}" cy="{y:.1f}" '
                f'r="{2.2 if shown else 4}"><title>{tip}</title></circle>'
            )
    legend = "".join(
        f'<span class="key"><i class="{line.style}"></i>{html.escape(line.label)}</span>' for line in lines
    )
    return f'<div class="legend">{legend}</div>' + _svg(parts, f"{y_label} by {x_label}")


def bar_chart(
    values: Sequence[float],
    x_label: str,
    y_label: str,
    x_values: Sequence[int] | None = None,
    styles: Sequence[str] = (),
) -> str:
    """An SVG chart of bars from 0.

    Args:
        values: not negative.
        x_label, y_label: what the axes say.
        x_values: numbers of the bars; default 0, 1, ...
        styles: CSS class of each bar; default ``s0``.
    """
    numbers = list(x_values) if x_values is not None else list(range(len(values)))
    low, high, ticks = axis_of(0.0, max(values, default=0.0))
    low = 0.0
    width = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    parts = [
        _frame(ticks, low, high, x_label, y_label),
        _x_numbers(numbers, lambda i: LEFT + (i + 0.5) * width),
    ]
    for index, value in enumerate(values):
        tall = (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        style = styles[index] if styles else "s0"
        if style != "s0":
            tall = max(tall, 2.5)  # a bar of another style (skipped, failed) is visible even at 0
        tip = html.escape(f"{x_label} {numbers[index]}: {value:g}")
        parts.append(
            f'<rect class="bar {style}" x="{LEFT + (index + 0.1) * width:.2f}" y="{HEIGHT - BOTTOM - tall:.2f}" '
            f'width="{max(0.4, 0.8 * width):.2f}" height="{tall:.2f}"><title>{tip}</title></rect>'
        )
    return _svg(parts, f"{y_label} by {x_label}")


def heat_map(
    table: npt.ArrayLike, rows: str, columns: str, unit: str, *, diverging: bool = False, low: float | None = None,
    high: float | None = None,
) -> str:  # fmt: skip
    """A heat map of a table [rows, columns] with a scale, as HTML.

    Args:
        table: numbers; not empty.
        rows, columns: names of the axes, in the plural.
        unit: meaning of the colours.
        diverging: whether colours diverge from 1.0.
        low, high: ends of the scale; default those of the table, with ``diverging`` equally far from 1.0.
    """
    values = np.asarray(table, dtype=np.float64)
    least, most = float(values.min()), float(values.max())
    bottom, top = least if low is None else low, most if high is None else high
    if diverging:
        reach = max(abs(bottom - 1.0), abs(top - 1.0), 0.02)
        bottom, top = 1.0 - reach, 1.0 + reach
    if top <= bottom:
        top = bottom + 1.0
    anchors = DIVERGING if diverging else SEQUENTIAL
    image = png(colours((values - bottom) / (top - bottom), anchors))
    scale = png(colours(np.linspace(0.0, 1.0, 128)[None, :], anchors))
    text = html.escape(
        f"{unit}: {values.shape[0]} {rows} from top to bottom, {values.shape[1]} {columns} from left to right; "
        f"smallest {least:.2f}, largest {most:.2f}"
    )
    tall = min(300, max(90, 6 * values.shape[0]))
    shown_low = max(bottom, 0.0) if diverging else bottom
    return (
        f'<div class="heat"><span class="rows">{html.escape(rows)} 0&ndash;{values.shape[0] - 1}</span>'
        f'<img class="cells" style="height:{tall}px" src="{image}" alt="{text}" title="{text}"></div>'
        f'<div class="heat-axis">{html.escape(columns)} 0&ndash;{values.shape[1] - 1}</div>'
        f'<div class="scale"><span>{_scale_number(shown_low)}</span><img src="{scale}" alt="scale">'
        f"<span>{_scale_number(top)}</span><span>{html.escape(unit)}; "
        f"{_scale_number(least)} to {_scale_number(most)}</span></div>"
    )


def colours(parts: npt.NDArray[np.float64], anchors: Anchors) -> npt.NDArray[np.uint8]:
    """uint8 [..., 3]: the colour of each value 0..1 (clipped) between the anchors."""
    places = [place for place, _ in anchors]
    clipped = np.clip(np.nan_to_num(parts), 0.0, 1.0)
    channels = [np.interp(clipped, places, [colour[channel] for _, colour in anchors]) for channel in range(3)]
    return np.asarray(np.stack(channels, axis=-1).round(), dtype=np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """A data URI of an image, pixels [rows, columns, 3]. Format: RFC 2083."""
    rows, columns, _ = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), dtype=np.uint8), pixels.reshape(rows, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    image = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def axis_of(least: float, most: float) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of an axis of about four round steps."""
    spread = most - least
    if spread <= 1e-9 * max(abs(most), 1.0):
        spread = abs(most) * 0.1 if abs(most) > 1e-6 else 1.0
    raw = spread / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.floor(least / step + 1e-9)
    last = max(math.ceil(most / step - 1e-9), first + 1)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _frame(ticks: Sequence[float], low: float, high: float, x_label: str, y_label: str) -> str:
    parts = []
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(12) if all(abs(round(t, d) - t) < step * 1e-6 for t in ticks)), 12)
    for tick in ticks:
        y = HEIGHT - BOTTOM - (tick - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="num" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick, digits)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">'
        f"{html.escape(y_label)}</text>"
    )
    return "".join(parts)


def _x_numbers(numbers: Sequence[int], place: Callable[[int], float]) -> str:
    """Up to seven numbers along the x axis."""
    count = len(numbers)
    every = max(1, math.ceil(count / 7))
    return "".join(
        f'<text class="num" x="{place(i):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{numbers[i]}</text>'
        for i in range(0, count, every)
    )


def _number(value: float, digits: int) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.{digits}f}"


def _scale_number(value: float) -> str:
    return f"{value:.2f}" if value != round(value) else f"{value:.0f}"


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
