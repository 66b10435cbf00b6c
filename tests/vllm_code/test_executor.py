# SPDX-License-Identifier: Apache-2.0
"""The executors whose workers count as vLLM's own processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ascend_eplb.adaptors.vllm.refusals import executor

pytest.importorskip("vllm")


VARIABLE = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
"""By which vLLM 0.30 to 0.32 choose the executor for Ray; 0.33 does not have it."""


class UsersExecutor:
    pass


@pytest.mark.parametrize(
    ("backend", "device", "second", "counts_as"),
    [
        ("mp", "cpu", "1", "mp"),
        ("ray", "cuda", "1", "mp"),
        ("ray", "cuda", "0", "ray"),
        ("ray", "cpu", "1", "ray"),
        ("external_launcher", "cuda", "1", "external_launcher"),
        (UsersExecutor, "cuda", "1", "UsersExecutor"),
    ],
)
def test_rays_second_executor_on_gpus_counts_as_processes(monkeypatch, backend, device, second, counts_as):
    from vllm import envs

    if backend == "ray" and device == "cuda" and VARIABLE not in envs.environment_variables:
        pytest.skip("this vLLM has one executor for Ray")
    monkeypatch.setenv(VARIABLE, second)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(distributed_executor_backend=backend),
        device_config=SimpleNamespace(device_type=device),
    )
    assert executor(config) == counts_as


class RayWorkers:
    pass


@pytest.mark.parametrize("multiprocess", [True, False])
def test_ray_executor_of_vllm_0_33_is_known_by_its_class(monkeypatch, multiprocess):
    """vLLM 0.33 has no variable that chooses between two executors for Ray."""
    from vllm import envs
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    monkeypatch.delitem(envs.environment_variables, VARIABLE, raising=False)
    monkeypatch.setattr(envs, "__getattr__", _without(VARIABLE, envs.__getattr__))
    monkeypatch.setattr(Executor, "get_class", lambda config: MultiprocExecutor if multiprocess else RayWorkers)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(distributed_executor_backend="ray"),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    assert executor(config) == ("mp" if multiprocess else "ray")


def _without(name, original):
    def get(asked):
        if asked == name:
            raise AttributeError(name)
        return original(asked)

    return get
