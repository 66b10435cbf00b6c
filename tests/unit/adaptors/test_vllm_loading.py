# SPDX-License-Identifier: Apache-2.0
"""Loading by a placement: every slot gets the expert of the placement, in any order of the checkpoint, and an expert
that was not loaded is named.

The wrapped loader is a stand-in for vLLM's: it takes a slot's id and knows which slots are on this rank.
One file, because all ways of loading are tested with the same layers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.vllm.loading import LayerSlots, LoadingError, LoadOrder, load_by, placement_loaded
from vllm_ascend_eplb.adaptors.vllm.worker import LoadOrders
from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.settings.config import EplbConfigError
from vllm_ascend_eplb.values.placement import Placement

EXPERTS, RANKS, REDUNDANT = 8, 4, 4
PARTS = ("w1", "w2", "w3")
ROOT = Path(__file__).parents[3]


class Layer(torch.nn.Module):
    """The experts of a layer on one rank; all weights of expert e are the number e."""

    def __init__(self, rank: int, num_slots: int) -> None:
        super().__init__()
        self.per_rank = num_slots // RANKS
        self.first = rank * self.per_rank
        self.calls = 0
        for part in PARTS:
            weight = torch.nn.Parameter(torch.full((self.per_rank, 2, 2), -1.0), requires_grad=False)
            weight.weight_loader = self.weight_loader
            self.register_parameter(part, weight)
        self.register_parameter("constant", torch.nn.Parameter(torch.zeros(1)))  # never loaded

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
        modules=list,
    )


def checkpoint(moe: SimpleNamespace, parts: tuple[str, ...] = PARTS) -> None:
    """Load as vLLM's models do: for every weight, try the expert's slots in vLLM's own order until one accepts it."""
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
    placement = random_placement(seed)  # some have two copies of an expert on a rank
    for rank in range(RANKS):
        moe = model(rank)
        load_by(moe, LoadOrder(placement, by_map=True))
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
    load_by(moe, LoadOrder(random_placement(0), by_map=True))
    with pytest.raises(LoadingError, match="layer 0, device 2, slot 0 got no weights"):
        placement_loaded(moe, 2)
    checkpoint(SimpleNamespace(moe_layers=[moe.moe_layers[0], moe.moe_layers[2]]))
    with pytest.raises(LoadingError, match="layer 1, device 2, slot 0 got no weights"):
        placement_loaded(moe, 2)


def test_missing_part_of_an_expert_is_found() -> None:
    slots = LayerSlots([[0], [1]])
    layer = Layer(0, 8)
    load = slots.loader(layer.weight_loader)
    for expert in (0, 1):
        load(layer.w1, torch.zeros(2, 2), "w1.weight", "w1", expert)
    load(layer.w2, torch.zeros(2, 2), "w2.weight", "w2", 0)
    assert slots.missing(range(2)) == [1]


def test_tensor_of_all_experts_is_refused() -> None:
    moe = model(0)
    load_by(moe, LoadOrder(random_placement(0), by_map=True))
    layer = moe.moe_layers[0].routed_experts
    with pytest.raises(LoadingError, match="has all experts in one tensor"):
        layer.w1.weight_loader(layer.w1, torch.zeros(EXPERTS, 2, 2), "w1.weight", "w1", 0, True)


def fused_checkpoint(moe: SimpleNamespace) -> None:
    """Load as vLLM does from one tensor of all experts of a layer: every logical expert once, and no copies."""
    for layer in moe.moe_layers:
        for part in PARTS:
            param = getattr(layer.routed_experts, part)
            for expert in range(EXPERTS):
                param.weight_loader(param, torch.full((2, 2), float(expert)), part, part, expert, True)


@pytest.mark.parametrize("rank", range(RANKS))
def test_copies_are_filled_from_tensors_of_all_experts(rank: int) -> None:
    """Negative control: without a LoadOrder the slots of copies are not filled."""
    placement = Placement.initial(3, EXPERTS, RANKS, REDUNDANT)
    own = placement.physical_to_logical.reshape(3, RANKS, -1)[:, rank].tolist()
    moe, left_alone = model(rank), model(rank)
    load_by(moe, LoadOrder(placement, by_map=False))
    fused_checkpoint(moe)
    fused_checkpoint(left_alone)
    assert [layer.routed_experts.held() for layer in moe.moe_layers] == own
    empty = [layer.routed_experts.held() for layer in left_alone.moe_layers]
    assert (empty == own) == all(slot < EXPERTS for slot in range(3 * rank, 3 * rank + 3))


def test_models_that_cannot_follow_are_left_alone() -> None:
    """Without a map vLLM loads these models, and the copies are compared afterwards."""

    class SomeMegaMoEExperts(Layer):
        pass

    order = LoadOrder(Placement.initial(3, EXPERTS, RANKS, REDUNDANT), by_map=False)
    shared, mega, narrow = model(0), model(0), model(0)
    shared.moe_layers[0].routed_experts.expert_map_manager = SimpleNamespace(num_fused_shared_experts=1)
    mega.moe_layers[0].routed_experts = SomeMegaMoEExperts(0, EXPERTS + REDUNDANT)
    narrow.num_physical_experts = 16
    for moe in (shared, mega, narrow):
        load_by(moe, order)
        assert placement_loaded(moe, 0) is None
    with pytest.raises(LoadingError, match="SomeMegaMoEExperts loads experts by itself"):
        load_by(mega, LoadOrder(order.placement, by_map=True))


def test_weights_in_other_forms_are_no_error() -> None:
    """Without a map, vLLM's own loader handles files of slots, random weights and whole tensors."""
    moe = model(1)
    order = LoadOrder(Placement.initial(3, EXPERTS, RANKS, REDUNDANT), by_map=False)
    layer, taken = moe.moe_layers[0].routed_experts, []
    layer.w1.weight_loader = lambda *args: taken.append(args)
    load_by(moe, order)
    assert placement_loaded(moe, 1) is order.placement
    whole = (layer.w1, torch.full((3, 2, 2), 7.0), "w1.weight", "w1", 3)
    layer.w1.weight_loader(*whole)
    assert taken == [(*whole, False)]


def test_tensors_of_llama_4_are_split_by_expert() -> None:
    """Llama-4's loader gets names without an expert's number, and transposed weights."""
    calls: list[str] = []

    class Llama(torch.nn.Module):
        def load_moe_expert_weights(self, name, weight, params, loaded, mapping, fused=True):
            calls.append(name)
            return False

    inner, moe, rank = Llama(), model(3), 3
    moe.modules = lambda: [inner]
    placement = random_placement(5)
    load_by(moe, LoadOrder(placement, by_map=True))
    mapping = [
        ("experts.w13_", "experts.0.gate_up_proj.", 0, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
        ("experts.w13_", "experts.0.gate_up_proj.", 0, "w3"),
    ]
    numbers = torch.arange(EXPERTS, dtype=torch.float32)[:, None, None]
    columns = torch.cat([torch.zeros(2), torch.full((2,), 0.5)])  # gate, then up
    for number, layer in enumerate(moe.moe_layers):
        seen: dict[str, list[torch.Tensor]] = {"w1": [], "w2": [], "w3": []}
        experts = layer.routed_experts

        def w13(param, weight, name, shard_id, expert_id, experts=experts, seen=seen):
            seen[shard_id].append(weight)
            getattr(experts, shard_id).weight_loader(getattr(experts, shard_id), weight, name, shard_id, expert_id)

        params = {
            f"{number}.experts.w13_weight": SimpleNamespace(weight_loader=w13),
            f"{number}.experts.w2_weight": SimpleNamespace(weight_loader=w13),
        }
        loaded: set[str] = set()
        gate_up = (numbers + columns).expand(EXPERTS, 2, 4)
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", numbers.expand(EXPERTS, 2, 2))):
            assert inner.load_moe_expert_weights(f"{number}.experts.{name}", weight, params, loaded, mapping)
        assert loaded == set(params)
        assert all(len(weights) == EXPERTS for weights in seen.values())
        own = placement.physical_to_logical.reshape(3, RANKS, -1)[number, rank]
        assert [int(experts.w1.data[slot, 0, 0]) for slot in range(3)] == own.tolist()
        assert torch.equal(experts.w3.data, experts.w1.data + 0.5)
        assert torch.equal(experts.w2.data, experts.w1.data)
    assert calls == []
    assert not inner.load_moe_expert_weights("0.router.weight", torch.zeros(2, 2), {}, set(), mapping)
    assert calls == ["0.router.weight"]


def test_slots_are_those_of_layers_not_of_the_model() -> None:
    """vllm-ascend's first model runner makes room for copies that the model does not know of."""
    moe, placement = model(1), random_placement(3)
    moe.num_physical_experts = EXPERTS
    for layer in moe.moe_layers:
        layer.routed_experts.moe_config = SimpleNamespace(num_experts=EXPERTS + REDUNDANT)
    load_by(moe, LoadOrder(placement, by_map=True))
    checkpoint(moe)
    for number, layer in enumerate(moe.moe_layers):
        per_rank = placement.slots_per_rank
        assert layer.routed_experts.held() == placement.physical_to_logical[number, per_rank : 2 * per_rank].tolist()


def test_a_placement_for_another_model_is_refused() -> None:
    with pytest.raises(LoadingError, match="has 8 slots per layer, the model was built with 12"):
        load_by(model(0), LoadOrder(Placement.initial(3, EXPERTS, RANKS), by_map=True))
    fused = model(0)
    fused.moe_layers[0].routed_experts.expert_map_manager = SimpleNamespace(num_fused_shared_experts=1)
    with pytest.raises(LoadingError, match="shared experts fused"):
        load_by(fused, LoadOrder(random_placement(0), by_map=True))


def stand_in_groups(monkeypatch, stage: int = 0, num_stages: int = 1) -> None:
    """Stand-ins for vLLM's groups of a worker in a pipeline stage."""
    stages = SimpleNamespace(world_size=num_stages, rank_in_group=stage, cpu_group=None)
    groups = SimpleNamespace(get_ep_group=lambda: SimpleNamespace(world_size=RANKS), get_pp_group=lambda: stages)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", groups)


def load_orders(settings: dict, model: object, redundant: int, speculative: object = None) -> LoadOrders:
    vllm_config = SimpleNamespace(
        additional_config={"eplb_config": {"dynamic_eplb": True, **settings}},
        speculative_config=speculative,
        model_config=model,
        parallel_config=SimpleNamespace(eplb_config=SimpleNamespace(num_redundant_experts=redundant)),
    )
    return LoadOrders(vllm_config)


def order_of(monkeypatch, settings: dict, redundant: int, stage: int, counts: list[int]) -> LoadOrder | None:
    """The LoadOrder of a worker in a pipeline stage, with stand-ins for vLLM's groups."""
    stand_in_groups(monkeypatch, stage, len(counts))

    def add_up(mine: torch.Tensor, group: object) -> None:
        assert mine.tolist() == [layers if number == stage else 0 for number, layers in enumerate(counts)]
        mine.copy_(torch.tensor(counts))

    monkeypatch.setattr(torch.distributed, "all_reduce", add_up)
    model = object()
    return load_orders(settings, model, redundant)(counts[stage], EXPERTS, model)


def test_order_without_a_map_is_that_of_vllm(monkeypatch) -> None:
    assert order_of(monkeypatch, {}, 0, 0, [3]) is None
    order = order_of(monkeypatch, {}, REDUNDANT, 0, [3])
    assert order is not None
    assert order == (Placement.initial(3, EXPERTS, RANKS, REDUNDANT), False)


@pytest.mark.parametrize("counts", [[5], [2, 3], [1, 1, 3]])
def test_every_stage_takes_its_own_layers_of_a_map(monkeypatch, tmp_path, counts) -> None:
    placement = random_placement(9, layers=5)
    write_expert_map(tmp_path / "map.json", placement)
    rows = []
    for stage, layers in enumerate(counts):
        order = order_of(monkeypatch, {"expert_map_path": str(tmp_path / "map.json")}, REDUNDANT, stage, counts)
        assert order is not None
        assert order.by_map
        assert order.placement.num_layers == layers
        rows.append(order.placement.physical_to_logical)
    np.testing.assert_array_equal(np.concatenate(rows), placement.physical_to_logical)
    with pytest.raises(EplbConfigError, match="has 5 MoE layers, the model has 6"):
        order_of(monkeypatch, {"expert_map_path": str(tmp_path / "map.json")}, REDUNDANT, 0, [counts[0], 6 - counts[0]])


DRAFT_LAYERS = 2


def orders_of_two(monkeypatch, path, placement: Placement) -> list[LoadOrder | None]:
    """The orders of a model of three layers, and of a draft model, from a map with this placement."""
    write_expert_map(path, placement)
    stand_in_groups(monkeypatch)
    model, draft = object(), SimpleNamespace(get_num_experts=lambda: EXPERTS)
    speculative = SimpleNamespace(draft_model_config=draft, target_model_config=model)
    orders = load_orders({"expert_map_path": str(path)}, model, REDUNDANT, speculative)
    return [orders(3, EXPERTS, model), orders(DRAFT_LAYERS, EXPERTS, draft)]


def test_layers_of_a_draft_model_come_after_the_models(monkeypatch, tmp_path) -> None:
    placement = random_placement(11, layers=3 + DRAFT_LAYERS)
    orders = orders_of_two(monkeypatch, tmp_path / "map.json", placement)
    assert [order.by_map for order in orders] == [True, True]
    rows = np.concatenate([order.placement.physical_to_logical for order in orders])
    np.testing.assert_array_equal(rows, placement.physical_to_logical)


def test_draft_model_beside_a_map_of_the_model_alone(monkeypatch, tmp_path) -> None:
    placement = random_placement(12, layers=3)
    orders = orders_of_two(monkeypatch, tmp_path / "map.json", placement)
    assert orders[0] == (placement, True)
    assert orders[1] == (Placement.initial(DRAFT_LAYERS, EXPERTS, RANKS, REDUNDANT), False)


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_map_of_other_models_is_refused(monkeypatch, tmp_path, layers) -> None:
    with pytest.raises(EplbConfigError, match=rf"has {layers} layers; use a map with those of the model \(3\)"):
        orders_of_two(monkeypatch, tmp_path / "map.json", random_placement(13, layers=layers))
