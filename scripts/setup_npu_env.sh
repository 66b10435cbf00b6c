#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sets up .venv-npu in this checkout: CPU torch, the unmodified torch_npu wheel, test tools; and builds the emulated CANN
# libraries into build/emulated_cann. torch_npu needs an environment of its own: without CANN libraries on the library
# path an installed torch_npu breaks `import torch`.
#
#   scripts/setup_npu_env.sh                the torch_npu of all targets of make
#   scripts/setup_npu_env.sh 2.10.0.post4   another one with its torch, in .venv-npu-2.10.0.post4 and
#                                           build/emulated_cann-2.10.0.post4; tests run there with
#                                           NPU_TEST_TORCH_NPU=2.10.0.post4
#
# Idempotent: a run that finds nothing changed returns at once.
#
#   PYTHON=python3.11      interpreter to make the environment with (default: python3.11, else python3)
#   PIP_FIND_LINKS=FOLDER  folder or page that has a CPU build of torch (default: PyTorch's own index)
#   PIP_INDEX_URL=URL      package registry (default: PyPI)
#   JOBS=N                 parallel compile jobs (default: 2; each takes up to 1.5 GiB)
set -eu

cd "$(dirname "$0")/.."
name=setup-npu
. scripts/setup_common.sh
torch_npu_version=${1:-2.13.0}
if [ "$torch_npu_version" = 2.13.0 ]; then
    venv=.venv-npu
    emulated=build/emulated_cann
else
    venv=.venv-npu-$torch_npu_version
    emulated=build/emulated_cann-$torch_npu_version
    torch_version=${torch_npu_version%.post*}
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the emulated CANN libraries are for Linux on x86-64"
choose_python
for tool in c++ cmake; do
    command -v "$tool" >/dev/null || fail "no $tool found; install a C++20 compiler (GCC 12 was checked) and CMake 3.18"
done

# This one also later, when the environment has its own: vllm-ascend asks for one, and another CMake compiles all anew.
cmake=$(command -v cmake)

lock_environment

environment_key=$({
    pwd
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat scripts/setup_npu_env.sh scripts/setup_common.sh
    echo "$torch_npu_version"
} | cksum)

configure_uv
# torch_npu must not be loaded by the builds below.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0

if [ "$(cat "$venv/.environment.stamp" 2>/dev/null || true)" != "$environment_key" ]; then
    rm -f "$venv/.environment.stamp"
    # Where PyTorch's index cannot be reached, the registry's build for GPUs serves, too.
    make_environment || uv pip install --quiet "torch==$torch_version"
    say "installing torch_npu $torch_npu_version and tools"
    # Its metadata asks for torch's build for CPUs by name.
    uv pip install --quiet --no-deps "torch_npu==$torch_npu_version"
    uv pip install --quiet "numpy<2.4" pyyaml decorator attrs psutil scipy cloudpickle pytest hypothesis ninja \
        "pybind11>=2.13" "setuptools>=77" "pydantic>=2.7" "prometheus_client>=0.18" "rich>=13" "typer>=0.12" \
        pytest-timeout "httpx>=0.27"
    echo "$environment_key" >"$venv/.environment.stamp"
fi

mkdir -p build

# The package itself: libraries that setup_env.sh has built serve here too (same Python; they are built without torch).
build_key=$({
    find csrc CMakeLists.txt setup.py -type f | LC_ALL=C sort | while read -r file; do
        echo "$file"
        cat "$file"
    done
} | cksum)
built=$(find vllm_ascend_eplb -name '_planner*.so' | head -n 1)
if [ -z "$built" ] || [ "$(cat "$venv/.build.stamp" 2>/dev/null || echo "$build_key")" != "$build_key" ]; then
    say "building the package"
    CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-2}" "$cmake" -S . -B build/package -G Ninja -DPython_EXECUTABLE="$UV_PYTHON" \
        -DCMAKE_MAKE_PROGRAM="$PWD/$venv/bin/ninja" \
        -Dpybind11_DIR="$("$UV_PYTHON" -m pybind11 --cmakedir)" >build/package.log 2>&1 &&
        "$cmake" --build build/package >>build/package.log 2>&1 ||
        { tail -50 build/package.log >&2 && fail "the build failed; see build/package.log"; }
fi
echo "$build_key" >"$venv/.build.stamp"

say "building the emulated CANN libraries"
"$cmake" -S tests/npu/emulated_cann -B "$emulated" -G Ninja -DPython_EXECUTABLE="$PWD/$venv/bin/python" \
    -DCMAKE_MAKE_PROGRAM="$PWD/$venv/bin/ninja" >"$emulated.log" 2>&1 ||
    { cat "$emulated.log" >&2 && fail "CMake failed"; }
"$cmake" --build "$emulated" --parallel "${JOBS:-2}" >>"$emulated.log" 2>&1 ||
    { tail -50 "$emulated.log" >&2 && fail "the build failed; see $emulated.log"; }
say "done"
