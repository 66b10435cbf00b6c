# SPDX-License-Identifier: Apache-2.0
"""Which executors count as vLLM's own processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ascend_eplb.adaptors.vllm.refusals import _executor

pytest.importorskip("vllm")


class SomebodysExecutor:
    pass


@pytest.mark.parametrize(
    ("backend", "device", "second", "counts_as"),
    [
        ("mp", "cpu", "1", "mp"),
        ("ray", "cuda", "1", "mp"),
        ("ray", "cuda", "0", "ray"),
        ("ray", "cpu", "1", "ray"),
        ("external_launcher", "cuda", "1", "external_launcher"),
        (SomebodysExecutor, "cuda", "1", "SomebodysExecutor"),
    ],
)
def test_rays_second_executor_on_gpus_counts_as_processes(monkeypatch, backend, device, second, counts_as):
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", second)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(distributed_executor_backend=backend),
        device_config=SimpleNamespace(device_type=device),
    )
    assert _executor(config) == counts_as
