// SPDX-License-Identifier: Apache-2.0
// Dispatch shares: the part of an expert's tokens that each of its replicas takes, for a given placement.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

class Dispatch {
  public:
    explicit Dispatch(Shape shape);

    // Writes the share [P] of each slot in its expert's load, so that the busiest rank's load is within `tolerance` of
    // the optimum, relatively. slots [P]: valid, -1 where empty.
    void share(const double* load, const int32_t* slots, double tolerance, double* share);

  private:
    struct Holder {
        int32_t rank;
        int32_t slots;  // slots of that rank that hold the expert
        double load;    // load of these slots together
    };
    struct Replicated {
        int32_t expert;
        int32_t first, last;  // in holders_
        double load;
    };

    void fill(const Replicated& expert);
    double held_above(double level);
    double lower_bound();

    Shape shape_;
    std::vector<int32_t> rank_of_;           // [P]
    std::vector<int32_t> count_, next_;      // [E]
    std::vector<int32_t> grouped_;           // [P] slots of replicated experts, expert by expert
    std::vector<double> rank_load_, fixed_;  // [R] all load; load of experts with one copy
    std::vector<Replicated> replicated_;
    std::vector<Holder> holders_;
    std::vector<int32_t> level_order_;       // scratch: an expert's holders, lowest first
    std::vector<int32_t> order_, position_;  // ranks by falling load
    std::vector<double> contained_;          // [R] load that cannot leave the busiest i + 1 ranks, by i
};

}  // namespace eplb
