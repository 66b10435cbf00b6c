// SPDX-License-Identifier: Apache-2.0
// One layer's plan: from the placement in force to one that reaches the target with few receipts, or comes as near to
// it as the search can.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "few_moves.h"
#include "order.h"
#include "random_numbers.h"
#include "search.h"

namespace eplb {

struct Goal;

class LayerPlanner {
  public:
    // load, variance [E] (variance may be null) and slots [P] as in plan_incremental(), which outlive this.
    LayerPlanner(const double* load, const double* variance, const int32_t* slots, Shape shape, const Goal& goal,
                 double target, uint64_t seed);

    // The descent, and where it does not reach the target a placement made from scratch.
    void descend();

    // So many rounds of large-neighbourhood search; none once settled().
    void improve(int rounds);

    // On small shapes: searches for the best placement for each number of receipts.
    void save_moves();

    // What that found with fewer receipts than the plan.
    const std::vector<FewMoves>& with_fewer_moves() const { return few_; }

    // Makes `slots` [P] the plan.
    void take(const std::vector<int32_t>& slots) { best_.slots = slots; }

    // The few rounds that there is time for in a fast plan.
    void improve_briefly();

    // Nothing can be better than what was found.
    bool settled() const { return !has_load_ || (best_.reached && best_.cost == 0); }

    // The moves to what was found, with the PARs after each group, and the PAR before all of them. Where experts are
    // hot at different times in `windows` [T] to [E], these are means over the windows, and all moves are one group.
    OrderedMoves order(const std::vector<const double*>& windows);
    double start_peak() const { return start_peak_; }
    bool steadied() const { return steadied_; }

  private:
    struct Found {
        std::vector<int32_t> slots;  // [P]
        double peak = 0.0;           // PAR
        int cost = 0;                // receipts
        bool reached = false;        // the target
    };

    void begin(double limit, double square);
    bool keep_if_better();
    void try_from_scratch(Random* noise);
    void sink(int steps);
    void save_receipts();
    void anneal(int steps);
    void improve_once(int round);

    const double* load_;
    const double* variance_;
    const int32_t* slots_;
    const double target_;
    Search search_;
    Random random_;
    Found best_;
    std::vector<FewMoves> few_;                                 // by receipts
    double lowest_ = std::numeric_limits<double>::max();        // PAR of any placement seen
    double scratch_peak_ = std::numeric_limits<double>::max();  // the same of those made from scratch
    double slack_ = 0.0;
    double floor_ = 0.0;  // no placement has a lower PAR
    double start_peak_ = 0.0;
    const bool stay_near_, thorough_;
    const int nodes_;
    bool has_load_ = false;
    bool steadied_ = false;
};

}  // namespace eplb
