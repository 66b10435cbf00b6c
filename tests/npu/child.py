# SPDX-License-Identifier: Apache-2.0
"""A child process of npus.run: one function of one program on one NPU."""

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    program, function, answer, args = sys.argv[1:5]
    import torch
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    result = getattr(importlib.import_module(f"tests.npu.programs.{program}"), function)(*json.loads(args))
    Path(answer).write_text(json.dumps(result))
    # Leave without running destructors: a program under test may have left a broken device behind, on purpose.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
