# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``plan``, checked and in one form: load, placement, topology, speeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import FloatArray, Int32Array, Placement
from .options import PlanInputError, check_integer

LARGEST_LOAD = 1e30
"""Largest load of an expert: sums of it still fit into float32, in which the default policy works as vLLM does."""


@dataclass(frozen=True)
class InForce:
    """A placement that was found valid: the fields of ``Placement`` that planning needs, without derived maps."""

    slots: Int32Array
    num_experts: int
    num_ranks: int

    @property
    def num_layers(self) -> int:
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slots.shape[1])


def as_array(values: Any) -> npt.NDArray[Any]:
    """``values`` as an array; torch tensors of any dtype, on any device, with or without gradients, and lists of them.

    Raises:
        ValueError, TypeError, RuntimeError: rows of different length, or no array at all.
    """
    if isinstance(values, (list, tuple)) and any(hasattr(entry, "detach") for entry in values):
        return np.stack([as_array(entry) for entry in values])
    if hasattr(values, "detach"):
        values = values.detach().cpu().resolve_neg()
        if str(values.dtype).startswith(("torch.bfloat16", "torch.float8")):  # which NumPy has not
            values = values.float()
    return np.asarray(values)


def checked_load(load: npt.ArrayLike) -> npt.NDArray[Any]:
    """The load as an array [T, L, E] of int64 or float64.

    Raises:
        PlanInputError: another shape or dtype, or entries that are negative, no numbers or above ``LARGEST_LOAD``.
    """
    try:
        array = as_array(load)
    except (ValueError, TypeError, RuntimeError) as error:  # whatever an object's own conversion raises
        raise PlanInputError(f"load is not an array: {error}") from None
    if array.dtype.kind not in "iuf":
        raise PlanInputError(f"load has dtype {array.dtype}; give integers or floats")
    if array.ndim not in (2, 3) or array.size == 0:
        raise PlanInputError(f"load has shape {array.shape}; give [layers, experts] or [windows, layers, experts]")
    if array.ndim == 2:
        array = array[None]
    if array.dtype != np.int64:
        with np.errstate(over="ignore"):  # a wider float may become infinity, which is refused below
            array = array.astype(np.float64)
    # NaN fails both; no int64 is above the largest load.
    if not (array.min() >= 0 and (array.dtype == np.int64 or array.max() <= LARGEST_LOAD)):
        bad = ~((array >= 0) & (array <= LARGEST_LOAD))
        window, layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise PlanInputError(
            f"the load of expert {expert} in layer {layer}, window {window} is {array[window, layer, expert]}; "
            f"allowed are finite numbers from 0 to {LARGEST_LOAD:g}"
        )
    return array


def total_of(series: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum [L, E] of the windows [T, L, E], in float64 where int64 might not hold it."""
    if series.dtype == np.int64 and float(series.max()) * len(series) < 2.0**62:
        return np.asarray(series.sum(axis=0))
    return np.asarray(series[0] if len(series) == 1 else series.sum(axis=0, dtype=np.float64))


def checked_placement(
    physical_to_logical: npt.ArrayLike | Placement, num_layers: int, num_experts: int, num_ranks: int
) -> InForce:
    """The placement in force, for a load of ``num_layers`` x ``num_experts``.

    Raises:
        PlanInputError: the value is not an array, or has another shape than the load.
        PlacementError: the value is not a valid placement.
    """
    check_integer("num_ranks", num_ranks)
    if isinstance(physical_to_logical, Placement):
        placement = physical_to_logical
        if placement.num_ranks != num_ranks:
            raise PlanInputError(f"num_ranks is {num_ranks}, but the placement is for {placement.num_ranks} ranks")
    else:
        try:
            array = as_array(physical_to_logical)
        except (ValueError, TypeError, RuntimeError) as error:
            raise PlanInputError(f"physical_to_logical is not an array: {error}") from None
        if array.dtype == np.int32 and array.ndim == 2 and len(array) == num_layers and 0 < num_ranks < 2**31:
            slots = np.ascontiguousarray(array)
            if _planner.is_valid(slots, num_experts, int(num_ranks)):
                return InForce(slots, num_experts, int(num_ranks))
        placement = Placement(array, num_experts, int(num_ranks))  # raises with the reason
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise PlanInputError(
            f"load is for {num_layers} layers of {num_experts} experts, "
            f"the placement for {placement.num_layers} layers of {placement.num_experts}"
        )
    return InForce(placement.physical_to_logical, num_experts, int(num_ranks))


def check_topology(placement: InForce, num_nodes: int, num_groups: int) -> None:
    """Raises PlanInputError unless nodes share the ranks evenly, and groups the experts."""
    for name, value, number, what in (
        ("num_nodes", num_nodes, placement.num_ranks, "ranks"),
        ("num_groups", num_groups, placement.num_experts, "experts"),
    ):
        check_integer(name, value)
        if value < 1 or number % value:
            raise PlanInputError(f"{name} is {value}; it must divide the {number} {what}")


def checked_speed(rank_speed: npt.ArrayLike | None, num_ranks: int, policy: str) -> FloatArray:
    """The speeds with a mean of 1; empty where all ranks are alike.

    Raises:
        PlanInputError: not one positive number for each rank, too far apart, or a policy that takes none.
    """
    if rank_speed is None:
        return np.zeros(0)
    try:
        given = as_array(rank_speed)
        speed = given.astype(np.float64) if given.dtype.kind in "iuf" else np.zeros(0)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PlanInputError(f"rank_speed is not an array: {error}") from None
    if speed.shape != (num_ranks,) or not (np.isfinite(speed).all() and speed.min() > 0):
        raise PlanInputError(f"rank_speed is {rank_speed!r}; give one number > 0 for each of {num_ranks} ranks")
    if speed.max() > 1000 * speed.min():
        raise PlanInputError(f"rank_speed is {speed.min():g}..{speed.max():g}; ranks may differ by a factor of 1000")
    if policy != "incremental":
        raise PlanInputError(f"the policy {policy!r} knows no rank_speed; use 'incremental', or leave rank_speed out")
    return np.zeros(0) if speed.min() == speed.max() else speed / speed.max() / (speed / speed.max()).mean()
