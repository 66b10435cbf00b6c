// SPDX-License-Identifier: Apache-2.0
// The best placements of a small layer for each number of receipts.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

// A beam search (Lowerre, 1976) over numbers of receipts: from `width` placements with so many receipts by receipts and
// swaps to those with more. Returns by number of receipts from 1 to `most` the placement [P] with the lowest PAR found,
// empty where one with fewer receipts has a PAR as low. `search` has begun; returns nothing for shapes that are not
// small, for placements with empty slots or an expert twice on a rank, and where nodes are told apart.
struct FewMoves {
    std::vector<int32_t> slots;  // [P]
    double peak;                 // PAR
    int cost;                    // receipts
};
std::vector<FewMoves> find_few_moves(const Search& search, int most, int width);

}  // namespace eplb
