#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Unpacks vllm-ascend and the vLLM that it pairs with into build/stack, for tests of the adaptor: pure Python, nothing is
# compiled and nothing in them is changed. Run scripts/setup_npu_env.sh first; takes the same environment variables.
# Idempotent.
set -eu

cd "$(dirname "$0")/.."
name=setup-stack
venv=.venv-npu
vllm_version=0.23.0
ascend_version=0.23.0.post1
. scripts/setup_common.sh

[ -e .venv-npu/.environment.stamp ] || fail "no .venv-npu here; run scripts/setup_npu_env.sh first"
key=$({
    pwd
    cat scripts/setup_npu_stack.sh .venv-npu/.environment.stamp pyproject.toml tests/npu/standins/vllm_ascend_C.py
} | cksum)
lock_environment
if [ "$(cat build/stack/.stamp 2>/dev/null || true)" = "$key" ]; then exit 0; fi
rm -rf build/stack
mkdir -p build/stack/site

export TORCH_DEVICE_BACKEND_AUTOLOAD=0
python=.venv-npu/bin/python
configure_uv

say "fetching the sources of vllm $vllm_version and vllm-ascend $ascend_version"
uv pip install --quiet setuptools_scm "setuptools>=77,<81" setuptools-rust wheel packaging jinja2 cmake pybind11
# pip asks a source distribution for its metadata before it hands it over; these variables keep it from compiling.
VLLM_VERSION_OVERRIDE=$vllm_version VLLM_TARGET_DEVICE=empty .venv-npu/bin/python -m pip download --quiet --no-deps \
    --disable-pip-version-check --no-build-isolation --no-binary :all: -d build/stack "vllm==$vllm_version"
COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b3 .venv-npu/bin/python -m pip download --quiet --no-deps \
    --disable-pip-version-check --no-build-isolation --no-binary :all: -d build/stack "vllm-ascend==$ascend_version"
for archive in build/stack/*.tar.gz; do tar -xzf "$archive" -C build/stack; done
rm build/stack/*.tar.gz

say "installing what they import"
cat >build/stack/overrides.txt <<END
torch==2.13.0+cpu
numpy<2.4
torchvision ; python_version < "3"
torchaudio ; python_version < "3"
triton ; python_version < "3"
END
{
    cat "build/stack/vllm-$vllm_version/requirements/common.txt"
    printf '%s\n' transformers==5.5.4 'fastapi<0.124.0' pandas msgpack quart numba
} >build/stack/requirements.txt
uv pip install --quiet --overrides build/stack/overrides.txt -r build/stack/requirements.txt

say "putting them on one path, with the metadata that they ask for"
link() {
    ln -s "../$1-$2/$1" "build/stack/site/$1"
    mkdir "build/stack/site/$1-$2.dist-info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$(echo "$1" | tr _ -)" "$2" \
        >"build/stack/site/$1-$2.dist-info/METADATA"
}
link vllm "$vllm_version"
link vllm_ascend "$ascend_version"
cp "build/stack/vllm_ascend-$ascend_version/vllm_ascend.egg-info/entry_points.txt" \
    "build/stack/site/vllm_ascend-$ascend_version.dist-info/"
say "writing what builds would have written"
# This package's metadata, with its entry points, as its own build writes it.
mkdir build/stack/metadata
$python -c 'import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel("build/stack/metadata")' >/dev/null 2>&1
mv build/stack/metadata/*.dist-info build/stack/site/
# The device type that vllm-ascend's set-up writes down; here every process may say which.
printf 'import os\n\n__device_type__ = os.environ.get("EMULATED_NPU_DEVICE_TYPE", "A2")\n' \
    >"build/stack/vllm_ascend-$ascend_version/vllm_ascend/_build_info.py"
cp tests/npu/standins/vllm_ascend_C.py "build/stack/vllm_ascend-$ascend_version/vllm_ascend/"
if [ "$UV_COMPILE_BYTECODE" = 1 ]; then
    $python -m compileall -q -j 2 build/stack/vllm-*/vllm build/stack/vllm_ascend-*/vllm_ascend >/dev/null || true
fi
echo "$key" >build/stack/.stamp
say "done"
