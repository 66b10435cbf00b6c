# SPDX-License-Identifier: Apache-2.0
"""The recorder of every engine follows the settings: stages, load series, stream."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend.adaptor import ReceivedTokens
from vllm_ascend_eplb.adaptors.engine_adaptor import recorder_for
from vllm_ascend_eplb.load import recorder as recorder_module
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.settings.config import SERIES_ENTRIES, EplbConfig
from vllm_ascend_eplb.values.placement import Placement

PLACEMENT = Placement.initial(2, 4, 2, 2)
CPU = torch.device("cpu")


def recorder(kind: type, **settings: Any) -> LoadRecorder:
    return recorder_for(kind, PLACEMENT, CPU, EplbConfig(dynamic_eplb=True, **settings))


@pytest.mark.parametrize("kind", [LoadRecorder, ReceivedTokens])
@pytest.mark.parametrize(("policy", "entries"), [(2, 1), (3, SERIES_ENTRIES)])
def test_policy_type_3_records_a_series(kind: type, policy: int, entries: int) -> None:
    """The series has the number of entries of the policy, and later entries have later steps."""
    made = recorder(kind, eplb_policy_type=policy, expert_heat_collection_interval=16)
    assert (made.num_entries, made.steps_per_entry) == (entries, 16 // entries)
    made.begin_step(PLACEMENT, record=True)
    for step in range(16):
        made.counts[:, 0] += step + 1
        made.begin_step(PLACEMENT, record=True)
    made.snapshot(PLACEMENT)
    series = np.asarray(made.take())
    assert series.shape[-3:] == (entries, 2, 4)
    tokens = series.reshape(entries, 2, 4)[:, 0, 0].tolist()
    if entries == 1:
        assert tokens == [sum(range(1, 17))]
    else:
        assert len(set(tokens)) == entries


@pytest.mark.parametrize("kind", [LoadRecorder, ReceivedTokens])
@pytest.mark.parametrize(("stage", "phases"), [("all", ("all",)), ("prefill", ("prefill",)), ("decode", ("decode",))])
def test_recorder_counts_only_the_wanted_stage(kind: type, stage: str, phases: tuple[str, ...]) -> None:
    assert recorder(kind, eplb_heat_collection_stage=stage).phases == phases


@pytest.mark.parametrize("kind", [LoadRecorder, ReceivedTokens])
@pytest.mark.parametrize(("mode", "own"), [("balance", True), ("observe", True), ("sync", False)])
def test_mode_sync_copies_on_the_default_stream(
    kind: type, mode: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    snapshot = recorder_module.Snapshot

    def noted(window: torch.Tensor, own_stream: bool) -> Any:
        asked.append(own_stream)
        return snapshot(window, own_stream)

    monkeypatch.setattr(recorder_module, "Snapshot", noted)
    recorder(kind, mode=mode)
    assert asked == [own]


STAGES = ("decode", "prefill")
TURNED = Placement(np.roll(PLACEMENT.physical_to_logical, 1, axis=1), 4, 2)


def test_received_tokens_of_other_stages_are_in_no_window() -> None:
    """In every order of stages, with the end of a window or another placement behind every step. A layer adds to its
    counters in every step."""
    for stages in itertools.product(STAGES, repeat=4):
        for then in itertools.product(("nothing", "window", "placement"), repeat=4):
            made, placement = recorder(ReceivedTokens, eplb_heat_collection_stage="decode"), PLACEMENT
            wanted, counted = 0, 0
            for number, (stage, event) in enumerate(zip(stages, (*then[:3], "window"), strict=True)):
                made.begin_step(placement, record=True, phase=stage)
                made.counts[:, 0] += 10**number
                wanted += 10**number if stage == "decode" else 0
                if event == "window":
                    made.snapshot(placement)
                    counted += int(made.take()[..., 0, :].sum())
                elif event == "placement":
                    made.flush(placement)
                    placement = TURNED if placement is PLACEMENT else PLACEMENT
            assert counted == wanted, (stages, then)
