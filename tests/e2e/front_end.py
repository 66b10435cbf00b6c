# SPDX-License-Identifier: Apache-2.0
"""vLLM's server with processes that are forked from its front end, and so need not import vLLM:
``python front_end.py ARGUMENTS``."""

from __future__ import annotations

import sys

from nursery import PRELOADED, fork_everything, import_all, run_module


def main() -> None:
    import_all(PRELOADED)
    fork_everything()
    run_module("vllm.entrypoints.openai.api_server", *sys.argv[1:])


if __name__ == "__main__":
    main()
