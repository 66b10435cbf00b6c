// SPDX-License-Identifier: Apache-2.0
#include "default_policy.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace eplb {

void pack_balanced(const double* weight, const int64_t* order, int n, int packs, int32_t* pack, int32_t* position) {
    const int per_pack = n / packs;
    if (per_pack == 1) {
        for (int i = 0; i < n; ++i) {
            pack[i] = i;
            position[i] = 0;
        }
        return;
    }
    std::vector<double> total(packs, 0.0);
    std::vector<int32_t> items(packs, 0);
    for (int i = 0; i < n; ++i) {
        const int item = static_cast<int>(order[i]);
        const int lightest = static_cast<int>(std::min_element(total.begin(), total.end()) - total.begin());
        pack[item] = lightest;
        position[item] = items[lightest]++;
        total[lightest] += weight[item];
        if (items[lightest] == per_pack) total[lightest] = std::numeric_limits<double>::infinity();
    }
}

void replicate(const double* weight, int n, int copies, int32_t* item, int32_t* count) {
    for (int i = 0; i < n; ++i) {
        item[i] = i;
        count[i] = 1;
    }
    // A max-heap of (weight per copy, item); of equal weights the lowest item comes first, as with argmax.
    using Entry = std::pair<double, int32_t>;
    const auto below = [](const Entry& a, const Entry& b) {
        return a.first < b.first || (a.first == b.first && a.second > b.second);
    };
    std::vector<Entry> heap(n);
    for (int i = 0; i < n; ++i) heap[i] = {weight[i], i};
    std::make_heap(heap.begin(), heap.end(), below);
    for (int copy = n; copy < copies; ++copy) {
        std::pop_heap(heap.begin(), heap.end(), below);
        Entry& top = heap.back();
        item[copy] = top.second;
        top.first = weight[top.second] / static_cast<double>(++count[top.second]);
        std::push_heap(heap.begin(), heap.end(), below);
    }
}

void preserve_slots(int32_t* slots, const int32_t* old, int num_slots, int num_ranks) {
    const int per_rank = num_slots / num_ranks;
    std::vector<int32_t> incoming(per_rank);
    std::vector<char> used(per_rank), kept(per_rank);
    for (int first = 0; first < num_slots; first += per_rank) {
        int32_t* local = slots + first;
        std::copy(local, local + per_rank, incoming.begin());
        std::fill(used.begin(), used.end(), 0);
        std::fill(kept.begin(), kept.end(), 0);
        for (int slot = 0; slot < per_rank; ++slot) {
            for (int i = 0; i < per_rank; ++i) {
                if (used[i] || incoming[i] != old[first + slot]) continue;
                local[slot] = incoming[i];
                used[i] = kept[slot] = 1;
                break;
            }
        }
        for (int slot = 0, i = 0; slot < per_rank; ++slot) {
            if (kept[slot]) continue;
            while (used[i]) ++i;
            local[slot] = incoming[i++];
        }
    }
}

}  // namespace eplb
