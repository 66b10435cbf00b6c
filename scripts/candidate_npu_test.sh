#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the tests on NPUs with a release candidate of vllm-ascend, with its first and then with its second model runner.
# The second half also runs if the first half failed. The times of both halves and their sum are printed, and written to
# build/durations-candidate.txt.
#
#   scripts/candidate_npu_test.sh 0.30.0rc2 [PYTEST ARGUMENT...]
set -eu

cd "$(dirname "$0")/.."
version=$1
shift
failed=
times=
mkdir -p build

half() { # RUNNER TEST FILES, PYTEST ARGUMENTS...
    runner=$1
    shift
    began=$(date +%s)
    NPU_TEST_REQUIRED=1 NPU_TEST_ASCEND=$version NPU_TEST_RUNNER=$runner .venv-npu/bin/python -m pytest "$@" ||
        failed="$failed $runner"
    times="$times, $runner $(($(date +%s) - began)) s"
}

start=$(date +%s)
served="tests/npu/test_serving.py tests/npu/test_serving_ways.py tests/npu/test_serving_drafts.py
tests/npu/test_serving_modes.py tests/npu/test_serving_quantised.py tests/npu/test_doctor.py"
# shellcheck disable=SC2086 # several files
half V1 tests/npu/test_ascend.py $served "$@"
# shellcheck disable=SC2086
half V2 tests/npu/test_second_runner.py $served "$@"
echo "vllm-ascend $version: $(($(date +%s) - start)) s$times" | tee build/durations-candidate.txt
[ -z "$failed" ] || { echo "failed with model runner:$failed" >&2 && exit 1; }
