// SPDX-License-Identifier: Apache-2.0
#include "incremental.h"

#include <algorithm>
#include <cstdlib>

#include "search.h"

namespace eplb {

LayerPlan plan_layer(const double* load, const int32_t* slots, int num_experts, int num_slots, int num_ranks,
                     const Goal& goal) {
    Search search({num_experts, num_slots, num_ranks});
    static const double square = getenv("SQ") ? atof(getenv("SQ")) : 0.1;
    search.aim(goal.target, square);
    if (search.begin(load, slots)) search.descend(8 * num_slots + 64);
    LayerPlan plan;
    const int E = num_experts, S = num_slots / num_ranks;
    const std::vector<int32_t>&expert = search.slots(), &start = search.start();
    // Experts that stay on a rank keep their slots; the received ones take the slots of the dropped ones.
    plan.slots.assign(slots, slots + num_slots);
    std::vector<int32_t> received, dropped;
    struct Change {
        int slot, out, in;
    };
    std::vector<Change> changes;
    for (int first = 0; first < num_slots; first += S) {
        std::vector<int32_t> left(expert.begin() + first, expert.begin() + first + S);
        dropped.clear();
        for (int p = first; p < first + S; ++p) {
            const auto found = std::find(left.begin(), left.end(), start[p]);
            if (found != left.end())
                left.erase(found);
            else
                dropped.push_back(p);
        }
        size_t i = 0;
        for (const int e : left)
            if (e < E) changes.push_back({dropped[i], start[dropped[i]], e}), ++i;
    }
    // Order: whatever leaves a copy of the dropped expert may go at once; the rest waits for, or goes together with,
    // the change that brings a copy elsewhere.
    std::vector<int32_t> copies(E + 1, 0);
    for (int p = 0; p < num_slots; ++p) ++copies[start[p]];
    std::vector<char> done(changes.size(), 0);
    int group = 0;
    size_t left = changes.size();
    const auto apply = [&](size_t i) {
        done[i] = 1;
        --left;
        --copies[changes[i].out];
        ++copies[changes[i].in];
        plan.slots[changes[i].slot] = changes[i].in;
        plan.moves.push_back({changes[i].slot, changes[i].in, group});
    };
    while (left > 0) {
        bool progress = false;
        for (size_t i = 0; i < changes.size(); ++i) {
            if (done[i] || (changes[i].out < E && copies[changes[i].out] < 2)) continue;
            apply(i);
            ++group;
            progress = true;
        }
        if (progress) continue;
        // Follow the last copy of each dropped expert to where it is received until the chain closes.
        size_t i = 0;
        while (done[i]) ++i;
        std::vector<size_t> chain;
        std::vector<char> seen(changes.size(), 0);
        while (!seen[i]) {
            seen[i] = 1;
            chain.push_back(i);
            for (size_t j = 0; j < changes.size(); ++j)
                if (!done[j] && changes[j].in == changes[i].out) {
                    i = j;
                    break;
                }
        }
        chain.erase(chain.begin(), std::find(chain.begin(), chain.end(), i));
        for (const size_t j : chain) apply(j);
        ++group;
    }
    return plan;
}

}  // namespace eplb
