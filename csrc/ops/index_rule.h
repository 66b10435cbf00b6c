// SPDX-License-Identifier: Apache-2.0
// The rule that chooses an entry of the expert's dispatch-table row for a token, for the CPU and the CUDA kernel.
// ops.py has the same rule in ATen operators, and the reasons for its form.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EPLB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EPLB_HOST_DEVICE inline
#endif

namespace eplb {

constexpr uint32_t kTokenStep = 2654435769u;   // 2^32 / golden ratio
constexpr uint32_t kExpertStep = 1779033703u;  // 2^32 * (sqrt(2) - 1)
constexpr int64_t kMaxWidth = 65535;           // a 16-bit fraction times the width stays within 32 bits

// Entry for the token whose row in the batch, times kTokenStep, is `token_angle`: a fraction of the unit interval, in
// 1/65536, scaled to 0..valid-1.
EPLB_HOST_DEVICE uint32_t entry_of(uint32_t token_angle, uint32_t expert, uint32_t valid) {
    const uint32_t fraction = (token_angle + expert * kExpertStep) >> 16;
    return (fraction * valid) >> 16;
}

}  // namespace eplb
