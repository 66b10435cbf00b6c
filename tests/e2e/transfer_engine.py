# SPDX-License-Identifier: Apache-2.0
"""A weight transfer engine that is a stand-in for a trainer: vLLM's own engines need NCCL or CUDA IPC. vLLM's worker,
its calls and their order are real.

The engine gives every slot the weights that the slot was loaded with, times a factor, in two parts. So weights are
right only if every expert is in the slot it was loaded into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import base, factory


@dataclass
class Init(base.WeightTransferInitInfo):
    pass


@dataclass
class Update(base.WeightTransferUpdateInfo):
    factor: float
    part: int


class Trainer(base.WeightTransferEngine[Init, Update]):
    init_info_cls, update_info_cls = Init, Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        experts = [module for module in self.model.modules() if hasattr(module, "w13_weight")]
        self._parts = [
            [(getattr(module, name), getattr(module, name).clone()) for module in experts]
            for name in ("w13_weight", "w2_weight")
        ]

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM then waits for an accelerator

    def receive_weights(self, update_info: Update) -> None:
        for parameter, loaded in self._parts[update_info.part]:
            torch.mul(loaded, update_info.factor, out=parameter.data)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


factory.WeightTransferEngineFactory.register_engine("trainer", Trainer)
