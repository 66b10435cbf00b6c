# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs. scripts/setup_env.sh makes .venv in this checkout once, and all targets use it.
RANKS ?= 4
SOAK_MINUTES ?= 30
PYTHON_FILES := vllm_ascend_eplb tests benchmarks examples setup.py
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
RUN := .venv/bin/python

.PHONY: help setup demo demo-pd test unit-test e2e-test matrix lint format bench soak long-test fuzz docs clean

help:  ## lists the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup:  ## makes .venv and builds the C++ parts
	@scripts/setup_env.sh

demo: setup  ## serves a real model on RANKS ranks (default 4; 2 for small machines) and shows how balancing works
	@$(RUN) -m examples.demo --ranks $(RANKS)

demo-pd: setup  ## the same with a prefill server and a decode server, each balanced by its own settings
	@$(RUN) -m examples.demo.prefill_decode

# Two lanes: one has all engines, the other has the rest, file by file (tests/conftest.py).
LANES := -n 2 --dist loadscope --no-loadscope-reorder
TEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest

test: setup  ## all tests except those on NPUs, including tests with real vLLM engines
	@$(TEST) $(LANES) --tier test -m "not soak and not npu and not install"

unit-test: setup  ## the unit tests
	@$(TEST) $(LANES) --tier unit -m "not soak" tests/unit

e2e-test: setup  ## the tests with real vLLM engines
	@$(TEST) -m "not soak" tests/e2e

.PHONY: install-test aarch64-test python-test
install-test: setup  ## builds in isolation, installs as a user does, and serves from the installed package
	@$(RUN) -m pytest --tier install -m "not soak" tests/install

aarch64-test: setup  ## builds the C++ for aarch64 and runs it under emulation; skipped without Debian's packages
	@scripts/aarch64.sh

python-test: setup  ## the unit tests without torch on Python 3.10 (oldest dependencies), 3.12 and 3.13, if installed
	@scripts/pythons.sh

matrix: setup  ## the tests with real vLLM engines on vLLM 0.30, 0.31 and 0.33, each in its own environment
	@scripts/matrix.sh 0.30.0 0.31.0 0.33.0

.PHONY: npu-setup emulated-npu-test long-emulated-npu-test npu-test
npu-setup:
	@scripts/setup_npu_env.sh
	@scripts/setup_npu_stack.sh

emulated-npu-test: npu-setup  ## the NPU tests: real torch_npu and vllm-ascend on emulated CANN, in .venv-npu
	@NPU_TEST_REQUIRED=1 .venv-npu/bin/python -m pytest --tier npu tests/npu -m "not soak"

long-emulated-npu-test: npu-setup  ## the long NPU tests: more ranks, data-parallel, pipeline stages, draft tokens, W8A8
	@NPU_TEST_REQUIRED=1 .venv-npu/bin/python -m pytest tests/npu -m soak

.PHONY: candidate-npu-test
candidate-npu-test: npu-setup  ## the NPU tests on vllm-ascend 0.30.0rc2 (vLLM 0.30.0), with both of its model runners
	@scripts/setup_npu_stack.sh 0.30.0rc2
	@scripts/candidate_npu_test.sh 0.30.0rc2

npu-test:  ## the NPU tests on this machine's NPUs (two or more); PYTHON=python3 names the Python that has torch_npu
	@NPU_TEST_REQUIRED=1 NPU_TEST_REAL=$(or $(NPU_TEST_REAL),1) $(or $(PYTHON),python3) -m pytest \
	    $(or $(TESTS),tests/npu)

lint: setup  ## ruff, mypy (strict) and clang-format
	@.venv/bin/ruff check $(PYTHON_FILES)
	@.venv/bin/ruff format --check $(PYTHON_FILES)
	@.venv/bin/mypy
	@.venv/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: setup  ## formats everything
	@.venv/bin/ruff check --fix $(PYTHON_FILES)
	@.venv/bin/ruff format $(PYTHON_FILES)
	@.venv/bin/clang-format -i $(CPP_FILES)

bench: setup  ## quick benchmarks; results in build/bench
	@mkdir -p build/bench
	@$(RUN) -m benchmarks.planner --quick --csv build/bench/planner.csv
	@$(RUN) -m benchmarks.planner_checks --quick --json build/bench/planner_checks.json
	@$(RUN) -m benchmarks.record_op --quick --json build/bench/record_op.json
	@$(RUN) -m benchmarks.stall --quick --json build/bench/stall.json

soak: setup  ## serves a model under random faults for SOAK_MINUTES (default 30); the report is in build/soak
	@$(RUN) -m tests.e2e.soak --minutes $(SOAK_MINUTES)

long-test: setup  ## the nightly tier: long tests
	@$(TEST) -m "soak and not npu"

fuzz: setup  ## the planner's C++ boundary under AddressSanitizer and UndefinedBehaviorSanitizer
	@cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DEPLB_BUILD_OPS=OFF \
	    -DEPLB_PLANNER_SANITIZE=ON -DEPLB_OUTPUT_DIR=$(CURDIR)/build/fuzz/out -DPython_EXECUTABLE=$(CURDIR)/$(RUN) \
	    -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir) >/dev/null
	@cmake --build build/fuzz
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 $(RUN) -m tests.unit.planning.planner_fuzz --module build/fuzz/out/_planner*.so

docs:  ## the guide as pages, in build/site; fails on a broken link
	@test -x build/docs-venv/bin/mkdocs || python3 -m venv build/docs-venv
	@build/docs-venv/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet
	@echo build/site/index.html

clean:  ## removes everything that was built, .venv included
	rm -rf .venv .venv-npu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.json demo-pd.json
	rm -f vllm_ascend_eplb/*.so
