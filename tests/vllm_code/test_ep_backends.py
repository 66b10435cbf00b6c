# SPDX-License-Identifier: Apache-2.0
"""vLLM's all2all backends: each is refused, or takes ids of physical experts and keeps no table that moves make stale.

The classes are vLLM's own. Their kernels, which need GPUs and libraries of others, are replaced by objects that catch
the ids that arrive.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from packaging.version import Version

from vllm_ascend_eplb.adaptors.vllm.ep_backends import EP_BACKENDS, MEGAKERNELS_REFUSED, beside_ep_backend
from vllm_ascend_eplb.settings.fit import refuse_options
from vllm_ascend_eplb.settings.messages import EplbConfigError

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"
MODULES = "vllm.model_executor.layers.fused_moe.prepare_finalize"
BALANCED = [name for name, backend in EP_BACKENDS.items() if not backend.refused]
REFUSED = [name for name, backend in EP_BACKENDS.items() if backend.refused]

EXPERTS, REDUNDANT, RANKS = 8, 4, 2
SLOTS = EXPERTS + REDUNDANT
BACKENDS_SINCE = {"aiter_mega_moe": "0.32"}
"""Backends for experts that vLLM 0.30 does not know: the release that brought each."""

IDS = torch.tensor([[11, 0], [8, 5], [3, 10]])
"""Slots that tokens were routed to; three of them are those of redundant experts."""


def served(all2all: str = "allgather_reducescatter", moe: str = "auto", draft: str | None = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(all2all_backend=all2all),
        kernel_config=SimpleNamespace(moe_backend=moe),
        speculative_config=None if draft is None else SimpleNamespace(moe_backend=draft),
    )


def vllm_has(since: str) -> bool:
    return Version(pytest.importorskip("vllm").__version__) >= Version(since)


def test_every_all2all_backend_of_vllm_is_classified() -> None:
    """A backend that a new vLLM adds shows here, so that a person decides."""
    parallel = pytest.importorskip("vllm.config.parallel")
    assert set(get_args(parallel.All2AllBackend)) <= set(EP_BACKENDS), "classify the new backends"
    assert parallel.ParallelConfig.all2all_backend in BALANCED


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *((served(name), f"--all2all-backend {name} ") for name in REFUSED),
        *((served(moe=name), f"--moe-backend {name} ") for name in MEGAKERNELS_REFUSED),
        *((served(draft=name), f"moe_backend of --speculative-config {name} ") for name in MEGAKERNELS_REFUSED),
        (served("one_of_tomorrow"), "--all2all-backend one_of_tomorrow "),
    ],
)
def test_a_backend_that_cannot_be_balanced_is_refused(config: Any, words: str) -> None:
    with pytest.raises(EplbConfigError) as raised:
        refuse_options(beside_ep_backend(config))
    message = str(raised.value)
    assert words in message
    assert "(allowed: " in message
    assert ": choose another, or leave eplb_config out" in message
    assert "\n" not in message


@pytest.mark.parametrize("all2all", BALANCED)
@pytest.mark.parametrize("moe", ["auto", "triton", "deep_gemm_mega_moe", "flashinfer_moe_ep_cutedsl"])
def test_other_backends_are_accepted(all2all: str, moe: str) -> None:
    refuse_options(beside_ep_backend(served(all2all, moe, "auto")))


def test_refused_megakernels_are_those_that_vllm_refuses() -> None:
    kernel = pytest.importorskip("vllm.config.kernel")
    for name in MEGAKERNELS_REFUSED:
        assert (name in get_args(kernel.MoEBackend)) == vllm_has(BACKENDS_SINCE.get(name, "0.30")), name
    moe_ep = pytest.importorskip("vllm.model_executor.layers.fused_moe.flashinfer_moe_ep")
    config = SimpleNamespace(
        weight_transfer_config=None, parallel_config=SimpleNamespace(enable_dbo=False, enable_eplb=True)
    )
    for name in kernel.FLASHINFER_MOE_EP_BACKENDS:
        layer = mock.MagicMock(moe_backend=name)
        with mock.patch.object(moe_ep, "get_current_vllm_config", return_value=config):
            reasons = moe_ep.flashinfer_moe_ep_unsupported_reasons(layer, None, None)
        assert ("EPLB" in reasons) == (name in MEGAKERNELS_REFUSED), name


class ArrivedError(Exception):
    """What a kernel was given: ids, and the number of experts where it takes one."""

    def __init__(self, ids: torch.Tensor, experts: int | None) -> None:
        self.ids, self.experts = ids, experts


def kernel(ids: int | str, experts: int | str | None = None) -> Any:
    """Stands for a kernel; ``ids`` and ``experts`` say which argument of it is which."""

    def launch(*args: Any, **kwargs: Any) -> None:
        def given(which: Any) -> Any:
            return args[which] if isinstance(which, int) else kwargs[which]

        raise ArrivedError(given(ids), None if experts is None else given(experts))

    return launch


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``prepare(name, module, cls, **arguments)``: gives vLLM's class of a backend ids, and returns what arrives."""
    pytest.importorskip("vllm.model_executor.layers.fused_moe.config")
    libraries = ("deep_ep", "nixl_ep", "flashinfer", "flashinfer.comm", "flashinfer.comm.trtllm_alltoall")
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, mock.MagicMock(topk_idx_t=torch.int64))
    sys.modules[libraries[-1]].MnnvlMoe.mnnvl_moe_alltoallv_prepare_without_allgather = kernel(0, 7)
    before = set(sys.modules)

    def arrives(module: str, cls: str, group: Any = None, **arguments: Any) -> ArrivedError:
        from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG as UNQUANTIZED

        loaded = importlib.import_module(f"{MODULES}.{module}")
        if group is not None:
            monkeypatch.setattr(loaded, "get_ep_group", lambda: group)
            monkeypatch.setattr(loaded, "get_local_sizes", lambda: [len(IDS)] * RANKS, raising=False)
            if hasattr(loaded, "FlashInferNVLinkOneSidedManager"):  # which vLLM 0.33 insists on
                group.device_communicator.all2all_manager.__class__ = loaded.FlashInferNVLinkOneSidedManager
        known = inspect.signature(getattr(loaded, cls)).parameters
        taken = {name: value for name, value in arguments.items() if name in known}
        with pytest.raises(ArrivedError) as raised:
            getattr(loaded, cls)(**taken).prepare(
                torch.zeros(len(IDS), 2048), torch.ones(IDS.shape), IDS, SLOTS, None, False, UNQUANTIZED
            )
        return raised.value

    yield arrives
    for name in set(sys.modules) - before:
        if name.startswith(MODULES):  # they hold what stood for the libraries
            del sys.modules[name]


def managed(**kernels: Any) -> Any:
    """An expert-parallel group whose all2all manager has the kernels."""
    manager = mock.MagicMock(world_size=RANKS, rank=1, **kernels)
    return mock.MagicMock(device_communicator=mock.MagicMock(all2all_manager=manager))


WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "allgather_reducescatter": (
        "naive_dp_ep",
        "MoEPrepareAndFinalizeNaiveDPEPModular",
        {"group": SimpleNamespace(dispatch=kernel(2)), "num_dispatchers": RANKS},
    ),
    "deepep_high_throughput": (
        "deepep_ht",
        "DeepEPHTPrepareAndFinalize",
        {
            "buffer": SimpleNamespace(get_dispatch_layout=kernel("topk_idx", "num_experts"), capture=None),
            "num_dispatchers": RANKS,
            "dp_size": RANKS,
            "rank_expert_offset": SLOTS // RANKS,
        },
    ),
    "deepep_low_latency": (
        "deepep_ll",
        "DeepEPLLPrepareAndFinalize",
        {
            "buffer": SimpleNamespace(low_latency_dispatch=kernel(1, 3)),
            "max_tokens_per_rank": 8,
            "num_dispatchers": RANKS,
        },
    ),
    "deepep_v2": (
        "deepep_v2",
        "DeepEPV2PrepareAndFinalize",
        {
            "buffer": SimpleNamespace(dispatch=kernel("topk_idx", "num_experts")),
            "num_dispatchers": RANKS,
            "dp_size": RANKS,
            "rank_expert_offset": SLOTS // RANKS,
            "num_experts": SLOTS,
            "num_topk": IDS.shape[1],
        },
    ),
    "nixl_ep": (
        "nixl_ep",
        "NixlEPPrepareAndFinalize",
        {
            "buffer": SimpleNamespace(dispatch=kernel(1)),
            "max_tokens_per_rank": 8,
            "num_dispatchers": RANKS,
            "expert_capacity": SLOTS,
        },
    ),
    "flashinfer_nvlink_two_sided": (
        "flashinfer_nvlink_two_sided",
        "FlashInferNVLinkTwoSidedPrepareAndFinalize",
        {"group": managed(), "num_dispatchers": RANKS},
    ),
    "flashinfer_nvlink_one_sided": (
        "flashinfer_nvlink_one_sided",
        "FlashInferNVLinkOneSidedPrepareAndFinalize",
        {
            "group": managed(
                moe_alltoall=SimpleNamespace(dispatch=kernel("token_selected_experts")),  # of vLLM 0.32
                get_communication=lambda: SimpleNamespace(dispatch=kernel(1)),  # of vLLM 0.33
            ),
            "max_num_tokens": 8,
            "top_k": IDS.shape[1],
            "num_experts": SLOTS,
            "hidden_size": 2048,
            "x_bytes_per_token": 4096,  # of vLLM 0.32
            "x_sf_bytes_per_token": 0,
            "dispatch_format": None,  # of vLLM 0.33
        },
    ),
}
SAME = {"naive": "allgather_reducescatter", "pplx": "allgather_reducescatter"} | {
    "flashinfer_all2allv": "flashinfer_nvlink_two_sided"
}
"""Names that vLLM maps to others."""


@pytest.mark.parametrize("name", WAYS)
def test_kernels_get_the_slots_that_tokens_were_routed_to(prepare: Any, name: str) -> None:
    """Those of redundant experts too, and where a kernel takes a number of experts, that of the slots."""
    module, cls, arguments = WAYS[name]
    arrived = prepare(module, cls, **arguments)
    assert torch.equal(arrived.ids.long(), IDS)
    assert arrived.experts in (None, SLOTS)


def test_ids_that_a_table_renames_are_noticed(prepare: Any) -> None:
    """Negative control: the table that vLLM gives this backend where experts lie in turn on the ranks."""
    module, cls, arguments = WAYS["deepep_low_latency"]
    table = torch.arange(SLOTS).flip(0)
    arrived = prepare(module, cls, **arguments, global_to_physical=table)
    assert torch.equal(arrived.ids, table[IDS])
    assert not torch.equal(arrived.ids, IDS)


def test_every_balanced_backend_is_tried() -> None:
    assert set(WAYS) | set(SAME) | {"passthrough"} == set(BALANCED)
    parallel = pytest.importorskip("vllm.config.parallel")
    for name in ("naive", "pplx"):
        assert parallel.ParallelConfig(all2all_backend=name).all2all_backend == SAME[name]


def parallel_config(all2all: str, eplb: bool) -> Any:
    config = pytest.importorskip("vllm.model_executor.layers.fused_moe.config")
    sizes = {"tp_size": 1, "pcp_size": 1, "dp_size": RANKS, "ep_size": RANKS, "sp_size": 1}
    ranks = {"tp_rank": 0, "pcp_rank": 0, "dp_rank": 1, "ep_rank": 1}
    return config.FusedMoEParallelConfig(**sizes, **ranks, use_ep=True, all2all_backend=all2all, enable_eplb=eplb)


@pytest.mark.parametrize("name", sorted(EP_BACKENDS))
def test_no_table_of_positions_is_built_with_eplb(name: str) -> None:
    """Experts that lie in turn on the ranks need one. With EPLB vLLM lays them in a row, as the slots are numbered."""
    maps = pytest.importorskip("vllm.model_executor.layers.fused_moe.expert_map_manager")
    tables = {}
    for eplb in (False, True):
        manager = maps.ExpertMapManager(
            max_num_batched_tokens=8,
            top_k=2,
            global_num_experts=SLOTS,
            num_redundant_experts=0,
            num_expert_group=2,
            moe_parallel_config=parallel_config(name, eplb),
            placement_strategy="round_robin",
            enable_eplb=eplb,
        )
        tables[eplb] = manager.routing_tables
    assert tables[True] is None
    assert manager.expert_map.tolist() == [-1] * (SLOTS // 2) + list(range(SLOTS // 2))
    assert (tables[False] is not None) == (name in ("deepep_low_latency", "nixl_ep"))


def rows() -> dict[str, list[str]]:
    """The table of all2all backends in the guide: cells by backend."""
    section = LIMITS.read_text(encoding="utf-8").split("\n## All2all backends\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {name: row for row in table[2:] for name in re.findall(r"`(\w+)`", row[0])}


def test_the_guide_says_of_each_backend_what_the_code_does() -> None:
    assert set(rows()) == set(EP_BACKENDS)
    for name, row in rows().items():
        assert (row[1] == "unsupported") == bool(EP_BACKENDS[name].refused), name
        assert ("`nccl` refused" in row[3]) == (not EP_BACKENDS[name].few_cores), name


@pytest.mark.parametrize("name", sorted(EP_BACKENDS))
def test_the_guide_says_where_shared_experts_lose_overlap(name: str) -> None:
    module = pytest.importorskip("vllm.model_executor.layers.fused_moe.runner.shared_experts")

    def lost(eplb: bool) -> bool:
        name_in_use = "allgather_reducescatter" if name in ("naive", "pplx") else name
        config = SimpleNamespace(moe_parallel_config=parallel_config(name_in_use, eplb))
        layer = SimpleNamespace(_moe_config=config, _layer=None, _lora_fully_sharded=False)
        return bool(vars(module.SharedExperts)["_disable_shared_experts_overlap"].fget(layer))

    said, _, since = rows()[name][4].partition(" since vLLM ")
    if since and not vllm_has(since):
        said = "lost"
    assert (lost(False), lost(True)) == {"kept": (False, False), "lost": (False, True), "never": (True, True)}[said]
