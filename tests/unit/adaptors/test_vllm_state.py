# SPDX-License-Identifier: Apache-2.0
"""Which rank counts which rows, and refused loading while a server balances; without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.adaptors.engine_adaptor import require_loaded_copies
from vllm_ascend_eplb.adaptors.errors import UnsupportedError
from vllm_ascend_eplb.adaptors.vllm.adaptor import Slice
from vllm_ascend_eplb.adaptors.vllm.runner import require_known_slice
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState


@given(st.integers(1, 9), st.integers(1, 300), st.data())
def test_slices_of_a_batch_hold_every_token_once(parts: int, rows: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, rows))
    length = -(-rows // parts)
    padded = torch.arange(parts * length)
    for part in range(parts):
        mine = padded[part * length : (part + 1) * length]
        assert Slice(part, parts).real(tokens, rows) == int((mine < tokens).sum())


def state(data_parallel_size: int = 1) -> VllmEplbState:
    return VllmEplbState(SimpleNamespace(data_parallel_size=data_parallel_size), torch.device("cpu"))


def test_a_whole_batch_needs_no_number_of_rows() -> None:
    mine = state()
    mine.forward_before(serving=True, stage="decode", rows=0)
    mine.prepare_forward(None, 17)
    assert int(mine.num_unpadded_tokens[0]) == 17


def test_a_rank_counts_its_slice_of_a_batch() -> None:
    mine = state(2)
    mine.slice = Slice(1, 2)
    mine.forward_before(serving=True, stage="decode", rows=8)
    mine.prepare_forward(None, 5)
    assert int(mine.num_unpadded_tokens[0]) == 1
    mine.count_nothing()
    assert int(mine.num_unpadded_tokens[0]) == 0


def test_runner_without_rows_is_refused_for_sliced_batches() -> None:
    sliced = state(2)
    sliced.slice = Slice(0, 2)
    require_known_slice(SimpleNamespace(eplb_state=state(2)))
    require_known_slice(SimpleNamespace(eplb_state=sliced, _determine_batch_execution_and_padding=None))
    with pytest.raises(UnsupportedError, match="not supported with vLLM's V2 model runner"):
        require_known_slice(SimpleNamespace(eplb_state=sliced))


def test_redundant_slots_without_weights_end_the_start() -> None:
    require_loaded_copies(0, "auto")
    require_loaded_copies(8, "dummy")
    with pytest.raises(UnsupportedError, match=r"copies of 8 experts differ.*; set num_redundant_experts to 0"):
        require_loaded_copies(8, "auto")


def test_reload_is_refused_where_engines_share_experts() -> None:
    with pytest.raises(RuntimeError, match=r"--data-parallel-size 2 is not supported"), state(2).new_weights():
        raise AssertionError("weights were loaded")


def test_weights_reach_a_balanced_model_one_way_only() -> None:
    loaded: list[Any] = []
    model, mine = SimpleNamespace(load_weights=loaded.append), state()
    mine.guard(model)
    with pytest.raises(RuntimeError, match="use the worker's reload_weights"):
        model.load_weights("past the balancer")
    with mine.new_weights():
        model.load_weights("through it")
    with pytest.raises(RuntimeError, match="wrong slots"):
        model.load_weights("afterwards")
    assert loaded == ["through it"]
