# SPDX-License-Identifier: Apache-2.0
"""Dispatch shares and tables: which part of an expert's tokens each of its replicas takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..placement import EMPTY, FloatArray, Placement


def dispatch_shares(load: npt.ArrayLike, physical_to_logical: npt.ArrayLike | Placement, num_ranks: int) -> FloatArray:
    """The share of its expert's tokens that each slot should take so that the busiest rank has least to do.

    Args:
        load: [L, E] tokens per logical expert, finite and not negative.
        physical_to_logical: int [L, P], the placement in force.
        num_ranks: ranks that share the slots evenly, R.

    Returns:
        float64 [L, P]; the shares of an expert's slots sum to 1, an empty slot has 0.
    """
    load = np.asarray(load, dtype=np.float64)
    placement = (
        physical_to_logical
        if isinstance(physical_to_logical, Placement)
        else Placement(physical_to_logical, load.shape[-1], num_ranks)
    )
    slots = placement.physical_to_logical
    inverse = np.pad(1.0 / placement.replica_count, ((0, 0), (0, 1)))
    return np.take_along_axis(inverse, slots.astype(np.int64), axis=1)


def dispatch_tables(
    shares: npt.ArrayLike, physical_to_logical: npt.ArrayLike, num_experts: int, entries: int = 32
) -> npt.NDArray[np.int64]:
    """int64 [L, E, K]: the slots that take the k-th, (k+K)-th, ... token of each expert, realising ``shares`` within 1/K.

    Args:
        shares: float [L, P] from ``dispatch_shares``.
        physical_to_logical: int [L, P], the placement that the shares belong to.
        num_experts: logical experts, E.
        entries: table width K.
    """
    slots = np.asarray(physical_to_logical)
    weight = np.asarray(shares, dtype=np.float64)
    num_layers = len(slots)
    table = np.zeros((num_layers, num_experts, entries), dtype=np.int64)
    for layer in range(num_layers):
        for expert in range(num_experts):
            at = np.flatnonzero(slots[layer] == expert)
            given = np.zeros(len(at))
            part = weight[layer, at]
            for k in range(entries):
                chosen = int(np.argmax(part * (k + 1) - given))
                given[chosen] += 1
                table[layer, expert, k] = at[chosen]
    assert slots.min() >= EMPTY
    return table
