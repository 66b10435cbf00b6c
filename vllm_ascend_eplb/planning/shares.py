# SPDX-License-Identifier: Apache-2.0
"""Dispatch shares: the part of an expert's tokens that each of its replicas takes.

New shares need no transfer, only new tables, so they can follow the load between two placements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import EMPTY, FloatArray, Placement, PlacementError

TOLERANCE = 1e-3
"""How far the busiest rank may be above the optimum of the linear program, relative to it."""


class ShareError(ValueError):
    """Shares that cannot be turned into a table."""


def dispatch_shares(
    load: npt.ArrayLike, physical_to_logical: npt.ArrayLike | Placement, num_ranks: int, tolerance: float = TOLERANCE
) -> FloatArray:
    """The share of its expert's tokens that each slot should take, so that the busiest rank has the least load.

    Solves the linear program "minimise the busiest rank's load" for a fixed placement by block coordinate descent
    (water-filling one replicated expert after the other). A lower bound from a cut proves the optimum.

    Args:
        load: [L, E] tokens per logical expert, finite and not negative.
        physical_to_logical: int [L, P], the placement in force; -1 marks an empty slot.
        num_ranks: ranks that share the slots evenly, R.
        tolerance: how far the busiest rank may be above the optimum, relative to it.

    Returns:
        float64 [L, P]; the shares of an expert's slots sum to 1, an empty slot has 0.

    Raises:
        PlacementError: ``physical_to_logical`` is not a valid placement, or ``load`` does not belong to it.
        ValueError: ``load`` has entries that are negative or not finite.
    """
    loads = np.ascontiguousarray(load, dtype=np.float64)
    if loads.ndim != 2:
        raise PlacementError(f"load has shape {loads.shape}; expected [layers, experts]")
    slots = (
        physical_to_logical.physical_to_logical if isinstance(physical_to_logical, Placement) else physical_to_logical
    )
    if isinstance(slots, np.ndarray) and slots.dtype == np.int32 and slots.ndim == 2 and len(slots) == len(loads):
        try:
            return _planner.dispatch_shares(loads, slots, num_ranks, tolerance)
        except ValueError:
            pass  # Placement below raises a clearer message
    placement = Placement(slots, loads.shape[1], num_ranks)
    if placement.num_layers != len(loads):
        raise PlacementError(f"load is for {len(loads)} layers, the placement for {placement.num_layers}")
    return _planner.dispatch_shares(loads, placement.physical_to_logical, num_ranks, tolerance)


def entry_counts(placement: Placement, shares: npt.ArrayLike, entries: int) -> npt.NDArray[np.int64]:
    """How many of the K entries of its expert's table row each slot gets: shares to within one entry.

    Largest remainder; ties go to the lower slot.

    Args:
        placement: [L, P].
        shares: float [L, P], finite and not negative; per layer and expert they sum to more than 0, not necessarily 1.
        entries: K.

    Returns:
        int64 [L, P]; the counts of an expert's slots sum to K, an empty slot has 0.

    Raises:
        ShareError: shapes differ, or shares are negative, not finite, or 0 for all replicas of an expert.
    """
    slots, experts = placement.physical_to_logical, placement.num_experts
    given = np.asarray(shares, dtype=np.float64)
    if given.shape != slots.shape:
        raise ShareError(f"shares have shape {given.shape}, the placement {slots.shape}")
    if not np.isfinite(given).all() or (given < 0).any():
        raise ShareError("shares must be finite and not negative")
    layers, places = np.nonzero(slots != EMPTY)
    row = layers * experts + slots[layers, places]
    wanted = given[layers, places]
    totals = np.bincount(row, wanted, minlength=len(slots) * experts)
    if (totals <= 0).any():
        layer, expert = divmod(int(np.argmax(totals <= 0)), experts)
        raise ShareError(
            f"layer {layer}: the shares of expert {expert} are all 0; one of its replicas must take tokens"
        )
    exact = wanted / totals[row] * entries
    counts = np.floor(exact).astype(np.int64)
    missing = entries - np.bincount(row, counts, minlength=len(totals)).astype(np.int64)
    by_remainder = np.lexsort((places, counts - exact, row))  # within a row: largest remainder first
    ordered = row[by_remainder]
    rank_in_row = np.arange(len(row)) - np.searchsorted(ordered, ordered)
    counts[by_remainder] += rank_in_row < missing[ordered]
    result = np.zeros(slots.shape, dtype=np.int64)
    result[layers, places] = counts
    return result


def shared_slot_load(
    load: npt.ArrayLike, physical_to_logical: npt.ArrayLike | Placement, shares: npt.ArrayLike
) -> FloatArray:
    """float64 [L, P]: tokens per slot when slots take ``shares`` [L, P] of their expert's ``load`` [L, E]."""
    loads = np.asarray(load, dtype=np.float64)
    given = (
        physical_to_logical.physical_to_logical if isinstance(physical_to_logical, Placement) else physical_to_logical
    )
    slots = np.asarray(given, dtype=np.int64)
    by_slot = np.take_along_axis(loads, np.maximum(slots, 0), axis=1) * np.asarray(shares) * (slots != EMPTY)
    return np.asarray(by_slot)


def shared_rank_load(
    load: npt.ArrayLike, physical_to_logical: npt.ArrayLike | Placement, shares: npt.ArrayLike, num_ranks: int
) -> FloatArray:
    """float64 [L, R]: tokens per rank when slots take ``shares`` [L, P] of their expert's ``load`` [L, E]."""
    by_slot = shared_slot_load(load, physical_to_logical, shares)
    return np.asarray(by_slot.reshape(len(by_slot), num_ranks, -1).sum(axis=2))
