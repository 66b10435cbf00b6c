// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the load recording ops; ops.py defines the schemas and says what the ops do.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "index_rule.h"

// ops.py looks for this mark in the file before it loads it: a library built for another torch is left alone.
extern "C" __attribute__((used, visibility("default"))) const char eplb_ops_built_for[] =
    "eplb-ops-built-for-torch:" EPLB_TORCH_VERSION ";";

namespace eplb {
namespace {

constexpr int64_t kEntriesPerThread = 16384;  // fewer are done sooner than another thread is woken

int64_t scalar(const at::Tensor& t, int64_t i) {
    return t.scalar_type() == at::kInt ? t.const_data_ptr<int32_t>()[i] : t.const_data_ptr<int64_t>()[i];
}

template <typename Id, typename Replicas>
struct Batch {
    const Id* ids;
    Id* out;
    int64_t top_k;
    const int64_t* table;
    int64_t row_stride;
    uint32_t width;
    uint64_t num_experts;
    const Replicas* replicas;
    uint64_t num_slots;

    // Maps the rows first..end-1; with `kCount` adds each mapped entry to its bin of `bins` [num_slots].
    template <bool kCount>
    void map(int64_t first, int64_t end, uint32_t* bins) const {
        int64_t i = first * top_k;
        for (int64_t token = first; token < end; ++token) {
            for (const int64_t stop = i + top_k; i < stop; ++i) {
                const uint64_t expert = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
                if (C10_UNLIKELY(expert >= num_experts)) {
                    out[i] = ids[i];
                    continue;
                }
                uint32_t valid = static_cast<uint32_t>(replicas[expert]);
                valid = valid > width ? width : valid;
                const uint32_t entry = entry_of(static_cast<uint32_t>(token), static_cast<uint32_t>(expert), valid);
                const int64_t slot = table[static_cast<int64_t>(expert) * row_stride + entry];
                out[i] = static_cast<Id>(slot);
                if constexpr (kCount) {
                    if (C10_LIKELY(static_cast<uint64_t>(slot) < num_slots)) ++bins[slot];
                }
            }
        }
    }

    // Maps the rows first..end-1 and counts those of them within real_first..real_end-1.
    void map_part(int64_t first, int64_t end, int64_t real_first, int64_t real_end, uint32_t* bins) const {
        const int64_t from = std::clamp(real_first, first, end);
        const int64_t to = std::clamp(real_end, from, end);
        map<false>(first, from, bins);
        map<true>(from, to, bins);
        map<false>(to, end, bins);
    }
};

template <typename Count>
void add_bins(const uint32_t* bins, int64_t num_slots, Count* counts) {
    for (int64_t slot = 0; slot < num_slots; ++slot) counts[slot] += static_cast<Count>(bins[slot]);
}

template <typename Id, typename Replicas>
void run(const Batch<Id, Replicas>& batch, int64_t num_tokens, int64_t real_first, int64_t real_end,
         at::Tensor& counts) {
    const int64_t entries = num_tokens * batch.top_k;
    const int64_t parts = std::clamp<int64_t>(entries / kEntriesPerThread, 1, at::get_num_threads());
    const bool counting = real_first < real_end;
    const int64_t num_slots = counts.size(0);
    const int64_t stride = (num_slots + 15) / 16 * 16;  // whole cache lines per part
    static thread_local std::vector<uint32_t> kept;
    if (counting) kept.assign(static_cast<size_t>(parts * stride), 0);
    uint32_t* const bins = kept.data();
    if (parts == 1) {
        batch.map_part(0, num_tokens, real_first, real_end, bins);
    } else {
        at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t part = begin; part < end; ++part) {
                batch.map_part(num_tokens * part / parts, num_tokens * (part + 1) / parts, real_first, real_end,
                               bins + part * stride);
            }
        });
    }
    if (!counting) return;
    for (int64_t part = 0; part < parts; ++part) {
        if (counts.scalar_type() == at::kInt) {
            add_bins(bins + part * stride, num_slots, counts.mutable_data_ptr<int32_t>());
        } else {
            add_bins(bins + part * stride, num_slots, counts.mutable_data_ptr<int64_t>());
        }
    }
}

template <typename Id, typename Replicas>
at::Tensor map_typed(const at::Tensor& ids, const at::Tensor& table, const at::Tensor& replicas, at::Tensor& counts,
                     int64_t real_first, int64_t real_end) {
    at::Tensor out = at::empty(ids.sizes(), ids.options());
    const Batch<Id, Replicas> batch{ids.const_data_ptr<Id>(),
                                    out.mutable_data_ptr<Id>(),
                                    ids.size(1),
                                    table.const_data_ptr<int64_t>(),
                                    table.stride(0),
                                    static_cast<uint32_t>(table.size(1)),
                                    static_cast<uint64_t>(table.size(0)),
                                    replicas.const_data_ptr<Replicas>(),
                                    static_cast<uint64_t>(counts.size(0))};
    run(batch, ids.size(0), real_first, real_end, counts);
    return out;
}

at::Tensor map_and_record(const at::Tensor& topk_ids, const at::Tensor& dispatch_table, const at::Tensor& replica_count,
                          at::Tensor counts, const at::Tensor& record, const std::optional<at::Tensor>& num_unpadded) {
    check_map_and_record(topk_ids, dispatch_table, replica_count, counts, record, num_unpadded);
    int64_t real_first = 0;
    int64_t real_end = topk_ids.size(0);
    if (num_unpadded) {
        const int64_t numbers = num_unpadded->numel();
        if (numbers == 2) real_first = std::max<int64_t>(scalar(*num_unpadded, 0), 0);
        real_end = std::min(scalar(*num_unpadded, numbers - 1), real_end);
    }
    if (!*record.const_data_ptr<bool>()) real_end = real_first;
    const at::Tensor ids = topk_ids.contiguous();
    const bool wide_ids = ids.scalar_type() == at::kLong;
    if (replica_count.scalar_type() == at::kLong) {
        return wide_ids ? map_typed<int64_t, int64_t>(ids, dispatch_table, replica_count, counts, real_first, real_end)
                        : map_typed<int32_t, int64_t>(ids, dispatch_table, replica_count, counts, real_first, real_end);
    }
    return wide_ids ? map_typed<int64_t, int32_t>(ids, dispatch_table, replica_count, counts, real_first, real_end)
                    : map_typed<int32_t, int32_t>(ids, dispatch_table, replica_count, counts, real_first, real_end);
}

template <typename Tokens, typename Count>
void add_tokens(const Tokens* tokens, int64_t num_slots, bool prefix_sums, Count* counts) {
    Tokens before = 0;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
        counts[slot] += static_cast<Count>(tokens[slot] - before);
        if (prefix_sums) before = tokens[slot];
    }
}

void record_expert_tokens(const at::Tensor& expert_tokens, at::Tensor counts, const at::Tensor& record,
                          bool prefix_sums, int64_t first_slot) {
    check_record_expert_tokens(expert_tokens, counts, record, first_slot);
    if (!*record.const_data_ptr<bool>()) return;
    const int64_t n = expert_tokens.size(0);
    const auto add = [&](const auto* tokens) {
        if (counts.scalar_type() == at::kInt) {
            add_tokens(tokens, n, prefix_sums, counts.mutable_data_ptr<int32_t>() + first_slot);
        } else {
            add_tokens(tokens, n, prefix_sums, counts.mutable_data_ptr<int64_t>() + first_slot);
        }
    };
    if (expert_tokens.scalar_type() == at::kInt) {
        add(expert_tokens.const_data_ptr<int32_t>());
    } else {
        add(expert_tokens.const_data_ptr<int64_t>());
    }
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ascend_eplb, CPU, m) {
    m.impl("map_and_record", &map_and_record);
    m.impl("record_expert_tokens", &record_expert_tokens);
}

}  // namespace eplb
