# SPDX-License-Identifier: Apache-2.0
"""The balancer inside a vLLM worker: vLLM's MixtureOfExperts protocol on one side, EplbUpdator on the other.

``VllmEplbState`` takes the place of vLLM's own ``EplbState``. The calls of the runner become the two verbs of the
updator::

    execute_model, _dummy_run ── note the kind of forward that begins
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

from ...agreement.exchange import exchange_bytes
from ...agreement.meeting import MEETING_SECONDS, MeetingPoint
from ...balancer.start import map_recorder, require_equal_start, start_balancer
from ...balancer.updator import EplbUpdator, Stage
from ...files.map_recorder import MapRecorder
from ..engine_adaptor import require_loaded_copies
from ..errors import UnsupportedError
from ..handed_over import settings_of
from ..parts import is_draft
from ..patching import patch_once
from ..readers import LoadedOrder, guard_model, modules_with_experts
from .adaptor import RealTokens, Slice, VllmAdaptor
from .cooperative import cooperative_kernels
from .eplb_state import ModelStates
from .loading import reloading

logger = logging.getLogger("vllm.eplb")


@dataclass(frozen=True)
class _Draft:
    """The draft model, which runs in the same forwards.

    Attributes:
        model_config: tells its forwards from those of the model.
        tokens: of its next forward.
        updator: its balancer; None with a static placement.
    """

    model_config: Any
    tokens: RealTokens
    updator: EplbUpdator | None


class VllmEplbState(ModelStates):
    """Replaces vLLM's ``EplbState`` in a runner: the same maps and views, and the balancer that changes them.

    A draft model with experts has maps, counters and a balancer of its own. It steps together with the model's
    balancer, because both models run in the same forward of the engine.

    Attributes:
        should_record_tensor: bool [1], read by every router of the model.
        tokens: that this rank routes, by micro-batch.
        slice: the part of each batch that this rank routes.
        parts_of_batch: ranks over which each batch is spread.
        updator: the balancer of the model; None before a model was added, and with a static placement.
        draft: the draft model with experts, or None.
        meeting: where the ranks of all engines come together; None before they did.
    """

    is_async = False
    adaptor_class = VllmAdaptor

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        super().__init__(parallel_config, device)
        self.should_record_tensor: torch.Tensor | None = None
        micro_batches = max(1, parallel_config.num_ubatches)  # 0 if batches are not split
        self.tokens = [RealTokens(device) for _ in range(micro_batches)]
        self.updator: EplbUpdator | None = None
        self.draft: _Draft | None = None
        self.slice = Slice()
        self.parts_of_batch = 1
        self.model: Any = None
        self.adaptor: VllmAdaptor | None = None
        self._rows = 0
        self._began = False
        self._loading = False
        self.loaded = LoadedOrder()
        self.meeting: MeetingPoint | None = None
        self._update: contextlib.ExitStack | None = None
        self._gone = False
        self._maps: MapRecorder | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Adds a model once its weights are loaded; all ranks call it together.

        Raises:
            StartError: the ranks were started differently; the message names rank and field.
            EpConfigurationError: the draft model has another number of experts than the model.
            UnsupportedError: there is such a model already, or redundant slots were left without weights.
        """
        from vllm.config import get_current_vllm_config
        from vllm.distributed.eplb.eplb_state import EplbLayerState

        self.validate_ep_configuration(model)
        vllm_config = get_current_vllm_config()
        name, drafts = model_name or model_config.model, is_draft(vllm_config, model_config)
        if (self.draft if drafts else self.adaptor) is not None:
            raise UnsupportedError(
                f"{name} is a second {'draft model' if drafts else 'model'} with experts; balancing it is not "
                "supported in this version: leave eplb_config or that model out"
            )
        config = settings_of(vllm_config.additional_config)
        adaptor = self.adaptor_class(model, name, self.device, config, is_draft=drafts)
        adaptor.cooperative_kernels = bool(cooperative_kernels(vllm_config))
        tokens = [RealTokens(self.device)] if drafts else self.tokens
        for layer in model.moe_layers:
            layer_state = getattr(layer, "eplb_state", None)
            if isinstance(layer_state, EplbLayerState):
                layer_state.should_record_tensor = adaptor.recorder.recording
                layer_state.num_unpadded_tokens_tensors = [part.tensor for part in tokens]
        updator = None
        if config.dynamic:
            maps = self._maps = self._maps or map_recorder(config)  # runners add both models in either order
            recorder = maps and (maps.of_draft_model if drafts else maps.of_model)(adaptor.placement)
            updator = start_balancer(adaptor, config, recorder)
            require_loaded_copies(updator.differing, str(vllm_config.load_config.load_format))
        else:
            require_equal_start(adaptor, config)
        by_map, experts = config.expert_map_path is not None, adaptor.expert_tensors()
        self.loaded.add(adaptor.placement, updator, by_map=by_map, experts=experts)
        if updator is not None:
            self.guard(model)
        if drafts:
            self.draft = _Draft(model_config, tokens[0], updator)
        else:
            self.model, self.adaptor, self.updator = model, adaptor, updator
            self.should_record_tensor = adaptor.recorder.recording
            self.slice = adaptor.slice
            self.parts_of_batch = adaptor.parts_of_batch
        self.model_states[model_config.compute_hash()] = adaptor.model_state(
            model, lambda: adaptor.placement if updator is None else updator.placement
        )

    def calibrate(self) -> None:
        """Times the MoE layers of the model, when it is ready to run and before the KV cache is sized; all ranks
        together. Layers of a draft model are not timed: plans for them are weighed by PAR."""
        if self.updator is not None:
            self.updator.calibrate()

    def begin(self) -> None:
        """Counts steps from now on: warm-up is over. The engine calls it on all ranks before it serves."""
        self._began = True

    def forward_before(self, *, serving: bool, stage: Stage, rows: int, tokens: int = 0) -> None:
        """Does one step of the balancer, on every rank, before each real or dummy forward.

        Args:
            rows: tokens of the batch, padding included; 0 if the runner does not tell.
            tokens: tokens of requests among them.
        """
        self._rows = rows
        if not self._began or self._update is not None:
            return
        if not serving:
            self._no_tokens()
        if self._gone and not self._any_serves(serving):
            return
        if self._gone:
            # The runner works in inference mode; tensors made here outlive it.
            with torch.inference_mode(False), torch.no_grad(), self._loading_weights(whole=False):
                pass  # the weights have come since the engine woke up
        for updator in self._updators():
            updator.forward_before(serving=serving, stage=stage, tokens_per_rank=tokens / self.parts_of_batch)

    def _any_serves(self, serving: bool) -> bool:
        """Whether the forward of any rank serves requests; all ranks together. Blocks: for steps after sleep only."""
        if self.updator is None:
            return serving
        adaptor = self.updator.parts.adaptor
        return any(exchange_bytes(adaptor.control_group, adaptor.topology.num_ranks, b"serves" if serving else b""))

    def count_nothing(self) -> None:
        """Stops counting for the next forwards, which serve no request."""
        self._no_tokens()
        for updator in self._updators():
            updator.pause_recording()

    def _no_tokens(self) -> None:
        for tokens in self.tokens:
            tokens.set(0)
        if self.draft is not None:
            self.draft.tokens.set(0)

    def _updators(self) -> list[EplbUpdator]:
        both = (self.updator, self.draft.updator if self.draft is not None else None)
        return [updator for updator in both if updator is not None]

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: list[Any] | None = None
    ) -> None:
        """Notes the number of tokens of the next batch without padding.

        The runner calls it for real batches, and its draft model for each of its own forwards.

        Args:
            ubatch_slices: the rows of each micro-batch, with padding; None for a batch that is not split.
        """
        if self.draft is not None and model_config is self.draft.model_config:
            self.draft.tokens.set(num_unpadded_tokens)
            return
        if ubatch_slices is None:
            self.tokens[0].set(self.slice.real(num_unpadded_tokens, self._rows))
            return
        for tokens, rows in zip(self.tokens, (part.token_slice for part in ubatch_slices), strict=True):
            real = max(0, min(num_unpadded_tokens, rows.stop) - rows.start)
            tokens.set(self.slice.real(real, rows.stop - rows.start))

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        """Notes the end of a forward.

        A profile run needs nothing here: when the model was added, staging, checksums and maps were allocated and every
        connection was used once. So vLLM counts this memory when it sizes its KV cache.
        """
        if self._began and not is_profile and self._update is None and not self._gone:
            for updator in self._updators():
                updator.forward_end()

    @contextlib.contextmanager
    def new_weights(self, what: str = "reload_weights", *, whole: bool = True) -> Iterator[None]:
        """Context in which weights are loaded, on all workers of all engines.

        Args:
            what: the call, for error messages.
            whole: whether all weights of the model are loaded; slots without new weights are then an error.

        Raises:
            RuntimeError: not all engines were called between the same two steps, so that their ranks cannot go back to
                the start placement together; or there is a draft model with experts, which vLLM does not reload.
        """
        self._require_one_model(what)
        self.come_together(what)
        with self._loading_weights(whole=whole):
            yield

    @contextlib.contextmanager
    def _loading_weights(self, *, whole: bool) -> Iterator[None]:
        loading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if whole and self.adaptor is not None:
            loading = reloading(self.model, self.adaptor.rank)
        if self.updator is not None and not whole:
            self.updator.weights.move_back()  # weights that are not loaded must be in their start slots
        with contextlib.nullcontext() if self.updator is None else self.updator.weights.loading(), loading:
            self._loading = True
            try:
                yield
            finally:
                self._loading = False
        self._gone = False

    def come_together(self, what: str) -> None:
        """Waits for the ranks of all engines, which are to be called together; see
        :class:`~vllm_ascend_eplb.agreement.meeting.MeetingPoint`.

        Args:
            what: the call, for the error message.

        Raises:
            RuntimeError: not all ranks were called in time. Nothing was changed.
        """
        world = torch.distributed.group.WORLD
        if self.updator is None or world is None or world.size() == 1:
            return
        if self.meeting is None:
            self.meeting = MeetingPoint(world.get_group_store(), world.rank(), world.size())
        if not self.meeting.meet(MEETING_SECONDS):
            raise RuntimeError(
                f"{what} changed nothing, because not all engines were called between two steps within "
                f"{MEETING_SECONDS:g} s; pause all engines (pause_generation), call {what} in all of them at the "
                "same time, then resume_generation"
            )

    def fall_asleep(self, level: int) -> None:
        """Called before vLLM frees the memory of the weights, in all workers of all engines together, between two
        forwards.

        Args:
            level: 1 if the contents come back, at the same addresses: the placement is kept. 2 if they do not: the
                start placement is put in force, because weights will be loaded by it.

        Raises:
            RuntimeError: not all engines were called together, or there is a draft model with experts, or level is not
                1 or 2.
        """
        if level not in (1, 2):
            raise RuntimeError(f"sleep level {level} is not supported together with balancing (allowed: 1, 2)")
        self._require_one_model("sleep")
        self.come_together("sleep")
        if self.updator is not None:
            self.updator.weights.rest(at_start=level == 2)
        self.count_nothing()
        if level == 2 and self.adaptor is not None:
            mine = [*(tokens.tensor for tokens in self.tokens), *self.adaptor.device_tensors()]
            self._kept = [(tensor, tensor.cpu().clone()) for tensor in mine]
            self._gone = True

    def wake_up(self, tags: list[str] | None) -> None:
        """Called after vLLM has memory again: restores the balancer's tensors. Weights come later; the first step with
        requests learns their checksums, and no step before it balances.

        Args:
            tags: kinds of memory that vLLM has again; None for all.
        """
        if tags is None or "weights" in tags:
            for tensor, kept in self._kept:
                tensor.copy_(kept)
            self._kept = []

    def _require_one_model(self, what: str) -> None:
        if self.draft is not None:
            raise RuntimeError(
                f"{what} with a draft model that has experts is not supported together with balancing; restart "
                "the server, or leave eplb_config out"
            )

    def begin_update(self) -> bool:
        """Called before a weight transfer, in all workers of all engines together: moves experts back to their start
        slots, where they stay until :meth:`end_update`. Steps in between are not counted.

        Returns:
            False if an update is under way already.

        Raises:
            RuntimeError: as for :meth:`new_weights`.
        """
        if self._update is not None:
            return False
        with contextlib.ExitStack() as entered:
            entered.enter_context(self.new_weights("start_weight_update", whole=False))
            self._update = entered.pop_all()
        self.count_nothing()
        return True

    def end_update(self) -> None:
        """Called after a weight transfer, also a failed one, in all workers of all engines, which have come together:
        learns the checksums again.

        Raises:
            RuntimeError: copies of an expert differ.
        """
        update, self._update = self._update, None
        if update is not None:
            update.close()

    def give_up_update(self) -> None:
        """Called if vLLM did not start a weight transfer: ends it if no worker started it. Otherwise no rank balances
        until ``finish_weight_update``."""
        try:
            self.come_together("start_weight_update")
        except RuntimeError:
            logger.warning("EPLB: some workers started a weight transfer: balancing rests until finish_weight_update")
        else:
            self.end_update()

    def guard(self, model: Any) -> None:
        """Lets ``load_weights`` load into the start slots, and refuses readers of weights while experts have moved.

        Trainers call ``load_weights`` of the model, or of a part of it, in every worker, once or for part after part of
        the weights.
        """

        def into_initial_slots(load: Any) -> Any:
            @functools.wraps(load)
            def load_weights(*args: Any, **kwargs: Any) -> Any:
                if self._loading or self._gone:  # after sleep weights may come in parts, so copies differ meanwhile
                    return load(*args, **kwargs)
                with self.new_weights("load_weights of the model", whole=False):
                    return load(*args, **kwargs)

            return load_weights

        for module in (model, *modules_with_experts(model, self.loaded)):
            if hasattr(module, "load_weights"):  # a part of a model may be loaded by itself
                patch_once(module, "load_weights", into_initial_slots)
        guard_model(model, self.loaded)

    def start_async_loop(self) -> None:
        """Does nothing: vLLM's own state starts a thread here; the balancer has its threads already."""

    def close(self) -> None:
        for updator in self._updators():
            updator.close()
