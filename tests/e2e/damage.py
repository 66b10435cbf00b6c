# SPDX-License-Identifier: Apache-2.0
"""Damages weights of a running server on request. It is loaded as each process starts, so it imports little."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

DAMAGE = "EPLB_TEST_DAMAGE"
"""Names the file that, once it is there, has expert-parallel rank 1 damage one weight, and remove the file."""


def damage_on_request() -> None:
    """In every process, as it starts: the first weight of an expert that has another copy grows by half."""
    from vllm_ascend_eplb.post_import import after_import

    request = Path(os.environ[DAMAGE])

    def patch(module: Any) -> None:
        before = module.EplbUpdator.forward_before

        def watched_before(self: Any, **names: Any) -> None:
            if self._rank == 1 and self.state.phase.name == "COLLECT" and request.exists():
                request.unlink()
                layer, slot = replicated(self.placement)
                weight = self._adaptor.expert_tensors()[layer][slot][0]
                weight[(0,) * weight.dim()] *= 1.5
            before(self, **names)

        module.EplbUpdator.forward_before = watched_before

    after_import("vllm_ascend_eplb.updator", patch)


def replicated(placement: Any) -> tuple[int, int]:
    """Layer and local slot on rank 1 of an expert that has another copy."""
    size = placement.slots_per_rank
    return next(
        (layer, slot)
        for layer, row in enumerate(placement.physical_to_logical.tolist())
        for slot in range(size)
        if row.count(row[size + slot]) > 1
    )
