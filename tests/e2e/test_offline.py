# SPDX-License-Identifier: Apache-2.0
"""Real offline vLLM engines: tokens stay equal while experts move, and counts are the routers' own."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.report import make_page
from vllm_ascend_eplb.values.placement import Placement

from .conftest import BUSY, DRAFT_TOKENS, PATTERN, prompts, reference_run
from .in_step import assert_one_rank_counts

TOKENS = 48
CHUNK = 64
"""Most tokens in a forward of the engine with chunked prefill."""

FIRST_PAIRS = 12_000
"""Pairs of token and expert, over all layers, of about the first 24 steps."""

CYCLES = 10
"""Cycles in runs that need many. The number of turns of the prompts that this takes depends on the machine."""


def equal_tokens(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    assert [len(tokens) for tokens in ours] == [len(tokens) for tokens in theirs]
    pairs = [(a, b) for mine, reference in zip(ours, theirs, strict=True) for a, b in zip(mine, reference, strict=True)]
    return sum(a == b for a, b in pairs), len(pairs)


def assert_equal_every_turn(tokens: list[list[int]], reference: list[list[int]]) -> None:
    turns = len(tokens) // len(reference)
    total = turns * sum(map(len, reference))
    assert equal_tokens(tokens, reference * turns) == (total, total)
    assert total > 0


SCHEDULED_AHEAD = """
from vllm_ascend_eplb.adaptors.post_import import after_import

class Order:  # a stand-in for streams and events; a CPU works in order
    def __init__(self, *args, **kwargs):
        pass
    def nothing(self, *args):
        pass
    record = synchronize = wait_stream = nothing

def keep(module):  # vLLM switches it off on a CPU
    update = module.CpuPlatform.check_and_update_config.__func__
    def kept(cls, vllm_config):
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
    module.CpuPlatform.check_and_update_config = classmethod(kept)

def stand_in(module):
    import torch
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream = Order, Order, Order

after_import("vllm.platforms.cpu", keep)
after_import("vllm.v1.worker.gpu_model_runner", stand_in)
"""


@pytest.fixture(scope="module")
def probed(runs, tmp_path_factory):
    """An engine with EP over two ranks, redundant experts, a random placement every few steps, and steps scheduled
    before the tokens of the previous step are known. Every router and kernel is watched."""
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "sitecustomize.py").write_text(SCHEDULED_AHEAD)
    run = runs(
        "probed",
        ranks=2,
        eplb=BUSY,
        probe=True,
        prompts=prompts(6),
        cycles=CYCLES,
        max_tokens=TOKENS,
        paths=[str(folder)],
    )
    assert run.code == 0, run.log[-6000:]
    return run


def test_tokens_equal_those_of_one_process(probed, reference):
    assert [rank["failures"] for rank in probed.result["ranks"]] == [0, 0]
    stats = json.loads(probed.result["ranks"][0]["stats"])
    assert stats["cycles_done"] >= 10
    assert stats["experts_moved"] > 10 * 6 * 64 / 2
    assert_equal_every_turn(probed.result["tokens"], reference)
    assert "expert transfers by gloo: staging of 2 x 128 experts" in probed.log


def test_steps_are_scheduled_ahead_and_counted_as_routed(probed):
    for rank in probed.result["ranks"]:
        assert rank["ahead"] > 200
    first = probed.result["ranks"][0]
    assert first["counted"] == first["routed"]


def test_all_ranks_hold_one_placement_at_one_step(probed):
    first, *rest = probed.result["ranks"]
    for rank in rest:
        assert {key: rank[key] for key in ("digest", "step", "cycle", "phase")} == {
            key: first[key] for key in ("digest", "step", "cycle", "phase")
        }


def test_recorded_load_is_the_routers_own_choice(probed):
    loads = assert_one_rank_counts(probed.result["ranks"])
    assert loads.sum() > 0
    np.testing.assert_array_equal(loads.sum(axis=2), loads.sum(axis=2)[:, :1].repeat(6, axis=1))  # tokens x top-4


def test_every_pair_is_computed_once_with_the_right_weights(probed):
    first, second = (rank["masks"] for rank in probed.result["ranks"])
    assert len(first) == len(second) > 1000
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.array(mine) + np.array(theirs), 1)
    assert [rank["wrong_experts"] for rank in probed.result["ranks"]] == [0, 0]


@pytest.fixture(scope="module")
def featured(runs):
    """A compiled model with chunked prefill, prefix caching, draft tokens and structured answers; at the end, weights
    are reloaded."""
    draft_tokens = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    run = runs(
        "featured",
        ranks=2,
        eplb={**BUSY, "weighted_dispatch": True},  # tables change as well as placements
        compile=True,
        arguments={
            "max_num_batched_tokens": CHUNK,
            "enable_prefix_caching": True,
            "block_size": 32,  # prompts have about a hundred tokens, and whole blocks are kept
            "speculative_config": draft_tokens if DRAFT_TOKENS else None,
        },
        pattern=PATTERN,
        reload=True,
        prompts=prompts(6),
        parts=[None, None],  # two turns at least: only the second finds prefixes in the cache
        cycles=CYCLES,
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-6000:]
    assert re.search(r"'mode': <CompilationMode\.DYNAMO_TRACE_ONCE.*'backend': 'inductor'", run.log)
    return run.result


def test_compiled_model_gives_the_same_tokens(featured, reference):
    """Tokens are equal with chunked prefill, prefix caching and draft tokens."""
    stats = json.loads(featured["ranks"][0]["stats"])
    assert stats["cycles_done"] >= 10
    assert stats["dispatch_updates"] >= 10
    assert stats["cycles_failed"] == 0
    assert stats["window"]["tokens"] > 0
    assert_equal_every_turn(featured["tokens"], reference)
    # the options were in use
    assert featured["cached"] > 0
    assert all((reload["drafts"] > 0) is DRAFT_TOKENS for reload in featured["reloads"])
    assert all(reload["most_tokens"] <= CHUNK for reload in featured["reloads"])


def test_structured_answers_are_the_same(featured, runs):
    expected = reference_run(runs).result["texts"]
    assert featured["texts"] == expected
    assert all(re.fullmatch(PATTERN, text) for text in expected)
    assert len(set(expected)) > 1


def test_reload_fills_the_initial_placement(featured, reference):
    first, second = featured["reloads"]
    assert first["placement"] == second["placement"] != first["initial"]
    for reload in (first, second):
        assert reload["placement_after"] == reload["initial"]
        assert reload["moved"] == 0
        assert (reload["by_name"], reload["norms"]) == (reload["initial"], 25)
    assert_equal_every_turn(featured["tokens_after"], reference)
    # experts moved again, so the checksums are those of the new weights
    assert featured["ranks"][0]["cycle"] > first["cycle"]
    assert featured["ranks"][0]["digest"] != first["initial"]


def check_balancedness(log: str) -> None:
    """Assert that there is a line every 25 steps whose three numbers agree."""
    lines = re.findall(
        r"EPLB step: (\d+) for model .*: avg_tokens=([\d.]+), max_tokens=(\d+), balancedness=([\d.]+)", log
    )
    assert [int(step) for step, *_ in lines[:4]] == [25, 50, 75, 100]
    for _, average, most, balancedness in lines:
        assert float(average) / int(most) == pytest.approx(float(balancedness), abs=1e-3)
    assert len(lines) >= 4


@pytest.mark.soak
def test_synchronous_engine_gives_the_same_tokens(runs, reference):
    """Mode sync, in an engine whose processes are spawned, as for a user.

    The fast proof is in distributed/test_updator.py, which compares a synchronous cycle with an asynchronous one. The
    observed run tests the lines about balancedness and vLLM's view of the maps.
    """
    settings = {**BUSY, "mode": "sync", "expert_heat_collection_interval": 20, "log_balancedness_interval": 25}
    run = runs("sync", spawned=True, ranks=2, eplb=settings, prompts=prompts(6), cycles=3, max_tokens=TOKENS)
    assert run.code == 0, run.log[-6000:]
    stats = json.loads(run.result["ranks"][0]["stats"])
    assert (stats["mode"], stats["cycles_failed"]) == ("sync", 0)
    assert stats["cycles_done"] >= 3
    assert_equal_every_turn(run.result["tokens"], reference)
    done = re.findall(r"EPLB cycle \d+: .* rounds, (\d+) steps after its load was taken", run.log)
    assert len(done) >= 3
    assert set(done) == {"0"}
    assert [rank["views"] for rank in run.result["ranks"]] == [True, True]
    check_balancedness(run.log)


def run_in_stages(runs, name, eplb):
    """Run an engine of two pipeline stages with two ranks per stage."""
    run = runs(
        name,
        ranks=2,
        eplb=eplb,
        arguments={"pipeline_parallel_size": 2, "enable_prefix_caching": False},
        probe=True,
        prompts=prompts(6)[:2],
        cycles=CYCLES,
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-6000:]
    return run.result


@pytest.fixture(scope="module")
def staged(runs):
    return run_in_stages(runs, "staged", BUSY)


def test_every_pipeline_stage_has_its_own_balancer(staged, reference):
    assert_equal_every_turn(staged["tokens"], reference[:12])
    assert [rank["part"] for rank in staged["ranks"]] == ["stage0", "stage0", "stage1", "stage1"]
    for stage in (staged["ranks"][:2], staged["ranks"][2:]):
        stats = json.loads(stage[0]["stats"])
        assert stats["cycles_done"] >= 10
        assert stats["cycles_failed"] == 0
        assert stage[0]["history"] == stage[1]["history"]
        assert [rank["wrong_experts"] for rank in stage] == [0, 0]
        for mine, theirs in zip(stage[0]["masks"], stage[1]["masks"], strict=True):
            np.testing.assert_array_equal(np.array(mine) + np.array(theirs), 1)
        # the stage has three of the six layers, and its first rank counts their tokens
        assert stage[0]["counted"] == [staged["computed"] * 4] * 3
        assert stage[1]["counted"] == [0] * 3
        # the planner of the stage gets their load
        np.testing.assert_array_equal(stage[0]["loads"], stage[0]["windows"][: len(stage[0]["loads"])])
    # Placements cannot be compared: the random placement of a cycle is the same in both stages.
    assert staged["ranks"][0]["windows"] != staged["ranks"][2]["windows"]


@pytest.mark.soak
def test_pipeline_stages_start_from_their_part_of_a_map(runs, reference, tmp_path):
    """Negative control: the other stage's part of the map has another digest."""
    rng = np.random.default_rng(11)
    rows = [rng.permutation([*range(64), *rng.choice(64, 4, replace=False)]) for _ in range(6)]
    write_expert_map(tmp_path / "map.json", Placement(np.array(rows), 64, 2))
    result = run_in_stages(runs, "staged map", {**BUSY, "expert_map_path": str(tmp_path / "map.json")})
    first, second = (Placement(np.array(rows[begin : begin + 3]), 64, 2).digest for begin in (0, 3))
    assert first != second
    assert [rank["initial"] for rank in result["ranks"]] == [first, first, second, second]
    assert_equal_every_turn(result["tokens"], reference[:12])
    assert [rank["wrong_experts"] for rank in result["ranks"]] == [0] * 4
    assert all(json.loads(rank["stats"])["cycles_done"] >= 10 for rank in result["ranks"][::2])


def lopsided(load: np.ndarray) -> Placement:
    """A placement of 64 experts on two ranks with 4 redundant experts; the first rank has the hotter half."""
    order = np.argsort(-load, axis=1)
    hot, cold = order[:, :32], order[:, 32:]
    return Placement(np.concatenate([hot, cold[:, -2:], cold, hot[:, -2:]], axis=1), 64, 2)


@pytest.fixture(scope="module")
def observed(runs, probed, tmp_path_factory):
    """An engine in mode observe that starts from a bad map, made from the load of the same prompts in another run. It
    is corrupted at the end."""
    path = tmp_path_factory.mktemp("map") / "map.json"
    loads = np.array(probed.result["ranks"][0]["loads"])
    enough = int(np.argmax(loads.sum(axis=(1, 2)).cumsum() >= FIRST_PAIRS))  # a busy machine makes longer windows
    placement = lopsided(loads[: enough + 1].sum(axis=0))
    write_expert_map(path, placement)
    settings = {
        "dynamic_eplb": True,
        "mode": "observe",
        "calibrate": False,
        "expert_map_path": str(path),
        "expert_heat_collection_interval": 24,
        "algorithm_execution_interval": 1,
        "log_balancedness_interval": 25,
    }
    run = runs("observed", ranks=2, eplb=settings, probe=True, corrupt=True, prompts=prompts(6), max_tokens=TOKENS)
    assert run.code == 0, run.log[-6000:]
    return run, placement


def test_engine_starts_from_a_map(observed, reference):
    run, placement = observed
    assert [rank["digest"] for rank in run.result["ranks"]] == [placement.digest, placement.digest]
    assert_equal_every_turn(run.result["tokens"], reference)
    # in the first window, rank load is that of the map under the routers' own choices
    stats = EplbStats.from_json(run.result["ranks"][0]["stats"])
    window = np.array(run.result["ranks"][0]["windows"][0])
    assert stats.cycles[0].par.mean == pytest.approx(placement.par(window).mean())
    assert stats.cycles[0].par_start == stats.cycles[0].par
    assert stats.cycles[0].par.mean > Placement.initial(6, 64, 2, 4).par(window).mean() + 0.2


def test_mode_observe_reports_the_gain_of_balancing(observed):
    run, placement = observed
    first = run.result["ranks"][0]
    stats = EplbStats.from_json(first["stats"])
    assert (stats.mode, stats.experts_moved, stats.cycles_done, stats.cycles_failed) == ("observe", 0, 0, 0)
    assert stats.cycles_skipped >= 3
    for cycle, load in zip(stats.cycles, first["loads"], strict=False):
        assert re.match(r"observing only: \d+ moves would bring PAR from \d", cycle.reason)
        assert cycle.par.mean == pytest.approx(placement.par(np.array(load)).mean())
        assert cycle.par_predicted.mean <= cycle.par.mean
    assert any(cycle.moves_planned for cycle in stats.cycles)
    # each plan is measured in the window after it
    would = np.mean([cycle.par_observed.mean for cycle in stats.cycles[:-1]])
    assert would < np.mean([cycle.par_realised.mean for cycle in stats.cycles[:-1]]) - 0.02
    assert "time would be saved" in make_page(stats, None)
    assert "the last plan would have brought PAR" in run.log
    check_balancedness(run.log)


def test_maps_switched_without_weights_are_found(observed, reference):
    """Negative control: the comparisons above can fail."""
    run, _ = observed
    equal, total = equal_tokens(run.result["corrupt_tokens"], reference)
    assert equal < total * 0.7
    assert run.result["corrupt_views"] == [False, False]
    assert [rank["views"] for rank in run.result["ranks"]] == [True, True]


DIFFERENT_SETTINGS = """
import os
from vllm_ascend_eplb.adaptors.post_import import after_import

def change(module):
    parse = module.EplbConfig.from_additional_config.__func__
    def other(cls, additional_config):
        config = parse(cls, additional_config)
        import torch.distributed as dist
        on_rank_one = dist.is_initialized() and dist.get_rank() == 1
        return config.model_copy(update={"algorithm_execution_interval": 7}) if on_rank_one else config
    module.EplbConfig.from_additional_config = classmethod(other)

after_import("vllm_ascend_eplb.settings.config", change)
"""


@pytest.mark.soak
def test_ranks_with_different_settings_do_not_start(runs, tmp_path):
    """The fast proof is test_ranks_started_differently_do_not_start in distributed/test_faults.py."""
    (tmp_path / "sitecustomize.py").write_text(DIFFERENT_SETTINGS)
    run = runs(
        "different",
        ranks=2,
        eplb=BUSY,
        prompts=prompts(1),
        max_tokens=4,
        paths=[str(tmp_path)],
    )
    assert run.code != 0
    assert (
        "expert-parallel rank 1 differs from rank 0 in eplb_config.algorithm_execution_interval: 7 against 1" in run.log
    )
