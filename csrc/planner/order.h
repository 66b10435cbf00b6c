// SPDX-License-Identifier: Apache-2.0
// The order of a layer's moves: small groups, best gain per receipt first, valid and better than the start after every
// group.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

struct Move {
    int32_t slot;
    int32_t expert;
};

struct Group {
    int32_t end;  // the group's moves are those from the previous group's end to this
    double peak;  // load of the busiest rank after it, in units of the mean
};

struct OrderedMoves {
    std::vector<Move> moves;
    std::vector<Group> groups;
};

// The moves that lead from where `search` began to `target` [P]. `search` must have begun anew; it ends at the target.
OrderedMoves order_moves(Search& search, const std::vector<int32_t>& target);

}  // namespace eplb
