// SPDX-License-Identifier: Apache-2.0
// Fused operators of a served model: normalisation, gating, routing, grouped products, paged attention.
#include "operator.h"

using at::Tensor;

namespace {

Tensor rms(const Tensor& x, const Tensor& gamma, double epsilon, Tensor* deviation) {
    Tensor wide = x.to(at::kFloat);
    Tensor scale = at::rsqrt(wide.pow(2).mean(-1, true) + epsilon);
    if (deviation) *deviation = scale;
    return wide * scale * gamma.to(at::kFloat);
}

void assign(Out& out, const Tensor& value) {
    if (out.given() && out.tensor.numel()) out.tensor.copy_(value.reshape(out.tensor.sizes()));
}

// Rows of the groups: [0, end) of every group, from counts (type 1) or prefix sums (type 0).
std::vector<int64_t> group_ends(const Tensor& list, int64_t type) {
    std::vector<int64_t> ends;
    int64_t end = 0;
    for (int64_t i = 0; i < list.numel(); ++i) {
        const int64_t value = list[i].item<int64_t>();
        end = type == 1 ? end + value : value;
        ends.push_back(end);
    }
    return ends;
}

// Rows as int8, and per row what they are to be multiplied with; the largest magnitude of a row becomes 127.
std::pair<Tensor, Tensor> quantised(const Tensor& x) {
    Tensor wide = x.to(at::kFloat);
    Tensor scale = wide.abs().amax(-1, true) / 127;
    return {at::round(wide / scale.clamp_min(1e-30)).to(at::kChar), scale.squeeze(-1)};
}

// One sequence: q [n, H, D], k and v [m, Hkv, D]; causal: the last query sees everything. Returns [n, H, D] and the
// logarithms of the sums [n, H, 1], which are -inf where there is no key.
std::pair<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
    const int64_t repeat = q.size(1) / k.size(1);
    Tensor keys = k.to(at::kFloat).repeat_interleave(repeat, 1).permute({1, 2, 0});
    Tensor values = v.to(at::kFloat).repeat_interleave(repeat, 1).transpose(0, 1);
    Tensor scores = at::matmul(q.to(at::kFloat).transpose(0, 1), keys) * scale;  // [H, n, m]
    if (causal) {
        Tensor hidden = at::ones({q.size(0), k.size(0)}, at::kBool).triu(k.size(0) - q.size(0) + 1);
        scores = scores.masked_fill(hidden, -std::numeric_limits<float>::infinity());
    }
    Tensor sums = at::logsumexp(scores, -1).transpose(0, 1).unsqueeze(-1);
    return {at::matmul(at::softmax(scores, -1), values).transpose(0, 1), sums};
}

}  // namespace

ACLNN(aclnnRmsNorm, [](In x, In gamma, double epsilon, Out y, Out deviation) {
    Tensor scale;
    y = rms(x, gamma, epsilon, &scale);
    assign(deviation, scale);
});
ACLNN(aclnnAddRmsNorm, [](In a, In b, In gamma, double epsilon, Out y, Out deviation, Out sum) {
    Tensor x = at::add(a, b), scale;
    y = rms(x, gamma, epsilon, &scale);
    assign(deviation, scale);
    sum = x;
});
ACLNN(aclnnSwiGlu, [](In self, int64_t dim, Out out) {
    auto halves = self.chunk(2, dim);
    out = at::silu(halves[0]) * halves[1];
});

ACLNN(aclnnMoeGatingTopK, [](In x, In bias, int64_t k, int64_t k_group, int64_t groups, int64_t, int64_t renorm,
                             int64_t norm_type, bool, double factor, double epsilon, Out y, Out experts, Out normed) {
    if (k_group != groups && groups > 1) throw emulated::Error(200001, "not emulated: aclnnMoeGatingTopK with groups");
    Tensor wide = x.to(at::kFloat);
    Tensor scores = norm_type == 0 ? at::softmax(wide, -1) : at::sigmoid(wide);
    Tensor ranked = bias.given() ? scores + bias.to(at::kFloat) : scores;
    Tensor chosen = std::get<1>(at::topk(ranked, k, -1));
    Tensor weights = scores.gather(-1, chosen);
    if (norm_type != 0 || renorm) weights = weights / (weights.sum(-1, true) + epsilon);
    y = weights * factor;
    experts = chosen;
    assign(normed, scores);
});
ACLNN(aclnnMoeGatingTopKSoftmax, [](In x, In, int64_t k, Out y, Out experts, Out rows) {
    auto [weights, chosen] = at::topk(at::softmax(x.to(at::kFloat), -1), k, -1);
    y = weights;
    experts = chosen;
    rows = at::arange(x.size(0) * k).reshape({k, x.size(0)}).t();
});

// Rows of x in the order of their experts (those in active_range), the place of each (token, k) pair in that order or
// -1, and the number of rows per expert.
ACLNN(aclnnMoeInitRoutingV3, [](In x, In experts, In scale, In, int64_t active, int64_t, int64_t, int64_t drop,
                                int64_t count_type, bool count, int64_t quant, Ints range, int64_t row_type,
                                Out expanded, Out places, Out counts, Out scales) {
    if (drop || quant < -1 || quant > 1 || quant == 0)
        throw emulated::Error(200001, "not emulated: aclnnMoeInitRoutingV3 with capacity or static quantisation");
    const int64_t k = experts.size(1), pairs = experts.numel();
    Tensor flat = experts.reshape(-1).to(at::kLong);
    const int64_t first = range.size() == 2 ? range[0] : 0, last = range.size() == 2 ? range[1] : int64_t{1} << 40;
    Tensor mine = at::logical_and(flat >= first, flat < last);
    Tensor order = at::argsort(at::where(mine, flat, at::scalar_tensor(int64_t{1} << 40, at::kLong)), true, 0, false);
    const int64_t taken = mine.sum().item<int64_t>();
    Tensor kept = order.narrow(0, 0, taken);
    expanded.tensor.zero_();
    const int64_t rows = std::min(taken, expanded.tensor.size(0));
    Tensor values = x.index_select(0, at::floor_divide(kept.narrow(0, 0, rows), k));
    if (quant == 1 && rows > 0) {
        auto [small, factors] = quantised(values);
        values = small;
        scales.tensor.reshape(-1).narrow(0, 0, rows).copy_(factors);
    }
    if (rows > 0) expanded.tensor.narrow(0, 0, rows).copy_(values);
    if (quant == -1 && scale.given() && scales.given() && scales.tensor.numel()) {
        scales.tensor.reshape(-1)
            .narrow(0, 0, rows)
            .copy_(scale.reshape(-1).index_select(0, at::floor_divide(kept.narrow(0, 0, rows), k)));
    }
    if (row_type == 0) {  // from pair to row
        Tensor place = at::full({pairs}, -1, at::kLong);
        place.index_copy_(0, kept, at::arange(taken));
        assign(places, place);
    } else {  // from row to pair
        Tensor pair = at::full({pairs}, -1, at::kLong);
        pair.narrow(0, 0, taken).copy_(kept);
        assign(places, pair);
    }
    if (count && counts.given()) {
        const int64_t number = counts.tensor.size(0);
        Tensor per_expert =
            at::bincount((flat.index_select(0, kept) - first), std::nullopt, number).narrow(0, 0, number);
        assign(counts, count_type == 1 ? per_expert : per_expert.cumsum(0));
    }
    (void)active;
});
ACLNN(aclnnMoeTokenPermute, [](In tokens, In indices, int64_t, bool, Out permuted, Out sorted) {
    const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
    Tensor order = at::argsort(indices.reshape(-1).to(at::kLong), true, 0, false);
    permuted = tokens.index_select(0, at::floor_divide(order, k)).narrow(0, 0, permuted.tensor.size(0));
    Tensor place = at::empty_like(order);
    place.index_copy_(0, order, at::arange(order.numel()));
    assign(sorted, place);
});
// Places may be -1 (nobody's here) or signed; weights of those are 0.
ACLNN(aclnnMoeTokenUnpermute, [](In permuted, In sorted, In probs, bool, Ints, Out out) {
    Tensor places = sorted.reshape(-1).to(at::kLong).abs().clamp_max(permuted.size(0) - 1);
    Tensor rows = permuted.index_select(0, places).to(at::kFloat);
    if (!probs.given()) {
        out = rows;
        return;
    }
    const int64_t k = probs.size(1);
    Tensor weights = probs.to(at::kFloat).reshape({-1, k, 1});
    rows = rows.reshape({-1, k, rows.size(-1)});
    // Rows behind weight 0 may hold anything, NaN included.
    out = at::where(weights == 0, at::zeros_like(rows), rows * weights).sum(1);
});

ACLNN(aclnnDynamicQuant, [](In x, In smooth, Out y, Out scale) {
    if (smooth.given()) throw emulated::Error(200001, "not emulated: aclnnDynamicQuant with smooth scales");
    if (!x.numel()) return;
    auto [small, factors] = quantised(x);
    y = small;
    assign(scale, factors);
});

// Integers are multiplied exactly; scale is per output column, row_scale per row.
static void grouped_matmul(const Ins& x, const Ins& weight, const Ins& bias, const Ins& scale, const Ins& row_scale,
                           const In& list, int64_t list_type, Outs& out) {
    if (x.size() != 1 || !list.given()) throw emulated::Error(200001, "not emulated: grouped matmul of several inputs");
    const bool integers = x[0].scalar_type() == at::kChar;
    if (integers ? !bias.empty() : !scale.empty() || !row_scale.empty())
        throw emulated::Error(200001, "not emulated: grouped matmul of int8 with bias, or of floats with scales");
    auto ends = group_ends(list, list_type);
    Tensor result = out[0].tensor;
    result.zero_();
    int64_t begin = 0;
    for (size_t group = 0; group < ends.size(); ++group) {
        const int64_t rows = ends[group] - begin;
        if (rows > 0) {
            auto of_group = [group](const Ins& list, int64_t dims) {
                return list.size() == 1 && list[0].dim() > dims ? list[0][static_cast<int64_t>(group)] : list[group];
            };
            Tensor mine = x[0].narrow(0, begin, rows), w = of_group(weight, 2);
            Tensor y = integers ? at::matmul(mine.to(at::kDouble), w.to(at::kDouble)) : at::matmul(mine, w);
            if (!scale.empty()) y = y.to(at::kFloat) * of_group(scale, 1).to(at::kFloat);
            if (!row_scale.empty()) y = y * row_scale[0].narrow(0, begin, rows).unsqueeze(1);
            if (!bias.empty()) y = y + of_group(bias, 1);
            result.narrow(0, begin, rows).copy_(y);
        }
        begin = ends[group];
    }
}
ACLNN(aclnnGroupedMatmulV4, [](Ins x, Ins weight, Ins bias, Ins scale, Ins, Ins, Ins, Ins row_scale, In list, Ins, Ins,
                               Ins, int64_t, int64_t, int64_t list_type, int64_t, Outs out, Outs,
                               Outs) { grouped_matmul(x, weight, bias, scale, row_scale, list, list_type, out); });
ACLNN(aclnnGroupedMatmulV5, [](Ins x, Ins weight, Ins bias, Ins scale, Ins, Ins, Ins, Ins row_scale, In list, Ins, Ins,
                               Ins, int64_t, int64_t, int64_t list_type, int64_t, Ints, Outs out, Outs,
                               Outs) { grouped_matmul(x, weight, bias, scale, row_scale, list, list_type, out); });

// Layout TND: query [T, H, D]; lengths of queries are prefix sums. Keys and values: paged, [blocks, size, Hkv * D],
// with lengths per sequence; or [T, Hkv, D] with prefix sums.
ACLNN(aclnnFusedInferAttentionScoreV3,
      [](In query, Ins keys, Ins values, In, In, Ints lengths, Ints kv_lengths, In, In, In, In, In, In, In, In table,
         In, In, In, In, In, In, In, In, Ints, In, In, In, int64_t heads, double scale, int64_t, int64_t, Text layout,
         int64_t kv_heads, int64_t sparse, int64_t, int64_t, int64_t, bool with_sums, int64_t, int64_t, Out out,
         Out sums) {
          if (layout != "TND") throw emulated::Error(200001, "not emulated: attention layout " + layout);
          if (!kv_heads) kv_heads = heads;
          const int64_t dim = query.size(-1);
          Tensor k = keys.at(0), v = values.at(0);
          out.tensor.zero_();
          if (with_sums) sums.tensor.fill_(-std::numeric_limits<float>::infinity());
          int64_t begin = 0, kv_begin = 0;
          for (size_t i = 0; i < lengths.size(); ++i) {
              const int64_t end = std::min(lengths[i], query.size(0)), rows = end - begin;
              Tensor keys_of, values_of;
              if (table.given()) {
                  const int64_t size = k.size(1), blocks = (kv_lengths[i] + size - 1) / size;
                  Tensor which = table[static_cast<int64_t>(i)].narrow(0, 0, blocks).to(at::kLong);
                  keys_of = k.index_select(0, which).reshape({-1, kv_heads, dim}).narrow(0, 0, kv_lengths[i]);
                  values_of = v.index_select(0, which).reshape({-1, kv_heads, dim}).narrow(0, 0, kv_lengths[i]);
              } else {
                  keys_of = k.reshape({-1, kv_heads, dim}).narrow(0, kv_begin, kv_lengths[i] - kv_begin);
                  values_of = v.reshape({-1, kv_heads, dim}).narrow(0, kv_begin, kv_lengths[i] - kv_begin);
                  kv_begin = kv_lengths[i];
              }
              if (rows > 0) {
                  auto [result, result_sums] =
                      attend(query.narrow(0, begin, rows), keys_of, values_of, scale, sparse != 0);
                  out.tensor.narrow(0, begin, rows).copy_(result);
                  if (with_sums) sums.tensor.narrow(0, begin, rows).copy_(result_sums);
              }
              begin = end;
          }
      });
ACLNN_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV3);

// Attention over parts of the keys: each has a result [rows, D] and the logarithms of its sums [rows].
ACLNN(aclnnAttentionUpdate, [](Ins sums, Ins parts, int64_t kind, Out out, Out) {
    if (kind) throw emulated::Error(200001, "not emulated: aclnnAttentionUpdate with another type");
    Tensor weights = at::softmax(at::stack(at::TensorList(sums)), 0).unsqueeze(-1);
    out = (at::stack(at::TensorList(parts)) * weights).sum(0);
});
