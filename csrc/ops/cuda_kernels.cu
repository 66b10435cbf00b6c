// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.h"
#include "index_rule.h"

namespace eplb {
namespace {

constexpr uint32_t kMaxSharedSlots = 12 * 1024 - 64;  // slots that fit into 48 KiB, which need no opt-in

__device__ __forceinline__ int64_t load(const Ints& numbers, int64_t i) {
    return numbers.wide ? static_cast<const int64_t*>(numbers.data)[i]
                        : static_cast<int64_t>(static_cast<const int32_t*>(numbers.data)[i]);
}

__device__ __forceinline__ void add(int64_t* to, uint32_t amount) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(amount));
}
__device__ __forceinline__ void add(int32_t* to, uint32_t amount) { atomicAdd(to, static_cast<int32_t>(amount)); }

// One pass over the entries, `kPerThread` per thread. All loads of a kind are issued before the first is used. With
// `kShared` a block counts in shared memory and adds its sums to `counts` at the end; otherwise every entry adds to
// `counts`.
template <typename Id, typename Count, bool kShared, int kThreads, int kPerThread>
__global__ void __launch_bounds__(kThreads) map_and_record_kernel(const MapArguments a) {
    extern __shared__ uint32_t bins[];
    const Id* const __restrict__ ids = static_cast<const Id*>(a.ids.data);
    Id* const __restrict__ out = static_cast<Id*>(a.out);
    Count* const counts = static_cast<Count*>(a.counts.data);
    const uint32_t base = blockIdx.x * (kThreads * kPerThread) + threadIdx.x;

    Id id[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        const uint32_t i = base + j * kThreads;
        id[j] = i < a.num_entries ? ids[i] : static_cast<Id>(-1);
    }
    const bool record = *a.record;
    int64_t first = 0;
    int64_t end = INT64_MAX;
    if (a.bounds.data != nullptr) {
        end = load(a.bounds, a.bounds_have_first ? 1 : 0);
        if (a.bounds_have_first) first = load(a.bounds, 0);
    }
    if constexpr (kShared) {
        for (uint32_t s = threadIdx.x; s < a.counts.num_slots; s += kThreads) bins[s] = 0;
    }
    uint32_t valid[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        const bool known = static_cast<uint64_t>(static_cast<int64_t>(id[j])) < a.num_experts;
        const int64_t replicas = known ? load(a.replicas, id[j]) : 0;
        valid[j] = replicas < 0 ? 0 : replicas > a.width ? a.width : static_cast<uint32_t>(replicas);
    }
    int64_t slot[kPerThread];
    uint32_t token[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        const bool known = static_cast<uint64_t>(static_cast<int64_t>(id[j])) < a.num_experts;
        const uint32_t expert = known ? static_cast<uint32_t>(id[j]) : 0;
        token[j] = (base + j * kThreads) / a.top_k;
        slot[j] =
            a.table[static_cast<size_t>(expert) * a.row_stride + entry_of(token[j] * kTokenStep, expert, valid[j])];
    }
    if constexpr (kShared) __syncthreads();
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        const uint32_t i = base + j * kThreads;
        if (i >= a.num_entries) break;
        const bool known = static_cast<uint64_t>(static_cast<int64_t>(id[j])) < a.num_experts;
        out[i] = known ? static_cast<Id>(slot[j]) : id[j];
        const bool counted = record && known && static_cast<uint64_t>(slot[j]) < a.counts.num_slots &&
                             token[j] >= first && token[j] < end;
        if (counted) {
            if constexpr (kShared) {
                atomicAdd(bins + slot[j], 1u);
            } else {
                add(counts + slot[j], 1u);
            }
        }
    }
    if constexpr (kShared) {
        if (!record) return;
        __syncthreads();
        for (uint32_t s = threadIdx.x; s < a.counts.num_slots; s += kThreads) {
            const uint32_t amount = bins[s];
            if (amount != 0) add(counts + s, amount);
        }
    }
}

template <typename Id, typename Count, bool kShared, int kThreads, int kPerThread>
cudaError_t launch(const MapArguments& a, cudaStream_t stream) {
    const uint32_t per_block = kThreads * kPerThread;
    const uint32_t blocks = (a.num_entries + per_block - 1) / per_block;
    const size_t shared = kShared ? a.counts.num_slots * sizeof(uint32_t) : 0;
    map_and_record_kernel<Id, Count, kShared, kThreads, kPerThread><<<blocks, kThreads, shared, stream>>>(a);
    return cudaGetLastError();
}

// Few entries add to `counts` faster than blocks zero and sum bins. More entries are spread over all multiprocessors;
// beyond that each thread takes more entries. The limits were measured on an H100 with 288 slots.
template <typename Id, typename Count>
cudaError_t choose(const MapArguments& a, cudaStream_t stream) {
    if (a.num_entries <= 1024 || a.counts.num_slots > kMaxSharedSlots)
        return launch<Id, Count, false, 128, 1>(a, stream);
    if (a.num_entries <= 32 * 1024) return launch<Id, Count, true, 512, 1>(a, stream);
    if (a.num_entries <= 128 * 1024) return launch<Id, Count, true, 512, 2>(a, stream);
    if (a.num_entries <= 512 * 1024) return launch<Id, Count, true, 512, 4>(a, stream);
    return launch<Id, Count, true, 512, 8>(a, stream);
}

}  // namespace

cudaError_t map_and_record(const MapArguments& a, cudaStream_t stream) {
    if (a.num_entries == 0) return cudaSuccess;
    if (a.ids.wide) return a.counts.wide ? choose<int64_t, int64_t>(a, stream) : choose<int64_t, int32_t>(a, stream);
    return a.counts.wide ? choose<int32_t, int64_t>(a, stream) : choose<int32_t, int32_t>(a, stream);
}

}  // namespace eplb
