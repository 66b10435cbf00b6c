// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as plain functions, without torch: nvcc compiles cuda_kernels.cu without torch's headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace eplb {

// A device pointer to int32 or int64 numbers.
struct Ints {
    const void* data;
    bool wide;  // int64
};

struct Counts {
    void* data;
    bool wide;
    uint32_t num_slots;
};

struct MapArguments {
    Ints ids;   // [num_entries], token by token
    void* out;  // like ids
    uint32_t num_entries;
    uint32_t top_k;
    const int64_t* table;
    uint32_t row_stride;
    uint32_t width;
    uint32_t num_experts;
    Ints replicas;  // [num_experts]
    Counts counts;
    const bool* record;
    Ints bounds;  // data null: all tokens count
    bool bounds_have_first;
};

cudaError_t map_and_record(const MapArguments& arguments, cudaStream_t stream);

}  // namespace eplb
