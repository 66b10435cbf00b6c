# SPDX-License-Identifier: Apache-2.0
"""Check an installed wheel without torch: the planner makes a plan, and the library of kernels loads."""

import ctypes
from pathlib import Path

import numpy as np

import vllm_ascend_eplb
from vllm_ascend_eplb import Placement, plan

load = np.array([[8.0, 4.0, 2.0, 1.0] * 4])
start = Placement.initial(1, 16, 4, 4)
made = plan(load, start.physical_to_logical, 4)
assert made.par_after.max() < made.par_before.max(), made

library = ctypes.CDLL(str(Path(vllm_ascend_eplb.__file__).with_name("_ops.so")))
library.eplb_register_cpu.restype = ctypes.c_char_p
said = library.eplb_register_cpu().decode()
assert said == "libtorch_cpu.so is not loaded", said
print(f"vllm-ascend-eplb {vllm_ascend_eplb.__version__}: planner and kernels load")
