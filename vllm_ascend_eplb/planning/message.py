# SPDX-License-Identifier: Apache-2.0
"""A plan as it travels from EP rank 0 to all ranks, once all have agreed on its length and its digest.

The message is little-endian: three int64 (the cycle's number, moves, bytes of the last part), the placement that it
leads to (int32 [L, P]), its rounds (int32 [N, 7]) and, where tokens are split by planned shares, the entries of each
slot in the dispatch tables (uint8 [L, P]).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ..values.placement import Placement
from ..values.rounds import Round, rounds_from_array
from .request import Dispatch

HEAD_BYTES = 24


ROW_BYTES = 28


def digest_of(message: bytes) -> int:
    """A hash that fits the agreed facts; never 0, which stands for no plan."""
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 2 or 1


def most_plan_bytes(placement: Placement) -> int:
    """Bytes of a plan with two moves for each slot. A longer plan gets a buffer of its own."""
    return HEAD_BYTES + placement.num_layers * placement.num_slots * (4 + 2 * ROW_BYTES + 1)


def pack_plan(
    number: int, target: npt.NDArray[np.int32], rounds: npt.NDArray[np.int32], dispatch: Dispatch | None = None
) -> bytes:
    """The message of the plan of cycle ``number``.

    Args:
        number: the cycle.
        target: [L, P], the placement that the plan leads to.
        rounds: [N, 7], see :func:`~vllm_ascend_eplb.values.rounds.rounds_to_array`.
        dispatch: shares for the target; None where tokens are split evenly.
    """
    counts = b"" if dispatch is None else dispatch.counts.tobytes()
    head = np.array([number, len(rounds), len(counts)], dtype="<i8").tobytes()
    return head + target.astype("<i4").tobytes() + rounds.astype("<i4").tobytes() + counts


def unpack_plan(
    message: bytes, number: int, start: Placement
) -> tuple[list[Round], Placement, npt.NDArray[np.uint8] | None]:
    """Rounds, target and entries of each slot. The rounds are not checked against ``start``, the placement in force.

    Raises:
        ValueError: the message is not a plan of cycle ``number`` for a placement of this shape.
    """
    shape = (start.num_layers, start.num_slots)
    rows_at = HEAD_BYTES + 4 * shape[0] * shape[1]
    if len(message) < rows_at:
        raise ValueError(f"a plan of {len(message)} bytes; at least {rows_at} are needed")
    cycle, num_rows, num_counts = np.frombuffer(message, dtype="<i8", count=3).tolist()
    if cycle != number:
        raise ValueError(f"the plan of cycle {cycle} arrived in cycle {number}")
    rows_end = rows_at + ROW_BYTES * num_rows
    if num_rows < 0 or num_counts not in (0, shape[0] * shape[1]) or len(message) != rows_end + num_counts:
        raise ValueError(f"a plan of {len(message)} bytes names {num_rows} moves and the shares of {num_counts} slots")
    slots = np.frombuffer(message, dtype="<i4", count=shape[0] * shape[1], offset=HEAD_BYTES)
    target = Placement(slots.reshape(shape), start.num_experts, start.num_ranks)
    rows = np.frombuffer(message, dtype="<i4", count=7 * num_rows, offset=rows_at).reshape(num_rows, 7)
    counts = np.frombuffer(message, dtype=np.uint8, offset=rows_end).reshape(shape) if num_counts else None
    return rounds_from_array(rows.astype(np.int32), start.slots_per_rank), target, counts
