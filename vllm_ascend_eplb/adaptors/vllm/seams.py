# SPDX-License-Identifier: Apache-2.0
"""Every place in vLLM that the adaptor takes hold of, in one table, with what it needs there.

``missing_seams`` looks for all of them at start-up, so that a vLLM that was changed is found out before it serves.
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
    """One place in vLLM.

    Attributes:
        module: its module.
        name: dotted name in it.
        use: what the adaptor does there.
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
            ImportError, AttributeError: vLLM has no such place.
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
    Seam("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker", "resolves worker_cls, which is ours"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.init_device", "the runner exists afterwards"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.load_model", "the weights are loaded afterwards"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "steps are counted from here on"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.reload_weights", "first every expert goes back to where it was loaded"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.shutdown", "the planner ends here"),
    Seam(_RUNNER, "EplbState", "our state takes its place", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner.execute_model", "a real forward begins", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner._dummy_run", "a dummy forward begins", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner._determine_batch_execution_and_padding", "the point of forward_before", runner="V1"),
    Seam(_RUNNER, "GPUModelRunner.eplb_step", "the point of forward_end", runner="V1"),
    Seam(_EPLB_2, "EplbState", "our state takes its place", runner="V2"),
    Seam(_EPLB_2, "EPLBController.prepare_forward", "the point of forward_before", runner="V2"),
    Seam(_EPLB_2, "EPLBController.step", "the point of forward_end", runner="V2"),
    Seam(_RUNNER_2, "GPUModelRunner.execute_model", "a real forward begins", runner="V2"),
    Seam(_RUNNER_2, "GPUModelRunner._dummy_run", "a dummy forward begins", runner="V2"),
    Seam("vllm.v1.worker.cpu_worker", "CPUWorker", "builds no EPLB state: ours does", ("cpu",)),
    Seam("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "builds no EPLB state: ours does", ("cpu",)),
    Seam(
        "vllm.config.parallel",
        "current_platform",
        "whether balancing is possible, where a worker copies its configuration: it is",
        ("cpu",),
    ),
    Seam("vllm.distributed.eplb.eplb_state", "EplbLayerState", "what a router reads"),
    Seam("vllm.distributed.parallel_state", "get_eplb_group", "the groups for control and weights"),
    Seam("vllm.distributed.parallel_state", "get_ep_group", "rank and size"),
    Seam("vllm.model_executor.models.interfaces", "get_mixture_of_experts_model", "the MoE part of a model"),
    Seam("vllm.model_executor.models.interfaces", "MixtureOfExperts.set_eplb_state", "hands maps and counters over"),
    Seam(_RELOAD, "record_metadata_for_reloading", "notes loaders that heed the map"),
    Seam(_LOADER, "initialize_model", "a model is built, and not loaded yet: here its slots get experts by a map"),
    Seam(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "MoERunner.do_naive_dispatch_combine",
        "whether tokens are gathered before they are routed: refused",
    ),
    Seam(_ROUTER, "eplb_map_to_physical_and_record", "identity on a CPU: replaced by map_and_record", ("cpu",)),
    Seam(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts.apply",
        "computes all experts as if they were local: replaced by one that computes the local ones",
        ("cpu",),
    ),
    Seam(
        "vllm.distributed.device_communicators.cpu_communicator",
        "CpuCommunicator.all_gather",
        "the collectives for unequal sizes are made of it",
        ("cpu",),
    ),
    Seam("vllm.model_executor.layers.fused_moe.experts.cpu_moe", "cpu_fused_moe", "computes the local ones", ("cpu",)),
)


def missing_seams(platform: str) -> list[str]:
    """The seams that this vLLM lacks, as lines that name the place and its use."""
    return not_found(seam for seam in SEAMS if not seam.platforms or platform in seam.platforms)


def not_found(seams: Iterable[Seam]) -> list[str]:
    """Those of them that are not there, as such lines."""
    missing = []
    for seam in seams:
        try:
            seam.find()
        except (ImportError, AttributeError) as error:
            missing.append(f"{seam.module}.{seam.name} ({seam.use}): {error}")
    return missing


def patch_points(seams: Iterable[Seam] = SEAMS) -> str:
    """Seams as a Markdown table: place, use, where it is needed."""
    rows = ["| place in vLLM | what the balancer does there | needed on | runner |", "| --- | --- | --- | --- |"]
    for seam in seams:
        where = ", ".join(seam.platforms) or "all"
        rows.append(f"| `{seam.module}` `{seam.name}` | {seam.use} | {where} | {seam.runner or 'both'} |")
    return "\n".join(rows) + "\n"


class SeamError(RuntimeError):
    """This vLLM lacks a place that the balancer takes hold of."""
