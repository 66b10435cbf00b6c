// SPDX-License-Identifier: Apache-2.0
// Threshold accepting (Dueck and Scheuer, 1990): steps that make the busiest rank worse by less than a falling
// threshold are taken. It minimises only the PAR, for small shapes on which the descent soon reaches a dead end.
#pragma once

#include <cstdint>
#include <vector>

#include "random_numbers.h"
#include "search.h"

namespace eplb {

class Annealing {
  public:
    // For the shape and the load of `search`, which has begun; experts may go to any rank.
    explicit Annealing(const Search& search);

    // Takes `steps` steps from slots [P], none of them empty; ends early when the PAR is at `floor`. Writes the best
    // placement into `slots` and returns its PAR.
    double run(std::vector<int32_t>& slots, int steps, double floor, Random& random);

  private:
    void set(int slot, int expert);
    double peak() const;
    double energy() const;
    bool holds(int rank, int expert) const { return held_[static_cast<size_t>(expert) * ranks_ + rank] != 0; }

    const int experts_, slots_, ranks_, per_rank_;
    std::vector<double> weight_, share_;  // [E]
    std::vector<double> slowness_;        // [R] 1 / speed
    std::vector<double> load_;            // [R] load / speed
    std::vector<int32_t> count_;          // [E]
    std::vector<int32_t> expert_;         // [P]
    std::vector<uint8_t> held_;           // [E, R]
};

}  // namespace eplb
