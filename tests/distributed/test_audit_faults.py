# SPDX-License-Identifier: Apache-2.0
"""Weights damaged in the slots of several processes: audits find the damage, and cycles repair it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from .fault_runs import Fault, run, run_all
from .model import Slots

pytestmark = pytest.mark.distributed


class AuditBusy(Fault):
    """No damage; audits alternate with cycles that move most experts."""

    settings: ClassVar[dict[str, Any]] = {"audit_interval": 8, "audit_action": "repair"}
    cycles = 8


def test_audit_of_intact_weights_finds_nothing() -> None:
    seen = run(AuditBusy)
    assert seen.stats.cycles_done >= 8
    assert seen.metrics["vllm_eplb_audits"] >= 4
    assert seen.metrics["vllm_eplb_audit_damaged_slots"] == 0
    assert seen.metrics["vllm_eplb_audit_mended_slots"] == 0
    assert seen.said("ERROR") == []


class Damage(Fault):
    """Three damages, at the steps in ``at``: a bit flips in a slot of rank 1 whose expert has a copy on rank 0; two
    slots of rank 0 without copies are swapped; a slot of rank 1 without a copy is damaged."""

    settings: ClassVar[dict[str, Any]] = {
        "policy": None,
        "target_par": 10.0,  # nothing to move: experts stay where they are
        "expert_heat_collection_interval": 30,
        "audit_interval": 25,
        "audit_action": "repair",
    }
    damages = True
    at = (60, 160, 260)
    most_steps = 360
    cycles = 10**6

    def before(self) -> None:
        layers = self.model.slots.stacked
        if self.ranks.rank == 1 and self.step == self.at[0]:  # its local slot 4 is slot 13, a copy of expert 1
            layers[2][0][4].view(-1).view(torch.int32)[100] ^= 1 << 9
        if self.ranks.rank == 0 and self.step == self.at[1]:  # experts 7 and 8
            for kind in layers[1]:
                kind[[7, 8]] = kind[[8, 7]]
        if self.ranks.rank == 1 and self.step == self.at[2]:  # the only copy of expert 10
            layers[0][2][1] += 1


class DamageInSync(Damage):
    """The same damages in mode sync, where a cycle takes one step, and so do an audit and a repair."""

    settings: ClassVar[dict[str, Any]] = {**Damage.settings, "mode": "sync"}
    most_steps = 230


def test_repair_takes_one_step_in_mode_sync() -> None:
    first, second = run_all(DamageInSync)
    assert second.wrong_at[0] == 60
    assert second.wrong_at[-1] < 60 + 2 * 25 + 2  # the audit under way may have summed the slot before
    assert first.wrong_at[0] == 160
    assert first.wrong_at[-1] < 160 + 2 * 25 + 2
    assert first.metrics["vllm_eplb_audit_mended_slots"] == 3


class DamageOnly(Damage):
    settings: ClassVar[dict[str, Any]] = {**Damage.settings, "audit_action": "report"}
    most_steps = 160


def test_flipped_bit_and_swapped_slots_are_repaired() -> None:
    first, second = run_all(Damage)
    flipped = [step for step in second.wrong_at if step < 260]
    swapped = [step for step in first.wrong_at if step < 260]
    assert flipped[0] == 60
    assert flipped[-1] < 60 + 2 * 25 + 25
    assert swapped[0] == 160
    assert swapped[-1] < 160 + 2 * 25 + 25
    assert second.wrong_at[-1] == 359  # this slot cannot be repaired, which the log says
    errors = first.said("ERROR", "EPLB audit at step")
    assert len(errors) == 3
    assert "1 of 54 slots do not hold the weights of their expert: layer 2, slot 13 (rank 1, expert 1)" in errors[0]
    assert "layer 1, slot 7 (rank 0, expert 7); layer 1, slot 8 (rank 0, expert 8); good copies" in errors[1]
    assert "layer 0, slot 10 (rank 1, expert 10); 0 get good copies, the others have none" in errors[2]
    assert [line.partition(" by step")[0] for line in first.said("WARNING", "EPLB audit")] == [
        "EPLB audit: 1 of 1 damaged slots were repaired",
        "EPLB audit: 2 of 2 damaged slots were repaired",
    ]
    assert first.metrics["vllm_eplb_audit_mended_slots"] == 3
    assert first.metrics["vllm_eplb_audit_damaged_slots"] == 1
    assert first.metrics['vllm_eplb_cycles{result="failed"}'] == 0


def test_audit_that_only_reports_changes_nothing() -> None:
    first, second = run_all(DamageOnly)
    assert second.wrong_at == list(range(60, 160))
    assert first.metrics["vllm_eplb_audit_damaged_slots"] == 1
    assert first.metrics["vllm_eplb_audit_mended_slots"] == 0
    assert len(first.said("ERROR", "EPLB audit at step")) == 1  # later audits do not repeat the line
    assert "answers may be wrong" in first.said("ERROR")[0]


class NewWeights(Fault):
    """All experts get other weights at step 41, in whatever phase the cycle is."""

    settings: ClassVar[dict[str, Any]] = {"audit_interval": 8, "audit_action": "repair"}
    damages = True
    cycles = 10

    def before(self) -> None:
        if self.step == 41:
            with self.updator.weights.loading():
                for live, new in zip(
                    self.model.slots.stacked, Slots(self.model.placement, self.ranks.rank).stacked, strict=True
                ):
                    for kind, value in zip(live, new, strict=True):
                        kind.copy_(value)
                    live[1] ^= 1


def test_audit_uses_the_checksums_of_reloaded_weights() -> None:
    first, second = run_all(NewWeights)
    assert first.wrong_at
    assert second.wrong_at  # the weights differ from those at the start
    assert first.metrics["vllm_eplb_audits"] >= 3
    assert first.metrics["vllm_eplb_audit_damaged_slots"] == 0
    assert first.said("ERROR") == []


class SendDamaged(Fault):
    """The only copies of experts are damaged, and every plan sends them to other slots."""

    settings: ClassVar[dict[str, Any]] = {"audit_interval": 1000, "max_failures": 3}
    damages = True
    cycles = 100

    def before(self) -> None:
        if self.ranks.rank == 1 and self.step == 0:
            for slot in range(self.model.slots.size):  # all slots of rank 1 in layer 0
                self.model.slots.stacked[0][1][slot] ^= 1


def test_damaged_weights_are_never_sent_on() -> None:
    first, second = run_all(SendDamaged)
    assert first.wrong_at == []
    assert first.phase == "OFF"
    assert first.results == ["failed"] * 3
    assert first.stats.failures == {"checksum": 3}
    assert "9 of 54 slots do not hold the weights of their expert" in first.said("ERROR", "EPLB audit")[0]
    assert second.wrong_at
