// SPDX-License-Identifier: Apache-2.0
// Placements from scratch for ranks of two slots, where both questions have a good answer: how many copies each expert
// gets, and which replicas share a rank.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

// A placement [P] with two slots per rank whose busiest rank has at most `limit`, in units of the mean load, or as little
// as the search for it finds within `trials` trials; and few receipts. `search` has begun; its ranks are alike. Copies
// are counted from the current placement, after some random changes if `random` is not null. Empty if there is no
// placement without duplicates.
std::vector<int32_t> place_in_pairs(const Search& search, double limit, int trials, Random* random);

}  // namespace eplb
