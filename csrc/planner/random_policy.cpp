// SPDX-License-Identifier: Apache-2.0
#include "random_policy.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "random_numbers.h"

namespace eplb {

namespace {

void shuffle(std::vector<int32_t>& items, Random& random) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(static_cast<uint32_t>(i))]);
}

}  // namespace

void draw_placement(uint64_t seed, int num_experts, int num_slots, int num_ranks, int32_t* slots) {
    Random random(seed);
    const int per_rank = num_slots / num_ranks;
    std::vector<int32_t> count(num_experts, 1);
    std::vector<int32_t> open(num_experts);  // experts that may get another copy
    std::iota(open.begin(), open.end(), 0);
    if (num_ranks == 1) open.clear();
    for (int copy = num_experts; copy < num_slots; ++copy) {
        if (open.empty()) {  // more slots than (rank, expert) pairs: two copies on one rank cannot be avoided
            ++count[random.below(static_cast<uint32_t>(num_experts))];
            continue;
        }
        const uint32_t i = random.below(static_cast<uint32_t>(open.size()));
        if (++count[open[i]] >= num_ranks) {
            open[i] = open.back();
            open.pop_back();
        }
    }
    // Experts with many copies first, each onto the ranks with most free slots: this never reaches a dead end.
    std::vector<int32_t> experts(num_experts), ranks(num_ranks), held(num_ranks, 0);
    std::iota(experts.begin(), experts.end(), 0);
    std::iota(ranks.begin(), ranks.end(), 0);
    shuffle(experts, random);
    std::stable_sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return count[a] > count[b]; });
    for (const int32_t expert : experts) {
        shuffle(ranks, random);
        std::stable_sort(ranks.begin(), ranks.end(), [&](int32_t a, int32_t b) { return held[a] < held[b]; });
        for (int left = count[expert], i = 0; left > 0; i = (i + 1) % num_ranks) {
            const int32_t rank = ranks[i];
            if (held[rank] == per_rank) continue;
            slots[rank * per_rank + held[rank]++] = expert;
            --left;
        }
    }
    std::vector<int32_t> local(per_rank);
    for (int rank = 0; rank < num_ranks; ++rank) {
        std::copy_n(slots + rank * per_rank, per_rank, local.begin());
        shuffle(local, random);
        std::copy_n(local.begin(), per_rank, slots + rank * per_rank);
    }
}

}  // namespace eplb
