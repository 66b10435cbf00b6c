// SPDX-License-Identifier: Apache-2.0
// The best placements of a small layer for each number of receipts.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

struct FewMoves {
    std::vector<int32_t> slots;  // [P]
    double peak;                 // PAR
    int cost;                    // receipts
};

constexpr int kMostSlotsForFewMoves = 32;

// A beam search (Lowerre, 1976) over numbers of receipts: receipts and swaps lead from `width` placements with one
// number of receipts to placements with more. Returns the placement with the lowest PAR found for each number of
// receipts from 1 to `most`, in rising order, without those whose PAR fewer receipts reach as well. `search` has begun.
// Returns nothing for shapes that are not small, for placements with empty slots or an expert twice on a rank, and if
// nodes differ.
std::vector<FewMoves> find_few_moves(const Search& search, int most, int width);

}  // namespace eplb
