# SPDX-License-Identifier: Apache-2.0
"""How many rows MoE layers compute, from the batches that probe.py has seen, and whether all are counted."""

from __future__ import annotations

from typing import Any

import numpy as np

from .serving import MAX_SEQUENCES


def rows_computed(
    windows: list[list[list[list[int]]]],
    ranks: int = 1,
    gathered: bool = True,
    fused: bool = False,
    shared_out: bool = False,
) -> np.ndarray:
    """int [T]: the rows that a MoE layer computed in every window.

    Args:
        windows: by window and step, the tokens of every data-parallel engine with and without padding (probe.py).
        ranks: ranks of an engine.
        gathered: True if engines gather their batches, padded to the longest (A2). Otherwise (A3) every rank sends its
            part and masks the padding; if a batch is too large for MC2, All2All gives every rank at least one row.
        fused: True if fused MC2 takes batches of any size.
        shared_out: True if the ranks of an engine share its rows out in equal parts (sequence parallelism). Then they
            gather, or send by All2All, these parts: no engine pads its batch to the longest.
    """

    def rows(step: list[list[int]]) -> int:
        filled, sent = step
        if not gathered and (fused or max(filled) <= MAX_SEQUENCES):
            return sum(sent)
        if shared_out:
            return sum(-(-tokens // ranks) * ranks for tokens in filled)
        if gathered:
            return max(filled) * len(filled)
        return sum(max(tokens, ranks) for tokens in filled)

    return np.array([sum(map(rows, window)) for window in windows])


def assert_rows_counted(
    records: dict[str, Any], ranks: int, gathered: bool, fused: bool, shared_out: bool = False
) -> np.ndarray:
    """Assert that in every window the load of every layer is that of all computed rows, with 4 experts each. Returns
    the loads, int [T, L, E].

    Args:
        records: of a rank, by probe_watched.
        ranks, gathered, fused, shared_out: as for :func:`rows_computed`.
    """
    loads = np.array(records["loads"])
    assert len(loads) >= 10
    computed = rows_computed(records["batches"][: len(loads)], ranks, gathered, fused, shared_out)
    assert computed.min() > 0
    np.testing.assert_array_equal(loads.sum(axis=2), computed[:, None].repeat(loads.shape[1], axis=1) * 4)
    return loads
