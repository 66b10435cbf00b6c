# SPDX-License-Identifier: Apache-2.0
"""Calibration on ranks that run: all measure the same, in turns that they agree on, and say the same of a load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.distributed.ranks import Ranks, run_ranks
from vllm_ascend_eplb.balancer import calibration, timing
from vllm_ascend_eplb.balancer.calibration import LayerRuns, calibrate
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.topology import Topology

RANKS, EXPERTS, TOP_K = 2, 8, 2


def calibrated(ranks: Ranks, folder: str) -> dict[str, Any]:
    """What a rank learns, by a clock of its own: a layer takes as long as its tokens say, and rank 1 is a little slower
    than rank 0."""
    placement = Placement.initial(2, EXPERTS, RANKS)
    lines: list[str] = []
    now = 0.0
    calibration.time = SimpleNamespace(perf_counter=lambda: now)  # type: ignore[attr-defined]
    timing.logger.info = lambda text, *values: lines.append(text % values)  # type: ignore[method-assign]
    timing.calibrate = functools.partial(calibrate, seconds=0.5)  # type: ignore[assignment]

    def prepare(ids: torch.Tensor) -> Callable[[], None]:
        mine = int((ids // placement.slots_per_rank == ranks.rank).sum())
        seconds = 2e-5 * mine * (1.0 + 0.1 * ranks.rank)

        def run() -> None:
            nonlocal now
            now += seconds

        return run

    adaptor: Any = SimpleNamespace(
        rank=ranks.rank,
        title="EPLB",
        device=torch.device("cpu"),
        control_group=ranks.control,
        placement=placement,
        topology=Topology.even(RANKS),
        num_groups=1,
        layer_runs=lambda: LayerRuns("layers that count", TOP_K, RANKS, 512, 1, prepare),
    )
    config = EplbConfig(dynamic_eplb=True, expert_map_record_path=str(Path(folder, "map.json")))
    times = timing.learn_times(adaptor, config, SimpleNamespace(measure_rates=lambda: (1e9, 1e9)))  # type: ignore[arg-type]
    return {"cost": times.cost.to_json(), "lines": lines}


def test_ranks_learn_the_same_and_time_a_recorded_load(tmp_path: Path) -> None:
    """The load lies on rank 0 alone: only EP rank 0 reads it, and yet all ranks run the same ids."""
    np.savez(tmp_path / "map.load.npz", load=np.tile([9.0, 9, 9, 9, 1, 1, 1, 1], (1, 2, 1)))
    first, second = run_ranks(RANKS, calibrated, str(tmp_path))
    assert first["cost"] == second["cost"]
    assert second["lines"] == []
    (said,) = [line for line in first["lines"] if "timed by its own counts" in line]
    before, after = (float(said.split(" takes ")[-1].split(" ms")[at].split()[-1]) for at in (0, 1))
    assert 1.5 < before / after < 2.0  # 0.9 of the pairs on the slowest rank instead of a half
