// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace eplb {

EPLB_KERNEL
void score_swaps(int n, Potential potential, float share, float excess_r, const float* __restrict slot_share,
                 const float* __restrict slot_excess, const float* __restrict slot_above, const float* __restrict price,
                 float* __restrict score) {
    const float above_r = potential.above(excess_r), twice = 2.0F * potential.square;
    for (int p = 0; p < n; ++p) {
        const float change = share - slot_share[p];
        const float here = excess_r - change, there = slot_excess[p] + change;
        const float before = above_r + slot_above[p];
        const float after = potential.above(here) + potential.above(there);
        // The difference of the squares, a^2 + b^2 - (a - c)^2 - (b + c)^2 = 2c (a - c - b).
        score[p] = (before - after + twice * change * (here - slot_excess[p])) * price[p];
    }
}

EPLB_KERNEL
void score_receipts(int n, Potential potential, float base, float load, const float* __restrict added,
                    const float* __restrict gain, const float* __restrict price, float* __restrict score) {
    for (int i = 0; i < n; ++i) score[i] = (base + gain[i] - potential(load + added[i])) * price[i];
}

EPLB_KERNEL
void score_placements(int n, Potential potential, const float* __restrict base, const float* __restrict load,
                      float added, float gain, const float* __restrict price, float* __restrict score) {
    for (int i = 0; i < n; ++i) score[i] = (base[i] + gain - potential(load[i] + added)) * price[i];
}

namespace {

// Floats above zero have the order of their bit patterns; with integers the compiler vectorises the maximum.
inline int32_t bits(float value) {
    int32_t result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

}  // namespace

EPLB_KERNEL
int best_above(int n, const float* score, float* least) {
    constexpr int kBlock = 64;
    const int32_t bar = bits(*least);
    int32_t best = bar;
    int block = 0;
    for (int first = 0; first < n; first += kBlock) {
        const int last = std::min(first + kBlock, n);
        int32_t top = bar;
        for (int i = first; i < last; ++i) top = std::max(top, bits(score[i]));
        if (top > best) {
            best = top;
            block = first;
        }
    }
    if (best == bar) return -1;
    int i = block;
    while (bits(score[i]) != best) ++i;
    *least = score[i];
    return i;
}

// Quotients of integers of 32 bits, cut to an integer, are exact in float64, whose division is faster.
EPLB_KERNEL
int64_t total_copies(int n, const int32_t* weight, int32_t most, int32_t limit) {
    const double divisor = most;
    int32_t total = 0;  // n and limit are below 2^16 and 2^11
    for (int i = 0; i < n; ++i) {
        const int32_t copies = static_cast<int32_t>(static_cast<double>(weight[i] - 1) / divisor) + 1;
        total += std::max(1, std::min(copies, limit));
    }
    return total;
}

EPLB_KERNEL
PairLoads pair_loads(int n, const int32_t* loads, int32_t limit) {
    int32_t heaviest = 0, above = 0;
    const int32_t* heavy = loads + n;
    for (int i = 0; i < n; ++i) {
        const int32_t load = heavy[i] + loads[n - 1 - i];
        heaviest = std::max(heaviest, load);
        above += std::max(load - limit, 0);
    }
    return {heaviest, above};
}

}  // namespace eplb
