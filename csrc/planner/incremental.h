// SPDX-License-Identifier: Apache-2.0
// The "incremental" policy: from the placement in force to a balanced one with few moves.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

// PARs of the search, whose loads are integers, differ less than this from those in float64.
constexpr double kSearchRounding = 1e-4;

struct Goal {
    const double* target = nullptr;  // [L]: PAR at which a layer is left as it is

    bool thorough = false;  // improve after the first descent
    int rounds = 0;         // rounds of improvement per layer; 0: until the time is up
    double seconds = 0.0;   // time of improvement, for all layers together
    uint64_t seed = 0;
    int threads = 1;

    int64_t max_moves = -1;                // over all layers; negative: no limit
    int64_t max_moves_per_rank = -1;       // the same for each receiving rank
    int64_t max_moves_between_nodes = -1;  // the same for moves to nodes that held no copy at the start

    const double* speed = nullptr;  // [R], speeds of the ranks, mean 1; null if all are alike

    const double* series = nullptr;  // [windows, L, E] that the load was forecast from
    int windows = 0;
    const double* p95 = nullptr;      // [L]: 95th percentile of the windows' PARs in the placement in force
    const double* highest = nullptr;  // [L]: the highest of them

    int nodes = 1;
    double far_cost = 1.0;   // cost of a receipt from another node; a receipt within the node costs 1
    bool stay_near = false;  // whether receipts from other nodes are forbidden
};

struct LayeredPlan {
    std::vector<int32_t> slots;          // [L, P] after all moves
    std::vector<int32_t> moves;          // [M, 4]: layer, slot, expert, group
    std::vector<double> par_of_windows;  // [L, 2]: before and after, for layers planned window by window; others 0
    std::vector<double> p95_of_windows;  // [L]: 95th percentile of the windows' PARs after all moves; empty without a
                                         // series
};

// load [L, E]: finite, not negative. variance [L, E]: variance of each expert's load from window to window; with it the
// plan is made to age well. Null: the plan has the fewest moves. slots [L, P]: the placement in force, valid, -1 where
// empty.
LayeredPlan plan_incremental(const double* load, const double* variance, const int32_t* slots, int num_layers,
                             Shape shape, const Goal& goal);

}  // namespace eplb
