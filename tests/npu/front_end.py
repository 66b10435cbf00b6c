# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with engine and workers that are forked from its front end, and so need not import vLLM. They wait at
sockets instead of in loops, which take the cores of a small machine.

    python -m tests.npu.front_end serve MODEL ...
"""

import os

from tests.e2e.sockets import wait_at_sockets


def main() -> None:
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    wait_at_sockets()
    from vllm.entrypoints.cli.main import main as serve

    serve()


if __name__ == "__main__":
    main()
