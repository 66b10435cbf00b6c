// SPDX-License-Identifier: Apache-2.0
// The arguments of map_and_record and their checks, for all devices.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "index_rule.h"
#include "tensor.h"

namespace eplb {

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(const Device& device) {
    const std::string name = device_type_name(device.type);
    return name == "cpu" ? name : name + ":" + std::to_string(device.index);
}

// "dtype torch.int64 and shape [4, 2]"
inline std::string text(const Tensor& t) {
    std::string shape;
    for (int64_t d = 0; d < t.dim(); ++d) shape += (d == 0 ? "" : ", ") + std::to_string(t.size(d));
    return "dtype torch." + dtype_name(t.dtype()) + " and shape [" + shape + "]";
}

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
    if (!holds) fail((text(parts) + ...));
}

inline bool is_int(const Tensor& t) { return t.is_int32() || t.is_int64(); }

// The arguments in the order of the op's schema, taken off a kernel's stack.
struct Arguments {
    explicit Arguments(const Word* stack)
        : topk_ids(tensor(stack[0])),
          dispatch_table(tensor(stack[1])),
          replica_count(tensor(stack[2])),
          counts(tensor(stack[3])),
          record(tensor(stack[4])) {
        // The value of an optional stands in memory of its own, which this function owns now.
        const std::unique_ptr<Word> value(reinterpret_cast<Word*>(static_cast<uintptr_t>(stack[5])));
        if (value) num_unpadded.emplace(tensor(*value));
        check_all();
    }

    const Tensor topk_ids;
    const Tensor dispatch_table;
    const Tensor replica_count;
    const Tensor counts;
    const Tensor record;
    std::optional<Tensor> num_unpadded;  // one number (the end of the counted rows) or two (first, end)

  private:
    static Tensor tensor(Word word) { return Tensor(reinterpret_cast<TensorHandle>(static_cast<uintptr_t>(word))); }

    void check_all() const {
        const Device& device = topk_ids.device();
        check(is_int(topk_ids) && topk_ids.dim() == 2, "topk_ids has ", topk_ids,
              "; it is int32 or int64 [tokens, experts per token]");
        check(topk_ids.numel() <= std::numeric_limits<int32_t>::max(), "topk_ids has ", topk_ids.numel(),
              " entries; at most 2^31 - 1 are allowed in one call: split the batch");
        check(dispatch_table.is_int64() && dispatch_table.dim() == 2 && dispatch_table.stride(1) == 1 &&
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
        check(is_int(counts) && counts.dim() == 1 && counts.is_contiguous(), "counts has ", counts,
              "; it is a contiguous int32 or int64 vector with one element per slot");
        check(counts.device() == device, "counts is on ", counts.device(), ", the tokens on ", device,
              "; keep both on the same device");
        check(record.is_bool() && record.numel() == 1, "record has ", record, "; it is a bool tensor of one element");
        check(record.device() == device, "record is on ", record.device(), ", the tokens on ", device,
              "; keep both on the same device");
        if (!num_unpadded) return;
        const bool numbers = num_unpadded->numel() == 1 || num_unpadded->numel() == 2;
        check(is_int(*num_unpadded) && numbers && num_unpadded->is_contiguous(), "num_unpadded has ", *num_unpadded,
              "; it is an int32 or int64 tensor of one number (rows 0..n-1 are real) or two (rows first..end-1)");
        check(num_unpadded->device() == device, "num_unpadded is on ", num_unpadded->device(), ", topk_ids on ", device,
              "; keep it on the same device");
    }
};

}  // namespace eplb
