# SPDX-License-Identifier: Apache-2.0
"""EplbUpdator with its real parts (planner process, control, transfers over Gloo) around a model that only routes."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.unit.values.test_step_cost import FLAT_THEN_STEEP
from vllm_ascend_eplb.agreement.channel import ControlError
from vllm_ascend_eplb.agreement.phases import AgreementError, Phase, early
from vllm_ascend_eplb.balancer import balancedness
from vllm_ascend_eplb.balancer.start import build_updator
from vllm_ascend_eplb.balancer.timing import Times
from vllm_ascend_eplb.planning.payoff import MoveRates
from vllm_ascend_eplb.planning.request import PlanRequest, plan_request
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import Plan
from vllm_ascend_eplb.values.topology import Topology

from . import policies
from .pace import PatientPlanner, settle
from .ranks import Ranks, run_ranks
from .routing_model import EXPERTS, LAYERS, RoutingModel, Seen, redundant

pytestmark = pytest.mark.distributed


def serve(ranks: Ranks, steps: int, settings: dict[str, Any], options: dict[str, Any]) -> Seen:
    """Step as an engine does, with one forward per step, for ``steps`` steps or the option ``cycles``."""
    model = RoutingModel(ranks, weighted=bool(settings.get("weighted_dispatch")))
    model.topology = Topology(options.get("nodes", (0,) * ranks.num_ranks))
    config = EplbConfig.from_additional_config(
        {
            "eplb_config": {
                "dynamic_eplb": True,
                "num_redundant_experts": redundant(ranks.num_ranks),
                "expert_heat_collection_interval": 10,
                "algorithm_execution_interval": 1,
                "min_gain": 0.0,
                **settings,
            }
        }
    )
    policy = options.get("policy", plan_request)
    seen = Seen(first_par=0.0)
    balancedness.logger.addFilter(lambda record: seen.lines.append(record.args) or True)
    balancedness.logger.setLevel(logging.INFO)
    planner = PatientPlanner(policy) if ranks.rank == 0 else None
    updator = build_updator(model, config, planner)
    if "tokens" in options and updator.lead is not None:
        updator.lead.learn(Times(FLAT_THEN_STEEP, MoveRates(options.get("receive"))))
    if "cut_after" in options:
        updator.parts.settings = replace(updator.parts.settings, cut_after=options["cut_after"])
    if options.get("prepare_fails_on") == ranks.rank:
        prepare, left = model.maps.prepare, [1]

        def failing(placement: Placement, layers: list[int]) -> None:
            if left[0]:
                left[0] -= 1
                raise MemoryError("planted")
            prepare(placement, layers)

        model.maps.prepare = failing  # type: ignore[method-assign]
    try:
        for step in range(steps):
            if options.get("part_at") == step and ranks.rank == 1:
                updator.work.placement = updator.placement.with_moves([[0, EXPERTS, 3]])
            serving = not options.get("idle") or step % 3 == 0
            updator.forward_before(serving=serving, tokens_per_rank=options.get("tokens", 1.0))
            if updator.state.cycle > len(seen.began):
                seen.began.append(step + 1)
            counted = model.recorder.counts.clone()
            model.forward()
            seen.forwards.append((model.recorder.counts - counted).numpy())
            updator.forward_end()
            seen.history.append(updator.placement.digest)
            seen.wrong = seen.wrong or model.slots.wrong(updator.placement)
            if model.dispatch is not None:
                table = model.dispatch.table.numpy()
                seen.tables.append(zlib.crc32(table.tobytes()))
                held = updator.placement.physical_to_logical
                for layer, rows in enumerate(table):
                    if (held[layer, rows] != np.arange(EXPERTS)[:, None]).any():
                        seen.wrong = f"step {step}: a row of layer {layer} names a slot of another expert"
            if updator.state.phase is Phase.COLLECT and updator.state.cycle not in seen.after:
                seen.after[updator.state.cycle] = updator.placement.digest, model.slots.digest()
            dist.barrier()  # a forward's collectives keep the ranks together
            settle(updator)
            if updator.state.cycle > options.get("cycles", steps):
                break
    except (AgreementError, ControlError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.phase = updator.state.phase.name
    seen.step = updator.state.step
    seen.first_par = float(model.placement.par(model.routed).mean())
    seen.final_par = float(updator.placement.par(model.routed).mean())
    seen.final_load = updator.placement.rank_load(model.routed).sum(axis=0).tolist()
    seen.stats = updator.stats.stats() if ranks.rank == 0 else None
    updator.close()
    return seen


def check_agreement(all_seen: list[Seen]) -> None:
    for seen in all_seen:
        assert seen.wrong == ""
        assert seen.error == ""
        assert seen.history == all_seen[0].history
        assert seen.tables == all_seen[0].tables
        assert seen.phase == all_seen[0].phase


@pytest.mark.parametrize("nodes", [(0, 0), (0, 0, 2)])
def test_cycles_balance_the_load_and_all_ranks_agree(nodes: tuple[int, ...]) -> None:
    all_seen = run_ranks(len(nodes), serve, 400, {}, {"nodes": nodes, "cycles": 6})
    check_agreement(all_seen)
    uneven = (len(nodes), 2, nodes)  # three ranks on two nodes are planned as one node, with a warning
    assert [uneven in seen.lines for seen in all_seen] == [len(nodes) == 3] + [False] * (len(nodes) - 1)
    stats = all_seen[0].stats
    assert stats.cycles_done >= 2
    assert stats.cycles_failed == 0
    assert all_seen[0].first_par > 1.08
    assert all_seen[0].final_par < 1 + (all_seen[0].first_par - 1) / 2
    assert stats.window.tokens % (64 * LAYERS) == 0  # whole batches, counted once


@pytest.mark.parametrize("mode", ["balance", "sync"])
def test_fault_of_the_planner_costs_one_cycle(mode: str) -> None:
    all_seen = run_ranks(
        2,
        serve,
        2000,
        {"max_failures": 10, "expert_heat_collection_interval": 4, "mode": mode, "planner_effort": "fast"},
        {"policy": policies.misbehave, "cycles": 7},
    )
    check_agreement(all_seen)
    cycles = all_seen[0].stats.cycles
    assert [cycle.result for cycle in cycles[:5]] == ["failed"] * 5
    reasons = [cycle.reason for cycle in cycles[:5]]
    for reason, word in zip(reasons, ("MemoryError: planted", "exit code -9", "copy", "", ""), strict=True):
        assert word in reason, reasons
    assert all(cycle.moved == 0 for cycle in cycles[:5])
    assert all_seen[0].stats.cycles_done >= 1


def test_too_many_failures_switch_balancing_off_at_one_step() -> None:
    all_seen = run_ranks(
        2, serve, 300, {"max_failures": 3, "expert_heat_collection_interval": 4}, {"policy": policies.always_fail}
    )
    check_agreement(all_seen)
    assert all_seen[0].phase == Phase.OFF.name
    assert all_seen[0].step == 300
    assert all_seen[0].stats.cycles_failed == 3
    assert "planted in cycle 3" in all_seen[0].stats.off_reason
    assert len(set(all_seen[0].history)) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_cannot_prepare_drops_the_cycle_on_all(rank: int) -> None:
    all_seen = run_ranks(2, serve, 500, {}, {"prepare_fails_on": rank, "cycles": 3})
    check_agreement(all_seen)
    stats = all_seen[0].stats
    assert stats.cycles_failed == 1
    assert stats.cycles_done >= 1


def test_a_faster_rank_gets_more_load() -> None:
    all_seen = run_ranks(2, serve, 400, {"rank_speed": [2, 1], "planner_effort": "fast"}, {"cycles": 4})
    check_agreement(all_seen)
    stats = all_seen[0].stats
    assert stats.cycles_done >= 1
    assert stats.cycles_failed == 0
    slow, fast = all_seen[0].final_load[1], all_seen[0].final_load[0]
    assert 1.7 < fast / slow < 2.3
    assert stats.window.par.mean < 1.15  # of load over speed
    assert stats.window.par_start.mean > 1.2  # even ranks are uneven in time


def test_mode_observe_moves_nothing_and_predicts_par() -> None:
    all_seen = run_ranks(2, serve, 80, {"mode": "observe", "log_balancedness_interval": 7}, {})
    check_agreement(all_seen)
    assert len(set(all_seen[0].history)) == 1
    stats = all_seen[0].stats
    assert stats.cycles_skipped >= 1
    assert "would bring PAR from" in stats.cycles[0].reason
    assert stats.cycles[0].par_predicted.mean < stats.cycles[0].par.mean
    check_balancedness(all_seen, interval=7)


@pytest.mark.parametrize("policy", [policies.plan_windows, plan_request])
def test_plan_of_windows_reports_the_95th_percentile(policy: Callable[[PlanRequest], Plan]) -> None:
    """The log line and the statistics have the percentile of a load series; a plan of one window has none."""
    all_seen = run_ranks(2, serve, 120, {}, {"policy": policy, "cycles": 1})
    check_agreement(all_seen)
    cycle = all_seen[0].stats.cycles[0]
    assert cycle.result == "done"
    told = [text for line in all_seen[0].lines for text in line if "p95 of windows" in str(text)]
    if policy is plan_request:
        assert (cycle.p95_before, cycle.p95_predicted, told) == (None, None, [])
        return
    before, after = cycle.p95_before.mean, cycle.p95_predicted.mean
    assert after < before == pytest.approx(cycle.par.mean, abs=1e-6)  # the windows are alike
    assert told == [f"; p95 of windows {before:.3f} -> {after:.3f}"]


@pytest.mark.parametrize(
    ("tokens", "receive", "moves"), [(4096, None, True), (8, None, False), (4096, 1.0, False), (8, 1.0, False)]
)
def test_measured_time_decides_what_moves(tokens: float, receive: float | None, moves: bool) -> None:
    """The same load is balanced if steps have many tokens. It is not balanced if steps have few tokens, because steps
    would not be shorter, or if transfers are slow (a byte per second)."""
    options = {"tokens": tokens, "receive": receive, "cycles": 3}
    all_seen = run_ranks(2, serve, 400, {}, options)
    check_agreement(all_seen)
    stats = all_seen[0].stats
    assert (stats.experts_moved > 0) is moves
    assert (len(set(all_seen[0].history)) > 1) is moves
    assert stats.moe_ms > 0
    assert (stats.moe_time_saved_seconds > 0) is moves
    if not moves:  # steps were timed, and against themselves nothing is saved
        assert stats.step_ms == stats.step_ms_start > 0
        assert stats.step_time_saved_seconds == 0
    reason = stats.cycles[0].reason
    if moves:
        assert stats.moe_ms < stats.moe_ms_start
    elif tokens == 8:
        assert "at 8 tokens per rank and step PAR up to" in reason
        assert "costs no time that can be measured" in reason
    else:
        assert "ms of MoE time per step" in reason
        assert "net less than" in reason


def measure(ranks: Ranks) -> tuple[float | None, float | None, str, bool]:
    """The measured rates of an idle balancer, the first wrong slot afterwards, and True if its loader is poisoned."""
    model = RoutingModel(ranks)
    settings = {"dynamic_eplb": True, "num_redundant_experts": redundant(ranks.num_ranks)}
    updator = build_updator(model, EplbConfig.from_additional_config({"eplb_config": settings}))
    receive, commit = updator.parts.loader.measure_rates()
    wrong = model.slots.wrong(updator.placement)
    poisoned = updator.parts.loader.poisoned
    updator.close()
    return receive, commit, wrong, poisoned


def test_measured_rates_are_equal_on_all_ranks() -> None:
    all_seen = run_ranks(3, measure)
    assert all(seen == all_seen[0] for seen in all_seen)
    receive, commit, wrong, poisoned = all_seen[0]
    assert receive > 0
    assert commit > 0
    assert wrong == ""
    assert not poisoned


def test_first_cycle_is_early_and_idle_steps_are_steps() -> None:
    """The first cycle begins after a quarter of the interval, as in vLLM (test_eplb_state.py compares). An idle step
    counts as a step, but its tokens are not counted."""
    settings = {"mode": "observe", "expert_heat_collection_interval": 40}
    all_seen = run_ranks(2, serve, 80, settings, {"idle": True})
    check_agreement(all_seen)
    for seen in all_seen:
        assert seen.began[0] == early(40) == 10
        assert len(seen.began) == 2
    counted = [tokens.sum() > 0 for tokens in all_seen[0].forwards]
    assert counted == [step % 3 == 0 for step in range(80)]
    assert all_seen[0].stats.window.tokens == 64 * LAYERS * sum(counted[9 : all_seen[0].began[1] - 1])


def check_balancedness(all_seen: list[Seen], interval: int) -> None:
    """Assert that rank 0 wrote one line about every ``interval``-th forward, with the tokens of that forward."""
    lines = [line for line in all_seen[0].lines if len(line) == 6]
    assert [line[0] for line in lines[:10]] == [interval * n for n in range(1, 11)]
    for step, name, average, most, ratio, left in lines:
        by_rank = all_seen[0].forwards[step - 1].reshape(LAYERS, 2, -1).sum(axis=2)
        assert (name, average, most) == ("routing model", by_rank.mean(axis=1).sum(), by_rank.max(axis=1).sum())
        assert ratio == pytest.approx(average / most)
        assert average == LAYERS * 64 / 2
        assert 0 <= left <= 10
    assert not [line for line in all_seen[1].lines if len(line) == 6]


def test_dispatch_shares_balance_without_moving_an_expert() -> None:
    settings = {"weighted_dispatch": True, "min_gain": 1.0, "expert_heat_collection_interval": 40}
    all_seen = run_ranks(2, serve, 800, settings, {"cycles": 6})
    check_agreement(all_seen)
    stats = all_seen[0].stats
    assert stats.experts_moved == 0
    assert stats.dispatch_updates >= 1
    assert stats.dispatch_par_after.mean < stats.dispatch_par_before.mean
    assert stats.window.par.mean < 1 + (stats.window.par_start.mean - 1) / 2
    assert len(set(all_seen[0].tables)) > 1


def test_long_plan_gives_way_to_a_newer_one() -> None:
    settings = {"policy": "random", "transfer_buffer_experts": 1, "expert_heat_collection_interval": 4}
    all_seen = run_ranks(2, serve, 800, settings, {"cycles": 5, "cut_after": 4})
    check_agreement(all_seen)
    stats = all_seen[0].stats
    cut = [cycle for cycle in stats.cycles if cycle.reason.startswith("cut off after")]
    assert len(cut) >= 2
    assert stats.cycles_failed == 0
    assert all(cycle.moved > 0 for cycle in cut)
    assert stats.experts_moved == sum(cycle.moved for cycle in stats.cycles)


def test_dispatch_shares_and_moves_go_together() -> None:
    all_seen = run_ranks(3, serve, 800, {"weighted_dispatch": True}, {"cycles": 6})
    check_agreement(all_seen)
    stats = all_seen[0].stats
    assert stats.experts_moved > 0
    assert stats.cycles_failed == 0
    assert stats.dispatch_updates >= 1
    assert len(set(all_seen[0].tables)) > 2


def test_ranks_with_different_placements_stop() -> None:
    all_seen = run_ranks(2, serve, 200, {}, {"part_at": 6})
    assert all("disagree about the placement" in seen.error for seen in all_seen), [seen.error for seen in all_seen]
    assert all(seen.step < 30 for seen in all_seen)


def changes(seen: Seen) -> int:
    """Steps at which the placement changed."""
    return sum(a != b for a, b in pairwise(seen.history))


@pytest.mark.parametrize(("num_ranks", "policy", "cycles"), [(2, "random", 3), (4, "random", 2), (2, "incremental", 1)])
def test_a_synchronous_cycle_takes_one_step(num_ranks: int, policy: str, cycles: int) -> None:
    """A cycle in mode sync takes one step and ends with the placement and weights of an asynchronous cycle. Both modes
    make the same plans: "random" depends on the cycle's number only, and the first window is the same."""
    settings = {"policy": policy, "planner_effort": "fast", "transfer_buffer_experts": 1}  # no plan depends on time
    at_once = run_ranks(num_ranks, serve, 400, {**settings, "mode": "sync"}, {"cycles": cycles})
    in_rounds = run_ranks(num_ranks, serve, 400, settings, {"cycles": cycles})
    check_agreement(at_once)
    check_agreement(in_rounds)
    for whole, stepwise in zip(at_once, in_rounds, strict=True):
        assert changes(whole) == sum(whole.after[n] != whole.after[n - 1] for n in range(1, max(whole.after) + 1))
        assert [whole.after[n] for n in range(cycles + 1)] == [stepwise.after[n] for n in range(cycles + 1)]
        assert len({whole.after[n][1] for n in range(cycles + 1)}) == cycles + 1  # weights did move
        assert changes(stepwise) > cycles  # so the count above can fail
    assert at_once[0].stats.cycles_failed == in_rounds[0].stats.cycles_failed == 0
    assert at_once[0].step == (cycles + 1) * 10 - 8  # no extra steps: a cycle at step 2, then every 10
