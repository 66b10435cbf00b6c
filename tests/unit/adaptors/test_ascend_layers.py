# SPDX-License-Identifier: Apache-2.0
"""The adaptor's assumptions about both forms of vllm-ascend's MoE layers; vllm-ascend is not needed."""

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors import engine_adaptor
from vllm_ascend_eplb.adaptors.ascend import routing
from vllm_ascend_eplb.adaptors.errors import UnsupportedError
from vllm_ascend_eplb.routing.maps import DispatchMaps
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
