# SPDX-License-Identifier: Apache-2.0
"""Estimates gain and memory of balancing and redundant experts, for a model on a machine, before anything is served.

A load as uneven as DeepSeek-V3's recorded loads is drawn (lognormal, sigma 0.7), a plan is made for it, and both are
timed with the cost model. This is an estimate: the model's recorded load, or a server's own measurement, is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..planning import plan
from ..values.placement import Placement
from .cost import CostModel, MoeShape

SIGMA = 0.7
DRAWN_LAYERS = 16
"""Layers for which load is drawn; the model's layers are assumed to have the same mean."""

WORTH = 0.01
"""Fraction of MoE time that a choice must save to be advised over a choice that takes less memory."""


class AdviceError(ValueError):
    """A model's configuration lacks a size, or the ranks cannot share its experts."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes from a model's configuration.

    Attributes:
        shape: shape of the MoE layers.
        kv_bytes: bytes of one token in the KV cache of a rank that keeps whole tokens, in bf16.
    """

    shape: MoeShape
    kv_bytes: float


@dataclass(frozen=True)
class Choice:
    """One number of redundant experts per layer.

    Attributes:
        redundant: redundant experts per layer. slots: slots of a rank.
        par_before, par_after: PAR, mean over layers, with the start placement and balanced.
        ms: milliseconds of all MoE layers in a step, balanced.
        saved: fraction of MoE time saved, against the fewest redundant experts without balancing.
        memory: bytes of a rank's redundant slots, over all layers. kv_tokens: tokens of KV cache that fit into them.
    """

    redundant: int
    slots: int
    par_before: float
    par_after: float
    ms: float
    saved: float
    memory: float
    kv_tokens: int


def read_sizes(config: dict[str, Any], name: str) -> ModelSizes:
    """The sizes from a Hugging Face configuration.

    Raises:
        AdviceError: a size is missing; the message names it.
    """
    config = config.get("text_config", config)

    def size(*keys: str, default: int | None = None) -> int:
        for key in keys:
            if isinstance(config.get(key), int):
                return int(config[key])
        if default is not None:
            return default
        raise AdviceError(f"{name} has no {' or '.join(keys)}; give the config.json of a Mixture-of-Experts model")

    layers = size("num_hidden_layers")
    dense = size("first_k_dense_replace", default=0) + len(config.get("mlp_only_layers") or ())
    hidden = size("hidden_size")
    shape = MoeShape(
        name=str((config.get("architectures") or [name])[0]),
        num_layers=max(1, layers - dense),
        num_experts=size("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=size("num_experts_per_tok", "num_experts_per_token"),
        hidden=hidden,
        width=size("moe_intermediate_size", "intermediate_size"),
    )
    if isinstance(config.get("kv_lora_rank"), int):
        per_layer = size("kv_lora_rank") + size("qk_rope_head_dim", default=64)
    else:
        heads = size("num_attention_heads")
        per_layer = 2 * size("num_key_value_heads", default=heads) * size("head_dim", default=hidden // heads)
    return ModelSizes(shape, 2.0 * per_layer * layers)


def choices(sizes: ModelSizes, cost: CostModel) -> list[Choice]:
    """Estimates for the fewest redundant experts that the ranks can share (often none), and one and two more per rank.

    Raises:
        AdviceError: the ranks cannot share the experts.
    """
    experts, ranks = sizes.shape.num_experts, cost.num_ranks
    if ranks < 2:
        raise AdviceError(f"{ranks} ranks; balancing needs 2 or more")
    layers = min(DRAWN_LAYERS, sizes.shape.num_layers)
    random = np.random.default_rng(0)
    load = np.round(1e5 * np.exp(SIGMA * random.normal(size=(layers, experts)))).astype(np.int64)
    least = -experts % ranks
    found: list[Choice] = []
    baseline = math.nan
    for redundant in (least, least + ranks, least + 2 * ranks):
        if redundant > experts * (ranks - 1):
            continue
        start = Placement.initial(layers, experts, ranks, redundant)
        made = plan(load, start, ranks, cost.num_nodes)
        scale = 1e3 * sizes.shape.num_layers / layers
        if not found:
            baseline = scale * float(cost.layer_seconds(start.slot_load(load)).sum())
        balanced = Placement(made.physical_to_logical, experts, ranks)
        ms = scale * float(cost.layer_seconds(balanced.slot_load(load)).sum())
        memory = (redundant / ranks) * cost.expert_bytes * sizes.shape.num_layers
        found.append(
            Choice(
                redundant,
                start.slots_per_rank,
                float(made.par_before.mean()),
                float(made.par_after.mean()),
                ms,
                1.0 - ms / baseline,
                memory,
                int(memory / sizes.kv_bytes),
            )
        )
    return found


def advised(found: list[Choice]) -> tuple[Choice | None, str]:
    """The advised choice, None for no balancing, and the reason in a sentence."""
    best: Choice | None = None
    for choice in found:
        if choice.saved >= WORTH + (best.saved if best is not None else 0.0):
            best = choice
    if best is None:
        return None, (
            "leave balancing off, or observe: at so few tokens a step waits for weights, and no placement saves 1 % of "
            "MoE time"
        )
    if best is found[0]:
        return best, f"balance with {best.redundant} redundant experts: more of them cost more than they save"
    return best, (
        f"balance with {best.redundant} redundant experts per layer; they take {best.memory / 2**30:.1f} GiB per rank, "
        f"{best.kv_tokens:,} tokens of KV cache"
    )
