# SPDX-License-Identifier: Apache-2.0
"""Stand-in for the driver of triton-ascend, as a backend of Triton: reports that there are NPUs. It compiles nothing:
Triton's own interpreter runs the kernels (TRITON_INTERPRET=1), and reads and writes device tensors."""

import os
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        """One core of each kind, because the interpreter runs one program after the other."""
        return {"num_aicore": 1, "num_vectorcore": 1}


class NPUDriver(DriverBase):
    def __init__(self) -> None:
        self.utils = _Utilities()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("npu", os.environ.get("EMULATED_NPU_SOC", "Ascend910B3"), 1)

    def get_current_device(self) -> int:
        import torch

        return int(torch.npu.current_device())

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("npu", torch.npu.current_device())

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("not emulated: compiled Triton kernels")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("not emulated: Triton's benchmarks")
