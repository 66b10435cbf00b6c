# SPDX-License-Identifier: Apache-2.0
"""Every patch point in vLLM, in one table: what the adaptor replaces, wraps or calls, and why.

Each worker looks for all of them at start-up (``missing_patch_points``), so that a changed vLLM is noticed before it
serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PatchPoint:
    """One patch point.

    Attributes:
        module: the module of the patch point.
        name: dotted name in the module.
        use: what the adaptor does with the patch point.
        platforms: device types that need it; empty for all.
        runner: "V1" or "V2" if only that model runner of vLLM needs it. A CPU runs V1; a GPU may run either.
    """

    module: str
    name: str
    use: str
    platforms: tuple[str, ...] = ()
    runner: str = ""

    def find(self) -> Any:
        """The object at this patch point.

        Raises:
            ImportError, AttributeError: this vLLM lacks the patch point.
        """
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


_RUNNER = "vllm.v1.worker.gpu_model_runner"


_RUNNER_2 = "vllm.v1.worker.gpu.model_runner"


_EPLB_2 = "vllm.v1.worker.gpu.eplb_utils"


_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"


_RELOAD = "vllm.model_executor.model_loader.reload"


_LOADER = "vllm.model_executor.model_loader.base_loader"


PATCH_POINTS = (
    PatchPoint("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "reads and checks the settings"),
    PatchPoint(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.init_worker",
        "resolves worker_cls, which names the worker class of this package",
    ),
    PatchPoint(
        "vllm.v1.executor.multiproc_executor",
        "MultiprocExecutor.__init__",
        "reads the answers of all workers before it raises the error of one",
    ),
    PatchPoint("vllm.v1.worker.gpu_worker", "Worker.init_device", "hooks the runner, which exists afterwards"),
    PatchPoint("vllm.v1.worker.gpu_worker", "Worker.load_model", "starts the balancer, once the weights are loaded"),
    PatchPoint("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "counts steps from here on"),
    PatchPoint(
        "vllm.v1.worker.gpu_worker",
        "Worker.reload_weights",
        "puts the start placement in force before weights are loaded",
    ),
    PatchPoint("vllm.v1.worker.gpu_worker", "Worker.shutdown", "ends the planner"),
    PatchPoint(_RUNNER, "EplbState", "replaces it by the state of the balancer", runner="V1"),
    PatchPoint(_RUNNER, "GPUModelRunner.execute_model", "notes that a real forward begins", runner="V1"),
    PatchPoint(_RUNNER, "GPUModelRunner._dummy_run", "notes that a dummy forward begins", runner="V1"),
    PatchPoint(
        _RUNNER,
        "GPUModelRunner._determine_batch_execution_and_padding",
        "calls forward_before when it returns",
        runner="V1",
    ),
    PatchPoint(_RUNNER, "GPUModelRunner.eplb_step", "calls forward_end", runner="V1"),
    PatchPoint(_EPLB_2, "EplbState", "replaces it by the state of the balancer", runner="V2"),
    PatchPoint(_EPLB_2, "EPLBController.prepare_forward", "calls forward_before when it returns", runner="V2"),
    PatchPoint(_EPLB_2, "EPLBController.step", "calls forward_end", runner="V2"),
    PatchPoint(_RUNNER_2, "GPUModelRunner.execute_model", "notes that a real forward begins", runner="V2"),
    PatchPoint(_RUNNER_2, "GPUModelRunner._dummy_run", "notes that a dummy forward begins", runner="V2"),
    PatchPoint("vllm.v1.worker.cpu_worker", "CPUWorker", "builds the EPLB state, which the CPU runner lacks", ("cpu",)),
    PatchPoint(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner.load_model",
        "builds the EPLB state, which the CPU runner lacks",
        ("cpu",),
    ),
    PatchPoint(
        "vllm.config.parallel",
        "current_platform",
        "lets a worker copy a configuration with the EPLB switch on",
        ("cpu",),
    ),
    PatchPoint("vllm.distributed.eplb.eplb_state", "EplbLayerState", "gives each router its maps and counters"),
    PatchPoint("vllm.distributed.parallel_state", "get_eplb_group", "gives the process groups for control and weights"),
    PatchPoint("vllm.distributed.parallel_state", "get_ep_group", "gives rank and size"),
    PatchPoint(
        "vllm.model_executor.models.interfaces", "get_mixture_of_experts_model", "gives the MoE part of a model"
    ),
    PatchPoint(
        "vllm.model_executor.models.interfaces",
        "MixtureOfExperts.set_eplb_state",
        "hands maps and counters to the layers",
    ),
    PatchPoint(_RELOAD, "record_metadata_for_reloading", "notes the loaders that follow the map"),
    PatchPoint(_LOADER, "initialize_model", "sets the loaders of a model that is built and not loaded yet"),
    PatchPoint(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "MoERunner.do_naive_dispatch_combine",
        "refuses layers that gather tokens before they route them",
    ),
    PatchPoint(
        _ROUTER,
        "eplb_map_to_physical_and_record",
        "is replaced by map_and_record; on a CPU it maps nothing",
        ("cpu",),
    ),
    PatchPoint(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts.apply",
        "replaces it by a kernel that computes the local experts only",
        ("cpu",),
    ),
    PatchPoint(
        "vllm.distributed.device_communicators.cpu_communicator",
        "CpuCommunicator.all_gather",
        "builds the collectives for unequal sizes on it",
        ("cpu",),
    ),
    PatchPoint(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe", "cpu_fused_moe", "computes the local experts", ("cpu",)
    ),
)


def points_on(platform: str) -> list[PatchPoint]:
    """The patch points that a platform needs (a device type: cuda, cpu, npu)."""
    return [point for point in PATCH_POINTS if not point.platforms or platform in point.platforms]


def missing_patch_points(platform: str) -> list[str]:
    """The patch points that this vLLM is missing, as lines that name each and its use."""
    return not_found(points_on(platform))


def not_found(points: Iterable[PatchPoint]) -> list[str]:
    """The missing ones of ``points``, as lines that name each and its use."""
    missing = []
    for point in points:
        try:
            point.find()
        except (ImportError, AttributeError) as error:
            missing.append(f"{point.module}.{point.name} ({point.use}): {error}")
    return missing


def patch_points(points: Iterable[PatchPoint] = PATCH_POINTS) -> str:
    """Patch points as a Markdown table: name, use, where each is needed."""
    rows = ["| patch point | purpose | needed on | runner |", "| --- | --- | --- | --- |"]
    for point in points:
        where = ", ".join(point.platforms) or "all"
        rows.append(f"| `{point.module}` `{point.name}` | {point.use} | {where} | {point.runner or 'both'} |")
    return "\n".join(rows) + "\n"
