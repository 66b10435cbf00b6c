# SPDX-License-Identifier: Apache-2.0
"""The adaptor's assumptions about both forms of vllm-ascend's MoE layers; vllm-ascend is not needed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors import engine_adaptor
from vllm_ascend_eplb.adaptors.ascend import routing
from vllm_ascend_eplb.adaptors.ascend.adaptor import placement_loaded
from vllm_ascend_eplb.adaptors.ascend.worker import Orders
from vllm_ascend_eplb.adaptors.errors import UnsupportedError
from vllm_ascend_eplb.adaptors.handed_over import HandedOver
from vllm_ascend_eplb.adaptors.vllm.loading import LoadingError, LoadOrder, load_by
from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.messages import EplbConfigError
from vllm_ascend_eplb.values.placement import Placement


class Until030(torch.nn.Module):
    """The form of 0.23: the layer hands its table to dispatchers."""

    def __init__(self) -> None:
        super().__init__()
        self.log2phy = torch.arange(4)


class Since030(torch.nn.Module):
    """The form since 0.30: the layer maps experts itself, and its tensors are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log2phy", torch.arange(4))
        self.ascend_expert_map = torch.tensor([0, 1, -1, -1])
        self.global_redundant_expert_num = 2


PLACEMENT = Placement(np.array([[0, 1, 2, 3, 0, 1]], dtype=np.int32), 4, 2)
LOCAL_SLOTS = torch.tensor([0, 1, 2, -1, -1, -1], dtype=torch.int32)


@pytest.fixture
def table() -> routing.SlotTable:
    return routing.SlotTable(DispatchMaps(PLACEMENT, torch.device("cpu"), width=3), 0, LOCAL_SLOTS, 0)


@pytest.mark.parametrize("form", [Until030, Since030])
def test_layer_routes_by_our_table(form: type, table: routing.SlotTable) -> None:
    layer = form()
    routing.route_by(layer, table)
    slots = layer.log2phy[torch.tensor([[0, 2], [0, 2], [1, 3]])]
    assert set(slots[:2, 0].tolist()) == {0, 4}  # both copies
    assert slots[:, 1].tolist() == [2, 2, 3]
    assert int(slots[2, 0]) in (1, 5)
    assert "log2phy" not in layer.state_dict()


def test_dispatchers_look_slots_up_by_slot(table: routing.SlotTable) -> None:
    layer = Since030()
    assert routing.maps_itself(layer)
    assert not routing.maps_itself(Until030())
    routing.route_by(layer, table)
    assert torch.equal(layer.ascend_expert_map, LOCAL_SLOTS)
    assert len(layer.ascend_expert_map) + layer.global_redundant_expert_num == PLACEMENT.num_slots


def test_vllms_order_is_all_experts_then_copies() -> None:
    assert Placement.initial(1, 4, 2, 2) == PLACEMENT
    assert Placement.initial(1, 4, 2).physical_to_logical.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("differing", "load_format", "ends"), [(3, "auto", True), (0, "auto", False), (3, "dummy", False)]
)
def test_empty_slots_end_the_start(differing: int, load_format: str, ends: bool) -> None:
    if not ends:
        engine_adaptor.require_loaded_copies(differing, load_format)
        return
    with pytest.raises(UnsupportedError, match=r"copies of 3 experts differ .* set num_redundant_experts to 0"):
        engine_adaptor.require_loaded_copies(differing, load_format)


def placement_of_layers(layers: int, shift: int = 0) -> Placement:
    """Every layer another placement of 4 experts in 6 slots on 2 ranks."""
    rows = [(np.arange(6) + number + shift) % 4 for number in range(layers)]
    return Placement(np.array(rows, dtype=np.int32), 4, 2)


def orders(monkeypatch: pytest.MonkeyPatch, path: Path | None, redundant: int, drafts: bool) -> Orders:
    """The orders of a worker of two ranks, with a stand-in for vLLM's groups."""
    groups: Any = SimpleNamespace(get_ep_group=lambda: SimpleNamespace(world_size=2))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", groups)
    speculative = None
    if drafts:
        draft = SimpleNamespace(get_num_experts=lambda: 4)
        speculative = SimpleNamespace(draft_model_config=draft, target_model_config=object())
    config = EplbConfig(dynamic_eplb=True, expert_map_path=None if path is None else str(path))
    handed = HandedOver({"num_redundant_experts": redundant}, config)
    return Orders(SimpleNamespace(additional_config={"eplb_config": handed}, speculative_config=speculative))


def test_copies_are_loaded_where_vllm_knows_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a map, for the model and for a draft model; without redundant experts, vLLM's loader is left alone."""
    order = orders(monkeypatch, None, 2, drafts=True)
    for layers in (3, 1):
        assert order(layers, 4, None) == LoadOrder(Placement.initial(layers, 4, 2, 2), by_map=False)
    assert orders(monkeypatch, None, 0, drafts=False)(3, 4, None) is None


@pytest.mark.parametrize("in_map", [3, 4])
def test_draft_model_is_loaded_by_layers_behind_the_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_map: int
) -> None:
    """A map of the model alone leaves the draft model in vLLM's order."""
    path, placement = tmp_path / "map.json", placement_of_layers(in_map)
    write_expert_map(path, placement)
    order = orders(monkeypatch, path, 2, drafts=True)
    model, draft = order(3, 4, None), order(1, 4, None)
    assert model is not None
    assert draft is not None
    assert model.by_map
    np.testing.assert_array_equal(model.placement.physical_to_logical, placement.physical_to_logical[:3])
    assert draft.by_map == (in_map == 4)
    usual = Placement.initial(1, 4, 2, 2).physical_to_logical
    np.testing.assert_array_equal(
        draft.placement.physical_to_logical, placement.physical_to_logical[3:] if in_map == 4 else usual
    )


@pytest.mark.parametrize(("in_map", "drafts"), [(2, False), (2, True), (4, False), (5, True)])
def test_map_of_other_layers_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_map: int, drafts: bool
) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, placement_of_layers(in_map))
    order = orders(monkeypatch, path, 2, drafts)
    with pytest.raises(EplbConfigError, match=rf"has {in_map} MoE layers, the model has [34]"):
        order(3, 4, None), order(1, 4, None)


class Experts(torch.nn.Module):
    """A layer of rank 1 whose loader notes nothing and accepts local slots."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.zeros(3, 2, 2), requires_grad=False)
        self.w1.weight_loader = lambda param, weight, name, shard, slot, success: 3 <= slot < 6
        self.moe_config = SimpleNamespace(num_experts=6)


def loaded(order: LoadOrder | None, fill: bool = True) -> Experts:
    layer = Experts()
    if order is not None:
        load_by(SimpleNamespace(num_physical_experts=4, moe_layers=[layer], modules=list), order)
        for expert in range(4 if fill else 3):
            layer.w1.weight_loader(layer.w1, torch.zeros(2, 2), "w1", "w1", expert)
    return layer


def placement_found(layers: list[Experts], maps: Placement) -> Placement:
    return placement_loaded(layers, maps, "Model", 1, by_map=True)


def test_placement_is_that_of_each_layers_loading() -> None:
    """A model loaded by a map, and a draft model that vLLM loaded in vLLM's order."""
    given = placement_of_layers(1, shift=3)
    layers = [loaded(LoadOrder(given, by_map=True)), loaded(None)]
    maps = Placement.initial(2, 4, 2, 2)
    found = placement_found(layers, maps).physical_to_logical.tolist()
    assert found == [given.physical_to_logical[0].tolist(), [0, 1, 2, 3, 0, 1]]
    with pytest.raises(UnsupportedError, match="loaded in vLLM's order, and the layers' maps say otherwise"):
        placement_found(layers, placement_of_layers(2))
    with pytest.raises(UnsupportedError, match=r"Model were not loaded by eplb_config\.expert_map_path"):
        placement_found([loaded(None)], Placement.initial(1, 4, 2, 2))
    layers[1] = loaded(LoadOrder(placement_of_layers(1), by_map=True), fill=False)
    with pytest.raises(LoadingError, match=r"Model cannot be loaded by .*: layer 1, device 1, slot 0 got no weights"):
        placement_found(layers, maps)
