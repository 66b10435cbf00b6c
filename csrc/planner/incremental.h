// SPDX-License-Identifier: Apache-2.0
// The "incremental" policy: from the placement in force to a balanced one with few moves.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

struct Goal {
    const double* target = nullptr;  // [L]: PAR at which a layer is left alone

    bool thorough = false;  // go on improving after the first descent,
    int rounds = 0;         // so many rounds per layer; 0: until the time is up
    double seconds = 0.0;   // for all layers together
    uint64_t seed = 0;
    int threads = 1;

    int64_t max_moves = -1;                // over all layers; negative: no limit
    int64_t max_moves_per_rank = -1;       // the same by receiving rank
    int64_t max_moves_between_nodes = -1;  // of those whose node held no copy at the start

    const double* speed = nullptr;  // [R], mean 1: of the ranks; null where all are alike

    const double* series = nullptr;  // [windows, L, E] that the load was forecast from
    int windows = 0;

    int nodes = 1;
    double far_cost = 1.0;   // of a receipt from another node; one within the node costs 1
    bool stay_near = false;  // no receipts from other nodes
};

struct LayeredPlan {
    std::vector<int32_t> slots;          // [L, P] after all moves
    std::vector<int32_t> moves;          // [M, 4]: layer, slot, expert, group
    std::vector<double> par_of_windows;  // [L, 2]: before and after, where a layer was planned for its windows; else 0
};

// load [L, E]: finite, not negative. variance [L, E]: of each expert's load from window to window, or null: then the
// plan makes fewest moves, otherwise it is made to age well. slots [L, P]: the placement in force, valid, -1 where
// empty.
LayeredPlan plan_incremental(const double* load, const double* variance, const int32_t* slots, int num_layers,
                             Shape shape, const Goal& goal);

}  // namespace eplb
