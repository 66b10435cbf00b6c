# SPDX-License-Identifier: Apache-2.0
"""The balancer inside a vLLM worker: vLLM's MixtureOfExperts protocol on one side, EplbUpdator on the other.

``VllmEplbState`` stands where vLLM's own ``EplbState`` would. The runner's calls become the two verbs of the updator::

    execute_model, _dummy_run ── say what kind of forward begins
    _determine_batch_execution_and_padding (V1), EPLBController.prepare_forward (V2) returned ──> forward_before
    eplb_step (V1), EPLBController.step (V2) ──> forward_end
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...balancer.start import require_equal_start, start_balancer
from ...balancer.updator import EplbUpdator, Stage
from ..handed_over import settings_of
from ..parts import is_drafter
from .adaptor import Slice, VllmAdaptor
from .eplb_state import EplbState
from .loading import loading_anew
from .seams import SeamError

logger = logging.getLogger("vllm.eplb")


@dataclass(frozen=True)
class _Drafter:
    """A second model that runs in the same forwards.

    Attributes:
        model_config: by which its forwards are told from the model's.
        num_unpadded_tokens: int32 [], tokens of its coming forward that are no padding.
        updator: its balancer; None where its placement stays as it is.
    """

    model_config: Any
    num_unpadded_tokens: torch.Tensor
    updator: EplbUpdator | None


def require_loaded_copies(differing: int, load_format: str) -> None:
    """vLLM leaves slots of redundant experts without weights where a checkpoint has all experts of a layer in one
    tensor; tokens that are sent there would be answered wrongly.

    Args:
        differing: experts whose copies differ from each other once the model is loaded.
        load_format: with vLLM's "dummy" every slot gets weights of its own, which is no fault.

    Raises:
        SeamError: copies differ that should not.
    """
    if differing and load_format != "dummy":
        raise SeamError(
            f"copies of {differing} experts differ from each other once the weights are loaded, so tokens would be "
            "answered wrongly: vLLM does not fill redundant slots from a checkpoint with all experts of a layer in one "
            "tensor; set num_redundant_experts to 0, or leave eplb_config out"
        )


class VllmEplbState(EplbState):
    """What a vLLM runner takes for its ``EplbState``: maps and views as there, and the balancer that changes them.

    A drafter with experts is a second model: with maps, counters and a balancer of its own, which steps with the
    model's, since both run in the same forward of the engine.

    Attributes:
        should_record_tensor: bool [1], read by every router of the model.
        num_unpadded_tokens: int32, the tokens that are no padding, of those that this rank routes; one per
            micro-batch.
        slice: the part of each batch that this rank routes.
        sharers: ranks that share each batch.
        updator: the model's balancer; None before a model was added, and where its placement stays as it is.
        drafter: the drafter's; None where there is none with experts.
    """

    is_async = False
    adaptor_class = VllmAdaptor

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        super().__init__(parallel_config, device)
        self.should_record_tensor: torch.Tensor | None = None
        self.num_unpadded_tokens = [torch.zeros((), dtype=torch.int32, device=device)]
        self.updator: EplbUpdator | None = None
        self.drafter: _Drafter | None = None
        self.slice = Slice()
        self.sharers = 1
        self._model: Any = None
        self._adaptor: VllmAdaptor | None = None
        self._rows = 0
        self._began = False
        self._loading = False

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Takes a model in, once its weights are loaded; all ranks together.

        Raises:
            StartError: the ranks were started differently; names rank and field.
            EpConfigurationError: a drafter has another number of experts than the model.
            SeamError: there is such a model already, or redundant slots were left without weights.
        """
        from vllm.config import get_current_vllm_config
        from vllm.distributed.eplb.eplb_state import EplbLayerState

        self.validate_ep_configuration(model)
        vllm_config = get_current_vllm_config()
        name, drafts = model_name or model_config.model, is_drafter(vllm_config, model_config)
        if (self.drafter if drafts else self._adaptor) is not None:
            raise SeamError(
                f"{name} is a second model with experts of its kind; balancing it is not supported in this version: "
                "leave eplb_config or that model out"
            )
        config = settings_of(vllm_config.additional_config)
        adaptor = self.adaptor_class(model, name, self.device, config, is_drafter=drafts)
        tokens = self.num_unpadded_tokens
        if drafts:
            tokens = [torch.zeros((), dtype=torch.int32, device=self.device)]
        for layer in model.moe_layers:
            layer_state = getattr(layer, "eplb_state", None)
            if isinstance(layer_state, EplbLayerState):
                layer_state.should_record_tensor = adaptor.recorder.recording
                layer_state.num_unpadded_tokens_tensors = tokens
        updator = None
        if config.dynamic:
            updator = start_balancer(adaptor, config)
            require_loaded_copies(updator.differing, str(vllm_config.load_config.load_format))
            self.guard(model)
        else:
            require_equal_start(adaptor, config)
        if drafts:
            self.drafter = _Drafter(model_config, tokens[0], updator)
        else:
            self._model, self._adaptor, self.updator = model, adaptor, updator
            self.should_record_tensor = adaptor.recorder.recording
            self.slice = adaptor.slice
            self.sharers = adaptor.sharers
        self.model_states[model_config.compute_hash()] = adaptor.model_state(
            model, lambda: adaptor.placement if updator is None else updator.placement
        )

    def update_mapping(self, model_config: Any, expanded_physical_to_logical: torch.Tensor) -> None:
        """Refused: the weights of a served model are where the balancer put them.

        Raises:
            SeamError: always.
        """
        raise SeamError(
            f"the placement of {model_config.model} cannot be set from outside while it is served, because its weights "
            "would stay where they are; start with expert_map_path, or let the balancer move them"
        )

    def calibrate(self) -> None:
        """Times the model's MoE layers, once it is ready to run and before the KV cache is sized; all ranks together. A
        drafter's are not timed: its plans are weighed by PAR."""
        if self.updator is not None:
            self.updator.calibrate()

    def begin(self) -> None:
        """Warm-up is over on this rank: what comes now are steps. The engine calls it on all ranks before it serves."""
        self._began = True

    def forward_before(self, *, serving: bool, stage: Stage, rows: int, tokens: int = 0) -> None:
        """One step of the balancer, on every rank, before each real or dummy forward of ``rows`` tokens, padding
        included, of which ``tokens`` are a request's."""
        self._rows = rows
        if not self._began:
            return
        if not serving:
            self._no_tokens()
        # The runner works in inference mode; tensors made here live longer than that.
        with torch.inference_mode(False), torch.no_grad():
            for updator in self._updators():
                updator.forward_before(serving=serving, stage=stage, tokens_per_rank=tokens / self.sharers)

    def count_nothing(self) -> None:
        """What follows serves nobody."""
        self._no_tokens()
        for updator in self._updators():
            updator.pause_recording()

    def _no_tokens(self) -> None:
        self.num_unpadded_tokens[0].fill_(0)
        if self.drafter is not None:
            self.drafter.num_unpadded_tokens.fill_(0)

    def _updators(self) -> list[EplbUpdator]:
        both = (self.updator, self.drafter.updator if self.drafter is not None else None)
        return [updator for updator in both if updator is not None]

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: list[Any] | None = None
    ) -> None:
        """How many tokens of the coming batch are no padding; called by the runner, and by its drafter for each of its
        forwards, for real batches."""
        if self.drafter is not None and model_config is self.drafter.model_config:
            self.drafter.num_unpadded_tokens.fill_(num_unpadded_tokens)
            return
        self.num_unpadded_tokens[0].fill_(self.slice.real(num_unpadded_tokens, self._rows))

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        """A forward is over. In a profile run nothing is to be done: staging, checksums and maps were allocated, and
        every connection was used once, when the model was added, so vLLM finds that memory taken when it sizes its KV
        cache. No expert moves there."""
        if self._began and not is_profile:
            for updator in self._updators():
                updator.forward_end()

    @contextlib.contextmanager
    def new_weights(self) -> Iterator[None]:
        """Around vLLM's loading of other weights, on all workers of an engine.

        Raises:
            RuntimeError: the server has several engines: each gets the call at another step, so their ranks, which
                share the experts, cannot go back to the initial placement together. Or there is a drafter with
                experts, which vLLM does not load anew.
        """
        if self.drafter is not None:
            raise RuntimeError(
                "reload_weights with a draft model that has experts is not supported together with balancing; restart "
                "the server, or leave eplb_config out"
            )
        if self.parallel_config.data_parallel_size > 1:
            raise RuntimeError(
                f"reload_weights with --data-parallel-size {self.parallel_config.data_parallel_size} is not supported "
                "together with balancing (allowed: 1); restart the server, or leave eplb_config out"
            )
        anew = contextlib.nullcontext() if self._adaptor is None else loading_anew(self._model, self._adaptor.rank)
        with contextlib.nullcontext() if self.updator is None else self.updator.new_weights(), anew:
            self._loading = True
            try:
                yield
            finally:
                self._loading = False

    def guard(self, model: Any) -> None:
        """From now on refuses weights that come past ``new_weights``: vLLM would load them into the wrong slots."""
        load = model.load_weights

        @functools.wraps(load)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            if not self._loading:
                raise RuntimeError(
                    "weights were given to the model while its experts are being balanced, so they would get into "
                    "wrong slots: use the worker's reload_weights, or leave eplb_config out"
                )
            return load(*args, **kwargs)

        model.load_weights = load_weights

    def start_async_loop(self) -> None:
        """vLLM's own state starts a thread here; ours has what it needs."""

    def close(self) -> None:
        for updator in self._updators():
            updator.close()
