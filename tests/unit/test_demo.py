# SPDX-License-Identifier: Apache-2.0
"""The demo's verdict: it passes on a good run, and fails for every fault."""

from __future__ import annotations

import io
import json
import socket
from dataclasses import replace

import pytest
from rich.console import Console

from examples.demo import port
from examples.demo.summary import DomainResult, Summary
from examples.demo.traffic import Tally
from examples.demo.view import View
from examples.tiny_moe.expert_load import domains, read_prompts
from tests.windows import rank_window
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.stats import EplbStats, Par

SKEWED, EVEN = [[30.0, 10.0]], [[20.0, 20.0]]


def good_stats() -> EplbStats:
    keeper = StatsKeeper("1.0", "default", "balance")
    for step, load in ((100, SKEWED), (200, EVEN)):
        keeper.step = step
        keeper.window_ended(rank_window(load, SKEWED))
        keeper.planned([1.0], 0.01)
        keeper.cycle_ended("done" if load is SKEWED else "skipped", moved=4 if load is SKEWED else 0, reason="no gain")
    return keeper.stats()


def good_result(stats: EplbStats) -> DomainResult:
    tally = Tally()
    tally.compare(0, [1, 2, 3], [1, 2, 3])
    return DomainResult.of("english", list(stats.cycles), tally, 200, 5.0)


def summary(
    stats: EplbStats, result: DomainResult, moved: float = 4.0, processes_left: tuple[str, ...] = ()
) -> Summary:
    return Summary(2, {}, [result], stats, {"vllm_eplb_experts_moved": moved}, list(processes_left), {"traffic": 1.0})


def test_good_run() -> None:
    stats = good_stats()
    result = good_result(stats)
    made = summary(stats, result)
    assert made.failures == []
    written = json.loads(json.dumps(made.to_dict()))
    assert written["ok"] is True
    assert written["domains"][0]["par_before"] == {"mean": 1.5, "worst": 1.5}
    assert written["domains"][0]["par_after"] == {"mean": 1.0, "worst": 1.0}
    assert written["domains"][0]["par_without"] == {"mean": 1.5, "worst": 1.5}
    assert (written["moves"], written["steps"], written["requests"]) == (4, 200, 1)
    assert (written["tokens_compared"], written["tokens_equal"]) == (3, 3)
    output = io.StringIO()
    made.show(Console(file=output, width=120))
    assert output.getvalue().rstrip().endswith("OK")


@pytest.mark.parametrize(
    ("answer", "expected", "equal", "compared"),
    [([1, 2, 3], [1, 2, 3], 3, 3), ([1, 9, 3], [1, 2, 3], 2, 3), ([1, 2], [1, 2, 3], 2, 3), ([1, 2, 3], [1], 1, 3)],
)
def test_tally(answer: list[int], expected: list[int], equal: int, compared: int) -> None:
    tally = Tally()
    tally.compare(7, answer, expected)
    assert (tally.requests, tally.tokens_equal, tally.tokens_compared) == (1, equal, compared)
    assert bool(tally.first_difference) == (answer != expected)


def test_every_fault_is_a_failure() -> None:
    stats = good_stats()
    result = good_result(stats)
    bad = {
        "nothing was balanced": summary(stats.model_copy(update={"experts_moved": 0}), result),
        "switched off": summary(stats.model_copy(update={"phase": "off"}), result),
        "PAR did not fall": summary(stats, replace(result, par_after=result.par_before)),
        "fewer than two windows": summary(stats, replace(result, par_after=None)),
        "no tokens were compared": summary(stats, replace(result, tokens_equal=0, tokens_compared=0)),
        "1 of 3 tokens differ": summary(stats, replace(result, tokens_equal=2)),
        "/metrics does not show": summary(stats, result, moved=0.0),
        "did not end with the server: process 7": summary(stats, result, processes_left=("process 7",)),
    }
    for text, made in bad.items():
        assert any(text in failure for failure in made.failures), text
        assert made.to_dict()["ok"] is False


def test_windows_of_few_tokens_are_judged_together() -> None:
    """One window that a start placement suits better by chance says nothing of the others."""
    stats = good_stats()
    changed = [
        stats.cycles[0].model_copy(
            update={"par": Par(mean=par, worst=par), "par_start": Par(mean=start, worst=start)},
        )
        for par, start in ((1.1, 1.1), (1.01, 1.06), (1.01, 1.06), (1.05, 1.04))
    ]
    tally = Tally()
    tally.compare(0, [1], [1])
    last, together = (
        DomainResult.of("english", changed, tally, 200, 5.0, few_tokens=few_tokens) for few_tokens in (False, True)
    )
    for result, fell in ((last, False), (together, True)):
        made = Summary(2, {}, [result], stats, {"vllm_eplb_experts_moved": 4.0}, [], {}, against_start=True)
        assert ("english: PAR did not fall" not in made.failures) is fell


def test_last_window_can_be_compared_with_the_start_placement() -> None:
    stats = good_stats()
    result = good_result(stats)
    for after, without, fell in ((1.02, 1.05, True), (1.05, 1.05, False)):
        changed = replace(result, par_before={"mean": 1.01}, par_after={"mean": after}, par_without={"mean": without})
        made = Summary(2, {}, [changed], stats, {"vllm_eplb_experts_moved": 4.0}, [], {}, against_start=True)
        assert ("english: PAR did not fall" not in made.failures) is fell


def test_plain_lines_and_live_view() -> None:
    stats = good_stats()
    for terminal in (False, True):
        output = io.StringIO()
        with View(Console(file=output, width=120, force_terminal=terminal)) as view:
            view.waiting("starting")
            view.update("english", None, "")
            view.update("english", stats, "some [text] of\nthe model")
            view.update("english", stats, "some more")
        text = output.getvalue()
        assert text.count("cycle 1 (step 100): done, 4 experts moved; PAR 1.500") == 1
        assert ("rank 1" in text) == terminal
        assert "of the model" in text


def test_prompts() -> None:
    assert len(domains()) >= 4
    for domain in domains():
        prompts = read_prompts(domain)
        assert len(prompts) == len(set(prompts)) == 24
        assert all(prompts)


def test_port_is_free_and_none_that_connections_get(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port.free_port()))
        taken = listening.getsockname()[1]
        assert taken in port.PORTS
        monkeypatch.setattr(port, "PORTS", range(taken, taken + 2))
        assert port.free_port() == taken + 1
