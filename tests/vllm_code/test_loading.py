# SPDX-License-Identifier: Apache-2.0
"""vLLM's own loaders and its reload, with a placement: every slot gets the expert of the placement."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.models.interfaces as interfaces
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.llama4 import Llama4Model

from tests.unit.adaptors.test_vllm_loading import EXPERTS, RANKS, Layer, checkpoint, random_placement
from vllm_ascend_eplb.adaptors.vllm import loading
from vllm_ascend_eplb.adaptors.vllm.loading import LoadingError, LoadOrder, load_by, placement_loaded
from vllm_ascend_eplb.values.placement import Placement

RANK = 2


class Model(torch.nn.Module):
    """The layers of one rank, in a model that vLLM can reload."""

    num_physical_experts, num_moe_layers, num_logical_experts = 12, 3, EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([Layer(RANK, self.num_physical_experts) for _ in range(3)])
        for layer in self.experts:
            del layer.constant

    @property
    def moe_layers(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(routed_experts=layer) for layer in self.experts]


def test_new_weights_go_to_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own reload keeps the loaders that the parameters had when the model was built."""

    def build() -> Model:
        model = Model()
        layerwise.record_metadata_for_reloading(model)  # as vLLM's own function does
        return model

    def assert_loaded() -> None:
        own = placement.physical_to_logical.reshape(3, RANKS, -1)[:, RANK].tolist()
        assert [layer.held() for layer in model.experts] == own

    monkeypatch.setattr(base_loader, "initialize_model", build)
    monkeypatch.setattr(interfaces, "get_mixture_of_experts_model", lambda model: model)
    placement = random_placement(3)
    with loading.loading_by(lambda layers, experts, config: LoadOrder(placement, by_map=True)):
        model = base_loader.initialize_model()
    assert base_loader.initialize_model is build
    checkpoint(model)
    assert_loaded()
    with loading.reloading(model, RANK):
        layerwise.initialize_layerwise_reload(model)
        checkpoint(model)
        layerwise.finalize_layerwise_processing(model, None)
    assert_loaded()
    with pytest.raises(LoadingError), loading.reloading(model, RANK):
        pass


class Experts(torch.nn.Module):
    """The slots of a rank; gate and up are one parameter, as vLLM has them."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first = 3 * rank
        self.layer_name, self.quant_config, self.is_fused_checkpoint_transposed = "0.experts", None, False
        self.moe_config = SimpleNamespace(is_act_and_mul=True)
        for name, rows in (("w13_weight", 2), ("w2_weight", 1)):
            weight = torch.nn.Parameter(torch.full((3, rows, 4), -1.0), requires_grad=False)
            weight.weight_loader = self.weight_loader
            self.register_parameter(name, weight)

    def weight_loader(
        self, param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
        return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        slot = expert_id - self.first
        if not 0 <= slot < 3:
            return False if return_success else None
        param.data[slot, {"w1": 0, "w2": 0, "w3": 1}[shard_id]].copy_(loaded_weight[0])
        return True if return_success else None

    _orient_fused_weight = staticmethod(vars(RoutedExperts)["_orient_fused_weight"].__func__)

    def get_expert_mapping(self, include_fused: bool = False) -> Any:
        return RoutedExperts.build_expert_params_mapping(
            "gate_proj", "down_proj", "up_proj", EXPERTS, 4, routed_experts_prefix="", include_fused=include_fused
        )


class Llama(torch.nn.Module):
    load_moe_expert_weights = Llama4Model.load_moe_expert_weights


NUMBERS = torch.arange(EXPERTS, dtype=torch.float32)[:, None, None]
GATE, UP, DOWN = 0.0, 0.25, 0.5


def checkpoint_of_all_experts() -> Iterator[tuple[str, torch.Tensor]]:
    number = NUMBERS.expand(-1, 1, 4)
    yield "gate_up_proj", torch.cat([number + GATE, number + UP], dim=1)
    yield "down_proj", number + DOWN


def load_most(layer: Experts, llama: Llama) -> None:
    del llama
    assert set(RoutedExperts.load_weights(layer, checkpoint_of_all_experts())) == {"w13_weight", "w2_weight"}


def load_llama_4(layer: Experts, llama: Llama) -> None:
    mapping = RoutedExperts.build_expert_params_mapping("gate_up_proj", "down_proj", "gate_up_proj", 1)
    params = {f"0.experts.routed_experts.{name}": getattr(layer, name) for name in ("w13_weight", "w2_weight")}
    for name, weight in checkpoint_of_all_experts():
        transposed = weight.transpose(-1, -2).contiguous()
        assert llama.load_moe_expert_weights(f"0.experts.{name}", transposed, params, set(), mapping, fused=True)


@pytest.mark.parametrize("load", [load_most, load_llama_4])
@pytest.mark.parametrize("rank", range(RANKS))
def test_loaders_of_vllm_fill_copies_from_one_tensor(rank: int, load: Any) -> None:
    """vLLM's real loaders, for most models and for Llama-4, load into stand-ins for a rank's slots."""
    placement = Placement(random_placement(4).physical_to_logical[:1], EXPERTS, RANKS)
    layer, llama = Experts(rank), Llama()
    moe = SimpleNamespace(
        num_physical_experts=12,
        moe_layers=[SimpleNamespace(routed_experts=layer)],
        modules=lambda: [llama] if load is load_llama_4 else [],
    )
    load_by(moe, LoadOrder(placement, by_map=True))
    load(layer, llama)
    assert placement_loaded(moe, rank) is placement
    own = torch.from_numpy(placement.physical_to_logical.reshape(RANKS, -1)[rank].copy()).float()
    assert torch.equal(layer.w13_weight[:, 0, 0], own + GATE)
    assert torch.equal(layer.w13_weight[:, 1, 0], own + UP)
    assert torch.equal(layer.w2_weight[:, 0, 0], own + DOWN)
