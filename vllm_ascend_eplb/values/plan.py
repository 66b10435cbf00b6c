# SPDX-License-Identifier: Apache-2.0
"""Plan: an ordered list of moves that leads from the placement in force to a better one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .placement import FloatArray, Int32Array, Placement

LAYER, SLOT, EXPERT, GROUP = range(4)
"""Columns of ``Plan.moves``, and the first ones of ``Round.moves``."""


class PlanError(ValueError):
    """A plan that must not be carried out."""


@dataclass(frozen=True)
class Plan:
    """The answer of a policy: moves from the placement in force, in order.

    Attributes:
        physical_to_logical: int32 [L, P], the placement after all moves.
        moves: int32 [M, 4], rows (layer, slot, expert, group) in order: copy ``expert`` of ``layer`` into ``slot``.
            Moves of a group are adjacent and take place together; after every whole group the placement is valid.
        par_before: float64 [L], predicted PAR of the placement in force.
        par_after: float64 [L], predicted PAR after all moves.
        policy: name of the policy that made it.
        p95_before, p95_after: float64 [L], the 95th percentile of the PARs in the windows that the plan was made from,
            in force and after all moves; None for a plan made from a single window.
        seconds: wall time that planning took.
    """

    physical_to_logical: Int32Array
    moves: Int32Array
    par_before: FloatArray
    par_after: FloatArray
    policy: str = ""
    seconds: float = field(default=0.0, compare=False)
    p95_before: FloatArray | None = None
    p95_after: FloatArray | None = None

    @property
    def num_moves(self) -> int:
        return len(self.moves)

    def check(self, start: Placement) -> None:
        """Checks that the moves lead from ``start`` to ``physical_to_logical`` and that every group leaves a valid
        placement.

        Raises:
            PlanError: they do not; the message names the first offending row, or expert and layer.
        """
        moves = self.moves
        if moves.ndim != 2 or moves.shape[1] != 4:
            raise PlanError(f"moves have shape {moves.shape}; expected [M, 4]")
        shape = (start.num_layers, start.num_slots)
        if self.physical_to_logical.shape != shape:
            raise PlanError(
                f"the plan is for a placement of shape {self.physical_to_logical.shape}; in force is {shape}"
            )
        for name, column, limit in (
            ("layer", LAYER, start.num_layers),
            ("slot", SLOT, start.num_slots),
            ("expert", EXPERT, start.num_experts),
        ):
            bad = (moves[:, column] < 0) | (moves[:, column] >= limit)
            if bad.any():
                row = int(np.argmax(bad))
                raise PlanError(f"move {row} names {name} {moves[row, column]}; allowed are 0..{limit - 1}")
        if np.any(np.diff(moves[:, GROUP]) < 0):
            raise PlanError("moves are not ordered by group")
        slots = start.physical_to_logical.copy()
        copies = start.replica_count.copy()
        group_ends: list[int] | npt.NDArray[np.intp] = (
            np.flatnonzero(np.diff(moves[:, GROUP], append=moves[-1, GROUP] + 1)) if len(moves) else []
        )
        first = 0
        for last in group_ends:
            group = moves[first : last + 1]
            layers, places, experts = group[:, LAYER], group[:, SLOT], group[:, EXPERT]
            if len({(int(a), int(b)) for a, b in zip(layers, places, strict=True)}) != len(group):
                raise PlanError(f"group {group[0, GROUP]} writes one slot twice")
            dropped = slots[layers, places]
            held = dropped >= 0
            np.subtract.at(copies, (layers[held], dropped[held]), 1)
            np.add.at(copies, (layers, experts), 1)
            slots[layers, places] = experts
            lost = copies[layers[held], dropped[held]] < 1
            if lost.any():
                at = int(np.argmax(lost))
                raise PlanError(
                    f"group {group[0, GROUP]} drops the last copy of expert {dropped[held][at]} "
                    f"in layer {layers[held][at]}"
                )
            first = int(last) + 1
        if not np.array_equal(slots, self.physical_to_logical):
            layer, slot = (int(i) for i in np.argwhere(slots != self.physical_to_logical)[0])
            raise PlanError(f"the moves do not lead to the plan's placement: layer {layer}, slot {slot} differs")

    @classmethod
    def between(cls, start: Placement, target: npt.NDArray[np.integer], load: npt.ArrayLike, policy: str = "") -> Plan:
        """The plan that changes every slot in which ``target`` [L, P] differs, one group per layer."""
        after = Placement(target, start.num_experts, start.num_ranks)
        layers, slots = np.nonzero(start.physical_to_logical != after.physical_to_logical)
        experts = after.physical_to_logical[layers, slots]
        groups = np.unique(layers, return_inverse=True)[1] if len(layers) else layers
        moves = np.stack([layers, slots, experts, groups], axis=1).astype(np.int32)
        return cls(after.physical_to_logical, moves, start.par(load), after.par(load), policy)
