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
#   JOBS=N                 parallel compile jobs (default: 1; each takes up to 1.5 GiB)
set -eu

cd "$(dirname "$0")/.."
torch_version=2.13.0
torch_npu_version=2.13.0
uv_version=0.13.9

say() { printf '[setup-npu] %s\n' "$*"; }
fail() {
    printf '[setup-npu] error: %s\n' "$*" >&2
    exit 1
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the emulated CANN libraries are for Linux on x86-64"
python=${PYTHON:-}
if [ -z "$python" ]; then
    if python3.11 -c '' 2>/dev/null; then python=python3.11; else python=python3; fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null ||
    fail "$python is not Python 3.10 or newer (3.11 is what was checked); set PYTHON=/path/to/python3.11"
for tool in c++ cmake; do
    command -v "$tool" >/dev/null || fail "no $tool found; install a C++20 compiler (GCC 12 was checked) and CMake 3.18"
done

mkdir -p .venv-npu
if command -v flock >/dev/null; then
    exec 8>.venv-npu/.setup.lock
    flock 8
fi

environment_key=$({
    pwd
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat scripts/setup_npu_env.sh
} | cksum)

# uv does not read pip's settings; hand them on.
if [ -z "${UV_DEFAULT_INDEX:-}" ]; then
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
export UV_PYTHON="$PWD/.venv-npu/bin/python" UV_LINK_MODE=copy UV_NO_PROGRESS=1
PATH="$PWD/.venv-npu/bin:$PATH"
export PATH
# torch_npu must not be loaded by the builds below.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0

if [ "$(cat .venv-npu/.environment.stamp 2>/dev/null || true)" != "$environment_key" ]; then
    rm -f .venv-npu/.environment.stamp
    say "making .venv-npu with $("$python" --version)"
    "$python" -m venv .venv-npu
    .venv-npu/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
    say "installing torch $torch_version for CPU and torch_npu $torch_npu_version"
    if ! { [ -n "${UV_FIND_LINKS:-}" ] && uv pip install --quiet "torch==$torch_version+cpu"; }; then
        uv pip install --quiet --torch-backend=cpu "torch==$torch_version"
    fi
    uv pip install --quiet "torch==$torch_version+cpu" "torch_npu==$torch_npu_version" "numpy<2.4" pyyaml decorator \
        attrs psutil scipy cloudpickle pytest hypothesis ninja "pybind11>=2.13" "setuptools>=77" \
        "pydantic>=2.7" "prometheus_client>=0.18" "rich>=13" "typer>=0.12"
    echo "$environment_key" >.venv-npu/.environment.stamp
fi

# The package itself: the libraries that setup_env.sh has built serve here too (same Python, same torch).
if [ -z "$(find vllm_ascend_eplb -name '_planner*.so' | head -n 1)" ]; then
    say "building the package"
    uv pip install --quiet --no-build-isolation -e .
fi

say "building the emulated CANN libraries"
mkdir -p build
cmake -S tests/npu/emulated_cann -B build/emulated_cann -G Ninja -DPython_EXECUTABLE="$PWD/.venv-npu/bin/python" \
    -DCMAKE_MAKE_PROGRAM="$PWD/.venv-npu/bin/ninja" >build/emulated_cann.log 2>&1 ||
    { cat build/emulated_cann.log >&2 && fail "CMake failed"; }
cmake --build build/emulated_cann --parallel "${JOBS:-1}" >>build/emulated_cann.log 2>&1 ||
    { tail -50 build/emulated_cann.log >&2 && fail "the build failed; see build/emulated_cann.log"; }
say "done"
