// SPDX-License-Identifier: Apache-2.0
// Placements of a layer made from scratch, in whole or in part, and matched with the one in force so that ranks receive
// few experts.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

// Slots [P] of a new placement for the load of `search`, which has begun, without an expert twice on a rank; empty if
// that is not possible. Copies go to the heaviest replica, replicas by falling load to the lightest rank (Graham's LPT
// rule, 1969; with two slots per rank the pairs are optimal for these copies). The bins are then matched with the ranks
// that hold most of their experts. With `noise` loads are varied by up to a tenth, so that calls differ. `chosen`: the
// copies of each expert, for each node that experts never leave.
std::vector<int32_t> place_from_scratch(const Search& search, Random* noise,
                                        const std::vector<std::vector<int32_t>>& chosen = {});

// Like place_from_scratch(), but packs only some ranks again: ranks above `limit` with the copies of a placement from
// scratch, ranks that lose or get a copy, and as few of the lightest ranks as needed to bring all below the limit.
// Empty if the limit cannot be kept this way, or if ranks are not equally fast.
std::vector<int32_t> repack(const Search& search, double limit);

// Slots [P] with the contents of ranks exchanged: each goes to the rank that held most of its experts at the start.
void lay_over_start(const Search& search, std::vector<int32_t>& slots);

}  // namespace eplb
