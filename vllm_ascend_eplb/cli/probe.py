# SPDX-License-Identifier: Apache-2.0
"""Asks torch and vLLM for ``doctor``, in a process of its own: importing them takes seconds, prints, and may crash.

``python -m vllm_ascend_eplb.cli.probe [--stacks-after SECONDS] [--vllm [-- ARGUMENTS OF A SERVER]]``. The last line on
standard output is ``MARK`` and one JSON object. After ``--stacks-after`` seconds the process writes the stacks of all
threads to standard error, so that the cause of a hang is seen.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from .finding import MARK

STACKS_AFTER_SECONDS = 120.0


def devices() -> dict[str, Any]:
    """Accelerators that torch sees."""
    try:
        import torch
    except Exception as error:  # a torch with missing libraries raises errors of many types
        return {"torch_error": _line(error)}
    found: dict[str, Any] = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0, "npu": 0}
    try:
        import torch_npu  # type: ignore[import-not-found, unused-ignore]  # noqa: F401

        found["npu"] = torch.get_device_module("npu").device_count()
    except ModuleNotFoundError:
        pass
    except Exception as error:
        found["npu_error"] = _line(error)
    return found


def kernels() -> dict[str, Any]:
    """The kernel of the recording op on each device, and the reason if it has none of its own."""
    logging.getLogger("vllm.eplb").setLevel(logging.ERROR)  # the warning becomes a finding
    try:
        import torch

        from ..load import ops
    except Exception as error:
        return {"kernels_error": _line(error)}
    devices = ["cpu", *(["cuda"] if torch.version.cuda is not None else [])]
    return {"kernels": {device: ops.kernel_for(device) for device in devices}, "no_kernel": dict(ops.why_not)}


def patch_points() -> dict[str, Any]:
    """The platform that vLLM chose, and the patch points that are missing."""
    try:
        import vllm
        from vllm.platforms import current_platform

        from ..adaptors.vllm.patch_points import missing_patch_points, points_on
        from ..adaptors.vllm.sources import installed_root
        from ..adaptors.vllm.versions import CHECKED_VERSIONS, verdict

        platform = str(current_platform.device_type)
        loaded = plugin()
        if platform == "npu":
            return {"vllm_version": str(vllm.__version__), "platform": platform, **loaded, **ascend()}
        said = verdict(vllm.__version__, platform, installed_root())
        return {
            **loaded,
            "vllm_version": str(vllm.__version__),
            "checked": said.balances,
            "warning": said.warning,
            "checked_versions": list(CHECKED_VERSIONS),
            "platform": platform,
            "missing": missing_patch_points(platform),
            "patch_points": len(points_on(platform)),
        }
    except ModuleNotFoundError as error:
        return {"vllm_error": f"not installed ({error})" if error.name == "vllm" else _line(error)}
    except Exception as error:
        return {"vllm_error": _line(error)}


def plugin() -> dict[str, Any]:
    """Whether vLLM's own loading of plugins puts the balancer in place.

    vLLM reads VLLM_PLUGINS, finds the entry points and calls them, as in each of its processes. Afterwards the function
    that the plugin hooks is checked.
    """
    found: dict[str, Any] = {"plugin_in_place": False}
    try:
        from vllm import envs
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        found["plugins_named"] = envs.VLLM_PLUGINS
        load_general_plugins()
        found["plugin_in_place"] = _is_ours(EngineArgs.create_engine_config)
    except Exception as error:  # of this plugin or another one
        found["plugin_error"] = _line(error)
    return found


def _is_ours(function: Any) -> bool:
    """Whether a function, or one that it wraps, was made by this package."""
    folder = str(Path(__file__).resolve().parent.parent)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and os.path.realpath(code.co_filename).startswith(folder + os.sep):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def ascend() -> dict[str, Any]:
    """The version of vllm-ascend, and differences of the chosen model runner from the one that our adaptor knows."""
    from vllm.plugins import load_general_plugins

    from ..adaptors.ascend import hand_over, runner, second_runner
    from ..adaptors.vllm.patch_points import missing_patch_points, not_found

    found: dict[str, Any] = {
        "ascend_version": hand_over.installed_version(),
        "ascend_checked_versions": list(hand_over.CHECKED_VERSIONS),
    }
    load_general_plugins()  # vllm-ascend's runner cannot be imported without its plugins
    try:
        importlib.import_module("vllm_ascend.ops")  # before the runner, as the worker does: they import each other
        if hand_over.second_runner():
            found["ascend_missing"] = [*missing_patch_points("npu"), *not_found(second_runner.PATCH_POINTS)]
        else:
            found["ascend_differences"] = runner.differences(importlib.import_module(runner.RUNNER))
    except Exception as error:
        found["ascend_error"] = _line(error)
    return found


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(words: list[str]) -> None:
    behind = "--" in words
    at = words.index("--") if behind else len(words)
    parser = argparse.ArgumentParser()
    parser.add_argument("--stacks-after", type=float, default=STACKS_AFTER_SECONDS)
    parser.add_argument("--vllm", action="store_true")
    options = parser.parse_args(words[:at])
    faulthandler.dump_traceback_later(options.stacks_after)
    if behind:
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"  # the balancer's log lines become findings
    answer = {**devices(), **kernels(), **(patch_points() if options.vllm else {})}
    if behind and "platform" in answer:
        from .probe_server import ask_server

        answer["server"] = ask_server(words[at + 1 :])
    print("\n" + MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
