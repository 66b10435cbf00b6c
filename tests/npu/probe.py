# SPDX-License-Identifier: Apache-2.0
"""Methods that a test adds to the workers (``--worker-extension-cls``): to look, and to break something on purpose."""

import hashlib
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

    def probe_replays(self) -> int:
        """How often this rank has replayed a captured graph since this was first asked."""
        graph: Any = torch.npu.NPUGraph  # type: ignore[attr-defined]
        if not hasattr(graph, "replays"):
            graph.replays, replay = 0, graph.replay

            def counted(self: Any) -> None:
                graph.replays += 1
                replay(self)

            graph.replay = counted
        return int(graph.replays)

    def probe_experts(self) -> dict[str, list[str]]:
        """What the slots of this rank hold: for each expert ("layer expert") a digest of the tensors of each copy."""
        balancer: Any = self.model_runner.eplb_updator.balancer  # type: ignore[attr-defined]
        placement, found = balancer.placement, {}
        first = balancer._rank * placement.slots_per_rank
        for layer, slots in enumerate(balancer._adaptor.expert_tensors()):
            for slot, tensors in enumerate(slots):
                digest = hashlib.sha256()
                for tensor in tensors:
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                expert = placement.physical_to_logical[layer, first + slot]
                found.setdefault(f"{layer} {expert}", []).append(digest.hexdigest())
        return found
