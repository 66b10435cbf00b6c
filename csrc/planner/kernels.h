// SPDX-License-Identifier: Apache-2.0
// The inner loops of the search. Each result depends only on its own element, in float32 with one rounding per
// operation, so any vector width gives the same numbers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace eplb {

// The cost of a rank's load (in units of the mean) in the search: the part above the limit, a step for any such part,
// because it takes a receipt however small it is, and a small square that prefers even ranks.
struct Potential {
    static constexpr float kSharp = 1 << 30;

    float limit = 1.0F;
    float square = 0.1F;
    float step = 0.0F;

    // Without a branch, which would be hard to predict: the least excess that float32 can have gives the whole step.
    float above(float excess) const {
        const float part = std::max(excess, 0.0F);
        return part + std::min(part * kSharp, step);
    }

    float operator()(float load) const {
        const float off = load - 1.0F;
        return above(load - limit) + square * off * off;
    }
};

// Prices: factors on a candidate's gain.
constexpr float kImpossible = 0.0F;
constexpr float kTwoReceipts = 0.5F;
constexpr float kOneReceipt = 1.0F;
constexpr float kFree = 6.0F;  // no receipt: experts go to ranks that held them at the start

// score[p]: the gain of rank r and the rank of slot p if they exchange r's expert with replica load `share` and slot
// p's expert, times price[p]. Excess: a rank's load minus the limit; above: its cost in the potential.
void score_swaps(int n, Potential potential, float share, float excess_r, const float* slot_share,
                 const float* slot_excess, const float* slot_above, const float* price, float* score);

// score[i] = (base + gain[i] - potential(load + added[i])) * price[i]
void score_receipts(int n, Potential potential, float base, float load, const float* added, const float* gain,
                    const float* price, float* score);

// score[i] = (base[i] + gain - potential(load[i] + added)) * price[i]
void score_placements(int n, Potential potential, const float* base, const float* load, float added, float gain,
                      const float* price, float* score);

// The index of the first largest score above `least`, or -1; *least becomes that score.
int best_above(int n, const float* score, float* least);

// Sum of the copies of which none has a weight above `most`, at least one and at most `limit` for each weight [n].
int64_t total_copies(int n, const int32_t* weight, int32_t most, int32_t limit);

// What the busiest pair has, and how much pairs have above a limit together.
struct PairLoads {
    int32_t heaviest, above;
};

// Pairs of loads [2 * n], lightest first: the heaviest with the lightest, and so on. The sum of all loads is below
// 2^31.
PairLoads pair_loads(int n, const int32_t* loads, int32_t limit);

}  // namespace eplb
