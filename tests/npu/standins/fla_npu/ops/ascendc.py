# SPDX-License-Identifier: Apache-2.0
"""The names that vllm-ascend imports."""


def _missing(*args, **kwargs):
    raise NotImplementedError("fla_npu is a stand-in here: linear attention is not emulated")


causal_conv1d_fn = causal_conv1d_update = recurrent_gated_delta_rule = _missing
chunk_kda_fwd = recurrent_kda = _missing
