# SPDX-License-Identifier: Apache-2.0
"""The loader on one rank: refused arguments, and the order of calls."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.transfer import loader as loader_module
from vllm_ascend_eplb.transfer.flight import CHUNK
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader, TransferError
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.rounds import Round


def slots(count: int = 4, layers: int = 1) -> list[list[list[torch.Tensor]]]:
    return [[[torch.full((3, 4), 10.0 * layer + slot)] for slot in range(count)] for layer in range(layers)]


def swap(a: int, b: int, number: int = 0, after: int = -1) -> Round:
    """A round that swaps the experts of slots a and b of layer 0."""
    return Round(number, np.array([[0, a, b, 0, b], [0, b, a, 0, a]], dtype=np.int32), 4, after)


def wait(loader: D2DExpertWeightLoader, rounds: int) -> None:
    end = time.monotonic() + 20
    while loader.rounds_done < rounds and time.monotonic() < end:
        time.sleep(0.001)
    assert loader.rounds_done == rounds


def test_slots_change_in_place_and_only_at_the_commit() -> None:
    weights = slots()
    addresses = [tensors[0].data_ptr() for tensors in weights[0]]
    loader = D2DExpertWeightLoader(weights, None, 0, 2)
    assert loader.learn_checksums(Placement([[0, 1, 2, 3]], 4, 1)) == 0
    loader.warm_up()
    loader.prepare(swap(0, 3))
    assert loader.ready(0)
    loader.issue(0)
    wait(loader, 1)
    assert loader.rounds_intact == 1
    assert [float(tensors[0][0, 0]) for tensors in weights[0]] == [0, 1, 2, 3]
    loader.commit(0)
    assert [float(tensors[0][0, 0]) for tensors in weights[0]] == [3, 1, 2, 0]
    assert [tensors[0].data_ptr() for tensors in weights[0]] == addresses
    loader.close()


def test_wrong_expert_is_not_intact() -> None:
    loader = D2DExpertWeightLoader(slots(), None, 0, 2)
    loader.learn_checksums(Placement([[0, 1, 2, 3]], 4, 1))
    loader.prepare(Round(0, np.array([[0, 0, 3, 0, 2]], dtype=np.int32), 4))  # says expert 3, reads slot 2
    loader.issue(0)
    wait(loader, 1)
    assert loader.rounds_intact == 0
    loader.prepare(Round(0, np.array([[0, 0, 3, 0, 3]], dtype=np.int32), 4))  # sent again, from the right slot
    assert loader.rounds_done == 0
    loader.issue(0)
    wait(loader, 1)
    assert loader.rounds_intact == 1


def test_copies_that_differ_from_the_start_are_not_verified() -> None:
    loader = D2DExpertWeightLoader(slots(), None, 0, 2)
    assert loader.learn_checksums(Placement([[0, 1, 2, 0]], 3, 1)) == 1


def test_round_waits_for_the_rounds_it_builds_on() -> None:
    loader = D2DExpertWeightLoader(slots(), None, 0, 2)
    loader.prepare(swap(0, 1))
    loader.prepare(swap(1, 2, number=1, after=0))
    assert loader.ready(0)
    assert not loader.ready(1)
    loader.issue(0)
    wait(loader, 1)
    loader.commit(0)
    assert loader.ready(1)


def test_buffer_in_use_is_not_filled_again() -> None:
    loader = D2DExpertWeightLoader(slots(), None, 0, 2, buffers=1)
    loader.prepare(swap(0, 1))
    loader.prepare(swap(2, 3, number=1))
    loader.issue(0)
    wait(loader, 1)
    loader.issue(1)
    assert loader.poisoned
    assert "staging buffer" in str(loader.error)
    with pytest.raises(TransferError, match="not used again"):
        loader.prepare(swap(0, 1))


def test_endless_transfer_poisons_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    loader = D2DExpertWeightLoader(slots(), None, 0, 2, deadline=60.0)
    loader.close()  # no thread is left to see the arrival
    loader.prepare(swap(0, 1))
    loader.issue(0)
    now += 60.0
    assert not loader.poisoned
    now += 0.1
    assert loader.poisoned
    loader.forget()
    assert loader.error is not None


def test_forgotten_round_leaves_nothing_behind() -> None:
    weights = slots()
    loader = D2DExpertWeightLoader(weights, None, 0, 2)
    loader.prepare(swap(0, 1))
    loader.issue(0)
    wait(loader, 1)
    loader.forget()
    assert (loader.rounds_done, loader.in_flight, loader.commits) == (0, 0, 0)
    loader.prepare(swap(2, 3))
    loader.issue(0)
    wait(loader, 1)
    loader.commit(0)
    assert [float(tensors[0][0, 0]) for tensors in weights[0]] == [0, 1, 3, 2]


def unequal() -> Any:
    weights = slots()
    weights[0][2] = [torch.zeros(2, 4)]
    return weights


def packed() -> Any:
    whole = torch.zeros(3, 4, 4)
    return [[[whole[:, :, slot]] for slot in range(4)]]


def shared() -> Any:
    whole = torch.zeros(20)
    return [[[whole[4 * slot : 4 * slot + 8]] for slot in range(3)]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (unequal(), "slot 2.*differ"),
        (packed(), "not contiguous"),
        (shared(), "share memory"),
        ([], "no expert weights"),
    ],
)
def test_layouts_that_cannot_be_moved_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        D2DExpertWeightLoader(weights, None, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer_experts": 0}, "at least 1"),
        ({"buffers": 3}, "allowed are 1 and 2"),
        ({"budget_bytes": 5}, str(CHUNK)),
        ({"transport": "pull"}, "does not work on cpu"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        D2DExpertWeightLoader(slots(), None, 0, **{"buffer_experts": 2, **arguments})


def test_rounds_that_do_not_fit_are_refused() -> None:
    loader = D2DExpertWeightLoader(slots(), None, 0, 1)
    with pytest.raises(TransferError, match="brings 2 experts"):
        loader.prepare(swap(0, 1))
    with pytest.raises(TransferError, match="3 slots per rank"):
        loader.prepare(Round(0, np.array([[0, 0, 1, 0, 1]], dtype=np.int32), 3))
