# SPDX-License-Identifier: Apache-2.0
"""Methods that a test adds to the workers (``--worker-extension-cls``), to observe them and to inject faults."""

import hashlib
import importlib
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def count_calls(keeper: Any, counter: str, *functions: tuple[Any, str]) -> int:
    """The calls of functions, each given by its owner and name, since the first call of this. The count is kept in an
    attribute of ``keeper``."""

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(keeper, counter, getattr(keeper, counter) + 1)
            return function(*args, **kwargs)

        setattr(owner, name, counted)

    if not hasattr(keeper, counter):
        setattr(keeper, counter, 0)
        for owner, name in functions:
            count(owner, name)
    return int(getattr(keeper, counter))


class Probe:
    """Works with both model runners of vllm-ascend; only the first one has an ``eplb_updator``."""

    def _parts(self) -> list[tuple[Any, list[Any]]]:
        """The balancers, with the MoE layers that they balance. The first runner has one. Under the second runner a
        draft model has its own, after the model's. Empty without balancing."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "eplb_updator"):
            return [(runner.eplb_updator.balancer, list(runner.eplb_updator.adaptor.moe_layers))]
        state = runner.eplb_state
        if state is None:
            return []
        parts = [(state.updator, state.model.moe_layers)]
        if state.draft is not None:
            draft = state.model_states[state.draft.model_config.compute_hash()]
            parts.append((state.draft.updator, draft.model.moe_layers))
        return [(balancer, [layer.routed_experts for layer in layers]) for balancer, layers in parts]

    def probe_freeze_weights(self, first: int = 0) -> int:
        """The negative control: from now on commits switch the maps but leave the weights.

        Args:
            first: the first layer with this fault; a draft model's layers come after the model's.
        """

        def freeze(loader: Any, first_layer: int) -> None:
            commit = loader.commit

            def commit_maps_only(number: int) -> None:
                slots = [tensor for layer in loader.slots[first_layer:] for slot in layer for tensor in slot]
                kept = [tensor.clone() for tensor in slots]
                commit(number)
                with torch.no_grad():
                    for tensor, before in zip(slots, kept, strict=True):
                        tensor.copy_(before)

            loader.commit = commit_maps_only

        before = 0
        for balancer, layers in self._parts():
            freeze(balancer.parts.loader, max(0, first - before))
            before += len(layers)
        return 1

    def probe_replays(self) -> int:
        """Replays of captured graphs on this rank since the first call."""
        graph: Any = torch.npu.NPUGraph  # type: ignore[attr-defined]
        return count_calls(graph, "replays", (graph, "replay"))

    def probe_scatters(self) -> int:
        """How often rows were shared out among the tensor-parallel ranks since the first call, as sequence parallelism
        does: by a reduce_scatter, or, in vLLM's own form, by a choice of rows that every rank has."""
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.model_executor.models import qwen3_moe

        group: Any = get_tp_group()
        return count_calls(group, "scatters", (group, "reduce_scatter"), (qwen3_moe, "sequence_parallel_chunk"))

    def probe_tables(self) -> str:
        """A digest of the routing tables of this rank's layers, under the second runner."""
        digest = hashlib.sha256()
        for _, layers in self._parts():
            for layer in layers:
                digest.update(layer.router.eplb_state.expert_replica_routing_table.cpu().numpy().tobytes())
        return digest.hexdigest()

    def probe_experts(self) -> dict[str, list[str]]:
        """The contents of this rank's slots: by expert ("layer expert"), digests of the tensors of its copies."""
        balancer: Any = self._parts()[0][0]
        placement, found = balancer.placement, {}
        first = balancer.parts.rank * placement.slots_per_rank
        for layer, slots in enumerate(balancer.parts.adaptor.expert_tensors()):
            for slot, tensors in enumerate(slots):
                digest = hashlib.sha256()
                for tensor in tensors:
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                expert = placement.physical_to_logical[layer, first + slot]
                found.setdefault(f"{layer} {expert}", []).append(digest.hexdigest())
        return found

    def probe_checkpoint(self, path: str) -> dict[str, Any]:
        """Compare this rank's slots with the experts that the placement puts there, from an unquantised checkpoint.

        Args:
            path: the file of weights.

        Returns:
            class: of the MoE layers. wrong, right: numbers of slots. placement: that in force, of layer 0 (int [P]).
        """
        (balancer, layers), right, wrong = self._parts()[0], 0, 0
        weights = load_file(path)
        first = balancer.parts.rank * balancer.placement.slots_per_rank
        for layer, slots in enumerate(balancer.parts.adaptor.expert_tensors()):
            for slot, (w13, w2) in enumerate(slots):
                expert = balancer.placement.physical_to_logical[layer, first + slot]
                gate, up, down = (
                    weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"].to(w13.dtype)
                    for name in ("gate", "up", "down")
                )
                both = torch.cat([gate, up]).T
                if torch.equal(w13.cpu(), both.reshape(w13.shape)) and torch.equal(w2.cpu(), down.T.reshape(w2.shape)):
                    right += 1
                else:
                    wrong += 1
        return {
            "class": type(layers[0]).__name__,
            "right": right,
            "wrong": wrong,
            "placement": balancer.placement.physical_to_logical[0].tolist(),
        }

    def probe_watch(self) -> int:
        """Start recording on this rank; call this before the first request.

        Recorded are the draft tokens and the loads that the planner got. Also, by balancer and window: the routers'
        choices (int [L, E], taken in vllm-ascend's own code before ours), the number of scheduled tokens, and the
        batches (by step, the tokens of every data-parallel engine, with and without padding).
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        self.drafts: list[Any] = []
        self.watched: list[dict[str, list[Any]]] = []
        for drafter, name in (
            (getattr(runner, "drafter", None), "_propose"),
            (getattr(runner, "speculator", None), "propose"),
        ):
            if hasattr(drafter, name):
                setattr(drafter, name, self._watched_propose(getattr(drafter, name)))
        for balancer, layers in self._parts():
            self._watch_load(balancer, layers)
        return 1

    def _watched_propose(self, propose: Any) -> Any:
        def watched_propose(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            if not kwargs.get("dummy_run"):
                self.drafts.append(drafts.tolist())
            return drafts

        return watched_propose

    def _watch_load(self, balancer: Any, layers: list[Any]) -> None:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        kept: dict[str, list[Any]] = {"windows": [], "rows": [], "batches": [], "loads": []}
        self.watched.append(kept)
        routing = importlib.import_module("vllm_ascend.ops.fused_moe.fused_moe")
        first_runner = hasattr(runner, "_determine_batch_execution_and_padding")
        chosen = np.zeros((balancer.placement.num_layers, balancer.placement.num_experts), dtype=np.int64)
        rows, layer_at_work = [0], [-1]
        batches: list[list[list[int]]] = []
        execute, snapshot = runner.execute_model, balancer.parts.recorder.snapshot

        def watched(select: Any, number: int | None = None) -> Any:
            def watched_select(*args: Any, **kwargs: Any) -> Any:
                weights, ids = select(*args, **kwargs)
                np.add.at(chosen[layer_at_work[0] if number is None else number], ids.cpu().numpy(), 1)
                return weights, ids

            return watched_select

        def watch_layer(number: int, method: Any) -> None:
            apply = method.apply

            def watched_apply(*args: Any, **kwargs: Any) -> Any:
                layer_at_work[0] = number
                return apply(*args, **kwargs)

            method.apply = watched_apply

        def watched_mapping(map_to_slots: Any, number: int) -> Any:
            def watched_map(ids: torch.Tensor) -> Any:
                np.add.at(chosen[number], ids.cpu().numpy(), 1)
                return map_to_slots(ids)

            return watched_map

        def watched_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(scheduler_output, *args, **kwargs)
            rows[0] += scheduler_output.total_num_scheduled_tokens  # the step's load is in the current window
            return result

        def watched_snapshot(placement: Any) -> None:
            kept["windows"].append(chosen.tolist())
            kept["rows"].append(rows[0])
            kept["batches"].append(batches.copy())
            chosen[:], rows[0] = 0, 0
            batches.clear()
            snapshot(placement)

        for number, layer in enumerate(layers):
            if hasattr(routing, "select_experts"):
                watch_layer(number, layer.quant_method)
            elif not first_runner:
                layer.router._apply_eplb_mapping = watched_mapping(layer.router._apply_eplb_mapping, number)
            else:  # since 0.30
                layer.router._select_experts = watched(layer.router._select_experts, number)
        if hasattr(routing, "select_experts"):
            routing.select_experts = watched(routing.select_experts)
        runner.execute_model = watched_execute
        self._watch_batches(batches)
        balancer.parts.recorder.snapshot = watched_snapshot
        if balancer.parts.planner is not None:
            submit = balancer.parts.planner.submit

            def watched_submit(request: Any) -> None:
                kept["loads"].append(request.load.sum(axis=0).tolist())
                submit(request)

            balancer.parts.planner.submit = watched_submit

    def _watch_batches(self, batches: list[list[list[int]]]) -> None:
        """Append, in every forward after the step has begun, the tokens of every data-parallel engine: with padding,
        and those that are sent to experts. MC2 masks the padding of a batch of requests; a dummy batch has no mask."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "_determine_batch_execution_and_padding"):
            determine, execute = runner._determine_batch_execution_and_padding, runner.execute_model
            scheduled: list[int] = []

            def watched_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                scheduled.append(scheduler_output.total_num_scheduled_tokens)
                try:
                    return execute(scheduler_output, *args, **kwargs)
                finally:
                    scheduled.clear()

            def watched_determine(*args: Any, **kwargs: Any) -> Any:
                result = determine(*args, **kwargs)  # begins the step, and perhaps a window
                filled = [result[1].num_tokens] if result[3] is None else result[3].tolist()
                own = filled[runner.dp_rank] if len(filled) > 1 else filled[0]
                sent = min(own, *scheduled) if scheduled else own
                # If graphs are captured, engines have different ideas of each other's padding.
                batches.append([self._of_all_engines(own), self._of_all_engines(sent)])
                return result

            runner.execute_model = watched_execute
            runner._determine_batch_execution_and_padding = watched_determine
            return
        module: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")
        dispatch, prepare = module.dispatch_cg_and_sync_dp, runner.eplb.prepare_forward
        agreed: list[list[list[int]]] = []

        def watched_dispatch(*args: Any, **kwargs: Any) -> Any:
            batch, across = dispatch(*args, **kwargs)
            filled = [batch.num_tokens] if across is None else across.num_tokens_across_dp.tolist()
            agreed[:] = [[filled, filled]]
            return batch, across

        def watched_prepare(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            batches.extend(agreed)
            agreed.clear()
            return result

        module.dispatch_cg_and_sync_dp, runner.eplb.prepare_forward = watched_dispatch, watched_prepare

    @staticmethod
    def _of_all_engines(number: int) -> list[int]:
        """Gather a number from all data-parallel engines, which are all at the same point."""
        from vllm.distributed.parallel_state import get_dp_group

        group = get_dp_group()
        numbers = torch.zeros(group.world_size, dtype=torch.int64)
        numbers[group.rank_in_group] = number
        torch.distributed.all_reduce(numbers, group=group.cpu_group)
        return [int(tokens) for tokens in numbers]

    def probe_watched(self) -> dict[str, Any]:
        """The records of the first balancer, those of a draft model's balancer, and the placements in force (int [L,
        P], a draft model's layers last)."""
        placements = [
            layer for balancer, _ in self._parts() for layer in balancer.placement.physical_to_logical.tolist()
        ]
        return {**self.watched[0], "placement": placements, "drafter": self.watched[1:]}

    def probe_drafts(self) -> dict[str, list[Any]]:
        """The draft tokens since the last call, step by step."""
        drafts, self.drafts = self.drafts, []
        return {"drafts": drafts}
