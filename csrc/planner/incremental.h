// SPDX-License-Identifier: Apache-2.0
// The "incremental" policy: from the placement in force to a balanced one with few moves, layer by layer.
#pragma once

#include <cstdint>
#include <vector>

namespace eplb {

struct Move {
    int32_t slot;
    int32_t expert;
    int32_t group;
};

struct Goal {
    double target = 1.02;  // PAR at which a layer is left alone
    int max_per_rank = 0;  // most experts that a rank receives in a layer; 0: no limit
};

struct LayerPlan {
    std::vector<int32_t> slots;  // [P] after all moves
    std::vector<Move> moves;     // in order; groups count from 0
};

// load [num_experts]: finite, not negative. slots [num_slots]: the placement in force, -1 where empty.
LayerPlan plan_layer(const double* load, const int32_t* slots, int num_experts, int num_slots, int num_ranks,
                     const Goal& goal);

}  // namespace eplb
