# SPDX-License-Identifier: Apache-2.0
"""Methods that a test adds to the workers (``--worker-extension-cls``): to look, and to break something on purpose."""

from typing import Any

import torch


class Probe:
    def probe_freeze_weights(self) -> int:
        """The negative control: from now on commits switch the maps, and leave the weights where they are."""
        loader: Any = self.model_runner.eplb_updator.balancer._loader  # type: ignore[attr-defined]
        commit = loader.commit

        def commit_maps_only(number: int) -> None:
            slots = [tensor for layer in loader._slots for slot in layer for tensor in slot]
            kept = [tensor.clone() for tensor in slots]
            commit(number)
            with torch.no_grad():
                for tensor, before in zip(slots, kept, strict=True):
                    tensor.copy_(before)

        loader.commit = commit_maps_only
        return 1
