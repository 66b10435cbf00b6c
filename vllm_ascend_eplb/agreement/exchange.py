# SPDX-License-Identifier: Apache-2.0
"""Exchanges that every rank waits for, at start-up and at reload only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class StartError(RuntimeError):
    """Ranks were started differently, and cannot be balanced together."""


def require_equal(group: Any, num_ranks: int, values: Mapping[str, object]) -> None:
    """Compares ``values`` over all ranks at start-up; blocks until all ranks take part.

    Args:
        group: a CPU process group of all ranks, or None for a single rank.
        num_ranks: ranks in it.
        values: by field name, everything that must be equal (version, settings, shape, placement); compared as text.

    Raises:
        StartError: a field differs; the message names the first such rank and field.
    """
    mine = {name: str(value) for name, value in values.items()}
    if group is None or num_ranks == 1:
        return
    # JSON, not torch's all_gather_object, which would unpickle data of other ranks.
    theirs = [json.loads(data) for data in exchange_bytes(group, num_ranks, json.dumps(mine).encode())]
    for rank, given in enumerate(theirs):
        for name in sorted({*theirs[0], *given}):
            first, value = theirs[0].get(name, "missing"), given.get(name, "missing")
            if first != value:
                raise StartError(
                    f"expert-parallel rank {rank} differs from rank 0 in {name}: {value} against {first}; "
                    "start all ranks with the same package version, model and settings"
                )


def exchange_bytes(group: Any, num_ranks: int, data: bytes) -> list[bytes]:
    """All ranks' ``data``, in rank order, over a CPU group; blocks. For start-up only."""
    if group is None or num_ranks == 1:
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
    group.allgather([sizes], [torch.tensor([len(data)], dtype=torch.int64)]).wait()
    longest = max(1, *(int(size) for size in sizes))
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    everything = [torch.zeros(longest, dtype=torch.uint8) for _ in range(num_ranks)]
    group.allgather([everything], [mine]).wait()
    return [part[: int(size)].numpy().tobytes() for part, size in zip(everything, sizes, strict=True)]
