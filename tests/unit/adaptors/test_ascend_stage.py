# SPDX-License-Identifier: Apache-2.0
"""The stage (prefill or decode) that data-parallel engines on Ascend count in together."""

from __future__ import annotations

import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend.routing import forward_of_all


@pytest.mark.parametrize(
    ("tokens", "stage"),
    [([1, 1], "decode"), ([16, 1], "decode"), ([1, 16], "decode"), ([17, 1], "prefill"), ([1, 300, 1], "prefill")],
)
def test_all_engines_share_stage_of_the_largest_batch(tokens, stage):
    assert forward_of_all(torch.tensor(tokens, dtype=torch.int32), 16) == (True, stage)
