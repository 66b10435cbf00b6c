// SPDX-License-Identifier: Apache-2.0
// Host side of the CUDA kernel of map_and_record; load/ops.py defines the schema and describes the op.
#include "cuda_ops.h"

#include "cuda_kernels.h"

namespace eplb {
namespace {

// Makes a device torch's current device while it lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(const Device& device) { EPLB_TORCH_CUDA(aoti_torch_create_cuda_guard, device.index, &guard_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    ~DeviceGuard() { torch_cuda_abi.aoti_torch_delete_cuda_guard(guard_); }

  private:
    OpaqueGuard* guard_ = nullptr;
};

Ints ints(const Tensor& t) { return {t.data(), t.is_int64()}; }

void launch(const Arguments& given, const Tensor& ids, const Tensor& out) {
    MapArguments arguments{};
    arguments.ids = ints(ids);
    arguments.out = out.mutable_data();
    arguments.num_entries = static_cast<uint32_t>(ids.numel());
    arguments.top_k = static_cast<uint32_t>(ids.size(1));
    arguments.table = given.dispatch_table.data<int64_t>();
    arguments.row_stride = static_cast<uint32_t>(given.dispatch_table.stride(0));
    arguments.width = static_cast<uint32_t>(given.dispatch_table.size(1));
    arguments.num_experts = static_cast<uint32_t>(given.dispatch_table.size(0));
    arguments.replicas = ints(given.replica_count);
    arguments.counts = {given.counts.mutable_data(), given.counts.is_int64(),
                        static_cast<uint32_t>(given.counts.size(0))};
    arguments.record = given.record.data<bool>();
    if (given.num_unpadded) {
        arguments.bounds = ints(*given.num_unpadded);
        arguments.bounds_have_first = given.num_unpadded->numel() == 2;
    }
    void* stream = nullptr;
    EPLB_TORCH_CUDA(aoti_torch_get_current_cuda_stream, ids.device().index, &stream);
    const cudaError_t error = map_and_record(arguments, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) fail(std::string("map_and_record: CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

Tensor map_and_record_cuda(const Arguments& given) {
    const DeviceGuard guard(given.topk_ids.device());
    Tensor out = given.topk_ids.empty_like();
    if (given.topk_ids.is_contiguous()) {
        launch(given, given.topk_ids, out);
    } else {
        launch(given, given.topk_ids.copy(), out);
    }
    return out;
}

}  // namespace eplb
