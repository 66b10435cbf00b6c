#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Unpacks vllm-ascend and the vLLM that it pairs with, for tests of the adaptor: pure Python, nothing is compiled and
# nothing in them is changed. Run scripts/setup_npu_env.sh first; takes the same environment variables. Idempotent.
#
#   scripts/setup_npu_stack.sh              the newest release, into build/stack; what it imports goes into .venv-npu
#   scripts/setup_npu_stack.sh 0.30.0rc2    a release candidate, into build/stack-0.30.0rc2, with what it imports
set -eu

cd "$(dirname "$0")/.."
name=setup-stack
venv=.venv-npu
. scripts/setup_common.sh

ascend_version=${1:-0.23.0.post1}
stack=build/stack-$ascend_version
case $ascend_version in
0.23.0.post1)
    vllm_version=0.23.0
    stack=build/stack
    imports="transformers==5.5.4 fastapi<0.124.0 pandas msgpack quart numba"
    torch=torch==2.13.0+cpu
    target=
    ;;
0.30.0rc2)
    vllm_version=0.30.0
    imports="transformers==5.14.1 pandas msgpack quart numba"
    torch='torch ; python_version < "3"' # that of .venv-npu
    target="--target $stack/packages"    # newer than what the release imports, so beside it and not in its place
    ;;
*) fail "$ascend_version is not a vllm-ascend known here: 0.23.0.post1 (the default), 0.30.0rc2" ;;
esac

[ -e .venv-npu/.environment.stamp ] || fail "no .venv-npu here; run scripts/setup_npu_env.sh first"
key=$({
    pwd
    cat scripts/setup_npu_stack.sh .venv-npu/.environment.stamp pyproject.toml tests/npu/standins/vllm_ascend_C.py
    cat tests/npu/standins/triton_ascend/*.py
} | cksum)
lock_environment
if [ "$(cat "$stack/.stamp" 2>/dev/null || true)" = "$key" ]; then exit 0; fi
rm -rf "$stack"
mkdir -p "$stack/site"

export TORCH_DEVICE_BACKEND_AUTOLOAD=0
python=.venv-npu/bin/python
configure_uv

say "fetching the sources of vllm $vllm_version and vllm-ascend $ascend_version"
uv pip install --quiet setuptools_scm "setuptools>=77,<81" setuptools-rust wheel packaging jinja2 cmake pybind11
# pip asks a source distribution for its metadata before it hands it over; these variables keep it from compiling.
VLLM_VERSION_OVERRIDE=$vllm_version VLLM_TARGET_DEVICE=empty .venv-npu/bin/python -m pip download --quiet --no-deps \
    --disable-pip-version-check --no-build-isolation --no-binary :all: -d "$stack" "vllm==$vllm_version"
COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b3 .venv-npu/bin/python -m pip download --quiet --no-deps \
    --disable-pip-version-check --no-build-isolation --no-binary :all: -d "$stack" "vllm-ascend==$ascend_version"
for archive in "$stack"/*.tar.gz; do tar -xzf "$archive" -C "$stack"; done
rm "$stack"/*.tar.gz

say "installing what they import"
cat >"$stack/overrides.txt" <<END
$torch
numpy<2.4
torchvision ; python_version < "3"
torchaudio ; python_version < "3"
triton ; python_version < "3"
END
{
    cat "$stack/vllm-$vllm_version/requirements/common.txt"
    echo "$imports" | tr ' ' '\n'
} >"$stack/requirements.txt"
# shellcheck disable=SC2086 # no target, no words
uv pip install --quiet $target --overrides "$stack/overrides.txt" -r "$stack/requirements.txt"

if [ "$ascend_version" = 0.30.0rc2 ]; then
    say "installing Triton, with stand-ins for what triton-ascend adds"
    # Its second model runner is made of Triton kernels. Only the interpreter is used: without the compilers for GPUs.
    triton=$stack/triton
    uv pip install --quiet --no-deps --target "$triton" "triton==3.6.0"
    rm -r "$triton"/triton/backends/nvidia "$triton"/triton/backends/amd "$triton"/triton-*.dist-info/entry_points.txt
    mkdir -p "$triton/triton/backends/npu" "$triton/triton/language/extra/cann" "$triton/triton_ascend-3.2.2.dist-info"
    touch "$triton/triton/backends/npu/__init__.py" "$triton/triton/language/extra/cann/__init__.py"
    cp tests/npu/standins/triton_ascend/driver.py tests/npu/standins/triton_ascend/compiler.py \
        "$triton/triton/backends/npu/"
    cp tests/npu/standins/triton_ascend/extension.py "$triton/triton/language/extra/cann/"
    printf 'Metadata-Version: 2.1\nName: triton-ascend\nVersion: 3.2.2\n' \
        >"$triton/triton_ascend-3.2.2.dist-info/METADATA"
    printf '[triton.backends]\nnpu = triton.backends.npu\n' >"$triton/triton_ascend-3.2.2.dist-info/entry_points.txt"
fi

say "putting them on one path, with the metadata that they ask for"
link() {
    ln -s "../$1-$2/$1" "$stack/site/$1"
    mkdir "$stack/site/$1-$2.dist-info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$(echo "$1" | tr _ -)" "$2" \
        >"$stack/site/$1-$2.dist-info/METADATA"
}
link vllm "$vllm_version"
link vllm_ascend "$ascend_version"
cp "$stack/vllm_ascend-$ascend_version/vllm_ascend.egg-info/entry_points.txt" \
    "$stack/site/vllm_ascend-$ascend_version.dist-info/"
say "writing what builds would have written"
# This package's metadata, with its entry points, as its own build writes it.
mkdir "$stack/metadata"
$python -c 'import sys, setuptools.build_meta as b; b.prepare_metadata_for_build_wheel(sys.argv.pop())' \
    "$stack/metadata" >/dev/null 2>&1
mv "$stack"/metadata/*.dist-info "$stack/site/"
# The device type that vllm-ascend's set-up writes down; here every process may say which.
printf 'import os\n\n__device_type__ = os.environ.get("EMULATED_NPU_DEVICE_TYPE", "A2")\n' \
    >"$stack/vllm_ascend-$ascend_version/vllm_ascend/_build_info.py"
cp tests/npu/standins/vllm_ascend_C.py "$stack/vllm_ascend-$ascend_version/vllm_ascend/"
if [ "$UV_COMPILE_BYTECODE" = 1 ]; then
    $python -m compileall -q -j 2 "$stack"/vllm-*/vllm "$stack"/vllm_ascend-*/vllm_ascend >/dev/null || true
fi
echo "$key" >"$stack/.stamp"
say "done"
