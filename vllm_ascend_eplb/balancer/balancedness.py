# SPDX-License-Identifier: Apache-2.0
"""BalancednessLog: a log line about the load of single forwards, at an interval, as vLLM's ``log_balancedness`` has it.

An asynchronous collective sums the counts of one forward over the ranks; EP rank 0 writes the line some steps later,
when the sum has arrived. All ranks know the steps at which the collective is posted, so no agreement is needed.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from ..agreement.channel import Bulk, ControlChannel
from ..load.recorder import LoadRecorder
from ..values.placement import Int64Array, Placement

logger = logging.getLogger("vllm.eplb")


class LoadStats(NamedTuple):
    """The load of one forward, summed over layers.

    Attributes:
        avg_tokens: tokens of an average rank.
        max_tokens: tokens of the busiest rank of each layer.
        balancedness: avg_tokens / max_tokens, 1.0 is perfect; 0.0 without tokens.
    """

    avg_tokens: float
    max_tokens: float
    balancedness: float


def load_stats(tokens: torch.Tensor, num_ranks: int) -> LoadStats:
    """The figures that vLLM logs about a forward, in float32 as vLLM computes them.

    Args:
        tokens: integers [L, P], tokens per slot over all ranks.
        num_ranks: ranks that share the slots evenly.
    """
    by_rank = tokens.reshape(tokens.shape[0], num_ranks, -1).sum(dim=-1).float()
    average, most = float(by_rank.mean(dim=1).sum()), float(by_rank.max(dim=1).values.sum())
    return LoadStats(average, most, average / most if most > 0 else 0.0)


class BalancednessLog:
    """Writes a line about every ``interval``-th forward.

    Args:
        name: name of the model.
        interval: steps between lines, at least 1.
        recorder, control: parts of the balancer; the recorder counts the logged tokens.
    """

    def __init__(self, name: str, interval: int, recorder: LoadRecorder, control: ControlChannel) -> None:
        self._name, self._interval = name, interval
        self._recorder, self._control = recorder, control
        self._watched = -1
        self._sums: list[tuple[int, int, Bulk[Int64Array | None]]] = []

    def before_step(self, step: int, due: int, placement: Placement) -> None:
        """Called before forward ``step`` on all ranks, before anything else changes the counts.

        Args:
            step: number of the next forward.
            due: steps until the next rearrangement may begin.
            placement: the placement in force since the last flush.
        """
        if self._watched >= 0:
            counts = self._recorder.counts.cpu().numpy().astype(np.int64)
            self._sums.append((self._watched, due, self._control.reduce_beside(counts)))
            self._watched = -1
        if step % self._interval == 0:
            self._recorder.flush(placement)
            self._watched = step
        while self._sums and self._sums[0][2].done():
            watched, then_due, total = self._sums.pop(0)
            self._write(watched, then_due, total.result())

    def _write(self, step: int, due: int, tokens: Int64Array | None) -> None:
        if tokens is None:
            return
        stats = load_stats(torch.from_numpy(tokens), self._control.num_ranks)
        logger.info(
            "EPLB step: %d for model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f, "
            "steps until the next rearrangement: %d",
            step,
            self._name,
            *stats,
            due,
        )
