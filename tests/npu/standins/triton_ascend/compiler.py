# SPDX-License-Identifier: Apache-2.0
"""Stand-in for the compiler of triton-ascend, which Triton requires for a backend. It compiles nothing."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class NPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "npu"

    def hash(self) -> str:
        return "emulated"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("not emulated: compiled Triton kernels")

    def add_stages(self, stages: dict[str, Any], options: object) -> None:
        raise NotImplementedError("not emulated: compiled Triton kernels")

    def load_dialects(self, context: object) -> None:
        raise NotImplementedError("not emulated: compiled Triton kernels")

    def get_module_map(self) -> dict[str, Any]:
        return {}
