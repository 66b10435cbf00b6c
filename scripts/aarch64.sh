#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the package's C++ for aarch64 and runs it under emulation. It compares the planner's plans with those of this
# machine, and the recording op with its oracle, with the torch that vllm-ascend uses. Then it checks that the same library
# refuses an older torch. All files are in build/aarch64. A result that passed is kept in the folder that EPLB_TEST_CACHE
# names (default: build/test-cache), under a hash of its inputs, and is not repeated.
#
# Needs Debian's packages g++-aarch64-linux-gnu and qemu-user, and installs them if it can. If they cannot be installed,
# the script says so and exits with 0; with AARCH64_REQUIRED=1 it fails.
set -eu

cd "$(dirname "$0")/.."
name=aarch64
venv=.venv
. scripts/setup_common.sh
torch_version=2.10.0
torch_refused=2.9.1
numpy_version=2.3.5
UV_COMPILE_BYTECODE=0 # the Python for aarch64 imports only a few of the modules

skip() {
    [ -z "${AARCH64_REQUIRED:-}" ] || fail "$1"
    say "skipped: $1"
    exit 0
}

# The hash covers all files that this script uses. Plans also depend on the Python of planning/ and values/.
inputs=$(find csrc CMakeLists.txt scripts/aarch64.sh tests/aarch64 tests/unit/load/test_ops.py benchmarks/placements.py benchmarks/loads.py benchmarks/planner_checks.py \
    vllm_ascend_eplb/load/ops.py vllm_ascend_eplb/planning vllm_ascend_eplb/values -type f ! -name '*.pyc' ! -name '*.so' |
    LC_ALL=C sort | while read -r file; do
        echo "$file"
        cat "$file"
    done | cksum | tr ' ' '-')
passed=${EPLB_TEST_CACHE:-build/test-cache}/aarch64-$inputs.txt
if [ -e "$passed" ]; then
    say "unchanged since this passed:"
    cat "$passed"
    exit 0
fi

have() { command -v "$1" >/dev/null; }
[ "$(uname -s)" = Linux ] || skip "this is not Linux"
have apt-get || skip "there is no apt-get to get an aarch64 Python with"
if ! { have aarch64-linux-gnu-g++ && have qemu-aarch64; }; then
    [ "$(id -u)" = 0 ] || skip "install the packages g++-aarch64-linux-gnu and qemu-user"
    say "installing g++-aarch64-linux-gnu and qemu-user"
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user; } \
        >/dev/null 2>&1 </dev/null || skip "apt-get cannot install g++-aarch64-linux-gnu and qemu-user"
fi

here=$PWD/build/aarch64
mkdir -p "$here"
python=$PWD/$venv/bin/python
configure_uv

# A Python for aarch64: Debian's packages are unpacked, which needs no root.
key=$(cat scripts/aarch64.sh | cksum)
if [ "$(cat "$here/.environment.stamp" 2>/dev/null || true)" != "$key" ]; then
    say "unpacking a Python for aarch64, and installing torch $torch_version and $torch_refused for it"
    rm -rf "$here"
    mkdir -p "$here/apt/lists/partial" "$here/apt/archives/partial" "$here/root" "$here/site"
    # The machine's own source of packages, in either of apt's two formats.
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*debian*.sources 2>/dev/null |
        sed -nE 's/^URIs: *([^ ]*debian).*/\1/p; s/^deb (\[[^]]*\] )?([^ ]*debian) .*/\2/p' | head -n 1)
    [ -n "$mirror" ] || skip "apt has no source of Debian's packages"
    echo "deb [arch=arm64] $mirror bookworm main" >"$here/apt/sources.list"
    cat >"$here/apt/apt.conf" <<CONF
Dir::State "$here/apt";
Dir::Cache "$here/apt";
Dir::State::status "/dev/null";
Dir::Etc::SourceList "$here/apt/sources.list";
Dir::Etc::SourceParts "-";
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
CONF
    (
        cd "$here/apt/archives"
        export APT_CONFIG="$here/apt/apt.conf"
        apt-get -qq update &&
            apt-get -qq download libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 \
                libssl3 libsqlite3-0 libuuid1 libcrypt1 libpython3.11-minimal python3.11-minimal \
                libpython3.11-stdlib libpython3.11-dev
    ) >/dev/null 2>&1 || skip "Debian's packages of Python 3.11 for arm64 are not to be had"
    for package in "$here"/apt/archives/*.deb; do dpkg -x "$package" "$here/root"; done
    "$venv/bin/uv" pip install --quiet --python-platform aarch64-manylinux_2_28 --python-version 3.11 \
        --target "$here/site" "torch==$torch_version" "numpy==$numpy_version" \
        $(grep -E '^(pytest|hypothesis)' scripts/requirements-dev.txt) ||
        skip "torch $torch_version for aarch64 is not to be had"
    "$venv/bin/uv" pip install --quiet --python-platform aarch64-manylinux_2_28 --python-version 3.11 \
        --target "$here/site-refused" "torch==$torch_refused" "numpy==$numpy_version" ||
        skip "torch $torch_refused for aarch64 is not to be had"
    echo "$key" >"$here/.environment.stamp"
fi

copy_package() { # FOLDER: the package's Python and the tests, without libraries
    rm -rf "$1"
    mkdir -p "$1"
    cp -r vllm_ascend_eplb tests pyproject.toml "$1/"
    find "$1" -name '*.so' -delete
}

say "building"
package=$here/package
copy_package "$package"
cmake -S . -B "$here/build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-Werror -I$here/root/usr/include" \
    -DEPLB_BUILD_CUDA=OFF -DEPLB_OUTPUT_DIR="$package/vllm_ascend_eplb" \
    -DPython_EXECUTABLE="$python" -DPython_INCLUDE_DIR="$here/root/usr/include/python3.11" \
    -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    >/dev/null
cmake --build "$here/build" --parallel 2 >/dev/null

emulated() { # SITE ARGUMENTS...: Python with the packages in SITE
    (
        site=$1
        shift
        cd "$package"
        PYTHONHOME="$here/root/usr" PYTHONPATH="$package:$site" PYTHONDONTWRITEBYTECODE=1 \
            qemu-aarch64 -L "$here/root" "$here/root/usr/bin/python3.11" "$@"
    )
}

say "plans: here and on aarch64"
PYTHONPATH=$PWD "$python" -m tests.aarch64.plans write "$here/cases.npz"
PYTHONPATH=$PWD "$python" -m tests.aarch64.plans hash "$here/cases.npz" >"$here/plans_here"
emulated "$here/site" -m tests.aarch64.plans hash "$here/cases.npz" >"$here/plans_aarch64"
diff "$here/plans_here" "$here/plans_aarch64" || fail "plans differ"
[ "$(cut -d' ' -f1 "$here/plans_here" | sort -u | wc -l)" -gt 20 ] || fail "the hashes hardly differ from case to case"
plans="$(wc -l <"$here/plans_here") plans are bit-identical"
say "$plans"

if have clang++; then
    say "plans of a build by clang, here"
    copy_package "$here/clang"
    cmake -S . -B "$here/build-clang" -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_FLAGS=-Werror -DEPLB_BUILD_CUDA=OFF \
        -DEPLB_OUTPUT_DIR="$here/clang/vllm_ascend_eplb" -DPython_EXECUTABLE="$python" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
    cmake --build "$here/build-clang" --parallel 2 >/dev/null
    (cd "$here/clang" && PYTHONPATH=$PWD "$python" -m tests.aarch64.plans hash "$here/cases.npz") >"$here/plans_clang"
    diff "$here/plans_here" "$here/plans_clang" || fail "plans of a build by clang differ"
    record=$(cd "$here/clang" && PYTHONPATH=$PWD "$python" -m tests.aarch64.record)
    [ "$record" = "cpu [[1, 2]] [0, 1, 1]" ] || fail "the op of a build by clang: $record"
    plans="$plans, those of a build by clang, too"
else
    say "skipped: there is no clang++ to build with"
fi

say "the recording op beside torch $torch_version"
emulated "$here/site" -m pytest -q -p no:cacheprovider tests/unit/load/test_ops.py \
    -k "oracle or of_every_size or errors_name or leave_no or views_of or any_number" | tee "$here/ops"
op="the recording op beside torch $torch_version: $(tail -n 1 "$here/ops")"
grep -q " passed" "$here/ops" || fail "no test of the op passed"
! grep -qE "(failed|error)" "$here/ops" || fail "the op's tests failed"

say "the same library beside torch $torch_refused, and after the upgrade to $torch_version"
emulated "$here/site-refused" -m tests.aarch64.record >"$here/refused" 2>"$here/refused.err" || fail "$(cat "$here/refused.err")"
emulated "$here/site" -m tests.aarch64.record >"$here/upgraded" 2>"$here/upgraded.err" || fail "$(cat "$here/upgraded.err")"
[ "$(cat "$here/refused")" = "aten [[1, 2]] [0, 1, 1]" ] || fail "beside torch $torch_refused: $(cat "$here/refused")"
[ "$(grep -c 'EPLB records expert load by ATen' "$here/refused.err")" = 1 ] || fail "$(cat "$here/refused.err")"
[ "$(cat "$here/upgraded")" = "cpu [[1, 2]] [0, 1, 1]" ] || fail "after the upgrade: $(cat "$here/upgraded")"
! grep -q EPLB "$here/upgraded.err" || fail "$(cat "$here/upgraded.err")"
say "torch $torch_refused: $(grep -o 'ATen.*' "$here/refused.err")"

mkdir -p "$(dirname "$passed")"
printf '%s\n' "$plans" "$op" "torch $torch_refused is refused with one line, $torch_version serves after it" >"$passed"
