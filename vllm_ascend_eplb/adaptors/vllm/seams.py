# SPDX-License-Identifier: Apache-2.0
"""Every patch point in vLLM (a *seam* in this code), in one table, with its use.

``missing_seams`` looks for all of them at start-up, so that a vLLM that was changed is found before it serves.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

CHECKED_VERSIONS = ("0.30", "0.31", "0.32")
"""Releases whose sources were read and on which the end-to-end tests ran."""


READ_VERSIONS = ("0.30", "0.31", "0.32", "0.33")
"""Releases in whose sources every seam was looked for (tests/unit/adaptors/test_seams.py)."""


def is_checked(version: str) -> bool:
    """Whether a vLLM version is one of ``CHECKED_VERSIONS`` (any patch release, any local build of it)."""
    match = re.match(r"(\d+\.\d+)\.", version + ".")
    return match is not None and match.group(1) in CHECKED_VERSIONS


@dataclass(frozen=True)
class Seam:
    """One patch point in vLLM.

    Attributes:
        module: its module.
        name: dotted name in it.
        use: what the adaptor does with it.
        platforms: device types that need it; empty for all.
        runner: "V1" or "V2" where only that model runner of vLLM's needs it. A CPU here runs V1; a GPU may run either.
    """

    module: str
    name: str
    use: str
    platforms: tuple[str, ...] = ()
    runner: str = ""

    def find(self) -> Any:
        """The object there.

        Raises:
            ImportError, AttributeError: this vLLM lacks it.
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


SEAMS = (
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "settings are read and checked"),
    Seam(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.init_worker",
        "creates the worker that the plugin names",
    ),
    Seam("vllm.v1.worker.gpu_worker", "Worker.init_device", "the model runner exists when it has returned"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.load_model", "the weights are loaded when it has returned"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "steps are counted once it has returned"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.reload_weights", "before it, experts go back to their initial slots"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.shutdown", "the planner process exits"),
    Seam(_RUNNER, "EplbState", "replaced by this package's state", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner.execute_model", "start of a real forward", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner._dummy_run", "start of a dummy forward", runner="V1"),
    Seam(
        _RUNNER,
        "GPUModelRunner._determine_batch_execution_and_padding",
        "calls forward_before",
        runner="V1",
    ),
    Seam(_RUNNER, "GPUModelRunner.eplb_step", "calls forward_end", runner="V1"),
    Seam(_EPLB_2, "EplbState", "replaced by this package's state", runner="V2"),
    Seam(_EPLB_2, "EPLBController.prepare_forward", "calls forward_before", runner="V2"),
    Seam(_EPLB_2, "EPLBController.step", "calls forward_end", runner="V2"),
    Seam(_RUNNER_2, "GPUModelRunner.execute_model", "start of a real forward", runner="V2"),
    Seam(_RUNNER_2, "GPUModelRunner._dummy_run", "start of a dummy forward", runner="V2"),
    Seam("vllm.v1.worker.cpu_worker", "CPUWorker", "builds no EPLB state; the plugin does", ("cpu",)),
    Seam(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner.load_model",
        "builds no EPLB state; the plugin does",
        ("cpu",),
    ),
    Seam(
        "vllm.config.parallel",
        "current_platform",
        "answers that EPLB is possible while a worker copies its configuration",
        ("cpu",),
    ),
    Seam("vllm.distributed.eplb.eplb_state", "EplbLayerState", "the maps and counters that a router reads"),
    Seam("vllm.distributed.parallel_state", "get_eplb_group", "the process groups for agreement and weights"),
    Seam("vllm.distributed.parallel_state", "get_ep_group", "rank and size of the expert-parallel group"),
    Seam("vllm.model_executor.models.interfaces", "get_mixture_of_experts_model", "the MoE part of a model"),
    Seam(
        "vllm.model_executor.models.interfaces",
        "MixtureOfExperts.set_eplb_state",
        "passes maps and counters on",
    ),
    Seam(_RELOAD, "record_metadata_for_reloading", "records the weight loaders that follow the map"),
    Seam(_LOADER, "initialize_model", "between building and loading a model, the map assigns experts to slots"),
    Seam(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "MoERunner.do_naive_dispatch_combine",
        "tells whether tokens are gathered before routing, which is refused",
    ),
    Seam(_ROUTER, "eplb_map_to_physical_and_record", "the identity on a CPU; replaced by map_and_record", ("cpu",)),
    Seam(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts.apply",
        "computes all experts as if they were local; replaced by a version for local experts",
        ("cpu",),
    ),
    Seam(
        "vllm.distributed.device_communicators.cpu_communicator",
        "CpuCommunicator.all_gather",
        "collectives of unequal sizes are built on it",
        ("cpu",),
    ),
    Seam("vllm.model_executor.layers.fused_moe.experts.cpu_moe", "cpu_fused_moe", "computes local experts", ("cpu",)),
)


def missing_seams(platform: str) -> list[str]:
    """The patch points that this vLLM lacks, as lines that name place and use."""
    return not_found(seam for seam in SEAMS if not seam.platforms or platform in seam.platforms)


def not_found(seams: Iterable[Seam]) -> list[str]:
    """Those of ``seams`` that are missing, as lines that name place and use."""
    missing = []
    for seam in seams:
        try:
            seam.find()
        except (ImportError, AttributeError) as error:
            missing.append(f"{seam.module}.{seam.name} ({seam.use}): {error}")
    return missing


def patch_points(seams: Iterable[Seam] = SEAMS) -> str:
    """The patch points as a Markdown table: place, use, where it is needed."""
    rows = ["| patch point | use | needed on | runner |", "| --- | --- | --- | --- |"]
    for seam in seams:
        where = ", ".join(seam.platforms) or "all"
        rows.append(f"| `{seam.module}` `{seam.name}` | {seam.use} | {where} | {seam.runner or 'both'} |")
    return "\n".join(rows) + "\n"


class SeamError(RuntimeError):
    """This vLLM is missing a patch point that the balancer needs."""
