#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the unit tests that need neither torch nor vLLM on the other supported Pythons (3.10, 3.12, 3.13), if they are
# installed (on PATH, in pyenv or in uv). Python 3.10 gets the oldest dependencies that pyproject.toml allows. The last
# lines give the result of each version: passed, failed or skipped. Environments are in build/pythons.
#
#   scripts/pythons.sh [VERSION...]
set -eu

cd "$(dirname "$0")/.."
name=pythons
venv=.venv
. scripts/setup_common.sh
uv=$PWD/$venv/bin/uv
configure_uv
unset UV_PYTHON

# The ignored tests import torch or a server.
tests="--ignore tests/unit/planning/test_plan_message.py --ignore tests/unit/observe/test_absent.py
    --ignore tests/unit/observe/test_times.py --ignore tests/unit/report/test_endpoint.py
    tests/unit/planning tests/unit/values tests/unit/settings tests/unit/files
    tests/unit/observe tests/unit/simulate tests/unit/report tests/unit/cli"
failed=
summary=
for version in ${*:-3.10 3.12 3.13}; do
    python=
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
        "$("$uv" python find --quiet --no-project --no-python-downloads "$version" 2>/dev/null)"; do
        if "$candidate" -c '' 2>/dev/null; then python=$candidate; fi
    done
    if [ -z "$python" ]; then
        summary="$summary
Python $version: skipped, it is not on this machine"
        continue
    fi
    # The oldest dependencies need wheels: numpy 1.26 has them for Python 3.9 to 3.12 only.
    resolution=highest
    [ "$version" = 3.10 ] && resolution=lowest-direct
    folder=build/pythons/$version
    say "Python $version, dependencies: $resolution"
    rm -rf "$folder"
    "$uv" venv --quiet --python "$python" "$folder"
    "$uv" pip install --quiet --python "$folder/bin/python" --resolution "$resolution" --reinstall-package \
        vllm-ascend-eplb . 'setuptools>=77' 'pybind11>=2.13'
    # Not pinned: the pinned versions do not support Python 3.10.
    "$uv" pip install --quiet --python "$folder/bin/python" pytest hypothesis scipy pyyaml httpx
    # The tests lie outside this checkout, so that they import the installed package.
    rm -rf "$folder/tests"
    cp -r tests benchmarks examples docs pyproject.toml "$folder/"
    # shellcheck disable=SC2086
    if (cd "$folder" && bin/python -m pytest -q -p no:cacheprovider $tests -m "not soak" \
        --deselect tests/unit/files/test_file_faults.py::test_full_disk_leaves_whole_files_and_a_line_for_each \
        --deselect tests/unit/planning/test_process.py::test_child_imports_neither_torch_nor_vllm); then
        result=passed
    else
        result=failed failed="$failed $version"
    fi
    summary="$summary
Python $version, dependencies $resolution: $result"
done
say "in all:$summary"
[ -z "$failed" ] || fail "failed on$failed"
