// SPDX-License-Identifier: Apache-2.0
// Checks of the ops' arguments, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "index_rule.h"

namespace eplb {

// Messages are joined as strings, without C++ streams: where a compiler links its own copy of libstdc++ into this
// library, streams would meet torch's copy and crash instead of reporting the error.
inline std::string text(const char* part) { return part; }
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(at::Device device) { return device.str(); }

// "dtype Long and shape [4, 2]"
inline std::string text(const at::Tensor& t) {
    std::string shape;
    for (const int64_t size : t.sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    return std::string("dtype ") + c10::toString(t.scalar_type()) + " and shape [" + shape + "]";
}

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
    if (!holds) TORCH_CHECK(false, (text(parts) + ...));
}

inline bool is_int(const at::Tensor& t) { return t.scalar_type() == at::kInt || t.scalar_type() == at::kLong; }

// Tokens that count: rows first..end-1 of the batch. `num_unpadded` holds one number (the end) or two (first, end).
inline void check_num_unpadded(const std::optional<at::Tensor>& num_unpadded, at::Device device) {
    if (!num_unpadded) return;
    const bool numbers = num_unpadded->numel() == 1 || num_unpadded->numel() == 2;
    check(is_int(*num_unpadded) && numbers && num_unpadded->is_contiguous(), "num_unpadded has ", *num_unpadded,
          "; it is an int32 or int64 tensor of one number (rows 0..n-1 are real) or two (rows first..end-1)");
    check(num_unpadded->device() == device, "num_unpadded is on ", num_unpadded->device(), ", topk_ids on ", device,
          "; keep it on the same device");
}

inline void check_counts(const at::Tensor& counts, at::Device device) {
    check(is_int(counts) && counts.dim() == 1 && (counts.size(0) < 2 || counts.stride(0) == 1), "counts has ", counts,
          "; it is a contiguous int32 or int64 vector with one element per slot");
    check(counts.device() == device, "counts is on ", counts.device(), ", the tokens on ", device,
          "; keep both on the same device");
}

inline void check_record(const at::Tensor& record, at::Device device) {
    check(record.scalar_type() == at::kBool && record.numel() == 1, "record has ", record,
          "; it is a bool tensor of one element");
    check(record.device() == device, "record is on ", record.device(), ", the tokens on ", device,
          "; keep both on the same device");
}

inline void check_map_and_record(const at::Tensor& topk_ids, const at::Tensor& dispatch_table,
                                 const at::Tensor& replica_count, const at::Tensor& counts, const at::Tensor& record,
                                 const std::optional<at::Tensor>& num_unpadded) {
    const at::Device device = topk_ids.device();
    check(is_int(topk_ids) && topk_ids.dim() == 2, "topk_ids has ", topk_ids,
          "; it is int32 or int64 [tokens, experts per token]");
    check(topk_ids.numel() <= std::numeric_limits<int32_t>::max(), "topk_ids has ", topk_ids.numel(),
          " entries; at most 2^31 - 1 are allowed in one call: split the batch");
    check(dispatch_table.scalar_type() == at::kLong && dispatch_table.dim() == 2 && dispatch_table.stride(1) == 1 &&
              dispatch_table.size(1) >= 1 && dispatch_table.size(1) <= kMaxWidth,
          "dispatch_table has ", dispatch_table,
          "; it is int64 [experts, width] with contiguous rows and a width of 1..", kMaxWidth);
    const int64_t span = dispatch_table.size(0) * dispatch_table.stride(0);
    check(span <= std::numeric_limits<uint32_t>::max(), "dispatch_table spans ", span,
          " elements; at most 2^32 - 1 are allowed: make it narrower");
    check(is_int(replica_count) && replica_count.dim() == 1 && replica_count.is_contiguous() &&
              replica_count.size(0) == dispatch_table.size(0),
          "replica_count has ", replica_count, "; it is int32 or int64 [", dispatch_table.size(0),
          "], one number per row of dispatch_table");
    check(dispatch_table.device() == device && replica_count.device() == device, "dispatch_table is on ",
          dispatch_table.device(), ", replica_count on ", replica_count.device(), ", topk_ids on ", device,
          "; keep all on the same device");
    check_counts(counts, device);
    check_record(record, device);
    check_num_unpadded(num_unpadded, device);
}

inline void check_record_expert_tokens(const at::Tensor& expert_tokens, const at::Tensor& counts,
                                       const at::Tensor& record, int64_t first_slot) {
    check(is_int(expert_tokens) && expert_tokens.dim() == 1 && expert_tokens.is_contiguous(), "expert_tokens has ",
          expert_tokens, "; it is a contiguous int32 or int64 vector with one element per local slot");
    check_counts(counts, expert_tokens.device());
    check_record(record, expert_tokens.device());
    const int64_t end = first_slot + expert_tokens.size(0);
    check(first_slot >= 0 && end <= counts.size(0), "slots ", first_slot, "..", end - 1,
          " are outside of counts, which has ", counts.size(0), " slots");
}

}  // namespace eplb
