# SPDX-License-Identifier: Apache-2.0
"""The stage (prefill or decode) that data-parallel engines on Ascend count in together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.distributed.ranks import Ranks, run_ranks
from vllm_ascend_eplb.adaptors.ascend.routing import forward_of_all, knows_own_batch_only, stage_of_all


@pytest.mark.parametrize(
    ("tokens", "stage"),
    [([1, 1], "decode"), ([16, 1], "decode"), ([1, 16], "decode"), ([17, 1], "prefill"), ([1, 300, 1], "prefill")],
)
def test_all_engines_share_stage_of_the_largest_batch(tokens, stage):
    assert forward_of_all(torch.tensor(tokens, dtype=torch.int32), 16) == (True, stage)


@pytest.mark.parametrize(
    ("consumes", "engines", "own"), [(None, 2, False), (False, 2, False), (True, 1, False), (True, 2, True)]
)
def test_engines_of_a_kv_consumer_may_know_own_batch_only(consumes, engines, own):
    transfer = None if consumes is None else SimpleNamespace(is_kv_consumer=consumes)
    parallel = SimpleNamespace(data_parallel_size=engines)
    assert knows_own_batch_only(SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel)) is own


def stages_of_all(ranks: Ranks) -> list[str]:
    """By step: no rank prefills; one does; both do."""
    return [stage_of_all("prefill" if ranks.rank < prefilling else "decode", ranks.control) for prefilling in (0, 1, 2)]


def test_ranks_agree_on_a_stage():
    assert run_ranks(2, stages_of_all) == [["decode", "prefill", "prefill"]] * 2
