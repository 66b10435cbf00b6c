# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's processes on a CPU wait at sockets. It may be loaded as each process starts, so it imports little.

They wait in loops otherwise: tensor-parallel ranks in shared memory, and workers and engine for up to a second until
they listen at a socket. With more processes than cores a loop takes the core that another process needs, and a step
takes a hundred times as long. Ranks at sockets are a way of vLLM's own, for ranks that share no memory.
"""

from __future__ import annotations

from typing import Any


def wait_at_sockets() -> None:
    """In every process, before its engine starts."""
    from vllm_ascend_eplb.adaptors.post_import import after_import

    after_import("vllm.distributed.device_communicators.cpu_communicator", _share_no_memory)
    after_import("vllm.distributed.device_communicators.shm_broadcast", _listen_at_once)


def _share_no_memory(module: Any) -> None:
    communicator = module.CpuCommunicator
    if hasattr(communicator, "_all_group_ranks_share_shm_group_name"):  # vLLM 0.32
        communicator._all_group_ranks_share_shm_group_name = lambda self: False


def _listen_at_once(module: Any) -> None:
    spin = getattr(module, "SpinCondition", None)
    if spin is not None and len(spin.__init__.__defaults__ or ()) == 1:  # busy_loop_s
        spin.__init__.__defaults__ = (0.0,)
