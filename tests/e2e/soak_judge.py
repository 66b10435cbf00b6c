# SPDX-License-Identifier: Apache-2.0
"""The verdict on a soak run, with limits of growth, and its report."""

from __future__ import annotations

import re
import statistics
from typing import Any

MOST_GROWTH = {"memory_mib": 48.0, "threads": 3, "files": 6, "sockets": 4, "shared_memory": 6}
"""Allowed growth of the median, from the first to the last quarter of the samples. A planner that is being replaced has
no semaphores, so shared_memory varies."""


VLLM_GROWTH_MIB = ((500, 0.7), (1_000_000, 0.15))
"""(requests, MiB per request): allowed growth of vLLM 0.32's two workers on a CPU, in addition to MOST_GROWTH. Without
this plugin 0.54 to 0.6 were measured for the first 500 requests of this kind, and 0.13 after them."""


def growth(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of the first and the last quarter of the samples, by resource; all samples have the same resources."""
    quarter = max(1, len(samples) // 4)
    table = {}
    for name in samples[0]:
        first = statistics.median(sample[name] for sample in samples[:quarter])
        last = statistics.median(sample[name] for sample in samples[-quarter:])
        table[name] = {"first": round(first, 1), "last": round(last, 1)}
    return table


def vllm_growth(requests: float) -> float:
    """MiB by which vLLM's workers may grow in ``requests`` requests."""
    total = 0.0
    for count, mib in VLLM_GROWTH_MIB:
        total += mib * min(requests, count)
        requests = max(0.0, requests - count)
    return total


def grown(table: dict[str, dict[str, float]]) -> list[str]:
    """The resources that grew by more than is allowed, of those in a table of :func:`growth`. If it has requests,
    memory may grow by what vLLM takes for them."""
    said = []
    for name, most in MOST_GROWTH.items():
        if name not in table:
            continue
        median = table[name]
        if name == "memory_mib" and "requests" in table:
            most += vllm_growth(table["requests"]["last"]) - vllm_growth(table["requests"]["first"])
        if median["last"] - median["first"] > most:
            said.append(f"{name} grew from {median['first']} to {median['last']}; at most {most:.0f} more are allowed")
    return said


def judge(result: dict[str, Any], left: list[str], log: str) -> list[str]:
    """The list of failures; empty after a good run."""
    answers, stats, said = result["answers"], result["stats"], []
    mended_before = result["before"].audit_mended if result["before"] is not None else 0
    if answers.failed:
        said.append(f"{len(answers.failed)} requests failed: {answers.failed[0]}")
    if answers.wrong:
        said.append(f"{answers.wrong} of {answers.tokens} tokens are wrong: {answers.first_wrong}")
    if not answers.requests:
        said.append("no request was answered")
    said += grown(result.get("growth", {}))
    if stats is None or not stats.cycles_done:
        said.append("no cycle was done")
    elif stats.phase == "off":
        said.append(f"balancing went off: {stats.off_reason}")
    elif stats.audit_damaged or stats.audit_mended > mended_before:
        said.append(f"an audit found {stats.audit_damaged} damaged slots and repaired {stats.audit_mended}")
    if re.search(r'File "[^"]*vllm_ascend_eplb/', log):
        said.append("there is a traceback with our code in the log")
    return said + left


def report(result: dict[str, Any]) -> str:
    """The report in Markdown."""
    answers, stats = result["answers"], result["stats"] or {}
    lines = [
        "# Soak",
        "",
        f"{result['seconds']:.0f} seconds on {result['machine']}, {result['parallel']} 2, seed {result['seed']}, "
        f"ended by {result['end']}: " + ("**passed**" if not result["failures"] else "**failed**"),
        "",
        *(f"- {line}" for line in [*result["failures"], ""] if result["failures"]),
        "| what | count |",
        "| --- | --- |",
        f"| requests answered | {answers['requests']} |",
        f"| requests failed | {len(answers['failed'])} |",
        f"| requests aborted on purpose | {answers['aborted']} |",
        f"| tokens compared | {answers['tokens']} |",
        f"| tokens wrong | {answers['wrong']} |",
        f"| cycles done / skipped / failed | {stats.get('cycles_done')} / {stats.get('cycles_skipped')} / "
        f"{stats.get('cycles_failed')} |",
        f"| experts moved | {stats.get('experts_moved')} |",
        f"| audits of all slots, damaged slots found | {stats.get('audits')}, {stats.get('audit_damaged')} |",
        f"| planner starts | {stats.get('planner_starts')} |",
        "",
        "| fault | times |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in sorted(result["faults"].items())),
        "",
        "| resource, median of | first quarter | last quarter |",
        "| --- | --- | --- |",
        *(f"| {name} | {median['first']} | {median['last']} |" for name, median in result["growth"].items()),
    ]
    return "\n".join(lines) + "\n"
