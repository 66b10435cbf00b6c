// SPDX-License-Identifier: Apache-2.0
// One layer's plan: from the placement in force to one that reaches the target with few receipts, or comes as close as
// the search can.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "few_moves.h"
#include "order.h"
#include "random_numbers.h"
#include "search.h"
#include "windows.h"

namespace eplb {

struct Goal;

class LayerPlanner {
  public:
    // load, variance [E] (variance may be null) and slots [P] as in plan_incremental(); they must outlive this object.
    LayerPlanner(const double* load, const double* variance, const int32_t* slots, Shape shape, const Goal& goal,
                 double target, uint64_t seed);

    // The descent, and a placement from scratch if the descent does not reach the target.
    void descend();

    // Rounds of large-neighbourhood search; does nothing if settled().
    void improve(int rounds);

    // Searches for the best placement for each number of receipts, on small shapes.
    void save_moves();

    // The placements found by it with fewer receipts than the plan.
    const std::vector<FewMoves>& with_fewer_moves() const { return few_; }

    // Makes `slots` [P] the plan.
    void take(const std::vector<int32_t>& slots) { best_.slots = slots; }

    // The few rounds of a fast plan.
    void improve_briefly();

    // Whether no placement can be better than the one found.
    bool settled() const { return !has_load_ || (best_.reached && best_.cost == 0); }

    // The moves to the placement found, with the PAR after each group, and the PAR before all of them. If experts are
    // hot at different times in the windows, these are means over the windows, and all moves are one group. `highest`:
    // the highest PAR in a window of the placement in force.
    OrderedMoves order(const Windows& windows, double highest);
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
    double step_at(double limit) const;
    double least_share();
    double floor();
    bool is_beyond_reach(double par);
    void descend_again(double share);
    bool keep_if_better();
    bool windows_matter(const Windows& windows, double highest) const;
    bool pairs() const { return search_.shape().per_rank() == 2 && search_.alike(); }
    void pair_up();
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
    double least_share_ = 0.0, floor_ = 0.0;  // of least_share() and floor(); 0: not known yet
    double start_peak_ = 0.0;
    const bool stay_near_, thorough_;
    const int nodes_;
    bool has_load_ = false;
    bool steadied_ = false;
    bool stepping_ = false;  // whether the potential has a step
};

}  // namespace eplb
