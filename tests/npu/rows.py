# SPDX-License-Identifier: Apache-2.0
"""How many rows MoE layers compute, from the batches that probe.py has seen."""

from __future__ import annotations

import numpy as np

from .serving import MAX_SEQUENCES


def rows_computed(
    windows: list[list[list[list[int]]]], ranks: int = 1, gathered: bool = True, fused: bool = False
) -> np.ndarray:
    """int [T]: the rows that a MoE layer computed in every window.

    Args:
        windows: by window and step, the tokens of every data-parallel engine with and without padding (probe.py).
        ranks: ranks of an engine.
        gathered: True if engines gather their batches, padded to the longest (A2). Otherwise (A3) every rank sends its
            part and masks the padding; if a batch is too large for MC2, All2All gives every rank at least one row.
        fused: True if fused MC2 takes batches of any size.
    """

    def rows(step: list[list[int]]) -> int:
        filled, sent = step
        if gathered:
            return max(filled) * len(filled)
        if max(filled) > MAX_SEQUENCES and not fused:
            return sum(max(tokens, ranks) for tokens in filled)
        return sum(sent)

    return np.array([sum(map(rows, window)) for window in windows])
