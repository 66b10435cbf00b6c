# SPDX-License-Identifier: Apache-2.0
"""Let vLLM's processes on a CPU wait at sockets. Every process may load this module as it starts, so it imports little.

By default they wait in loops: tensor-parallel ranks in shared memory, and workers and engine for up to a second before
they listen at a socket. With more processes than cores, a loop takes the core that another process needs, and a step
takes a hundred times as long. vLLM itself uses sockets for ranks that share no memory.
"""

from __future__ import annotations

from typing import Any


def wait_at_sockets() -> None:
    """Call this in every process before its engine starts."""
    from vllm_ascend_eplb.adaptors.post_import import after_import

    after_import("vllm.distributed.device_communicators.cpu_communicator", _share_no_memory)
    after_import("vllm.distributed.device_communicators.shm_broadcast", _listen_at_once)


def _share_no_memory(module: Any) -> None:
    communicator = module.CpuCommunicator
    if hasattr(communicator, "_all_group_ranks_share_shm_group_name"):  # vLLM 0.32
        communicator._all_group_ranks_share_shm_group_name = lambda self: False


def _listen_at_once(module: Any) -> None:
    spin = getattr(module, "SpinCondition", None)
    if spin is None:
        return
    spin.__init__.__defaults__ = (0.0,)  # busy_loop_s
    # A reader that listens at once may miss a notification. vLLM's reader then looks again after five seconds, or a
    # minute before 0.30; here it looks every millisecond.
    if hasattr(module, "SHM_READER_RECHECK_INTERVAL_MS"):
        module.SHM_READER_RECHECK_INTERVAL_MS = 1
    else:
        wait = spin.wait
        spin.wait = lambda self, timeout_ms=None: wait(self, 1)
