# SPDX-License-Identifier: Apache-2.0
"""The worker that vLLM runs in place of its own while the balancer is on: the same class, with the balancer in it.

vLLM finds its worker by name (``parallel_config.worker_cls``). ``worker_class_name`` gives a name in this module that
stands for a worker class of vLLM's, or of anybody's, and is resolved in the worker's process only.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger("vllm.eplb")

_PREFIX = "Eplb:"


def worker_class_name(base: str) -> str:
    """A name for ``worker_cls`` that stands for the class ``base`` (qualified name) with the balancer in it."""
    return base if base.startswith(__name__) else f"{__name__}.{_PREFIX}{base.replace('.', '/')}"


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return _balanced(resolve_obj_by_qualname(name.removeprefix(_PREFIX).replace("/", ".")))


@functools.cache
def _balanced(base: type) -> type:
    """A subclass of the worker class ``base`` that balances."""

    class EplbWorker(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            from . import vllm

            vllm.take_over()
            super().__init__(*args, **kwargs)

        def init_device(self) -> None:
            from .vllm import hook_runner

            super().init_device()
            hook_runner(self.model_runner)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            from .vllm import ensure_state, require_known_slice, start_placement
            from .vllm_loading import loading_by

            with loading_by(functools.partial(start_placement, self.vllm_config)):
                super().load_model(*args, **kwargs)
            ensure_state(self.model_runner, self.vllm_config)
            require_known_slice(self.model_runner)

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            state = getattr(self.model_runner, "eplb_state", None)
            if state is not None:
                state.begin()
            return result

        def reload_weights(self, *args: Any, **kwargs: Any) -> None:
            with self.model_runner.eplb_state.new_weights():
                super().reload_weights(*args, **kwargs)

        def shutdown(self) -> None:
            state = getattr(getattr(self, "model_runner", None), "eplb_state", None)
            if state is not None:
                state.close()
            super().shutdown()

    EplbWorker.__name__ = EplbWorker.__qualname__ = f"Eplb{base.__name__}"
    return EplbWorker
