# SPDX-License-Identifier: Apache-2.0
"""Hooks into vLLM's model runners: what kind of forward begins, and the one point of each step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from ...balancer.updator import Stage
from .seams import SeamError


def require_known_slice(runner: Any) -> None:
    """The V2 runner does not say how long a batch is with padding, so nobody knows which slice of it is whose.

    Raises:
        SeamError: MoE layers are sequence-parallel with that runner.
    """
    state = runner.eplb_state
    if state is not None and state.slice.parts > 1 and not hasattr(runner, "_determine_batch_execution_and_padding"):
        raise SeamError(
            "--tensor-parallel-size with --data-parallel-size is not supported with vLLM's V2 model runner in this "
            "version; set VLLM_USE_V2_MODEL_RUNNER=0, or use one of the two"
        )


def hook_runner(runner: Any) -> None:
    """Calls ``forward_before`` at the one right point of real and dummy forwards of a runner.

    The point is behind vLLM's data-parallel collective of that forward, so that the communicators are entered in the
    same order on ranks with and without requests, and before the model runs. In V1 it is directly behind
    ``_determine_batch_execution_and_padding``, in V2 behind ``EPLBController.prepare_forward``.

    Raises:
        SeamError: the runner is of neither kind.
    """
    forwards = _Forwards(runner)
    if hasattr(runner, "_determine_batch_execution_and_padding"):
        runner._determine_batch_execution_and_padding = forwards.step_after(
            runner._determine_batch_execution_and_padding
        )
    elif hasattr(getattr(runner, "eplb", None), "prepare_forward"):
        runner.eplb.prepare_forward = forwards.step_after(runner.eplb.prepare_forward)
    else:
        raise SeamError(
            f"{type(runner).__name__} is neither vLLM's V1 nor its V2 runner; balancing others is not supported: leave "
            "eplb_config out"
        )
    runner.execute_model = forwards.real(runner.execute_model)
    runner._dummy_run = forwards.dummy(runner._dummy_run)


class _Forwards:
    """Knows, from the runner's two ways in, what forward has begun and has not reached the point of its step yet."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._begun: tuple[bool, Stage, int] | None = None
        self._in_dummy = False

    def step_after(self, original: Any) -> Any:
        """``original``, and after it one step of the balancer if a forward has begun."""

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
            if self._in_dummy:  # V2's dummy run is an execute_model of its own
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
                if skip_eplb or is_profile:  # profiling, warm-up and capturing are no steps
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
        """Tokens of a request in a decode step; V1 and V2 have different names for it."""
        runner = self._runner
        v1 = getattr(runner, "uniform_decode_query_len", None)
        return int(v1 if v1 is not None else runner.decode_query_len)


def _stage_of(scheduler_output: Any, decode_tokens: int) -> Stage:
    """A batch in which no request has more tokens than a decode step gives it only decodes."""
    most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
    return "prefill" if most > decode_tokens else "decode"
