# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism on vLLM's CPU backend, made right.

**Experts.**
vLLM's CPU kernel for experts ignores the expert map: it takes every id for a local one. Here a rank takes the (token,
expert) pairs of its own slots only, computes each as a batch of its own with one expert per row, and adds the results
up per token in float32. The other ranks' pairs are theirs; the all-reduce after the layer sums the ranks.

**The switch.** vLLM refuses its EPLB switch on a CPU. It is set behind that check, which runs once more where a worker
copies its configuration for a part of a model, as multimodal ones have: there it is told that balancing is possible.

**Data parallel.** vLLM gathers the ranks' tokens before its experts and scatters the sums after them; its communicator
for CPUs lacks the two collectives for unequal numbers of tokens. Here they are made of equal ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


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
    """What this rank's slots contribute to ``output``, in place.

    Args:
        output: [N, H], overwritten.
        hidden_states: [N, H].
        w1, w2: this rank's weights, in the layout of vLLM's kernel.
        w1_bias, w2_bias: or None.
        topk_weights: [N, K].
        topk_ids: [N, K] physical experts; negative ones are nobody's.
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
    """Lets the class ``CPUUnquantizedExperts`` heed the expert map; idempotent."""
    original = experts.apply
    if getattr(original, "_eplb", False):
        return

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
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_map is None:
            original(
                self,
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                global_num_experts,
                expert_map,
                a1q_scale,
                a2_scale,
                workspace13,
                workspace2,
                expert_tokens_meta,
                apply_router_weight_on_input,
            )
            return
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

    apply._eplb = True  # type: ignore[attr-defined]
    experts.apply = apply


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Our mapping under vLLM's name and with its arguments."""
    from ...load import ops

    return ops.map_and_record(
        topk_ids,
        logical_to_physical_map,
        logical_replica_count,
        expert_load_view,
        record_enabled,
        num_unpadded_tokens,
    )


def replace_router_mapping() -> None:
    """Puts our mapping in place of vLLM's, which on a CPU maps nothing and counts nothing; idempotent.

    Some models import vLLM's by name (deepseek_v4, kimi_k3), so it is replaced wherever it is: call this again once the
    model is loaded. What is imported later gets ours anyway.
    """
    name = eplb_map_to_physical_and_record.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and name in vars(module):
            setattr(module, name, eplb_map_to_physical_and_record)


def let_configurations_be_copied(parallel: Any) -> None:
    """Lets the check in the module ``vllm.config.parallel`` pass with the EPLB switch on; idempotent.

    Nothing else in that module asks for a GPU in this way.
    """
    platform = parallel.current_platform

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

        def is_cuda_alike(self) -> bool:
            return True

    parallel.current_platform = Platform()


def add_collectives(communicator: Any) -> None:
    """Gives the class ``CpuCommunicator`` ``all_gatherv`` and ``reduce_scatterv``, if it has none of its own."""

    def all_gatherv(
        self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(input_, list):
            return [all_gatherv(self, each, dim, sizes) for each in input_]  # type: ignore[misc]
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
