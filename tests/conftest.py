# SPDX-License-Identifier: Apache-2.0
"""Hooks and fixtures for all tests: two lanes, durations of a tier, temporary files, log capture."""

import contextlib
import logging
import multiprocessing.util
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tests.cache import folder

with contextlib.suppress(ImportError):  # tests on real NPUs run without it
    import hypothesis

    hypothesis.settings.register_profile("busy machine", deadline=None)  # tests must pass on a slow machine
    hypothesis.settings.load_profile("busy machine")

# A shell makes a background job ignore Ctrl-C, and its children inherit that. Tests interrupt programs, so Ctrl-C must
# work however the tests were started.
signal.signal(signal.SIGINT, signal.default_int_handler)


BUDGETS = {"unit": 90, "test": 900, "npu": 600, "install": 180}
"""Seconds that a tier may take on two idle cores. No test fails if it takes longer."""

ROOT = Path(__file__).parents[1]
BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=sorted(BUDGETS), help="keep durations in build/durations-TIER.txt")


ENGINES = "tests/e2e/"
FREE_ENGINES = ("test_prefill_decode.py", "test_sequence_parallel.py", "test_updates.py")
"""Modules whose engines no other module uses, and whose tests do not depend on how fast a planner is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines come first: theirs is the longer of the two lanes. The free ones come last, to the lane that is done."""
    items.sort(key=lambda item: (lane(item.nodeid) != "engines", lane(item.nodeid).startswith(ENGINES)))


def lane(test: str) -> str:
    """What is run by one worker, in order: all engines but the free ones, else a file. Two engines at once starve each
    other's planner on two cores."""
    path = test.split("::")[0]
    return "engines" if path.startswith(ENGINES) and not path.endswith(FREE_ENGINES) else path


@pytest.hookimpl(optionalhook=True)  # tests on NPUs run without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Two workers (pytest -n 2): one has all engines, the other takes file by file. xdist's own groups (--dist
    loadgroup) are lost with pytest 9.2, without a word."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return Lanes(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tier = config.getoption("--tier")
    if tier is None:
        return
    found = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = sorted((item for item in found if isinstance(item, pytest.TestReport)), key=lambda item: -item.duration)
    seconds = time.monotonic() - BEGAN
    line = f"tier {tier}: {seconds:.0f} s of {BUDGETS[tier]} s"
    lanes = {"engines": 0.0, "the rest": 0.0}
    for report in reports:
        lanes["engines" if lane(report.nodeid) == "engines" else "the rest"] += report.duration
    lines = [f"lanes: {', '.join(f'{name} {spent:.0f} s' for name, spent in lanes.items())}"]
    lines += [f"{report.duration:8.2f} s {report.when:8} {report.nodeid}" for report in reports[:25]]
    path = ROOT / "build" / f"durations-{tier}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([line, *lines]) + "\n")
    terminalreporter.write_line(line + (" (over its budget)" if seconds > BUDGETS[tier] else ""))


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let programs under test put temporary files (vLLM's sockets, flight records) into pytest's folder, which pytest
    removes when all tests pass. Inductor keeps what it compiles, because its C++ takes 15 s. It precompiles no headers,
    because it would do so for every folder of temporary files."""
    multiprocessing.util.get_temp_dir()  # make this process's own folder before: it is removed at exit
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder() / "inductor")
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog see our loggers: after vLLM is imported, the logger "vllm" above them no longer propagates."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
