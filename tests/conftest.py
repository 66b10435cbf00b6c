# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

import contextlib
import logging
import multiprocessing.util
import os
import signal
import tempfile

import pytest

with contextlib.suppress(ImportError):  # those on real NPUs do without it
    import hypothesis

    hypothesis.settings.register_profile("busy machine", deadline=None)  # no test depends on how long something takes
    hypothesis.settings.load_profile("busy machine")

# A shell that starts a job in the background makes it ignore Ctrl-C, and its children inherit that. Tests interrupt
# programs, so they must not depend on how they were started themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests start leaves its temporary files (vLLM's sockets, records of last steps) in pytest's folder, which
    goes when all pass."""
    multiprocessing.util.get_temp_dir()  # this process's own, which it removes at its very end
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once vLLM is imported, its loggers, ours below them, end at its own handler."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
