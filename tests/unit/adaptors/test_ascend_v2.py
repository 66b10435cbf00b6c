# SPDX-License-Identifier: Apache-2.0
"""The adaptor for vllm-ascend's second model runner, without vllm-ascend: the stage of a data-parallel forward, and
refusals."""

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend import second_runner
from vllm_ascend_eplb.adaptors.errors import PatchPointError
from vllm_ascend_eplb.adaptors.vllm.adaptor import tensors_by_slot
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState


def test_idle_engine_counts_in_stage_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle engine's slots receive tokens of the other engines. The runner's function is wrapped once, even if
    several states are made."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(VllmEplbState, "__init__", lambda self, *unused: None)
    monkeypatch.setattr(VllmEplbState, "forward_before", lambda self, **kinds: said.append(kinds))
    answers = [torch.tensor([1, 60]), torch.tensor([1, 4]), None]
    runner = SimpleNamespace(
        dispatch_cg_and_sync_dp=lambda across: ("batch", across and SimpleNamespace(num_tokens_across_dp=across.tokens))
    )
    monkeypatch.setattr(second_runner, "importlib", SimpleNamespace(import_module=lambda name: runner))
    states = [second_runner.SecondRunnerEplbState(None, torch.device("cpu")) for _ in range(2)]
    for state in states:
        state.most_in_decode = 16
    for tokens in answers:
        sync = None if tokens is None else SimpleNamespace(tokens=tokens)
        assert runner.dispatch_cg_and_sync_dp(sync)[0] == "batch"
        for state in states:
            state.forward_before(serving=False, stage="decode", rows=1)
    prefill = {"serving": True, "stage": "prefill", "rows": 1, "tokens": 30}
    decode = {"serving": True, "stage": "decode", "rows": 1, "tokens": 2}
    idle = {"serving": False, "stage": "decode", "rows": 1, "tokens": 0}
    assert said == [prefill, prefill, decode, decode, idle, idle]


def test_quantised_experts_are_lists_of_tensors() -> None:
    """The weights of slots are views, whichever form a layer reports."""
    together, apart = torch.nn.Parameter(torch.zeros(3, 2, 2)), [torch.full((2,), float(slot)) for slot in range(3)]
    slots = tensors_by_slot([[together, apart], [apart]], 3)
    assert [[len(tensors) for tensors in layer] for layer in slots] == [[2, 2, 2], [1, 1, 1]]
    for slot, (first, second) in enumerate(slots[0]):
        assert first.data_ptr() == together[slot].data_ptr()
        assert second.data_ptr() == apart[slot].data_ptr()
        assert not first.requires_grad


def test_draft_model_without_experts_gets_no_redundant_experts() -> None:
    parallel = SimpleNamespace(eplb_config=SimpleNamespace(num_redundant_experts=2), enable_eplb=True)

    def replace(instance: Any, /, **changes: Any) -> Any:
        return type(instance)(**{**vars(instance), **changes})

    replaced = second_runner.without_redundancy(replace)
    assert replaced(parallel, enable_eplb=False).eplb_config.num_redundant_experts == 0
    assert replaced(parallel, enable_eplb=True).eplb_config.num_redundant_experts == 2
    assert replaced(parallel).eplb_config.num_redundant_experts == 2


def test_reload_is_refused() -> None:
    state = second_runner.SecondRunnerEplbState.__new__(second_runner.SecondRunnerEplbState)
    with pytest.raises(RuntimeError, match="restart the server"), state.new_weights():
        pass


def test_missing_patch_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of vllm-ascend are stand-ins that lack one name, so vllm-ascend may be installed or not."""
    modules: dict[str, ModuleType] = {}
    for point in second_runner.PATCH_POINTS:
        owner: Any = modules.setdefault(point.module, ModuleType(point.module))
        *parents, name = point.name.split(".")
        for parent in parents:
            owner.__dict__.setdefault(parent, type(parent, (), {}))
            owner = getattr(owner, parent)
        setattr(owner, name, object())
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    second_runner.take_over()
    assert modules[second_runner.CONTROLLER].AscendEplbState is second_runner.SecondRunnerEplbState
    del modules[second_runner.CONTROLLER].AscendEplbState
    with pytest.raises(PatchPointError, match=r"v2\.eplb\.AscendEplbState \(.*leave eplb_config out"):
        second_runner.take_over()
    del modules[second_runner.EXPERTS]._record_v2_eplb_load
    with pytest.raises(PatchPointError, match=r"AscendEplbState .*; .*_record_v2_eplb_load \("):
        second_runner.take_over()
