# SPDX-License-Identifier: Apache-2.0
"""The adaptor for vllm-ascend's second model runner, where that is not: what it takes for granted of vLLM, and what it
makes of a data-parallel forward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend import second_runner as ascend_v2
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState


def test_experts_are_loaded_in_vllms_order() -> None:
    from vllm.distributed.eplb.eplb_state import EplbState

    for experts, redundant in ((8, 0), (8, 3), (4, 9)):
        order = ascend_v2.vllm_order(experts, redundant)
        assert order == list(EplbState.build_initial_global_physical_to_logical_map(experts, redundant))


def test_an_idle_engine_counts_in_the_stage_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots receive their tokens. The runner's function is wrapped once, however often a state is made."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(VllmEplbState, "__init__", lambda self, *unused: None)
    monkeypatch.setattr(VllmEplbState, "forward_before", lambda self, **kinds: said.append(kinds))
    answers = [torch.tensor([1, 60]), torch.tensor([1, 4]), None]
    runner = SimpleNamespace(
        dispatch_cg_and_sync_dp=lambda across: ("batch", across and SimpleNamespace(num_tokens_across_dp=across.tokens))
    )
    monkeypatch.setattr(ascend_v2, "importlib", SimpleNamespace(import_module=lambda name: runner))
    monkeypatch.setattr(ascend_v2.AscendV2EplbState, "across", None)
    for _ in range(2):
        state = ascend_v2.AscendV2EplbState(None, torch.device("cpu"))
    state._most_in_decode = 16
    for tokens in answers:
        sync = None if tokens is None else SimpleNamespace(tokens=tokens)
        assert runner.dispatch_cg_and_sync_dp(sync)[0] == "batch"
        state.forward_before(serving=False, stage="decode", rows=1)
    assert said == [
        {"serving": True, "stage": "prefill", "rows": 1, "tokens": 30},
        {"serving": True, "stage": "decode", "rows": 1, "tokens": 2},
        {"serving": False, "stage": "decode", "rows": 1, "tokens": 0},
    ]


def test_new_weights_are_refused() -> None:
    state = ascend_v2.AscendV2EplbState.__new__(ascend_v2.AscendV2EplbState)
    with pytest.raises(RuntimeError, match="restart the server"), state.new_weights():
        pass


def test_a_vllm_ascend_that_lacks_a_place_is_named() -> None:
    with pytest.raises(
        ascend_v2.SeamError, match=r"AscendEplbState .*No module named 'vllm_ascend'.*leave eplb_config"
    ):
        ascend_v2.take_over()
