# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel that maps experts to slots and counts tokens on a GPU, with our tables.

The kernel is cut out of vLLM's source, so that it runs without an installed vLLM: from ``EPLB_VLLM_ROUTER`` (the path
of a copy of vllm/model_executor/layers/fused_moe/router/base_router.py), otherwise from the installed vLLM. Without a
GPU, Triton's interpreter runs it (``TRITON_INTERPRET=1``), which checks the results but not the speed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.values.placement import Placement

NAMES = ("_eplb_map_and_record_i32_kernel", "_eplb_map_and_record_triton")
LAYERS, EXPERTS, RANKS, REDUNDANT, TOP_K = 2, 64, 8, 16, 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def router_source() -> Path | None:
    given = os.environ.get("EPLB_VLLM_ROUTER")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), "model_executor/layers/fused_moe/router/base_router.py")


SOURCE = router_source()
needs_kernel = pytest.mark.skipif(
    SOURCE is None or not SOURCE.exists(),
    reason="no source of vLLM here: install vLLM, or set EPLB_VLLM_ROUTER to a copy of its router/base_router.py",
)
needs_gpu = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU")
pytestmark = needs_kernel

Mapping = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Mapping:
    """vLLM's own function that launches the kernel, cut out of vLLM's source."""
    pytest.importorskip("triton")
    assert SOURCE is not None
    text = SOURCE.read_text(encoding="utf-8")
    lines = text.splitlines()
    parts = ["import torch", "import triton", "import triton.language as tl"]
    for name in NAMES:
        node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
    path = tmp_path_factory.mktemp("router") / "router_kernel.py"
    path.write_text("\n\n\n".join(parts) + "\n")
    spec = importlib.util.spec_from_file_location("router_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if INTERPRETED:
        _take_all_masks()
    sys.modules["router_kernel"] = module  # Triton looks for the source there
    spec.loader.exec_module(module)
    return getattr(module, NAMES[1])  # type: ignore[no-any-return]


def _take_all_masks() -> None:
    """Make the interpreter's atomic operations accept masks that come from an ``and`` of bytes."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = TensorHandle(mask.data.astype(bool), mask.dtype)
        return original(self, operation, pointer, value, mask, *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


def placement_of(seed: int) -> Placement:
    """A placement whose redundant slots have copies of a few hot experts, at most one copy per rank."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(LAYERS):
        hot = rng.choice(EXPERTS, 4, replace=False)
        slots = [[] for _ in range(RANKS)]  # type: list[list[int]]
        for expert in [*np.repeat(hot, 4).tolist(), *rng.permutation(EXPERTS).tolist()]:
            rank = min((r for r in range(RANKS) if expert not in slots[r]), key=lambda r: len(slots[r]))
            slots[rank].append(expert)
        rows.append(np.concatenate(slots))
    return Placement(np.array(rows), EXPERTS, RANKS)


class Model:
    """The tables and counters that the adaptor makes for a model on a GPU."""

    def __init__(self, kernel: Mapping, placement: Placement) -> None:
        self.kernel, self.placement = kernel, placement
        self.maps = DispatchMaps(placement, DEVICE, width=REDUNDANT + 1)
        self.recorder = LoadRecorder(LAYERS, EXPERTS, placement.num_slots, DEVICE, dtype=torch.int32)
        self.real = torch.zeros((), dtype=torch.int32, device=DEVICE)

    def map(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        return self.kernel(
            ids,
            self.maps.logical_to_physical[layer],
            self.maps.replica_count[layer],
            self.recorder.counts[layer],
            self.recorder.recording,
            self.real,
        )

    def begin(self, real: int, record: bool = True) -> None:
        self.real.fill_(real)
        self.recorder.begin_step(self.placement, record=record)

    def move(self, placement: Placement) -> None:
        """Commit another placement, as EplbUpdator does."""
        self.recorder.flush(self.placement)
        self.maps.prepare(placement, list(range(LAYERS)))
        self.maps.commit()
        self.placement = placement


def batch(tokens: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.array([rng.choice(EXPERTS, TOP_K, replace=False) for _ in range(tokens)])).to(DEVICE)


def check(model: Model, layer: int, ids: torch.Tensor, mapped: torch.Tensor) -> None:
    """Assert that every id was mapped to a slot that holds the expert."""
    held = model.placement.physical_to_logical[layer][mapped.cpu().numpy()]
    np.testing.assert_array_equal(held, ids.cpu().numpy())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_every_token_goes_to_one_replica_and_counts_once(kernel: Mapping, tokens: int) -> None:
    model = Model(kernel, placement_of(1))
    real = max(1, tokens - 3)
    expected = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    for step in range(3):
        model.begin(real)
        for layer in range(LAYERS):
            ids = batch(tokens, 10 * step + layer)
            mapped = model.map(layer, ids)
            check(model, layer, ids, mapped)
            np.add.at(expected[layer], ids[:real].cpu().numpy().ravel(), 1)
        model.move(placement_of(2 + step))
    model.begin(tokens, record=False)  # a dummy step
    model.map(0, batch(tokens, 99))
    model.recorder.snapshot(model.placement)
    np.testing.assert_array_equal(model.recorder.take()[0], expected)


@pytest.mark.cuda
@needs_gpu
def test_replicas_share_the_tokens_of_an_expert(kernel: Mapping) -> None:
    model = Model(kernel, placement_of(1))
    model.begin(0)
    hot = int(model.placement.replica_count[0].argmax())
    replicas = int(model.placement.replica_count[0][hot])
    ids = torch.full((2000, 1), hot, device=DEVICE)
    share = np.bincount(model.map(0, ids).cpu().numpy().ravel())
    share = share[share > 0]
    assert len(share) == replicas > 1
    assert share.min() > 0.8 * 2000 / replicas


@pytest.mark.cuda
@needs_gpu
def test_tables_of_another_placement_are_found(kernel: Mapping) -> None:
    """Negative control: the comparison above fails if the tables are those of another placement."""
    model = Model(kernel, placement_of(1))
    model.begin(600)
    ids = batch(600, 3)
    mapped = model.map(0, ids)
    model.placement = placement_of(2)
    with pytest.raises(AssertionError):
        check(model, 0, ids, mapped)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_graph_follows_commits(kernel: Mapping) -> None:
    model = Model(kernel, placement_of(1))
    ids = batch(512, 0)
    model.begin(512)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model.map(0, ids)  # compiled outside the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            mapped = model.map(0, ids)
    torch.cuda.synchronize()
    model.recorder.counts.zero_()
    for step in range(5):
        ids.copy_(batch(512, step))
        model.begin(500)
        graph.replay()
        torch.cuda.synchronize()
        check(model, 0, ids, mapped)
        counted = model.recorder.counts[0].cpu().numpy()
        np.testing.assert_array_equal(
            counted, np.bincount(mapped[:500].cpu().numpy().ravel(), minlength=model.placement.num_slots)
        )
        model.move(placement_of(2 + step))


@pytest.mark.skipif(INTERPRETED, reason="this test starts the run in the interpreter")
def test_kernel_passes_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not captured"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "5 passed" in done.stdout
