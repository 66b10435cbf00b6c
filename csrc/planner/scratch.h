// SPDX-License-Identifier: Apache-2.0
// Placements of a layer made from scratch, wholly or in part, laid over the one in force so that ranks receive little.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

// Slots [P] of a new placement for the load that `search` has begun with, no expert twice on a rank; empty where the
// slots cannot be filled so. Copies go to the heaviest replica, replicas by falling load to the lightest rank (Graham's
// LPT rule, 1969; with two slots per rank the pairs are optimal for these copies). The bins so made are matched with
// the ranks that hold most of their experts. With `noise` loads are taken as up to a tenth off, so that calls differ.
std::vector<int32_t> place_from_scratch(const Search& search, Random* noise);

// The same for the ranks that need it only: those above `limit` when experts have the copies that they would get from
// scratch, those that lose or get a copy, and as many of the lightest as it takes for all to end up below the limit.
// Empty where the limit cannot be kept so, or where ranks are not equally fast.
std::vector<int32_t> repack(const Search& search, double limit);

// Slots [P] with the contents of ranks exchanged, each laid over the rank that holds most of its experts at the start.
void lay_over_start(const Search& search, std::vector<int32_t>& slots);

}  // namespace eplb
