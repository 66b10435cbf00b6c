# SPDX-License-Identifier: Apache-2.0
"""Stand-in for vllm-ascend's compiled extension: the custom operators that a small MoE model needs, in terms of
torch_npu's own ones; and for the operators of NNAL that such a model calls. Copied beside vllm-ascend's modules, where
its build would put the extension.
"""

import torch
import torch_npu
import vllm.v1.worker.block_table as _block_table
from torch_npu.op_plugin.atb._atb_ops import _register_atb_extensions

_library = torch.library.Library("_C_ascend", "DEF")


# Named by vllm-ascend's meta registration, called by nothing here.
for _schema in (
    "get_masked_input_and_mask(Tensor input, int a, int b, int c, int d, int e) -> (Tensor, Tensor)",
    "bgmv_expand(Tensor x, Tensor weight, Tensor indices, Tensor(a!) y, int offset, int size) -> Tensor",
    "sgmv_expand(Tensor x, Tensor weight, Tensor i, Tensor n, Tensor(a!) y, int offset, int size) -> Tensor",
    "device_print(str message) -> ()",
    "device_print_tensor(Tensor tensor) -> ()",
):
    _library.define(_schema)


def _operator(schema: str):
    _library.define(schema)

    def registered(function):
        _library.impl(schema.split("(")[0], function, "PrivateUse1")
        return function

    return registered


@_operator(
    "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta, float epsilon) -> (Tensor, Tensor, Tensor)"
)
def _add_rms_norm_bias(x1, x2, gamma, beta, epsilon):
    y, deviation, x = torch_npu.npu_add_rms_norm(x1, x2, gamma, epsilon)
    return (y if beta is None else y + beta), deviation, x


def _add_rms_norm_bias_shapes(x1, x2, gamma, beta, epsilon):
    return torch.empty_like(x1), x1.new_empty((*x1.shape[:-1], 1), dtype=torch.float32), torch.empty_like(x1)


_library.impl("npu_add_rms_norm_bias", _add_rms_norm_bias_shapes, "Meta")  # compiled models call it


@_operator(
    "npu_moe_init_routing_custom(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
    "int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=-1, int[] active_expert_range=[], int row_idx_type=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _moe_init_routing_custom(x, expert_idx, **options):
    return torch_npu.npu_moe_init_routing_v2(x, expert_idx, **options)


@_operator(
    "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, int norm_type, "
    "bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None) -> (Tensor, Tensor, Tensor)"
)
def _moe_gating_top_k(
    x,
    k,
    k_group,
    group_count,
    group_select_mode,
    renorm,
    norm_type,
    out_flag,
    routed_scaling_factor,
    eps,
    bias_opt=None,
):
    return torch_npu.npu_moe_gating_top_k(
        x,
        k,
        bias=bias_opt,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


@_operator(
    "grouped_matmul_swiglu_quant_weight_nz_tensor_list(Tensor x, Tensor[] weight, Tensor[] weight_scale, "
    "Tensor x_scale, Tensor group_list, *, Tensor? bias=None, Tensor? offset=None, float swiglu_limit=0.0) "
    "-> (Tensor, Tensor, Tensor)"
)
def _grouped_matmul_swiglu_quant(x, weight, weight_scale, x_scale, group_list, **unused):
    """int8 rows in, int8 rows and their scales out; group_list: prefix sums."""
    (both,) = torch_npu.npu_grouped_matmul(
        x=[x],
        weight=weight,
        scale=weight_scale,
        per_token_scale=[x_scale],
        group_list=group_list,
        split_item=2,
        group_type=0,
        group_list_type=0,
        output_dtype=torch.float32,
    )
    rows, scales = torch_npu.npu_dynamic_quant(torch_npu.npu_swiglu(both))
    return rows, scales, torch.empty_like(scales)


def _rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox_style):
    """In place. cos_sin_cache [positions, rotary size]: cosines, then sines."""
    cos, sin = cos_sin_cache[positions.reshape(-1).to(torch.int64)].chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    for tensor in (query, key):
        heads = tensor.view(cos.shape[0], -1, head_size)
        rotary, rest = heads[..., : 2 * cos.shape[-1]], heads[..., 2 * cos.shape[-1] :]
        if is_neox_style:
            a, b = rotary.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        else:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
            turned = torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)
        tensor.copy_(turned.view(tensor.shape))


def _reshape_and_cache(key, value, key_cache, value_cache, slot_indices):
    """slot_indices [tokens]: block * block size + place; negative ones are padding and go to block 0, which vLLM keeps
    for that."""
    places = key_cache.shape[0] * key_cache.shape[1]
    slots = slot_indices.to(torch.int64)
    slots = slots.clamp(min=0)
    key_cache.view(places, *key_cache.shape[2:]).index_copy_(0, slots, key.view(-1, *key_cache.shape[2:]))
    value_cache.view(places, *value_cache.shape[2:]).index_copy_(0, slots, value.view(-1, *value_cache.shape[2:]))


def _mrope(positions, query, key, cos_sin_cache, head_size, *, mrope_section, rotary_mode="half", cache_mode="default"):
    """Without sections it is the plain rotary embedding, not in place."""
    assert not any(mrope_section), "not emulated: npu_mrope with sections"
    query, key = query.clone(), key.clone()
    _rotary_embedding(positions, query, key, head_size, cos_sin_cache, rotary_mode == "half")
    return query, key


def _scatter_pa_kv_cache(key, value, key_cache, value_cache, slot_mapping, *, cache_mode="Norm"):
    """The same into caches that may lie side by side in one tensor."""
    assert cache_mode == "Norm", "not emulated: npu_scatter_pa_kv_cache in internal formats"
    slots = slot_mapping.to(torch.int64).clamp(min=0)
    block, place = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, place] = key.view(-1, *key_cache.shape[2:])
    value_cache[block, place] = value.view(-1, *value_cache.shape[2:])


_register_atb_extensions()  # once only; what follows stays
torch_npu._npu_rotary_embedding = _rotary_embedding
torch_npu._npu_reshape_and_cache = _reshape_and_cache
torch_npu.npu_mrope = _mrope
torch_npu.npu_scatter_pa_kv_cache = _scatter_pa_kv_cache
torch_npu.npu_format_cast = lambda tensor, layout: tensor  # internal formats (NZ) are not emulated
torch_npu._npu_matmul_add_fp32 = lambda *tensors: (
    None
)  # vllm-ascend calls it once, to warm ATB up, and drops the result


class _ComputeSlotMapping:
    """vLLM's Triton kernel of that name, without context parallelism: where each token's key and value go."""

    def __getitem__(self, grid):
        requests = grid[0] - 1

        def launch(tokens, most, starts, positions, table, stride, block_size, slot_mapping, **constants):
            lengths = starts[1 : requests + 1] - starts[:requests]
            rows = torch.repeat_interleave(torch.arange(requests, device=starts.device), lengths.to(torch.int64))
            places = positions[: rows.shape[0]].to(torch.int64)
            blocks = table[rows, places // block_size].to(torch.int64)
            slot_mapping[: rows.shape[0]] = blocks * block_size + places % block_size
            slot_mapping[tokens:most] = constants["PAD_ID"]

        return launch


if hasattr(_block_table, "_compute_slot_mapping_kernel"):
    _block_table._compute_slot_mapping_kernel = _ComputeSlotMapping()
else:  # 0.30.0rc2 has one of its own, called alike
    import vllm_ascend.ops.triton.compute_slot_mapping as _slot_mapping

    _slot_mapping._compute_slot_mapping_kernel = _ComputeSlotMapping()


class _Kernel:
    """A Triton kernel in terms of torch_npu: ``kernel[grid](...)``."""

    def __init__(self, function):
        self._function = function

    def __getitem__(self, grid):
        return self._function


def _rope(
    q, q_stride, k, k_stride, cos, cos_stride, sin, sin_stride, cos_sin, cos_sin_stride, positions, tokens,
    q_heads, k_heads, head_size, rotary_size, *unused, **constants,
):  # fmt: skip
    """In place. cos_sin [positions, rotary size]: cosines, then sines; or a row of each for every token."""
    neox = constants["IS_NEOX_STYLE"]
    if constants["USE_COS_SIN"]:
        cos, sin = cos_sin[positions[:tokens].to(torch.int64), :rotary_size].chunk(2, -1)
    cos, sin = cos[:tokens].float().unsqueeze(1), sin[:tokens].float().unsqueeze(1)
    for tensor, heads in ((q, q_heads), (k, k_heads)):
        rows = tensor.as_strided((tokens, heads, head_size), (tensor.stride(0), head_size, 1))[..., :rotary_size]
        a, b = rows.float().chunk(2, -1) if neox else (rows[..., 0::2].float(), rows[..., 1::2].float())
        turned = (a * cos - b * sin, b * cos + a * sin)
        together = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
        rows.copy_(together.to(tensor.dtype))


def _map_to_physical(ids, table, slots, experts, pairs, top, rows, **unused):
    """ids int [N, K]; table int32 [rows, E]; slots [N, K], written: -1 where there is no such expert."""
    wanted = ids.reshape(-1).to(torch.int64)
    row = torch.div(torch.arange(pairs, device=ids.device), top, rounding_mode="floor") % rows
    known = (wanted >= 0) & (wanted < experts)
    taken = table.view(-1)[row * experts + wanted * known]
    slots.view(-1).copy_(torch.where(known, taken, -1))


def _record_expert_tokens(tokens, load, enabled, slots, first, *, group_list_type, **unused):
    """Adds counts (group_list_type 1) or prefix sums of them to load[first:], if that is enabled."""
    counts = tokens[:slots].to(torch.int64)
    if group_list_type != 1:
        counts = torch.cat([counts[:1], counts[1:] - counts[:-1]])
    load[first : first + slots].add_((counts * (enabled != 0)).to(load.dtype))


def _replace_kernels_of_layers():
    """Those in every layer: they are called often, and in graphs that are captured; the other kernels of the second
    model runner are run by Triton's interpreter, which waits for the device."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        import vllm_ascend.ops.triton.eplb as eplb
        import vllm_ascend.ops.triton.rope as rope

        rope._triton_rope = _Kernel(_rope)
        eplb._map_to_physical_kernel = _Kernel(_map_to_physical)
        eplb._record_expert_tokens_kernel = _Kernel(_record_expert_tokens)


_replace_kernels_of_layers()


def _moe_distribute_dispatch(
    x,
    expert_ids,
    moe_expert_num,
    ep_world_size,
    ep_rank_id,
    expert_token_nums_type,
    global_bs=0,
    x_active_mask=None,
    quant_mode=0,
    **unused,
):
    """The first half of MC2, a fused operator of CANN, in terms of collectives: every token to the ranks that hold its
    slots, ordered by slot. x [N, H], expert_ids [N, K]. N is equal on all ranks, or at most the share of a rank in
    global_bs. With a quant_mode they travel as int8. There are as many rows as all ranks can send, so that graphs can
    be captured; those behind the last slot's have no meaning."""
    group = _mc2_group()
    further = _rows(x, global_bs, ep_world_size) - x.shape[0]
    if further:
        pad = torch.nn.functional.pad
        x, expert_ids = pad(x, (0, 0, 0, further)), pad(expert_ids, (0, 0, 0, further), value=-1)

    def gathered(tensor):
        parts = [torch.empty_like(tensor) for _ in range(ep_world_size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    ids = expert_ids.to(torch.int64)
    if x_active_mask is not None:
        ids = ids.masked_fill(~x_active_mask[: ids.shape[0]].unsqueeze(1), -1)
    scales = None
    if quant_mode:
        x, scales = torch_npu.npu_dynamic_quant(x)
        scales = gathered(scales)
    tokens, ids = gathered(x), gathered(ids)
    size = moe_expert_num // ep_world_size
    local = ids.flatten() - ep_rank_id * size
    mine = (local >= 0) & (local < size)
    slots = torch.where(mine, local, size)
    pairs = torch.argsort(slots, stable=True)
    counts = torch.zeros(size + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, slots, mine.to(torch.int64))[:size]
    numbers = counts if expert_token_nums_type == 1 else counts.cumsum(0)
    nothing = torch.empty(0, dtype=torch.int32, device=x.device)
    rows, sent = pairs // ids.shape[1], torch.where(mine[pairs], pairs, pairs.shape[0])
    return tokens[rows], nothing if scales is None else scales[rows], sent, numbers, nothing, nothing, nothing


def _moe_distribute_combine(
    expand_x, expert_ids, expert_scales, ep_world_size, ep_rank_id, assist_info_for_combine, global_bs=0, **unused
):
    """The second half: the results back to the tokens' ranks, weighted and summed. expert_scales float32 [N, K]."""
    tokens, top = _rows(expert_ids, global_bs, ep_world_size), expert_ids.shape[1]
    sent = assist_info_for_combine
    results = torch.zeros(sent.shape[0] + 1, expand_x.shape[1], dtype=expand_x.dtype, device=expand_x.device)
    results[sent] = expand_x
    results = results[:-1]  # the last row took those without a meaning
    torch.distributed.all_reduce(results, group=_mc2_group())  # one summand is not zero
    own = results.view(ep_world_size, tokens, top, -1)[ep_rank_id, : expert_ids.shape[0]].float()
    return (own * expert_scales.unsqueeze(-1)).sum(1).to(expand_x.dtype)


def _rows(tokens, global_bs, ep_world_size):
    """Rows that every rank sends, of which ``tokens`` [N, ...] are the first."""
    return global_bs // ep_world_size if global_bs else tokens.shape[0]


def _mc2_group():
    from vllm_ascend.distributed.parallel_state import get_mc2_group

    return get_mc2_group().device_group


def _int4_products(rows, scales, weights, weight_scales, biases, counts):
    """rows int8 [N, I] with scales [N]; by slot, weights int32 [I, O / 8], their scales and biases float32 [O]; counts
    by slot. As on the device, 8 is taken from every number of a row, and the bias, 8 times the sum of an output's
    weights, makes up for it."""
    packs = torch.stack(list(weights)).view(torch.int8).to(torch.int32)
    odd = torch.div(packs, 16, rounding_mode="floor")
    even = packs - 16 * odd
    even = torch.where(even > 7, even - 16, even)
    whole = torch.stack([even, odd], -1).flatten(2).float()
    values = whole * torch.stack([scale.reshape(1, -1) for scale in weight_scales])
    bias = torch.stack([bias.reshape(1, -1).float() for bias in biases])
    (products,) = torch_npu.npu_grouped_matmul(
        x=[torch.cat([rows.float() - 8, torch.ones_like(rows[:, :1]).float()], 1)],
        weight=list(torch.cat([values, bias], 1)),
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    return products * scales.reshape(-1, 1)


@_operator(
    "dispatch_ffn_combine(Tensor x, Tensor[] weight1, Tensor[] weight2, Tensor expert_idx, Tensor[] scale1, "
    "Tensor[] scale2, Tensor[] bias1, Tensor[] bias2, Tensor probs, str group, int max_output_size, "
    "float swiglu_limit, int world_size=-1, Tensor? x_active_mask=None, *, Tensor(a!) out, "
    "Tensor(b!) expert_token_nums) -> ()"
)
def _dispatch_ffn_combine(
    x, weight1, weight2, expert_idx, scale1, scale2, bias1, bias2, probs, group_name, max_output_size, swiglu_limit,
    world_size=-1, x_active_mask=None, *, out, expert_token_nums,
):  # fmt: skip
    """Fused MC2, in terms of both halves and the products between them. x [N, H], expert_idx and probs [N, K]; the
    weights by slot, as a list or as one tensor. Without scales they are of x's dtype. With scales (float32 in the bits
    of int64) they are in W8A8 (int8) or in W4A8 (eight int4 of a row in int32, with a bias). N is equal on all
    ranks."""
    group, size = _mc2_group(), expert_token_nums.shape[0]
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    quantised = scale1[0].numel() > 0
    rows, scales, sent, counts, *_ = _moe_distribute_dispatch(
        x, expert_idx, size * ranks, ranks, rank, 1, x_active_mask=x_active_mask, quant_mode=2 if quantised else 0
    )
    weight1, weight2 = (list(part[0]) if part[0].dim() == 3 else part for part in (weight1, weight2))
    grouped = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    first, second = ([scale.to(torch.int32).view(torch.float32) for scale in part] for part in (scale1, scale2))
    if not quantised:
        (both,) = torch_npu.npu_grouped_matmul(x=[rows], weight=weight1, **grouped)
        (results,) = torch_npu.npu_grouped_matmul(x=[torch_npu.npu_swiglu(both)], weight=weight2, **grouped)
    elif weight1[0].dtype == torch.int32:
        both = _int4_products(rows, scales, weight1, first, bias1, counts)
        rows, scales = torch_npu.npu_dynamic_quant(torch_npu.npu_swiglu(both))
        results = _int4_products(rows, scales, weight2, second, bias2, counts)
    else:
        rows, scales, _ = _grouped_matmul_swiglu_quant(rows, weight1, first, scales, counts.cumsum(0))
        (results,) = torch_npu.npu_grouped_matmul(
            x=[rows], weight=weight2, scale=second, per_token_scale=[scales], output_dtype=torch.float32, **grouped
        )
    out.copy_(_moe_distribute_combine(results, expert_idx, probs, ranks, rank, sent))
    expert_token_nums.copy_(counts)


torch_npu.npu_moe_distribute_dispatch_v2 = _moe_distribute_dispatch
torch_npu.npu_moe_distribute_combine_v2 = _moe_distribute_combine
