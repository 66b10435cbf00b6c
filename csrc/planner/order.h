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
    int32_t end;  // end of the group's moves, which begin at the previous group's end
    double peak;  // load of the busiest rank after the group, in units of the mean
};

struct OrderedMoves {
    std::vector<Move> moves;
    std::vector<Group> groups;
};

// The moves from the start of `search` to `target` [P]. `search` must be at its start; afterwards it is at the target.
OrderedMoves order_moves(Search& search, const std::vector<int32_t>& target);

}  // namespace eplb
