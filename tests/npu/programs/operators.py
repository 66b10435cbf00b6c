# SPDX-License-Identifier: Apache-2.0
"""Compare every emulated operator with the CPU's result."""

from collections.abc import Callable

import torch


def _cases() -> dict[str, Callable[[Callable], torch.Tensor]]:
    """The cases by name: functions of ``t``, which moves a CPU tensor to the device under test."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=g)
    y = torch.randn(6, 8, generator=g)
    i = torch.randint(0, 6, (4, 8), generator=g)
    n = torch.randint(1, 9, (6, 8), generator=g)
    m = torch.randint(1, 9, (6, 8), generator=g)
    b = x > 0
    e = torch.randint(0, 16, (40,), generator=g)
    unary = "abs neg exp expm1 sin cos tan tanh erf sigmoid relu floor ceil round trunc sign frac".split()  # noqa: SIM905
    cases: dict[str, Callable] = {name: lambda t, f=name: getattr(torch, f)(t(x)) for name in unary}
    cases |= {
        f"{name} of positive": lambda t, f=name: getattr(torch, f)(t(x).abs() + 0.1)
        for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")
    }
    binary = "add sub mul div floor_divide remainder fmod eq ne gt ge lt le maximum minimum pow".split()  # noqa: SIM905
    cases |= {name: lambda t, f=name: getattr(torch, f)(t(x).abs() + 1, t(y).abs() + 1) for name in binary}
    cases |= {f"{name} integers": lambda t, f=name: getattr(torch, f)(t(n), t(m)) for name in binary if name != "div"}
    cases |= {
        f"{name} scalar": lambda t, f=name: getattr(torch, f)(t(n), 3)
        for name in binary
        if name not in ("maximum", "minimum")
    }
    cases |= {
        "logical": lambda t: t(b).logical_and(t(n > 4)).logical_or(t(n > 7)).logical_not(),
        "bitwise": lambda t: ((t(n) & t(m)) | 8) ^ t(m),
        "bitwise bool": lambda t: (t(b) & t(n > 4)) | ~t(b),
        "div trunc": lambda t: torch.div(t(n), t(m), rounding_mode="trunc"),
        "div floor scalar": lambda t: t(n) // 3,
        "rsub": lambda t: 1 - t(x),
        "clamp": lambda t: t(x).clamp(-0.5, 0.5),
        "clamp min": lambda t: t(x).clamp(min=0.1),
        "clamp max": lambda t: t(x).clamp(max=0.1),
        "where": lambda t: torch.where(t(b), t(x), t(y)),
        "addcmul": lambda t: torch.addcmul(t(x), t(y), t(y), value=0.5),
        "lerp": lambda t: torch.lerp(t(x), t(y), 0.25),
        "isfinite": lambda t: torch.isfinite(t(x) / t(torch.zeros(6, 8))),
        "isnan": lambda t: torch.isnan(t(x).log()),
        "nan to num": lambda t: torch.nan_to_num(t(y) / t(torch.zeros(6, 8)) + t(x).log() * 0, 1.0, 2.0, -3.0),
        "silu": lambda t: torch.nn.functional.silu(t(x)),
        "gelu": lambda t: torch.nn.functional.gelu(t(x)),
        "softplus": lambda t: torch.nn.functional.softplus(t(x)),
        "in place": lambda t: t(x).clone().add_(1).mul_(2).sub_(t(y)).div_(3).neg_().exp_(),
        "cast": lambda t: t(x).to(torch.int32).to(torch.float16).to(torch.float32),
        "bfloat16": lambda t: (t(x).bfloat16() * 2).float(),
        "strided copy": lambda t: t(x)[:, ::2].t().contiguous(),
        "strided write": lambda t: t(x).clone().t()[1:5].fill_(7) + 0 * t(x).t()[1:5],
        "masked": lambda t: t(x).masked_fill(t(b), -1.0),
        "masked select": lambda t: t(x)[t(b)],
        "nonzero": lambda t: t(b).nonzero(),
        "zeros ones full": lambda t: (
            t(x) * 0 + torch.ones_like(t(x)) + torch.full_like(t(x), 2.0) + torch.zeros_like(t(x))
        ),
        "eye": lambda t: torch.eye(4, device=t(x).device),
        "arange": lambda t: torch.arange(3, 40, 4, device=t(x).device),
        "linspace": lambda t: torch.linspace(0, 1, 7, device=t(x).device),
        "cat": lambda t: torch.cat([t(x), t(y)], dim=1),
        "stack": lambda t: torch.stack([t(x), t(y)], dim=1),
        "split": lambda t: torch.cat([p * k for k, p in enumerate(t(x).split([1, 2, 3]))]),
        "lists added": lambda t: torch.cat(torch._foreach_add([t(x), t(y)], [t(y), t(x)], alpha=2)),
        "repeat": lambda t: t(x).repeat(2, 3),
        "repeat interleave": lambda t: t(x).repeat_interleave(2, dim=0),
        "repeat interleave tensor": lambda t: torch.repeat_interleave(t(torch.arange(6)), t(torch.arange(6))),
        "flip roll": lambda t: t(x).flip(0).roll(2, 1),
        "tril triu": lambda t: t(x).tril() + t(x).triu(1) * 2,
        "pad": lambda t: torch.nn.functional.pad(t(x), (1, 2, 0, 1), value=3.0),
        "permute": lambda t: t(x).view(2, 3, 8).permute(2, 0, 1).contiguous(),
        "one hot": lambda t: torch.nn.functional.one_hot(t(i[0]), 6),
        "sum": lambda t: t(x).sum(),
        "sum dim": lambda t: t(x).sum(dim=1, keepdim=True),
        "sum integers": lambda t: t(n).sum(0),
        "mean": lambda t: t(x).mean(dim=0) + t(x).mean(),
        "prod": lambda t: t(x).prod(),
        "max min": lambda t: t(x).max() - t(x).min(),
        "max dim": lambda t: t(x).max(dim=1)[0] + t(x).max(dim=1)[1] + t(x).min(dim=1)[1],
        "amax amin": lambda t: t(x).amax(1) - t(x).amin(1),
        "argmax argmin": lambda t: t(x).argmax(1) * 10 + t(x).argmin(1),
        "all any": lambda t: t(b).all(dim=1) ^ t(b).any(dim=1) ^ t(b).any(),
        "cumsum": lambda t: t(n).cumsum(0),
        "sort": lambda t: t(x).sort(dim=1, descending=True)[0] + t(x).sort(dim=1)[1],
        "argsort stable": lambda t: torch.argsort(t(n), dim=1, stable=True),
        "topk": lambda t: t(x).topk(3, dim=1)[0] + t(x).topk(3, dim=1)[1],
        "var std": lambda t: t(x).var(1) + t(x).std(0).mean(),
        "norm": lambda t: torch.linalg.vector_norm(t(x), dim=1),
        "logsumexp": lambda t: t(x).logsumexp(1),
        "bincount": lambda t: torch.bincount(t(e), minlength=16),
        "histc": lambda t: torch.histc(t(e).float(), bins=16, min=0, max=16),
        "unique": lambda t: torch.unique(t(e)),
        "gather": lambda t: t(x).gather(0, t(i)),
        "scatter": lambda t: t(x).clone().scatter_(0, t(i[:1]), t(y[:1])),
        "scatter value": lambda t: t(x).clone().scatter_(0, t(i[:1]), 5.0),
        "scatter add": lambda t: t(n).clone().scatter_add_(0, t(i), t(m[:4])),
        "index": lambda t: t(x)[t(i[0])],
        "index two": lambda t: t(x)[t(i[0]), t(i[1])],
        "index second": lambda t: t(x)[:, t(i[0])],
        "index put": lambda t: t(x).clone().index_put_((t(torch.tensor([0, 2])),), t(y[:2])),
        "index put accumulate": lambda t: t(n).clone().index_put_((t(i[0]),), t(m[0, 0]), accumulate=True),
        "index select": lambda t: t(x).index_select(0, t(i[0])),
        "index add": lambda t: t(x).clone().index_add_(0, t(i[0]), t(torch.ones(8, 8))),
        "index copy": lambda t: t(x).clone().index_copy_(0, t(torch.tensor([1, 3])), t(y[:2])),
        "index fill": lambda t: t(x).clone().index_fill_(0, t(torch.tensor([1, 3])), -1.0),
        "embedding": lambda t: torch.nn.functional.embedding(t(i), t(x)),
        "searchsorted": lambda t: torch.searchsorted(t(torch.arange(0.0, 8.0)), t(x)),
        "equal": lambda t: torch.tensor(torch.equal(t(x), t(x)) and not torch.equal(t(x), t(y))),
        "isclose": lambda t: torch.isclose(t(x), t(x) + 1e-9),
        "mm": lambda t: t(x) @ t(y).t(),
        "bmm": lambda t: torch.bmm(t(x).view(2, 3, 8), t(y).view(2, 8, 3)),
        "matmul": lambda t: torch.matmul(t(x).view(2, 3, 8), t(y).t()),
        "addmm": lambda t: torch.addmm(t(torch.ones(6)), t(x), t(y).t()),
        "linear": lambda t: torch.nn.functional.linear(t(x), t(y), t(torch.ones(6))),
        "softmax": lambda t: torch.softmax(t(x), dim=-1) + torch.log_softmax(t(x), dim=0),
        "layer norm": lambda t: torch.nn.functional.layer_norm(t(x), (8,), t(y[0]), t(y[1])),
        "item": lambda t: torch.tensor(t(x)[2, 3].item()),
        "view dtype": lambda t: t(x).view(torch.uint8).sum(1),
    }
    return cases


def against_cpu() -> dict[str, str]:
    """The errors by name, for the cases that differ from the CPU."""
    wrong = {}
    for name, case in _cases().items():
        expected = case(lambda tensor: tensor.clone())
        try:
            torch.testing.assert_close(case(lambda tensor: tensor.npu()).cpu(), expected, rtol=1e-6, atol=1e-6)
        except Exception as error:
            wrong[name] = str(error)[:600]
    return wrong


def count() -> int:
    return len(_cases())


def not_emulated() -> str:
    try:
        torch.linalg.svd(torch.eye(3).npu())
        torch.npu.synchronize()
    except Exception as error:
        return str(error)
    return "it worked"


def fused() -> dict[str, str]:
    """Compare the fused operators of a served MoE model with plain formulas; returns the errors by name."""
    import torch_npu

    g = torch.Generator().manual_seed(1)
    wrong = {}

    def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        try:
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
        except AssertionError as error:
            wrong[name] = str(error)[:600]

    x, y, gamma = torch.randn(5, 16, generator=g), torch.randn(5, 16, generator=g), torch.randn(16, generator=g)

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6) * gamma

    check("rms norm", torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-6)[0], norm(x))
    added = torch_npu.npu_add_rms_norm(x.npu(), y.npu(), gamma.npu(), 1e-6)
    check("add rms norm", added[0], norm(x + y))
    check("add rms norm, sum", added[2], x + y)
    check("swiglu", torch_npu.npu_swiglu(x.npu()), torch.nn.functional.silu(x[:, :8]) * x[:, 8:])

    # A MoE layer whose rank holds the slots first..last-1 of 8: pairs of other ranks contribute nothing.
    tokens, hidden, inner, experts, k = 7, 16, 12, 8, 2
    h = torch.randn(tokens, hidden, generator=g)
    logits = torch.randn(tokens, experts, generator=g)
    w13 = torch.randn(experts, hidden, 2 * inner, generator=g)
    w2 = torch.randn(experts, inner, hidden, generator=g)
    weights, ids, _ = torch_npu.npu_moe_gating_top_k(logits.npu(), k, renorm=1)
    want_weights, want_ids = torch.softmax(logits, -1).topk(k, -1)
    want_weights = want_weights / want_weights.sum(-1, keepdim=True)
    check("gating", weights, want_weights)
    check("gating, experts", ids.to(torch.int64), want_ids)

    def routed(first: int, last: int, quant_mode: int) -> list[torch.Tensor]:
        """Rows sorted by expert, their positions, the number of rows per expert, and the scales."""
        return torch_npu.npu_moe_init_routing_v2(
            h.npu(),
            ids,
            active_num=tokens * k,
            expert_num=experts,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            active_expert_range=[first, last],
            quant_mode=quant_mode,
        )

    for first, last in ((0, 8), (0, 4), (4, 8)):
        mine = (want_ids >= first) & (want_ids < last)
        rows, places, counts, _ = routed(first, last, -1)
        check(f"counts {first}", counts, torch.bincount(want_ids[mine] - first, minlength=last - first))
        inner_rows = torch_npu.npu_grouped_matmul(
            [rows], [w13[first:last].npu()], split_item=2, group_list_type=1, group_type=0, group_list=counts
        )[0]
        out_rows = torch_npu.npu_grouped_matmul(
            [torch_npu.npu_swiglu(inner_rows)],
            [w2[first:last].npu()],
            split_item=2,
            group_list_type=1,
            group_type=0,
            group_list=counts,
        )[0]
        out = torch_npu.npu_moe_token_unpermute(out_rows, places.abs(), probs=weights * mine.npu())
        want = torch.zeros(tokens, hidden)
        for token in range(tokens):
            for n in range(k):
                if mine[token, n]:
                    e = int(want_ids[token, n])
                    a, b = (h[token] @ w13[e]).chunk(2)
                    want[token] += want_weights[token, n] * ((torch.nn.functional.silu(a) * b) @ w2[e])
        check(f"experts {first}..{last - 1}", out, want)

    # The same in int8: rows are quantised one by one, weights by output column.
    def int8(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = v.abs().amax(-1, keepdim=True) / 127
        return torch.round(v / scale), scale

    rows, scale = torch_npu.npu_dynamic_quant(h.npu())
    check("dynamic quantisation", rows.float(), int8(h)[0])
    check("dynamic quantisation, scale", scale, int8(h)[1].squeeze(-1))
    w8 = [int8(w.t()) for w in w13]  # [2 * inner, hidden] and [2 * inner, 1]
    sorted_rows, _, counts, sorted_scale = routed(0, experts, 1)
    products = torch_npu.npu_grouped_matmul(
        [sorted_rows],
        [w.t().contiguous().to(torch.int8).npu() for w, _ in w8],
        scale=[s.squeeze(-1).npu() for _, s in w8],
        per_token_scale=[sorted_scale],
        split_item=2,
        group_list_type=1,
        group_type=0,
        group_list=counts,
        output_dtype=torch.float32,
    )[0]
    order = torch.argsort(want_ids.flatten(), stable=True)
    want = torch.stack(
        [
            (int8(h)[0][pair // k] @ w8[e][0].t()) * int8(h)[1][pair // k] * w8[e][1].squeeze(-1)
            for pair in order.tolist()
            for e in [int(want_ids.flatten()[pair])]
        ]
    )
    check("int8 products", products, want)

    # Two sequences with 3 and 1 new tokens after 4 and 6 old ones, 4 query heads over 2 key heads, blocks of 4 tokens.
    lengths, kv_lengths, size = [3, 1], [7, 7], 4
    q = torch.randn(4, 4, 8, generator=g)
    cache_k, cache_v = torch.randn(5, size, 16, generator=g), torch.randn(5, size, 16, generator=g)
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    arguments = {
        "query": q.npu(),
        "key": cache_k.npu(),
        "value": cache_v.npu(),
        "atten_mask": torch.ones(2048, 2048, dtype=torch.int8).triu(1).npu(),
        "actual_seq_lengths": [3, 4],
        "actual_seq_lengths_kv": kv_lengths,
        "block_table": table.npu(),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.3,
        "input_layout": "TND",
        "block_size": size,
        "sparse_mode": 3,
    }
    got, _ = torch_npu.npu_fused_infer_attention_score(**arguments)
    captured = [torch.empty_like(got), torch.empty(1).npu()]  # as in a captured graph
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(**arguments)
    torch_npu.npu_fused_infer_attention_score.out(**arguments, workspace=workspace, out=captured)
    begin, parts = 0, []
    for n, new in enumerate(lengths):
        keys = cache_k[table[n].long()].reshape(-1, 2, 8)[: kv_lengths[n]].repeat_interleave(2, 1)
        values = cache_v[table[n].long()].reshape(-1, 2, 8)[: kv_lengths[n]].repeat_interleave(2, 1)
        for i in range(new):
            seen = kv_lengths[n] - new + i + 1
            scores = torch.einsum("hd,mhd->hm", q[begin + i], keys[:seen]) * 0.3
            parts.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), values[:seen]))
        begin += new
    check("attention", got, torch.stack(parts))
    check("attention with a workspace", captured[0], torch.stack(parts))

    # The last query of the first sequence, over parts of its keys, one of them empty; the parts are then put together.
    sums, results = [], []
    for block, known in ((3, 4), (1, 3), (0, 0)):
        of_part = {
            "query": q[2:3].npu(),
            "actual_seq_lengths": [1],
            "actual_seq_lengths_kv": [known],
            "block_table": torch.tensor([[block]], dtype=torch.int32).npu(),
            "atten_mask": None,
            "sparse_mode": 0,
            "softmax_lse_flag": True,
        }
        result, logarithms = torch_npu.npu_fused_infer_attention_score(**{**arguments, **of_part})
        results.append(result.view(4, 8))
        sums.append(logarithms.view(4))
    together, _ = torch_npu.npu_attention_update(sums, results, 0)
    check("attention over parts", together, parts[2])
    return wrong
