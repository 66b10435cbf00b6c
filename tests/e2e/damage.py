# SPDX-License-Identifier: Apache-2.0
"""Faults in a running server, on request: damage a weight, kill the planner in a phase, or let a transfer fail. Every
process loads this module as it starts, so it imports little."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

REQUESTS = "EPLB_TEST_REQUESTS"
"""Variable with the folder of the requests: files that are removed when the fault is made."""

DAMAGE = "damage a weight"
"""Expert-parallel rank 1 damages one weight."""

NO_MEMORY = "no memory for a round"
"""Expert-parallel rank 1 runs out of memory while it prepares a round, before the round is sent."""

NO_ISSUE = "a round that is not issued"
"""Expert-parallel rank 1 throws while it issues a round; the other rank waits for the bytes."""


def kill_in(phase: str) -> str:
    """The request to kill the planner at the next step that begins in ``phase``."""
    return f"kill the planner in {phase}"


def damage_on_request() -> None:
    """Call this as a process starts. On request, the first weight of an expert with another copy grows by half, the
    planner is killed, or a round of transfers throws."""
    from vllm_ascend_eplb.adaptors.post_import import after_import

    requests = Path(os.environ[REQUESTS])

    def patch(module: Any) -> None:
        before = module.EplbUpdator.forward_before

        def watched_before(self: Any, **names: Any) -> None:
            phase = self.state.phase.name
            if self.parts.rank == 1 and phase == "COLLECT" and taken(requests / DAMAGE):
                layer, slot = replicated(self.placement)
                weight = self.parts.adaptor.expert_tensors()[layer][slot][0]
                weight[(0,) * weight.dim()] *= 1.5
            planner = self.parts.planner.pid if self.parts.planner is not None else None
            if planner is not None and taken(requests / kill_in(phase)):
                os.kill(planner, signal.SIGKILL)
            before(self, **names)

        module.EplbUpdator.forward_before = watched_before

    def throw(module: Any, name: str, request: Path, error: Exception) -> None:
        before = getattr(module.D2DExpertWeightLoader, name)

        def perhaps(self: Any, *args: Any) -> None:
            if self.rank == 1 and taken(request):
                raise error
            before(self, *args)

        setattr(module.D2DExpertWeightLoader, name, perhaps)

    def patch_transfers(module: Any) -> None:
        throw(module, "prepare", requests / NO_MEMORY, MemoryError("planted before the gate"))
        throw(module, "_issue_part", requests / NO_ISSUE, RuntimeError("planted behind the gate"))

    after_import("vllm_ascend_eplb.balancer.updator", patch)
    after_import("vllm_ascend_eplb.transfer.loader", patch_transfers)


def taken(request: Path) -> bool:
    """Take a request; True if there was one."""
    try:
        request.unlink()
    except FileNotFoundError:
        return False
    return True


def replicated(placement: Any) -> tuple[int, int]:
    """(layer, local slot on rank 1) of an expert that has another copy."""
    size = placement.slots_per_rank
    return next(
        (layer, slot)
        for layer, row in enumerate(placement.physical_to_logical.tolist())
        for slot in range(size)
        if row.count(row[size + slot]) > 1
    )
