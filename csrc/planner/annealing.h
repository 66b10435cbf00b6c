// SPDX-License-Identifier: Apache-2.0
// Threshold accepting (Dueck and Scheuer, 1990) for a layer's balance alone, for shapes so small that the descent's
// moves lead to a dead end soon: steps that make the busiest rank worse by less than a falling threshold are taken.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

class Annealing {
  public:
    // For the shape and the load that `search` has begun with; experts may go to any rank.
    explicit Annealing(const Search& search);

    // From slots [P], none of them empty, so many steps; ends early once the busiest rank is at `floor`. Leaves
    // the best placement seen in `slots` and returns its PAR.
    double run(std::vector<int32_t>& slots, int steps, double floor, Random& random);

  private:
    void set(int slot, int expert);
    double peak() const;
    double energy() const;
    bool holds(int rank, int expert) const { return held_[static_cast<size_t>(expert) * ranks_ + rank] != 0; }

    const int experts_, slots_, ranks_, per_rank_;
    std::vector<double> weight_, share_;  // [E]
    std::vector<double> slowness_;        // [R] one over the speed
    std::vector<double> load_;            // [R] over the speed
    std::vector<int32_t> count_;          // [E]
    std::vector<int32_t> expert_;         // [P]
    std::vector<uint8_t> held_;           // [E, R]
};

}  // namespace eplb
