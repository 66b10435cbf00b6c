# SPDX-License-Identifier: Apache-2.0
import numpy as np
import numpy.typing as npt

_Int32 = npt.NDArray[np.int32]
_Float = npt.NDArray[np.float64]

SEARCH_ROUNDING: float

def pack_balanced(weight: _Float, order: npt.NDArray[np.int64], packs: int) -> _Int32: ...
def replicate(weight: _Float, copies: int) -> tuple[_Int32, _Int32]: ...
def preserve_slots(slots: _Int32, old: _Int32, num_ranks: int) -> _Int32: ...
def draw_placement(seed: int, num_layers: int, num_experts: int, num_slots: int, num_ranks: int) -> _Int32: ...
def par(load: _Float, slots: _Int32, num_ranks: int) -> _Float: ...
def is_valid(slots: _Int32, num_experts: int, num_ranks: int) -> bool: ...
def dispatch_shares(load: _Float, slots: _Int32, num_ranks: int, tolerance: float) -> _Float: ...
def forecast(series: _Float, at_rest: npt.NDArray[np.bool_]) -> tuple[_Float, _Float]: ...
def pars_of_windows(series: _Float, slots: _Int32, num_ranks: int, speed: _Float) -> _Float: ...
def plan_incremental(
    load: _Float,
    slots: _Int32,
    variance: _Float,
    target: _Float,
    *,
    num_ranks: int,
    num_nodes: int,
    thorough: bool,
    rounds: int,
    seconds: float,
    seed: int,
    threads: int,
    max_moves: int,
    max_moves_per_rank: int,
    max_moves_between_nodes: int,
    far_cost: float,
    stay_near: bool,
    speed: _Float,
    series: _Float,
    pars: _Float,
) -> tuple[_Int32, _Int32, _Float, _Float] | tuple[_Int32, _Int32, _Float, _Float, _Float]: ...
