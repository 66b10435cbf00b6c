// SPDX-License-Identifier: Apache-2.0
// Registers the CUDA kernels of the load recording ops; ops.py defines the schemas and says what the ops do.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "arguments.h"
#include "cuda_kernels.h"

namespace eplb {
namespace {

Ints ints(const at::Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == at::kLong}; }

Counts counts_of(at::Tensor& t) {
    return {t.mutable_data_ptr(), t.scalar_type() == at::kLong, static_cast<uint32_t>(t.size(0))};
}

at::Tensor map_and_record_cuda(const at::Tensor& topk_ids, const at::Tensor& dispatch_table,
                               const at::Tensor& replica_count, at::Tensor counts, const at::Tensor& record,
                               const std::optional<at::Tensor>& num_unpadded) {
    check_map_and_record(topk_ids, dispatch_table, replica_count, counts, record, num_unpadded);
    const c10::cuda::CUDAGuard guard(topk_ids.device());
    const at::Tensor ids = topk_ids.contiguous();
    at::Tensor out = at::empty(ids.sizes(), ids.options());
    MapArguments arguments{};
    arguments.ids = ints(ids);
    arguments.out = out.mutable_data_ptr();
    arguments.num_entries = static_cast<uint32_t>(ids.numel());
    arguments.top_k = static_cast<uint32_t>(ids.size(1));
    arguments.table = dispatch_table.const_data_ptr<int64_t>();
    arguments.row_stride = static_cast<uint32_t>(dispatch_table.stride(0));
    arguments.width = static_cast<uint32_t>(dispatch_table.size(1));
    arguments.num_experts = static_cast<uint32_t>(dispatch_table.size(0));
    arguments.replicas = ints(replica_count);
    arguments.counts = counts_of(counts);
    arguments.record = record.const_data_ptr<bool>();
    if (num_unpadded) {
        arguments.bounds = ints(*num_unpadded);
        arguments.bounds_have_first = num_unpadded->numel() == 2;
    }
    C10_CUDA_CHECK(map_and_record(arguments, c10::cuda::getCurrentCUDAStream()));
    return out;
}

void record_expert_tokens_cuda(const at::Tensor& expert_tokens, at::Tensor counts, const at::Tensor& record,
                               bool prefix_sums, int64_t first_slot) {
    check_record_expert_tokens(expert_tokens, counts, record, first_slot);
    const c10::cuda::CUDAGuard guard(expert_tokens.device());
    C10_CUDA_CHECK(record_expert_tokens(ints(expert_tokens), static_cast<uint32_t>(expert_tokens.size(0)), prefix_sums,
                                        counts_of(counts), static_cast<uint32_t>(first_slot),
                                        record.const_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ascend_eplb, CUDA, m) {
    m.impl("map_and_record", &map_and_record_cuda);
    m.impl("record_expert_tokens", &record_expert_tokens_cuda);
}

}  // namespace eplb
