// SPDX-License-Identifier: Apache-2.0
// Checks of the ops' arguments, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

#include "index_rule.h"

namespace eplb {

inline bool is_int(const at::Tensor& t) { return t.scalar_type() == at::kInt || t.scalar_type() == at::kLong; }

// Tokens that count: rows first..end-1 of the batch. `num_unpadded` holds one number (the end) or two (first, end).
inline void check_num_unpadded(const std::optional<at::Tensor>& num_unpadded, at::Device device) {
    if (!num_unpadded) return;
    TORCH_CHECK(is_int(*num_unpadded) && (num_unpadded->numel() == 1 || num_unpadded->numel() == 2) &&
                    num_unpadded->is_contiguous(),
                "num_unpadded has dtype ", num_unpadded->scalar_type(), " and shape ", num_unpadded->sizes(),
                "; it is an int32 or int64 tensor of one number (rows 0..n-1 are real) or two (rows first..end-1)");
    TORCH_CHECK(num_unpadded->device() == device, "num_unpadded is on ", num_unpadded->device(), ", topk_ids on ",
                device, "; keep it on the same device");
}

inline void check_counts(const at::Tensor& counts, at::Device device) {
    TORCH_CHECK(is_int(counts) && counts.dim() == 1 && (counts.size(0) < 2 || counts.stride(0) == 1),
                "counts has dtype ", counts.scalar_type(), " and shape ", counts.sizes(),
                "; it is a contiguous int32 or int64 vector with one element per slot");
    TORCH_CHECK(counts.device() == device, "counts is on ", counts.device(), ", the tokens on ", device,
                "; keep both on the same device");
}

inline void check_record(const at::Tensor& record, at::Device device) {
    TORCH_CHECK(record.scalar_type() == at::kBool && record.numel() == 1, "record has dtype ", record.scalar_type(),
                " and shape ", record.sizes(), "; it is a bool tensor of one element");
    TORCH_CHECK(record.device() == device, "record is on ", record.device(), ", the tokens on ", device,
                "; keep both on the same device");
}

inline void check_map_and_record(const at::Tensor& topk_ids, const at::Tensor& dispatch_table,
                                 const at::Tensor& replica_count, const at::Tensor& counts, const at::Tensor& record,
                                 const std::optional<at::Tensor>& num_unpadded) {
    TORCH_CHECK(is_int(topk_ids) && topk_ids.dim() == 2, "topk_ids has dtype ", topk_ids.scalar_type(), " and shape ",
                topk_ids.sizes(), "; it is int32 or int64 [tokens, experts per token]");
    TORCH_CHECK(topk_ids.numel() <= std::numeric_limits<int32_t>::max(), "topk_ids has ", topk_ids.numel(),
                " entries; at most 2^31 - 1 are allowed in one call: split the batch");
    TORCH_CHECK(dispatch_table.scalar_type() == at::kLong && dispatch_table.dim() == 2 &&
                    dispatch_table.stride(1) == 1 && dispatch_table.size(1) >= 1 && dispatch_table.size(1) <= kMaxWidth,
                "dispatch_table has dtype ", dispatch_table.scalar_type(), " and shape ", dispatch_table.sizes(),
                "; it is int64 [experts, width] with contiguous rows and a width of 1..", kMaxWidth);
    TORCH_CHECK(dispatch_table.size(0) * dispatch_table.stride(0) <= std::numeric_limits<uint32_t>::max(),
                "dispatch_table spans ", dispatch_table.size(0) * dispatch_table.stride(0),
                " elements; at most 2^32 - 1 are allowed: make it narrower");
    TORCH_CHECK(is_int(replica_count) && replica_count.dim() == 1 && replica_count.is_contiguous() &&
                    replica_count.size(0) == dispatch_table.size(0),
                "replica_count has dtype ", replica_count.scalar_type(), " and shape ", replica_count.sizes(),
                "; it is int32 or int64 [", dispatch_table.size(0), "], one number per row of dispatch_table");
    TORCH_CHECK(dispatch_table.device() == topk_ids.device() && replica_count.device() == topk_ids.device(),
                "dispatch_table is on ", dispatch_table.device(), ", replica_count on ", replica_count.device(),
                ", topk_ids on ", topk_ids.device(), "; keep all on the same device");
    check_counts(counts, topk_ids.device());
    check_record(record, topk_ids.device());
    check_num_unpadded(num_unpadded, topk_ids.device());
}

inline void check_record_expert_tokens(const at::Tensor& expert_tokens, const at::Tensor& counts,
                                       const at::Tensor& record, int64_t first_slot) {
    TORCH_CHECK(is_int(expert_tokens) && expert_tokens.dim() == 1 && expert_tokens.is_contiguous(),
                "expert_tokens has dtype ", expert_tokens.scalar_type(), " and shape ", expert_tokens.sizes(),
                "; it is a contiguous int32 or int64 vector with one element per local slot");
    check_counts(counts, expert_tokens.device());
    check_record(record, expert_tokens.device());
    TORCH_CHECK(first_slot >= 0 && first_slot + expert_tokens.size(0) <= counts.size(0), "slots ", first_slot, "..",
                first_slot + expert_tokens.size(0) - 1, " are outside of counts, which has ", counts.size(0), " slots");
}

}  // namespace eplb
