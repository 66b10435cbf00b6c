# SPDX-License-Identifier: Apache-2.0
"""Loading by a placement: every slot gets its expert, whatever the order of the checkpoint, and what is left out shows.

The loader that is wrapped here stands for vLLM's: it takes a slot's id, and knows which slots are on this rank.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.vllm.loading import LayerSlots, LoadingError, load_by, placement_loaded
from vllm_ascend_eplb.values.placement import Placement

EXPERTS, RANKS, REDUNDANT = 8, 4, 4
PARTS = ("w1", "w2", "w3")
ROOT = Path(__file__).parents[3]


class Layer(torch.nn.Module):
    """Experts of one layer on one rank; the weight of expert e is the number e."""

    def __init__(self, rank: int, num_slots: int) -> None:
        super().__init__()
        self.per_rank = num_slots // RANKS
        self.first = rank * self.per_rank
        self.calls = 0
        for part in PARTS:
            weight = torch.nn.Parameter(torch.full((self.per_rank, 2, 2), -1.0), requires_grad=False)
            weight.weight_loader = self.weight_loader
            self.register_parameter(part, weight)
        self.register_parameter("constant", torch.nn.Parameter(torch.zeros(1)))  # nobody loads it

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        self.calls += 1
        local = expert_id - self.first
        if not 0 <= local < self.per_rank:
            return False if return_success else None
        param.data[local].copy_(loaded_weight)
        return True if return_success else None

    def held(self) -> list[int]:
        assert torch.equal(self.w1.data, self.w2.data)
        assert torch.equal(self.w1.data, self.w3.data)
        return [int(self.w1.data[slot, 0, 0]) for slot in range(self.per_rank)]


def model(rank: int, layers: int = 3) -> SimpleNamespace:
    slots = EXPERTS + REDUNDANT
    return SimpleNamespace(
        num_physical_experts=slots,
        moe_layers=[SimpleNamespace(routed_experts=Layer(rank, slots)) for _ in range(layers)],
    )


def checkpoint(moe: SimpleNamespace, parts: tuple[str, ...] = PARTS) -> None:
    """Loads as vLLM's models do: for each weight, slots that hold the expert in vLLM's own order until one takes it."""
    usual = [*range(EXPERTS), *range(REDUNDANT)]
    for layer in moe.moe_layers:
        for expert in reversed(range(EXPERTS)):
            for part in parts:
                param = getattr(layer.routed_experts, part)
                for slot in (s for s, e in enumerate(usual) if e == expert):
                    if param.weight_loader(param, torch.full((2, 2), float(expert)), f"{expert}.{part}.weight",
                                           shard_id=part, expert_id=slot, return_success=True):  # fmt: skip
                        break


def random_placement(seed: int, layers: int = 3) -> Placement:
    random = np.random.default_rng(seed)
    rows = [random.permutation([*range(EXPERTS), *random.integers(0, EXPERTS, REDUNDANT)]) for _ in range(layers)]
    return Placement(np.array(rows), EXPERTS, RANKS)


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_holds_the_expert_of_the_placement(seed: int) -> None:
    placement = random_placement(seed)  # some hold an expert twice on a rank
    for rank in range(RANKS):
        moe = model(rank)
        load_by(moe, placement)
        checkpoint(moe)
        assert placement_loaded(moe, rank) is placement
        own = placement.physical_to_logical.reshape(3, RANKS, -1)[:, rank]
        assert [layer.routed_experts.held() for layer in moe.moe_layers] == own.tolist()


def test_without_a_placement_nothing_changes() -> None:
    moe = model(1)
    checkpoint(moe)
    assert placement_loaded(moe, 1) is None
    assert [layer.routed_experts.held() for layer in moe.moe_layers] == [[3, 4, 5]] * 3


def test_expert_that_was_not_loaded_is_named() -> None:
    moe = model(2)
    load_by(moe, random_placement(0))
    with pytest.raises(LoadingError, match="layer 0, device 2, slot 0 got no weights"):
        placement_loaded(moe, 2)
    checkpoint(SimpleNamespace(moe_layers=[moe.moe_layers[0], moe.moe_layers[2]]))
    with pytest.raises(LoadingError, match="layer 1, device 2, slot 0 got no weights"):
        placement_loaded(moe, 2)


def test_a_part_that_is_missing_is_noticed() -> None:
    slots = LayerSlots([[0], [1]])
    layer = Layer(0, 8)
    load = slots.loader(layer.weight_loader)
    for expert in (0, 1):
        load(layer.w1, torch.zeros(2, 2), "w1.weight", "w1", expert)
    load(layer.w2, torch.zeros(2, 2), "w2.weight", "w2", 0)
    assert slots.missing(range(2)) == [1]


def test_a_tensor_of_all_experts_is_refused() -> None:
    moe = model(0)
    load_by(moe, random_placement(0))
    layer = moe.moe_layers[0].routed_experts
    with pytest.raises(LoadingError, match="has all experts in one tensor"):
        layer.w1.weight_loader(layer.w1, torch.zeros(EXPERTS, 2, 2), "w1.weight", "w1", 0, True)


def test_a_placement_for_another_model_is_refused() -> None:
    with pytest.raises(LoadingError, match="has 8 slots per layer, the model was built with 12"):
        load_by(model(0), Placement.initial(3, EXPERTS, RANKS))
    fused = model(0)
    fused.moe_layers[0].routed_experts.expert_map_manager = SimpleNamespace(num_fused_shared_experts=1)
    with pytest.raises(LoadingError, match="shared experts fused"):
        load_by(fused, random_placement(0))


RELOAD = """
import sys
import torch
from types import SimpleNamespace
from tests.unit.adaptors.test_vllm_loading import Layer, checkpoint, random_placement
from vllm_ascend_eplb.adaptors.vllm import loading
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader.reload import layerwise
import vllm.model_executor.models.interfaces as interfaces

class Model(torch.nn.Module):
    num_physical_experts, num_moe_layers, num_logical_experts = 12, 3, 8
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList([Layer(2, 12) for _ in range(3)])
        for layer in self.experts:
            del layer.constant
    @property
    def moe_layers(self):
        return [SimpleNamespace(routed_experts=layer) for layer in self.experts]

def build():
    model = Model()
    layerwise.record_metadata_for_reloading(model)  # as vLLM's own function does
    return model

def shown(model, placement):
    own = placement.physical_to_logical.reshape(3, 4, -1)[:, 2].tolist()
    return [layer.held() for layer in model.experts] == own

base_loader.initialize_model = build
interfaces.get_mixture_of_experts_model = lambda model: model
placement = random_placement(3)
with loading.loading_by(lambda layers, experts, config: placement):
    model = base_loader.initialize_model()
checkpoint(model)
first = shown(model, placement)
with loading.reloading(model, 2):
    layerwise.initialize_layerwise_reload(model)
    checkpoint(model)
    layerwise.finalize_layerwise_processing(model, None)
again = shown(model, placement)
try:
    with loading.reloading(model, 2):
        pass
    noticed = False
except loading.LoadingError:
    noticed = True
print("RESULT", base_loader.initialize_model is build, first, again, noticed)
"""


def test_new_weights_go_to_the_same_slots() -> None:
    """With vLLM's own reloading, which keeps the loaders that parameters had when the model was built."""
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "RESULT True True True True" in done.stdout, done.stderr[-3000:]
