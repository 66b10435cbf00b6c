#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sets up .venv-npu in this checkout: CPU torch, the unmodified torch_npu wheel, test tools; and builds the emulated CANN
# libraries into build/emulated_cann. torch_npu needs an environment of its own: without CANN libraries on the library
# path an installed torch_npu breaks `import torch`.
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
venv=.venv-npu
torch_npu_version=2.13.0
. scripts/setup_common.sh

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the emulated CANN libraries are for Linux on x86-64"
choose_python
for tool in c++ cmake; do
    command -v "$tool" >/dev/null || fail "no $tool found; install a C++20 compiler (GCC 12 was checked) and CMake 3.18"
done

lock_environment

environment_key=$({
    pwd
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat scripts/setup_npu_env.sh scripts/setup_common.sh
} | cksum)

configure_uv
# torch_npu must not be loaded by the builds below.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0

if [ "$(cat .venv-npu/.environment.stamp 2>/dev/null || true)" != "$environment_key" ]; then
    rm -f .venv-npu/.environment.stamp
    make_environment
    say "installing torch_npu $torch_npu_version and tools"
    uv pip install --quiet "torch==$torch_version+cpu" "torch_npu==$torch_npu_version" "numpy<2.4" pyyaml decorator \
        attrs psutil scipy cloudpickle pytest hypothesis ninja "pybind11>=2.13" "setuptools>=77" \
        "pydantic>=2.7" "prometheus_client>=0.18" "rich>=13" "typer>=0.12" pytest-timeout "httpx>=0.27"
    echo "$environment_key" >.venv-npu/.environment.stamp
fi

mkdir -p build

# The package itself: libraries that setup_env.sh has built serve here too (same Python, same torch).
build_key=$({
    find csrc CMakeLists.txt setup.py -type f | LC_ALL=C sort | while read -r file; do
        echo "$file"
        cat "$file"
    done
} | cksum)
built=$(find vllm_ascend_eplb -name '_planner*.so' | head -n 1)
if [ -z "$built" ] || [ "$(cat .venv-npu/.build.stamp 2>/dev/null || echo "$build_key")" != "$build_key" ]; then
    say "building the package"
    CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-2}" cmake -S . -B build/package -G Ninja -DPython_EXECUTABLE="$UV_PYTHON" \
        -DCMAKE_MAKE_PROGRAM="$PWD/.venv-npu/bin/ninja" \
        -Dpybind11_DIR="$("$UV_PYTHON" -m pybind11 --cmakedir)" >build/package.log 2>&1 &&
        cmake --build build/package >>build/package.log 2>&1 ||
        { tail -50 build/package.log >&2 && fail "the build failed; see build/package.log"; }
fi
echo "$build_key" >.venv-npu/.build.stamp

say "building the emulated CANN libraries"
cmake -S tests/npu/emulated_cann -B build/emulated_cann -G Ninja -DPython_EXECUTABLE="$PWD/.venv-npu/bin/python" \
    -DCMAKE_MAKE_PROGRAM="$PWD/.venv-npu/bin/ninja" >build/emulated_cann.log 2>&1 ||
    { cat build/emulated_cann.log >&2 && fail "CMake failed"; }
cmake --build build/emulated_cann --parallel "${JOBS:-2}" >>build/emulated_cann.log 2>&1 ||
    { tail -50 build/emulated_cann.log >&2 && fail "the build failed; see build/emulated_cann.log"; }
say "done"
