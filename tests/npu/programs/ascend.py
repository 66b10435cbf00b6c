# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own unmodified modules with their EPLB classes or ours: the calls of its model runner over MoE layers
that are small enough for an exact comparison.

One file, because all programs run the same small layers, whose exact results are computed here.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vllm_ascend_eplb.adaptors import handed_over
from vllm_ascend_eplb.adaptors.ascend import routing
from vllm_ascend_eplb.adaptors.ascend.adaptor import placement_of
from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.values.placement import Placement

from . import slow

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LAYERS, EXPERTS, HIDDEN, INNER, TOKENS = 2, 8, 32, 16, 24
FROZEN_SECONDS = 15.0
SKEWED = ("skew", "consumer")
"""Faults in which ranks are in different stages."""


def _groups() -> None:
    """Make the process groups that vllm-ascend makes for SIZE expert-parallel ranks."""
    import vllm.distributed.parallel_state as vllm_state
    import vllm_ascend.distributed.parallel_state as ascend_state

    dist.init_process_group("cpu:gloo,npu:hccl", timeout=timedelta(seconds=200))

    def group(ranks: list[int], everybody: bool = True) -> Any:
        device = dist.new_group(ranks, backend="hccl") if everybody else None

        def all_gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            parts = [torch.empty_like(tensor) for _ in ranks]
            dist.all_gather(parts, tensor.contiguous(), group=device)
            return torch.cat(parts, dim)

        return SimpleNamespace(
            ranks=ranks,
            world_size=len(ranks),
            rank_in_group=ranks.index(RANK),
            device_group=device,
            cpu_group=dist.new_group(ranks, backend="gloo") if everybody else None,
            all_gather=all_gather,
        )

    everybody = list(range(SIZE))
    vllm_state._EP = group(everybody)
    vllm_state._PP = group([RANK], everybody=False)
    ascend_state._DYNAMIC_EPLB = group(everybody)


def _runner_module(ours: bool) -> ModuleType:
    import vllm_ascend

    vllm_ascend.register()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import vllm_ascend.ops  # before the runner, as the worker does: they import each other
    import vllm_ascend.worker.model_runner_v1 as runner

    if ours:
        from vllm_ascend_eplb.adaptors.ascend import runner as ascend

        ascend.take_over(runner)
    return runner


def stock_config(values: dict[str, Any]) -> Any:
    """vllm-ascend's own settings, which take a dictionary, or keyword arguments since 0.30."""
    from vllm_ascend.ascend_config import EplbConfig

    return EplbConfig(**values) if dataclasses.is_dataclass(EplbConfig) else EplbConfig(values)


def _quant_type(quantised: str, known: Any) -> str:
    """vllm-ascend's name of a quantisation."""
    if not quantised:
        return "NONE"
    since_0_30 = {"MXFP8": "W8A8MXFP", "MXFP4": "W4A4MXFP"}
    return quantised if quantised in known else since_0_30[quantised]


class Layer:
    """A stand-in for AscendFusedMoE with the parts that EPLB uses: maps, weights by name, received tokens."""

    def __init__(self, number: int, config: Any, owned: bool, quantised: str) -> None:
        from vllm_ascend.eplb.core.eplb_utils import init_eplb_config
        from vllm_ascend.quantization.quant_type import QuantType

        self.number, self.owned, self.quantised = number, owned, quantised
        moe = SimpleNamespace(num_experts=EXPERTS, ep_size=SIZE, ep_rank=RANK)
        self.global_expert_map, self.expert_map, self.log2phy, redundant = init_eplb_config(
            config, number, moe, tp_size=None if owned else SIZE
        )
        self.local_num_experts, self.ep_rank = (EXPERTS + redundant) // SIZE, RANK
        self.quant_type = QuantType[_quant_type(quantised, QuantType.__members__)]
        self.moe_load = torch.zeros(self.local_num_experts, dtype=torch.int64, device="npu")
        held = [int(torch.nonzero(self.expert_map == slot)[0]) for slot in range(self.local_num_experts)]
        w13, w2 = zip(*(expert_weights(number, e) for e in held), strict=True)
        first, second = zip(*(scales(e, quantised) for e in held), strict=True)
        if quantised == "W8A8":  # a tensor for each expert, and one for its scales
            self.w13_weight_list = [weight.to(torch.int8).npu() for weight in w13]
            self.w2_weight_list = [weight.to(torch.int8).npu() for weight in w2]
            self.w13_weight_scale_fp32_list = [torch.full((2 * INNER,), scale, device="npu") for scale in first]
            self.w2_weight_scale_list = [torch.full((HIDDEN,), scale, device="npu") for scale in second]
        elif quantised:  # one tensor for all experts, and one for their scales, which are exponents
            self.w13_weight = mx_codes(torch.stack(w13), quantised).npu()
            self.w2_weight = mx_codes(torch.stack(w2), quantised).npu()
            self.w13_weight_scale = mx_exponents(first, 2 * INNER).npu()
            self.w2_weight_scale = mx_exponents(second, HIDDEN).npu()
        else:
            self.w13_weight = torch.stack(w13).npu()
            self.w2_weight = torch.stack(w2).npu()

    def weight_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of both weights that ``forward`` needs: two tensors [slots, HIDDEN]."""
        if self.quantised == "W8A8":
            w13 = zip(self.w13_weight_list, self.w13_weight_scale_fp32_list, strict=True)
            w2 = zip(self.w2_weight_list, self.w2_weight_scale_list, strict=True)
            return (
                torch.stack([(weight.float() * scale.unsqueeze(1)).sum(0) for weight, scale in w13]),
                torch.stack([weight.float().sum(1) * scale for weight, scale in w2]),
            )
        if not self.quantised:
            return self.w13_weight.sum(1), self.w2_weight.sum(2)
        w13 = mx_values(self.w13_weight, self.w13_weight_scale, self.quantised)
        return w13.sum(1), mx_values(self.w2_weight, self.w2_weight_scale, self.quantised).sum(2)

    def get_log2phy_map(self) -> Any:
        return self.log2phy

    def clear_moe_load(self) -> None:
        self.moe_load.zero_()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The sum of the token's experts. If ranks own their tokens, the tokens of all ranks are gathered after the
        mapping; otherwise all ranks map the same tokens."""
        slots = self.log2phy[ids].to(torch.int64)
        if self.owned:
            all_x = torch.empty(SIZE * x.shape[0], HIDDEN, device="npu")
            all_slots = torch.empty(SIZE * x.shape[0], ids.shape[1], dtype=torch.int64, device="npu")
            dist.all_gather_into_tensor(all_x, x)
            dist.all_gather_into_tensor(all_slots, slots)
            x, slots = all_x, all_slots
        local = slots - RANK * self.local_num_experts
        mine = (local >= 0) & (local < self.local_num_experts)
        local = local.clamp(0, self.local_num_experts - 1)
        self.moe_load.scatter_add_(0, local.reshape(-1), mine.reshape(-1).to(torch.int64))
        w13, w2 = (sums[local] for sums in self.weight_sums())
        out = (x.unsqueeze(1) * w13 * w2 * mine.unsqueeze(-1)).sum(1)
        dist.all_reduce(out)
        return out[RANK * TOKENS : (RANK + 1) * TOKENS] if self.owned else out


def expert_weights(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    w13 = torch.randint(-3, 4, (2 * INNER, HIDDEN), generator=generator).float()
    return w13, torch.randint(-3, 4, (HIDDEN, INNER), generator=generator).float()


def scales(expert: int, quantised: str) -> tuple[float, float]:
    """The scales of an expert's two weights, chosen so that all sums stay exact."""
    if not quantised:
        return 1.0, 1.0
    return 2.0 ** (expert % 3), 1.0 / 8 + expert if quantised == "W8A8" else 2.0 ** -(expert % 4)


def mx_table(quantised: str) -> torch.Tensor:
    """float32 [256, values per byte]: the values of all bytes in OCP's microscaling formats. In E2M1 the low half comes
    first."""
    codes = torch.arange(256, dtype=torch.uint8)
    if quantised == "MXFP8":
        return codes.view(torch.float8_e4m3fn).float().unsqueeze(1)
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    e2m1 = torch.cat([e2m1, -e2m1])
    return torch.stack([e2m1[codes.long() % 16], e2m1[codes.long() // 16]], 1)


def mx_codes(weights: torch.Tensor, quantised: str) -> torch.Tensor:
    """The weights [..., n] as bytes: uint8 [..., n / 2] for E2M1, float8 [..., n] for E4M3."""
    if quantised == "MXFP8":
        return weights.to(torch.float8_e4m3fn)
    table = mx_table(quantised)[:16, 0]
    halves = (weights.unsqueeze(-1) == table).to(torch.uint8).argmax(-1).to(torch.uint8)
    return halves[..., 0::2] | halves[..., 1::2] << 4


def mx_exponents(scales: tuple[float, ...], rows: int) -> torch.Tensor:
    """uint8 [experts, rows, 1]: scales as E8M0, one block per row."""
    exponents = torch.log2(torch.tensor(scales)).round() + 127
    return exponents.to(torch.uint8).view(-1, 1, 1).repeat(1, rows, 1)


def mx_values(codes: torch.Tensor, exponents: torch.Tensor, quantised: str) -> torch.Tensor:
    """The scaled weights that ``mx_codes`` and ``mx_exponents`` encode."""
    values = mx_table(quantised).npu()[codes.view(torch.uint8).long()].flatten(-2)
    powers = torch.pow(2.0, torch.arange(-127.0, 129.0)).npu()
    return values * powers[exponents.long()]


def reference(layer: int, x: torch.Tensor, ids: torch.Tensor, quantised: str) -> torch.Tensor:
    factors = []
    for expert in range(EXPERTS):
        w13, w2 = (weight.double() for weight in expert_weights(layer, expert))
        first, second = scales(expert, quantised)
        factors.append(w13.sum(0) * w2.sum(1) * first * second)
    return (x.double().unsqueeze(1) * torch.stack(factors)[ids]).sum(1).float()


class _Watch:
    """Ends the process if a step takes too long."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._since = time.monotonic()
        self._over = False
        threading.Thread(target=self._run, daemon=True).start()

    def begun(self, step: int | None) -> None:
        """Note that a step has begun; None after the last step."""
        self._step, self._since = step, time.monotonic()
        self._over = step is None

    def _run(self) -> None:
        while not self._over:
            time.sleep(0.5)
            if self._step is not None and time.monotonic() - self._since > FROZEN_SECONDS:
                Path(sys.argv[3]).write_text(json.dumps({"frozen": self._step}))
                os._exit(0)


def several(cases: list[list[Any]]) -> list[dict[str, Any]]:
    """Run ``balance`` for every case in turn."""
    results = []
    for case in cases:
        results.append(balance(*case))
        dist.barrier()
    return results


def balance(
    ours: bool,
    owned: bool,
    redundant: int,
    steps: int,
    fault: str,
    intervals: tuple[int, int] = (10, 3),
    quantised: str = "",
) -> dict[str, Any]:
    """Make the runner's calls over ``steps`` forwards of skewed load.

    Args:
        ours: our classes, or vllm-ascend's.
        owned: every rank routes its own tokens (MC2, All2All), or all ranks route the same tokens (AllGather).
        fault: "kill": the planner of rank 0 is killed once. "slow": planners take slow.SECONDS. "skew": ranks are in
            different stages in the same step, and one stage is counted. "consumer": the same on a KV consumer, whose
            ranks agree on the stage. "map": a static placement from a map. Or empty.
        intervals: expert_heat_collection_interval and algorithm_execution_interval.
        quantised: W8A8 (int8 with scales, in lists of tensors), MXFP4 or MXFP8 (all experts in one tensor), or empty.

    A step that takes FROZEN_SECONDS ends the process; the answer is then {"frozen": the step}.
    """
    os.environ["DYNAMIC_EPLB"] = "true"
    runner = _runner_module(ours)
    if not dist.is_initialized():
        _groups()
    settings = {
        "dynamic_eplb": True,
        "num_redundant_experts": redundant,
        "expert_heat_collection_interval": intervals[0],
        "algorithm_execution_interval": intervals[1],
    }
    stage = {"eplb_heat_collection_stage": "decode" if fault in SKEWED else "all"}
    config = stock_config({**settings, **stage, "eplb_policy_type": 2})
    if ours:
        from vllm_ascend_eplb.adaptors.ascend import hand_over

        if fault == "map":
            path = Path(tempfile.gettempdir()) / f"eplb-map-{os.environ['MASTER_PORT']}.json"  # the same on all ranks
            write_expert_map(path, _some_placement(redundant))
            settings = {"expert_map_path": str(path)}
            dist.barrier()
        given = {"eplb_config": {**settings, **stage, "transport": "hccl"}}
        config = stock_config(hand_over.hand_over(given)["eplb_config"])
        assert config.dynamic_eplb
        routing.ranks_own_their_tokens = lambda: owned  # type: ignore[assignment]
    layers = [Layer(number, config, owned, quantised) for number in range(LAYERS)]
    torch.npu.synchronize()
    runner.VllmEplbAdaptor._registered_moe_layers[:] = layers
    model = SimpleNamespace(config=SimpleNamespace(), quant_config=quantised or None)
    import vllm_ascend.eplb.adaptor.vllm_adaptor as stock_adaptor

    stock_adaptor.get_ascend_config = lambda: SimpleNamespace(enable_fused_mc2=0)

    # The calls of NPUModelRunner.__init__ and eplb_warmup.
    loader = runner.D2DExpertWeightLoader()
    shared: Any = {"expert_map": None, "moe_load": None, "expert_maps": None}
    if not ours:
        from multiprocessing import Manager

        manager = Manager()
        shared = manager.dict(shared)
    process = runner.EplbProcess(shared_dict=shared, policy_type=2, enable_d2d=True, tp_size=None if owned else SIZE)
    if fault == "slow" and not ours:
        update = process.worker.do_update
        process.worker.do_update = lambda: (time.sleep(slow.SECONDS), update())[1]
    child = process._launch_process()
    updator = runner.EplbUpdator(config, loader, process, child)
    adaptor = runner.VllmEplbAdaptor(model=model)
    loader.set_adator(adaptor)
    updator.set_adaptor(adaptor)
    if ours:
        updator.configure(handed_over.settings_of(given), "auto", fault == "consumer")
    counted: list[int] = []
    updator.warm_up_eplb()
    updator.adaptor.clear_all_moe_loads()
    if ours:
        updator.begin()
        if RANK == 0 and updator.balancer is not None:
            submit = updator.balancer.parts.planner.submit

            def watched_submit(request: Any) -> None:
                counted.append(int(request.load.sum()))
                submit(request)

            updator.balancer.parts.planner.submit = watched_submit
        if fault == "slow" and RANK == 0:
            updator.balancer.parts.planner.close()
            updator.balancer.parts.planner = EplbProcess(slow.plan)
    if fault == "kill" and RANK == 0:
        if ours:
            while updator.balancer.parts.planner.pid is None:
                time.sleep(0.05)
            os.kill(updator.balancer.parts.planner.pid, 9)
        else:
            child.kill()

    draw = np.random.default_rng(7)
    wrong, slowest, moved = 0, 0.0, set()
    watch = _Watch()
    for step in range(steps):
        watch.begun(step)
        # Expert 0 is the hottest in layer 0, expert 1 in layer 1; every 40 steps the order is reversed.
        heat = 1.0 / np.arange(1, EXPERTS + 1) ** 1.2
        heat = heat[:: -1 if step // 40 % 2 else 1]
        all_ids = np.stack(
            [
                [
                    [draw.choice(EXPERTS, 2, replace=False, p=np.roll(heat, i) / heat.sum()) for _ in range(TOKENS)]
                    for i in range(LAYERS)
                ]
                for _ in range(SIZE)
            ]
        )
        ids = torch.from_numpy(all_ids[RANK if owned else 0])
        all_x = torch.from_numpy(draw.integers(-4, 5, (SIZE, TOKENS, HIDDEN)).astype(np.float32))
        x = all_x[RANK if owned else 0]
        decodes = fault not in SKEWED or (step + RANK) % 3 > 0
        began = time.perf_counter()
        with torch.inference_mode():
            if ours:
                updator.step(True, "decode" if decodes else "prefill")
            updator.forward_before()
            out = [layer.forward(x.npu(), ids[layer.number].npu()) for layer in layers]
            updator.forward_end(decodes)
            torch.npu.synchronize()
        slowest = max(slowest, time.perf_counter() - began)
        wrong += not all(torch.equal(o.cpu(), reference(i, x, ids[i], quantised)) for i, o in enumerate(out))
        if ours:
            moved.add(updator.balancer.placement.digest if updator.balancer else 0)
        else:
            moved.add(str(layers[0].w13_weight.flatten(1).cpu().tolist()))
    watch.begun(None)
    result: dict[str, Any] = {"wrong": wrong, "placements": len(moved), "slowest": slowest}
    if fault == "map":
        maps = [layer.global_expert_map.cpu().numpy() for layer in layers]
        assert placement_of(maps, layers[0].local_num_experts) == _some_placement(redundant)
        dist.barrier()
        if RANK == 0:
            Path(config.expert_map_path).unlink()
        result["phase"] = "no balancer" if updator.balancer is None else "a balancer"
        updator.shutdown()
    elif ours:
        stats = updator.balancer.stats.stats()
        result["counted"] = counted
        result["par"] = [cycle.par.mean for cycle in stats.cycles]
        result["failed"] = stats.cycles_failed
        result["phase"] = updator.balancer.state.phase.name
        updator.shutdown()
    else:
        child.kill()
    return result


def _some_placement(redundant: int) -> Placement:
    """A placement with a different order of experts in every layer; redundant slots copy the previous rank's."""
    slots = []
    for layer in range(LAYERS):
        order = np.roll(np.arange(EXPERTS), layer + 3).reshape(SIZE, -1)
        copies = np.roll(order, 1, axis=0)[:, : redundant // SIZE]  # from the previous rank
        slots.append(np.concatenate([order, copies], axis=1).reshape(-1))
    return Placement(np.array(slots, dtype=np.int32), EXPERTS, SIZE)


def surface() -> dict[str, Any]:
    """The modules of the runner's classes, and faults of our settings as vllm-ascend reads them."""
    runner = _runner_module(True)
    from vllm_ascend_eplb.adaptors.ascend import hand_over
    from vllm_ascend_eplb.adaptors.ascend import runner as ascend

    modules = [
        getattr(runner, name).__module__
        for name in ("EplbUpdator", "EplbProcess", "D2DExpertWeightLoader", "VllmEplbAdaptor")
    ]
    given = {"eplb_config": {"dynamic_eplb": True, "target_par": 1.1, "eplb_policy_type": 3, "transport": "hccl"}}
    changed = hand_over.hand_over(given)
    wrong = ""
    if not stock_config(changed["eplb_config"]).dynamic_eplb or os.environ["DYNAMIC_EPLB"] != "true":
        wrong = "vllm-ascend would not balance"
    ours = handed_over.settings_of(copy.deepcopy(changed))
    if ours.target_par != 1.1 or ours.transport != "hccl":
        wrong = "our settings were lost"
    if set(changed) != {"eplb_config"} or "target_par" in changed["eplb_config"] or len(given["eplb_config"]) != 4:
        wrong = "the settings were not split"
    counts = importlib.import_module(ascend.FORWARD_CONTEXT)._EXTRA_CTX.eplb_heat_collection_status
    return {"modules": modules, "settings": wrong, "counts": counts}


def memory() -> int:
    """The bytes of the device's memory."""
    return int(torch.npu.mem_get_info()[1])


def strange_runner() -> dict[str, Any]:
    """Take over a runner that makes an unknown call; it must be left alone."""
    import inspect

    runner = _runner_module(False)
    from vllm_ascend_eplb.adaptors.ascend import runner as ascend

    source, stock = inspect.getsource(runner), runner.EplbUpdator
    changed = source + "\n        self.eplb_updator.something_new()\n"
    ascend.inspect = SimpleNamespace(getsource=lambda module: changed)  # type: ignore[assignment]
    found = ascend.differences(runner)
    ascend.take_over(runner)
    return {"differences": found, "left_alone": runner.EplbUpdator is stock}
