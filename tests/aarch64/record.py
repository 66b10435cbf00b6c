# SPDX-License-Identifier: Apache-2.0
"""Call the recording op once on the installed torch; print the kernel that ran, the slots and the counts."""

from __future__ import annotations

import torch

from vllm_ascend_eplb.load import ops

if __name__ == "__main__":
    counts = torch.zeros(3, dtype=torch.int64)
    table, replicas, record = torch.tensor([[2], [1]]), torch.tensor([1, 1]), torch.ones(1, dtype=torch.bool)
    out = ops.map_and_record(torch.tensor([[1, 0]]), table, replicas, counts, record)
    print(ops.kernel_for("cpu"), out.tolist(), counts.tolist())
