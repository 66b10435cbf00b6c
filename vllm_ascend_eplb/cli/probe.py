# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` asks of torch and vLLM, in a process of its own: importing them takes seconds, prints, and may crash.

The last line on standard output is one JSON object that begins with ``MARK``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

MARK = "vllm-ascend-eplb probe: "


def devices() -> dict[str, Any]:
    """Accelerators that torch sees."""
    try:
        import torch
    except Exception as error:  # a torch whose libraries are missing raises what it likes
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
    """Which kernel the recording op has on each device, and why it has none of its own on one."""
    logging.getLogger("vllm.eplb").setLevel(logging.ERROR)  # its warning is told as a finding
    try:
        import torch

        from ..load import ops
    except Exception as error:
        return {"kernels_error": _line(error)}
    devices = ["cpu", *(["cuda"] if torch.version.cuda is not None else [])]
    return {"kernels": {device: ops.kernel_for(device) for device in devices}, "no_kernel": dict(ops.why_not)}


def seams() -> dict[str, Any]:
    """The platform that vLLM chose, and what the adaptor would not find in it."""
    try:
        import vllm
        from vllm.platforms import current_platform

        from ..adaptors.vllm.seams import CHECKED_VERSIONS, SEAMS, is_checked, missing_seams

        platform = str(current_platform.device_type)
        loaded = plugin()
        if platform == "npu":
            return {"vllm_version": str(vllm.__version__), "platform": platform, **loaded, **ascend()}
        return {
            **loaded,
            "vllm_version": str(vllm.__version__),
            "checked": is_checked(vllm.__version__),
            "checked_versions": list(CHECKED_VERSIONS),
            "platform": platform,
            "missing": missing_seams(platform),
            "seams": sum(1 for seam in SEAMS if not seam.platforms or platform in seam.platforms),
        }
    except ModuleNotFoundError as error:
        return {"vllm_error": f"not installed ({error})" if error.name == "vllm" else _line(error)}
    except Exception as error:
        return {"vllm_error": _line(error)}


def plugin() -> dict[str, Any]:
    """Whether vLLM's own loading of plugins puts the balancer in place: asked, not modelled.

    vLLM reads VLLM_PLUGINS, finds the entry points and calls them, as in each of its processes; then the function that
    the plugin hooks is looked at.
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
    """What vllm-ascend is installed, and what the model runner that is chosen does that our adaptor does not know."""
    from vllm.plugins import load_general_plugins

    from ..adaptors.ascend import hand_over as ascend_config
    from ..adaptors.ascend import runner as adaptor
    from ..adaptors.ascend import second_runner as ascend_v2
    from ..adaptors.vllm.seams import missing_seams, not_found

    found: dict[str, Any] = {
        "ascend_version": ascend_config.installed_version(),
        "ascend_checked_versions": list(ascend_config.CHECKED_VERSIONS),
    }
    load_general_plugins()  # vllm-ascend's own, without which its runner cannot be imported
    try:
        importlib.import_module("vllm_ascend.ops")  # before the runner, as the worker does: they import each other
        if ascend_config.second_runner():
            found["ascend_missing"] = [*missing_seams("npu"), *not_found(ascend_v2.SEAMS)]
        else:
            found["ascend_differences"] = adaptor.differences(importlib.import_module(adaptor.RUNNER))
    except Exception as error:
        found["ascend_error"] = _line(error)
    return found


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    answer = {**devices(), **kernels(), **(seams() if "--vllm" in sys.argv else {})}
    print("\n" + MARK + json.dumps(answer), flush=True)
