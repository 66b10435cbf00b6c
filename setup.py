# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ parts with CMake: the planner (pybind11) and the kernels of the torch op. Neither needs torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


PLANNER = Extension("vllm_ascend_eplb._planner", sources=[])
OPS = Extension("vllm_ascend_eplb._ops", sources=[])


def missing_tools() -> list[str]:
    """Packages of the build tools that this machine lacks: CMake, and Ninja if there is no make."""
    tools = [] if shutil.which("cmake") else ["cmake>=3.18"]
    return tools if shutil.which("make") or shutil.which("ninja") else [*tools, "ninja"]


class FreshFiles(build_py):
    """Keeps files of an earlier build in this checkout's build folder out of the package."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "vllm_ascend_eplb"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build for both; CMake writes the libraries into the folder that setuptools names."""

    def get_ext_filename(self, fullname: str) -> str:
        # _ops.so is loaded by its path and fits any version of Python.
        if fullname.rpartition(".")[2] == "_ops":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext is not PLANNER:
            return  # one CMake build makes both
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # the paths of the checkout or of Python may have changed
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DEPLB_OUTPUT_DIR={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if not shutil.which("make"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    ext_modules=[PLANNER, OPS],
    cmdclass={"build_py": FreshFiles, "build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
