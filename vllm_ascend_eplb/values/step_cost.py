# SPDX-License-Identifier: Apache-2.0
"""StepCost: what one MoE layer takes in a step, by tokens per rank and peak-to-average ratio (PAR).

Tokens are not time. With few tokens a rank's time is that of reading the weights of its slots, however its tokens are
spread; with many tokens it follows the busiest rank's. The turning point differs by machine, model and kernel. So the
time is measured on a grid, and interpolated between the points of that grid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

Origin = Literal["measured", "modelled", "proportional"]
"""Where the times come from: ``measured`` where the model is served, ``modelled`` by a model of the machine, or
``proportional``: nothing is known, and time is proportional to the tokens of the busiest rank, without a unit."""

KIND, VERSION = "vllm-ascend-eplb step cost", 1

MOST_POINTS = 4096
"""Most points of a grid: a file is read whole."""


class StepCostError(ValueError):
    """Times, or a file of times, that cannot be used."""


@dataclass(frozen=True, eq=False)
class StepCost:
    """Milliseconds of one MoE layer, of its slowest rank, measured on a grid.

    Times are interpolated linearly between the points. Beyond the largest number of tokens they grow in proportion to
    the tokens. Beyond the largest PAR the time is that of the same tokens on the busiest rank at the largest PAR. Below
    the smallest values, and beyond the most slots, times are constant. Times never fall with more tokens, PAR or slots:
    where measurements do, a point becomes the mean of the largest below it and the least above it.

    Args:
        tokens: [N] tokens that each rank brings into the step, rising, > 0.
        pars: [M] PARs, rising, from 1.
        slots: [K] slots of a rank in a layer that get tokens, rising, >= 1.
        milliseconds: [N, M, K], finite and > 0.
        noise: relative difference of two measurements of the same thing; smaller savings cannot be told from zero.
        origin: where the times come from.
        subject: what was measured, in words: model, ranks, device. A file with another subject is not used.

    Raises:
        StepCostError: an argument is out of range; names it.
    """

    tokens: FloatArray
    pars: FloatArray
    slots: FloatArray
    milliseconds: FloatArray
    noise: float = 0.01
    origin: Origin = "measured"
    subject: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 0.0), ("pars", 1.0), ("slots", 1.0)):
            axis = array_of(name, getattr(self, name))
            if axis.ndim != 1 or not len(axis) or (np.diff(axis) <= 0).any() or axis[0] < least or axis[0] <= 0:
                raise StepCostError(f"{name} is {axis.tolist()}; allowed are rising numbers from {least:g} up")
            object.__setattr__(self, name, axis)
        if self.pars[0] != 1.0:
            raise StepCostError(f"pars begin at {self.pars[0]:g}; the first must be 1, perfect balance")
        grid = array_of("milliseconds", self.milliseconds)
        shape = (len(self.tokens), len(self.pars), len(self.slots))
        if grid.shape != shape or grid.size > MOST_POINTS or (grid <= 0).any():
            raise StepCostError(
                f"milliseconds has shape {grid.shape}; allowed are {shape} numbers > 0, at most {MOST_POINTS} of them"
            )
        if not isinstance(self.noise, (int, float)) or not 0.0 <= self.noise <= 1.0:
            raise StepCostError(f"noise is {self.noise!r}; allowed are fractions from 0 to 1")
        if self.origin not in get_args(Origin):
            raise StepCostError(f"origin is {self.origin!r}; allowed are {', '.join(get_args(Origin))}")
        largest_below, least_above = grid, np.flip(grid)
        for axis_number in range(3):
            largest_below = np.maximum.accumulate(largest_below, axis=axis_number)
            least_above = np.minimum.accumulate(least_above, axis=axis_number)
        grid = 0.5 * (largest_below + np.flip(least_above))
        grid.setflags(write=False)
        object.__setattr__(self, "milliseconds", grid)

    @classmethod
    def proportional(cls) -> StepCost:
        """Time proportional to the tokens of the busiest rank, without a unit: assumed where nothing is known."""
        ends = np.array([1.0, 2.0])
        return cls(ends, ends, np.ones(1), np.multiply.outer(ends, ends)[..., None], 0.0, "proportional")

    @property
    def in_milliseconds(self) -> bool:
        """Whether times have a unit, and can be compared with the times of transfers."""
        return self.origin != "proportional"

    def layer_ms(self, tokens: npt.ArrayLike, par: npt.ArrayLike, slots: float) -> FloatArray:
        """float64 [...]: milliseconds of a layer; ``tokens`` per rank and ``par`` broadcast against each other."""
        many, peak = np.broadcast_arrays(np.asarray(tokens, dtype=np.float64), np.asarray(par, dtype=np.float64))
        beyond = np.maximum(peak / self.pars[-1], 1.0)
        many = many * beyond
        growth = np.maximum(many / self.tokens[-1], 1.0)
        i, t = _place(self.tokens, many)
        j, u = _place(self.pars, peak)
        k, v = _place(self.slots, np.asarray(slots, dtype=np.float64))
        grid = self.milliseconds
        total = np.zeros(many.shape)
        for a, weight_a in ((i, 1.0 - t), (np.minimum(i + 1, len(self.tokens) - 1), t)):
            for b, weight_b in ((j, 1.0 - u), (np.minimum(j + 1, len(self.pars) - 1), u)):
                for c, weight_c in ((k, 1.0 - v), (np.minimum(k + 1, len(self.slots) - 1), v)):
                    total += weight_a * weight_b * weight_c * grid[a, b, c]
        return np.asarray(total * growth)

    def best_of(self, again: StepCost) -> StepCost:
        """Of two measurements of the same thing the shorter time at every point: what made a run longer was somebody
        else's. The one measured ``again`` alone where the points differ."""
        axes = ("tokens", "pars", "slots")
        if self.subject != again.subject or any(
            not np.array_equal(getattr(self, axis), getattr(again, axis)) for axis in axes
        ):
            return again
        shorter = np.minimum(self.milliseconds, again.milliseconds)
        return replace(again, milliseconds=shorter, noise=min(self.noise, again.noise))

    def to_dict(self) -> dict[str, Any]:
        """The value in JSON's types."""
        return {
            "kind": KIND,
            "version": VERSION,
            "subject": self.subject,
            "origin": self.origin,
            "noise": self.noise,
            "tokens": self.tokens.tolist(),
            "pars": self.pars.tolist(),
            "slots": self.slots.tolist(),
            "milliseconds": self.milliseconds.tolist(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, value: object) -> StepCost:
        """Reads what :meth:`to_dict` gave.

        Raises:
            StepCostError: it is something else, or of another version.
        """
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise StepCostError(f"not a step cost: expected a JSON object whose kind is {KIND!r}")
        if value.get("version") != VERSION:
            raise StepCostError(
                f"a step cost of version {value.get('version')!r}; this package reads version {VERSION}: measure again"
            )
        names = {"tokens", "pars", "slots", "milliseconds", "noise", "origin", "subject"}
        missing = names - value.keys()
        if missing or not isinstance(value["subject"], str):
            raise StepCostError(
                f"not a step cost: {', '.join(sorted(missing)) or 'subject'} is missing or of a wrong type"
            )
        return cls(**{name: value[name] for name in names})

    @classmethod
    def from_json(cls, text: str | bytes) -> StepCost:
        """Reads what :meth:`to_json` wrote.

        Raises:
            StepCostError: the text is something else, or of another version.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StepCostError(f"not a step cost: {error}") from None
        return cls.from_dict(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepCost) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())


def array_of(name: str, value: Any) -> FloatArray:
    """A read-only copy in float64.

    Raises:
        StepCostError: the value is not an array of finite numbers.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise StepCostError(f"{name} is not an array of numbers") from None
    if not np.isfinite(array).all():
        raise StepCostError(f"{name} has entries that are not finite")
    array.setflags(write=False)
    return array


def _place(axis: FloatArray, value: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """The point of ``axis`` at or below each value, and the part of the way to the next; ends are not passed."""
    if len(axis) == 1:
        return np.zeros(value.shape, dtype=np.intp), np.zeros(value.shape)
    inside = np.clip(value, axis[0], axis[-1])
    at = np.clip(np.searchsorted(axis, inside, side="right") - 1, 0, len(axis) - 2)
    return at, (inside - axis[at]) / (axis[at + 1] - axis[at])
