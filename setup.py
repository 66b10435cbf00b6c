# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ parts with CMake: the planner (pybind11, no torch) and, where torch is installed, the torch ops."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake build for all extensions; CMake writes the libraries into the package's folder."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
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
        if importlib.util.find_spec("torch") is None:
            print("torch is not installed: building without csrc/ops; load is then recorded by ATen operators")
            configure.append("-DEPLB_BUILD_OPS=OFF")
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("vllm_ascend_eplb._planner", sources=[])], cmdclass={"build_ext": CMakeBuild})
