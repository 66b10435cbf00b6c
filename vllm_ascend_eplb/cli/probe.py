# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` asks of torch and vLLM, in a process of its own: importing them takes seconds, prints, and may crash.

The last line on standard output is one JSON object that begins with ``MARK``.
"""

from __future__ import annotations

import importlib
import json
import sys
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


def patch_points() -> dict[str, Any]:
    """The platform that vLLM chose, and the patch points that it is missing."""
    try:
        import vllm
        from vllm.platforms import current_platform

        from ..adaptors.vllm.patch_points import missing_patch_points, points_on
        from ..adaptors.vllm.sources import installed_root
        from ..adaptors.vllm.versions import CHECKED_VERSIONS, verdict

        platform = str(current_platform.device_type)
        if platform == "npu":
            return {"vllm_version": str(vllm.__version__), "platform": platform, **ascend()}
        said = verdict(vllm.__version__, platform, installed_root())
        return {
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


def ascend() -> dict[str, Any]:
    """The version of vllm-ascend, and how the chosen model runner differs from the one that our adaptor knows."""
    from vllm.plugins import load_general_plugins

    from ..adaptors.ascend import hand_over, runner, second_runner
    from ..adaptors.vllm.patch_points import missing_patch_points, not_found

    found: dict[str, Any] = {
        "ascend_version": hand_over.installed_version(),
        "ascend_checked_versions": list(hand_over.CHECKED_VERSIONS),
    }
    load_general_plugins()  # those of vllm-ascend, without which its runner cannot be imported
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


if __name__ == "__main__":
    answer = {**devices(), **(patch_points() if "--vllm" in sys.argv else {})}
    print("\n" + MARK + json.dumps(answer), flush=True)
