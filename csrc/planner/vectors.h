// SPDX-License-Identifier: Apache-2.0
// EPLB_KERNEL marks a function with a vector loop: wider vectors are used if the machine has them, chosen when the
// library is loaded. Without fused multiply-add: AVX2 does not include it, and -ffp-contract=off forbids it elsewhere.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define EPLB_KERNEL __attribute__((target_clones("avx2", "default")))
#else
#define EPLB_KERNEL
#endif
