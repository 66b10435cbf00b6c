# SPDX-License-Identifier: Apache-2.0
"""The core knows nothing of an engine, and the planner's side nothing of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_ascend_eplb

CORE = """
    checksum config control cycle load maps ops placement plans policy process rounds stats topology transfer
    transport transport_collective transport_pull updator adaptors.base plugin post_import
"""
PLANNER_SIDE = "placement plans policy process rounds topology"

CODE = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module("vllm_ascend_eplb." + name)
print(sorted(name for name in ("vllm", "torch_npu", "vllm_ascend", "torch") if name in sys.modules))
"""


def imported_by(modules: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", CODE, modules], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_the_core_imports_no_engine():
    assert imported_by(CORE) == "['torch']"


def test_the_planners_side_imports_no_torch():
    assert imported_by(PLANNER_SIDE) == "[]"


def test_the_check_can_fail():
    assert imported_by("load") == "['torch']"


@pytest.mark.parametrize("name", ["plan", "dispatch_shares", "Placement"])
def test_public_names(name):
    assert callable(getattr(vllm_ascend_eplb, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vllm_ascend_eplb.no_such_name


def loggers(source):
    """Names of the loggers that it asks for; None where the name is worked out."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger":
            yield call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None


def test_every_logger_is_one_that_a_server_shows():
    """vLLM gives handlers to the loggers under its own name only; what becomes of others depends on the release."""
    package = Path(vllm_ascend_eplb.__file__).parent
    names = [(path.name, name) for path in package.rglob("*.py") for name in loggers(path.read_text())]
    assert len(names) > 10
    assert [each for each in names if not str(each[1]).startswith("vllm.eplb")] == []
    assert list(loggers("import logging\nlogging.getLogger(__name__)")) == [None]
