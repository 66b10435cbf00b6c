# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step without its routed experts: ``python -m benchmarks.decode_step --out FOLDER``.

On one GPU and in bf16, this times all work of a decode step on a rank with data-parallel attention, except the products
of routed experts: projections, attention over the KV cache, norms, router, shared expert, dense layers and the language
model's head. It runs plain torch operations in a captured CUDA graph. Dispatch and combine of tokens between ranks and
sampling are left out, so the experts' part of a real step is smaller than these times suggest.

Attention over the cache is timed as batched products, which read the cache twice. A fused kernel is faster, especially
with long contexts. The experts' part of a step is then larger than these times suggest.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES = (8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (1024, 4096)
FIELDS = ("model", "tokens", "context", "layer_ms", "attention_ms", "once_ms")


@dataclass(frozen=True)
class Attention:
    """The parts of a model beside its routed experts.

    Attributes:
        layers: with routed experts; dense: without, of ``dense_width``.
        heads, kv_heads: of queries, and of the cache; key, value: sizes of a head there.
        q_rank: of the queries' low-rank projection; 0 for none. rope: part of a key without a value (latent attention).
        head, out: sizes of a query head and of a value head outside of the cache.
        shared: width of the shared expert; 0 for none.
    """

    model: str
    hidden: int
    layers: int
    dense: int
    dense_width: int
    experts: int
    heads: int
    kv_heads: int
    key: int
    value: int
    q_rank: int
    head: int
    out: int
    shared: int
    vocabulary: int

    @property
    def latent(self) -> bool:
        return self.q_rank > 0


MODELS = (
    Attention("DeepSeek-V3", 7168, 58, 3, 18432, 256, 128, 1, 576, 512, 1536, 192, 128, 2048, 129280),
    Attention("Qwen3-235B-A22B", 4096, 94, 0, 0, 128, 64, 4, 128, 128, 0, 128, 128, 0, 151936),
)
TINY = (
    Attention("latent", 64, 2, 1, 128, 8, 4, 1, 40, 32, 16, 24, 16, 32, 128),
    Attention("grouped", 64, 2, 0, 0, 8, 8, 2, 16, 16, 0, 16, 16, 0, 128),
)


class Timer:
    """Times functions on a device, without the launches of their kernels."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, device

    def milliseconds(self, run: Callable[[], Any], times: int = 8, turns: int = 5) -> float:
        """Of one run: median over ``turns`` of the mean over ``times``."""
        torch = self._torch
        if self._device == "cpu":
            run()
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                run()
        graph.replay()
        took = []
        for _ in range(turns):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            took.append(start.elapsed_time(end) / times)
        return statistics.median(took)


class Step:
    """The weights of one layer of a model, and what a step does with them."""

    def __init__(self, model: Attention, device: str) -> None:
        import torch

        self._torch, self._device, self.model = torch, device, model
        m = model

        def weight(*shape: int) -> Any:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02

        self._norm = weight(m.hidden)
        if m.latent:
            self._q_down, self._q_up = weight(m.q_rank, m.hidden), weight(m.heads * m.head, m.q_rank)
            self._kv_down = weight(m.key, m.hidden)
            self._absorb, self._expand = weight(m.heads, m.out, m.value), weight(m.heads, m.value, m.out)
        else:
            self._qkv = weight((m.heads + 2 * m.kv_heads) * m.head, m.hidden)
        self._output = weight(m.hidden, m.heads * m.out)
        self._router = weight(m.experts, m.hidden)
        self._gate_up, self._down = weight(2 * m.shared, m.hidden), weight(m.hidden, m.shared)
        self._dense_gate_up, self._dense_down = weight(2 * m.dense_width, m.hidden), weight(m.hidden, m.dense_width)
        self._vocabulary = weight(m.vocabulary, m.hidden)

    def _mlp(self, x: Any, gate_up: Any, down: Any) -> Any:
        functional = self._torch.nn.functional
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, down)

    def projections(self, x: Any, values: Any) -> Any:
        """All of an attention block but the attention over the cache; ``values`` [B, heads, value] stand for that."""
        torch, m = self._torch, self.model
        functional = torch.nn.functional
        normed = functional.rms_norm(x, (m.hidden,), self._norm)
        if m.latent:
            q = functional.linear(functional.linear(normed, self._q_down), self._q_up).view(len(x), m.heads, m.head)
            self._kept = functional.linear(normed, self._kv_down)
            self._query = torch.bmm(q[..., : m.out].transpose(0, 1), self._absorb)
            values = torch.bmm(values.transpose(0, 1), self._expand).transpose(0, 1)
        else:
            self._kept = functional.linear(normed, self._qkv)
        return x + functional.linear(values.reshape(len(x), -1), self._output)

    def layer(self, x: Any, values: Any) -> Any:
        """A layer without its attention over the cache and without its routed experts."""
        torch, m = self._torch, self.model
        x = self.projections(x, values)
        normed = torch.nn.functional.rms_norm(x, (m.hidden,), self._norm)
        scores = torch.sigmoid(torch.nn.functional.linear(normed, self._router).float())
        self._chosen = torch.topk(scores, min(8, m.experts), dim=-1)
        return x + self._mlp(normed, self._gate_up, self._down) if m.shared else x + normed

    def dense_layer(self, x: Any, values: Any) -> Any:
        """The same of a layer without routed experts."""
        x = self.projections(x, values)
        normed = self._torch.nn.functional.rms_norm(x, (self.model.hidden,), self._norm)
        return x + self._mlp(normed, self._dense_gate_up, self._dense_down)

    def head(self, x: Any) -> Any:
        return self._torch.nn.functional.linear(x, self._vocabulary)

    def row(self, timer: Timer, batch: int, context: int) -> dict[str, Any]:
        """A row of the CSV."""
        torch, m = self._torch, self.model

        def tensor(*shape: int) -> Any:
            return torch.randn(*shape, device=self._device, dtype=torch.bfloat16)

        x, values = tensor(batch, m.hidden), tensor(batch, m.heads, m.value)
        once = timer.milliseconds(lambda: self.head(x))
        if m.dense:
            once += m.dense * timer.milliseconds(lambda: self.dense_layer(x, values))
        layer = timer.milliseconds(lambda: self.layer(x, values))
        groups, per_group = batch * m.kv_heads, m.heads // m.kv_heads
        keys = tensor(groups, context, m.key)
        cached_values = keys[..., : m.value] if m.latent else tensor(groups, context, m.value)
        query = tensor(groups, per_group, m.key)

        def attend() -> Any:
            scores = torch.bmm(query, keys.transpose(1, 2)) / math.sqrt(m.head)
            return torch.bmm(torch.softmax(scores, dim=-1), cached_values)

        attention = timer.milliseconds(attend, times=2)
        return {
            "model": m.model,
            "tokens": batch,
            "context": context,
            "layer_ms": round(layer, 5),
            "attention_ms": round(attention, 5),
            "once_ms": round(once + m.dense * attention, 5),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for decode_step.csv")
    parser.add_argument("--tiny", action="store_true", help="in small, to see that it runs")
    parser.add_argument("--seconds", type=float, default=90.0, help="rows not begun by then are left out")
    arguments = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer, began, left_out = Timer(device), time.monotonic(), 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), (arguments.out / "decode_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for model in TINY if arguments.tiny else MODELS:
            step = Step(model, device)
            for context in (64,) if arguments.tiny else CONTEXTS:
                for batch in (2, 8) if arguments.tiny else BATCHES:
                    if time.monotonic() - began > arguments.seconds:
                        left_out += 1
                        continue
                    writer.writerow(step.row(timer, batch, context))
                    file.flush()
            del step
    print(f"{time.monotonic() - began:.0f} s; {left_out} rows were left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
