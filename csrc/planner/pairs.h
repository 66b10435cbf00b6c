// SPDX-License-Identifier: Apache-2.0
// Placements from scratch for ranks of two slots, where both questions have a good answer: how many copies each expert
// gets, and which replicas share a rank.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

// A placement [P] whose busiest rank has at most `limit`, in units of the mean load, or as little as a search of
// `trials` trials finds, and that takes few receipts; no expert is twice on a rank. `search` has begun; its ranks are
// alike and have two slots. The copies that experts have now are where the search starts. Empty if it finds none.
std::vector<int32_t> place_in_pairs(const Search& search, double limit, int trials, Random& random);

}  // namespace eplb
