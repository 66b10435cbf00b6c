# SPDX-License-Identifier: Apache-2.0
"""Pinned rows are kept until the events of their copies are done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.routing.pinned import PinnedRows
from vllm_ascend_eplb.values.placement import Placement


class LateEvent:
    """A stand-in for a device's event; ``done`` is true when the device has reached it."""

    made: list[LateEvent]

    def __init__(self) -> None:
        self.recorded, self.done = False, False
        self.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return self.done


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[LateEvent]:
    LateEvent.made = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=LateEvent))
    return LateEvent.made


def test_rows_are_kept_until_their_copies_are_done(events: list[LateEvent]) -> None:
    """The host may be any number of commits ahead, so a fixed number of kept rows would release rows still in use."""
    pinned, device_rows = PinnedRows(torch.device("cuda")), torch.zeros(3)
    for number in range(5):
        pinned.keep(device_rows)
        assert pinned.num_kept == number + 1
    for event in events[:3]:
        event.done = True
    pinned.keep(device_rows)
    assert pinned.num_kept == 3


def test_host_keeps_no_rows() -> None:
    pinned = PinnedRows(torch.device("cpu"))
    rows: Any = pinned.rows(np.arange(6).reshape(2, 3)[:, ::-1])
    assert rows.tolist() == [[2, 1, 0], [5, 4, 3]]
    pinned.keep(rows)
    assert pinned.num_kept == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_maps_release_rows_once_copied() -> None:
    placement = Placement.initial(2, 4, 2, 2)
    maps = DispatchMaps(placement, "cuda", 2)
    for _ in range(5):
        maps.prepare(placement, [0, 1])
        maps.commit()
        torch.cuda.synchronize()
    assert maps.prepared.pinned.num_kept == 1
