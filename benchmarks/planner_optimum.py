# SPDX-License-Identifier: Apache-2.0
"""Fewest possible moves, for instances that are small enough for a mixed-integer program (SciPy's HiGHS)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Optimum:
    """Receipts of the best placement found, and the lower bound that the solver proved."""

    moves: int
    bound: float
    slots: npt.NDArray[np.int32]


def fewest_moves(
    load: FloatArray,
    slots: npt.NDArray[np.integer],
    num_ranks: int,
    target: float,
    seconds: float,
    most: int | None = None,
) -> Optimum | None:
    """The placement with PAR at most ``target`` that is reached with fewest receipts; None if none was found in time.

    Args:
        load: [E] tokens per expert.
        slots: [P] the placement in force, no expert twice on a rank.
        num_ranks: R.
        target: PAR, loads split evenly over replicas.
        seconds: time limit of the solver.
        most: a number of receipts known to suffice.

    Variables: x[e, r], rank r holds e; y[e, c], e has c copies; z[e, r, c] = x[e, r] * y[e, c], continuous.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    num_experts, per_rank = len(load), len(slots) // num_ranks
    weight = load / load.sum() * num_ranks
    spare = len(slots) - num_experts
    copies = [min(num_ranks, spare + 1, max(2, 1 + int(np.ceil(w / 0.25)))) for w in weight]
    x0 = np.zeros((num_experts, num_ranks), dtype=bool)
    x0[slots, np.arange(len(slots)) // per_rank] = True

    x = np.arange(num_experts * num_ranks).reshape(num_experts, num_ranks)
    n = x.size
    y, z = [], []
    for e in range(num_experts):
        y.append(n + np.arange(copies[e]))
        n += copies[e]
    integer = n
    for e in range(num_experts):
        z.append(n + np.arange(num_ranks * copies[e]).reshape(num_ranks, copies[e]))
        n += num_ranks * copies[e]

    rows: list[tuple[list[int], list[float], float, float]] = []
    for e in range(num_experts):
        count = [float(c + 1) for c in range(copies[e])]
        rows.append((list(y[e]), [1.0] * copies[e], 1, 1))
        rows.append((list(x[e]) + list(y[e]), [1.0] * num_ranks + [-c for c in count], 0, 0))
        for r in range(num_ranks):
            rows.append(([*z[e][r], x[e, r]], [1.0] * copies[e] + [-1.0], 0, 0))
        for c in range(copies[e]):  # the copies counted are on that many ranks
            rows.append(([*z[e][:, c], y[e][c]], [1.0] * num_ranks + [-count[c]], 0, 0))
            for r in range(num_ranks):
                rows.append(([z[e][r, c], y[e][c]], [1.0, -1.0], -np.inf, 0))
    for r in range(num_ranks):
        rows.append((list(x[:, r]), [1.0] * num_experts, per_rank, per_rank))
        columns = [int(z[e][r, c]) for e in range(num_experts) for c in range(copies[e])]
        shares = [weight[e] / (c + 1) for e in range(num_experts) for c in range(copies[e])]
        rows.append((columns, shares, 0, target))
    cost = np.zeros(n)
    cost[x[~x0]] = 1.0
    if most is not None:
        rows.append((list(x[~x0]), [1.0] * int((~x0).sum()), 0, most))
    at = np.repeat(np.arange(len(rows)), [len(row[0]) for row in rows])
    matrix = coo_array(
        (np.concatenate([row[1] for row in rows]), (at, np.concatenate([row[0] for row in rows]))), shape=(len(rows), n)
    )
    integrality = np.zeros(n)
    integrality[:integer] = 1
    result = milp(
        cost,
        constraints=LinearConstraint(matrix.tocsr(), [row[2] for row in rows], [row[3] for row in rows]),
        bounds=Bounds(0, 1),
        integrality=integrality,
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    held = result.x[: x.size].reshape(num_experts, num_ranks) > 0.5
    after = np.concatenate([np.flatnonzero(held[:, r]) for r in range(num_ranks)]).astype(np.int32)
    return Optimum(round(result.fun), float(result.mip_dual_bound), after)


def least_peak(load: FloatArray, slots: npt.NDArray[np.integer], num_ranks: int) -> float:
    """The least load of the busiest rank that any dispatch shares allow for a placement [P] (linear program)."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    num_slots, num_experts = len(slots), len(load)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    held = np.flatnonzero(slots >= 0)
    equal = coo_array((np.ones(len(held)), (slots[held], held)), shape=(num_experts, num_slots + 1))
    upper = coo_array(
        (
            np.concatenate([np.ones(num_slots), -np.ones(num_ranks)]),
            (
                np.concatenate([rank, np.arange(num_ranks)]),
                np.concatenate([np.arange(num_slots), np.full(num_ranks, num_slots)]),
            ),
        ),
        shape=(num_ranks, num_slots + 1),
    )
    cost = np.zeros(num_slots + 1)
    cost[-1] = 1.0
    scale = load.sum() / num_ranks
    result = linprog(
        cost, A_ub=upper.tocsr(), b_ub=np.zeros(num_ranks), A_eq=equal.tocsr(), b_eq=load / scale, bounds=(0, None)
    )
    return float(result.fun * scale)
