# SPDX-License-Identifier: Apache-2.0
"""Fixes expert parallelism on vLLM's CPU backend.

**Experts.** The CPU kernel of vLLM ignores the expert map and treats every id as a local one. Here a rank computes only
the (token, expert) pairs of its own slots, with one expert per row, and sums the results per token in float32. The
all-reduce after the layer adds the pairs of the other ranks.

**The switch.** vLLM refuses its EPLB switch on a CPU. The front end sets it after that check. The check runs once more
where a worker copies its configuration for a part of a multimodal model; there it is told that balancing is possible.

**Data parallel.** vLLM gathers the tokens of all ranks before the experts and scatters the sums after them. Its CPU
communicator lacks the two collectives for unequal numbers of tokens; here they are built of equal ones.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from ...load import ops
from ..patching import patch_once


@torch.library.custom_op("vllm_ascend_eplb::cpu_local_experts", mutates_args=("output",))
def cpu_local_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    activation: str,
    isa: str,
    apply_router_weight_on_input: bool,
) -> None:
    """Writes the contribution of the slots of this rank to ``output``.

    Args:
        output: [N, H], overwritten.
        hidden_states: [N, H].
        w1, w2: weights of this rank, in the layout of vLLM's kernel.
        w1_bias, w2_bias: biases of this rank, or None.
        topk_weights: [N, K].
        topk_ids: [N, K] physical experts; negative ones belong to no rank.
        expert_map: [P] local slot of each physical expert, -1 on another rank.
        activation, isa, apply_router_weight_on_input: as vLLM's kernel takes them.
    """
    from vllm._custom_ops import cpu_fused_moe

    ids = topk_ids.long()
    local = torch.where(ids >= 0, expert_map[ids.clamp(min=0)].long(), -1)
    rows, nth = torch.nonzero(local >= 0, as_tuple=True)
    if not rows.numel():
        output.zero_()
        return
    pairs = hidden_states[rows]
    results = torch.empty_like(pairs)
    cpu_fused_moe(
        results,
        pairs,
        w1,
        w2,
        w1_bias,
        w2_bias,
        topk_weights[rows, nth].unsqueeze(1).contiguous(),
        local[rows, nth].to(torch.int32).unsqueeze(1).contiguous(),
        activation,
        isa,
        apply_router_weight_on_input,
    )
    total = torch.zeros(output.shape, dtype=torch.float32)
    total.index_add_(0, rows, results.float())
    output.copy_(total)


@cpu_local_experts.register_fake
def _(output: torch.Tensor, *args: Any) -> None:
    return None


def replace_experts(experts: Any) -> None:
    """Lets the class ``CPUUnquantizedExperts`` follow the expert map; idempotent."""
    patch_once(experts, "apply", _local_experts_of)


def _local_experts_of(original: Any) -> Any:
    """``CPUUnquantizedExperts.apply`` that computes only the local experts if there is an expert map."""

    @functools.wraps(original)
    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        apply_router_weight_on_input: bool,
        **kwargs: Any,
    ) -> Any:
        if expert_map is None:
            given = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map)
            kwargs["apply_router_weight_on_input"] = apply_router_weight_on_input
            return original(self, *given, *args, **kwargs)
        if self._use_zentorch:
            raise RuntimeError("expert parallelism on a CPU is not supported with zentorch; uninstall zentorch")
        cpu_local_experts(
            output,
            hidden_states,
            w1,
            w2,
            self.w1_bias,
            self.w2_bias,
            topk_weights,
            topk_ids,
            expert_map,
            activation.value,
            self.isa,
            apply_router_weight_on_input,
        )
        return None

    return apply


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Our mapping under vLLM's name and with its arguments."""
    return ops.map_and_record(
        topk_ids,
        logical_to_physical_map,
        logical_replica_count,
        expert_load_view,
        record_enabled,
        num_unpadded_tokens,
    )


def replace_router_mapping() -> None:
    """Puts our mapping in place of vLLM's, which maps and counts nothing on a CPU; idempotent.

    Some models import vLLM's by name (deepseek_v4, kimi_k3), so it is replaced in every module that has it: call this
    again once the model is loaded. Modules that are imported later get ours.
    """
    name = eplb_map_to_physical_and_record.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and name in vars(module):
            setattr(module, name, eplb_map_to_physical_and_record)


def let_configurations_be_copied(parallel: Any) -> None:
    """Lets the check in the module ``vllm.config.parallel`` pass with the EPLB switch on; idempotent.

    Nothing else in that module asks for a GPU in this way.
    """
    patch_once(parallel, "current_platform", _cuda_alike)


def _cuda_alike(platform: Any) -> Any:
    """The same platform, but ``is_cuda_alike`` is true."""

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

        def is_cuda_alike(self) -> bool:
            return True

    return Platform()


def add_collectives(communicator: Any) -> None:
    """Gives the class ``CpuCommunicator`` the methods ``all_gatherv`` and ``reduce_scatterv`` where it lacks them."""

    def all_gatherv(
        self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(input_, list):
            return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]  # type: ignore[misc]
        if dim != 0:
            raise NotImplementedError(f"all_gatherv along dimension {dim}; only 0 is used")
        if sizes is None:
            gathered: torch.Tensor = self.all_gather(input_, 0)
            return gathered
        most = max(sizes)
        padded = input_.new_zeros((most, *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = self.all_gather(padded, 0).split(most)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        if dim != 0:
            raise NotImplementedError(f"reduce_scatterv along dimension {dim}; only 0 is used")
        sizes = sizes or [len(input_) // self.world_size] * self.world_size
        total = self.all_reduce(input_.clone())
        first = sum(sizes[: self.rank_in_group])
        return total[first : first + sizes[self.rank_in_group]].clone()  # type: ignore[no-any-return]

    for name, function in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        if name not in vars(communicator):
            setattr(communicator, name, function)
