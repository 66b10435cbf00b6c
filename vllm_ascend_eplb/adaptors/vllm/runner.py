# SPDX-License-Identifier: Apache-2.0
"""Hooks into the model runners of vLLM: the kind of forward that begins, and the point of its step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from ...balancer.updator import Stage
from ..errors import PatchPointError, UnsupportedError
from ..patching import patch_once


def require_known_slice(runner: Any) -> None:
    """Refuses sequence-parallel MoE layers with the V2 runner, which does not tell the padded length of a batch.

    Raises:
        UnsupportedError: the runner is V2 and each rank routes a slice of a batch.
    """
    state = runner.eplb_state
    if state is not None and state.slice.parts > 1 and not hasattr(runner, "_determine_batch_execution_and_padding"):
        raise UnsupportedError(
            "--tensor-parallel-size with --data-parallel-size is not supported with vLLM's V2 model runner in this "
            "version; set VLLM_USE_V2_MODEL_RUNNER=0, or use one of the two"
        )


def hook_runner(runner: Any) -> None:
    """Calls ``forward_before`` at the same point of real and dummy forwards of a runner.

    The point is after the data-parallel collective of the forward and before the model runs, so that ranks with and
    without requests enter the communicators in the same order. In V1 it is directly after
    ``_determine_batch_execution_and_padding``, in V2 after ``EPLBController.prepare_forward``.

    Raises:
        PatchPointError: the runner is neither V1 nor V2.
    """
    forwards = _Forwards(runner)
    if hasattr(runner, "_determine_batch_execution_and_padding"):
        patch_once(runner, "_determine_batch_execution_and_padding", forwards.step_after)
    elif hasattr(getattr(runner, "eplb", None), "prepare_forward"):
        patch_once(runner.eplb, "prepare_forward", forwards.step_after)
    else:
        raise PatchPointError(
            f"{type(runner).__name__} is neither vLLM's V1 nor its V2 runner; balancing others is not supported: leave "
            "eplb_config out"
        )
    patch_once(runner, "execute_model", forwards.real)
    patch_once(runner, "_dummy_run", forwards.dummy)


class _Forwards:
    """The forward that has begun and has not reached the point of its step yet."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._begun: tuple[bool, Stage, int] | None = None
        self._in_dummy = False

    def step_after(self, original: Any) -> Any:
        """Wraps ``original``: after it, one step of the balancer if a forward has begun."""

        @functools.wraps(original)
        def then_step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            begun, self._begun = self._begun, None
            if begun is not None and self._runner.eplb_state is not None:
                serving, stage, tokens = begun
                rows = getattr(result[1], "num_tokens", 0) if isinstance(result, tuple) else 0  # V2 does not say
                self._runner.eplb_state.forward_before(serving=serving, stage=stage, rows=rows, tokens=tokens)
            return result

        return then_step

    def real(self, execute: Any) -> Any:
        @functools.wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self._in_dummy:  # the dummy run of V2 calls execute_model
                return execute(scheduler_output, *args, **kwargs)
            tokens = int(scheduler_output.total_num_scheduled_tokens)
            with self._forward(True, _stage_of(scheduler_output, self._decode_tokens()), tokens):
                return execute(scheduler_output, *args, **kwargs)

        return execute_model

    def dummy(self, original: Any) -> Any:
        @functools.wraps(original)
        def dummy_run(*args: Any, skip_eplb: bool = False, is_profile: bool = False, **kwargs: Any) -> Any:
            if self._runner.eplb_state is not None:
                self._runner.eplb_state.count_nothing()
            self._in_dummy = True
            try:
                if skip_eplb or is_profile:  # profiling, warm-up and capturing are not steps
                    return original(*args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)
                with self._forward(False, "decode"):
                    return original(*args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)
            finally:
                self._in_dummy = False

        return dummy_run

    @contextlib.contextmanager
    def _forward(self, serving: bool, stage: Stage, tokens: int = 0) -> Iterator[None]:
        self._begun = (serving, stage, tokens)
        try:
            yield
        finally:
            self._begun = None

    def _decode_tokens(self) -> int:
        """Tokens of a request in a decode step, under the name of V1 or of V2."""
        runner = self._runner
        v1 = getattr(runner, "uniform_decode_query_len", None)
        return int(v1 if v1 is not None else runner.decode_query_len)


def _stage_of(scheduler_output: Any, decode_tokens: int) -> Stage:
    """Decode where no request has more tokens than a decode step gives it, else prefill."""
    most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
    return "prefill" if most > decode_tokens else "decode"
