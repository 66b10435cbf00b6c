// SPDX-License-Identifier: Apache-2.0
// One layer's placement while the search changes it: who holds what, how many copies, the load of every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
#include "random_numbers.h"

namespace eplb {

struct Shape {
    int experts;  // E
    int slots;    // P
    int ranks;    // R
    int per_rank() const { return slots / ranks; }
};

// What a candidate's gain is multiplied with: one over the receipts that it costs; nearly free ones count as kFree.
inline float price_of(int cost) { return cost >= 2 ? kTwoReceipts : cost == 1 ? kOneReceipt : kFree; }

// What holds for all placements of a layer.
struct Conditions {
    int nodes = 1;     // share the ranks evenly
    float far = 1.0F;  // a receipt from another node (one that held no copy at the start) counts less by this factor,
                       // 0 < far <= 1, or is forbidden where it is 0
    const double* speed = nullptr;  // [R] of the ranks, with a mean of 1; null: all alike. A rank's load is then what
                                    // it has to do over its speed.
};

// What a descent goes for, in units of the mean load.
struct Aim {
    double limit;         // at which a rank is light enough
    double square;        // weight of the potential's square
    double scored_limit;  // from which the potential rises steeply
};

class Search {
  public:
    Search(Shape shape, Conditions conditions);

    // Starts from `slots` [P] (-1: empty) under `load` [E]. Returns false where there is no load and nothing to do.
    // With `variance` [E] (of each expert's load, tokens squared; may be null) the square of the potential is the one
    // that is to be expected: a rank's variance is the sum of its replicas', each variance / copies^2.
    bool begin(const double* load, const int32_t* slots, const double* variance);

    void aim(const Aim& aim);

    // Gives experts more copies until none of their replicas carries more than `share` of a rank's mean, and keeps the
    // descent from dropping below. An expert whose replicas leave little room beside them holds a descent up: no
    // single copy more helps its ranks without hurting the receiver as much, and dropping one looks cheap. Does nothing
    // and returns false where the slots do not suffice.
    bool split_heavy(double share);

    // The load of the heaviest replica, in units of a rank's mean, when copies are given out to make that least.
    double smallest_largest_share() const;

    // No placement has a lower PAR, where smallest_largest_share() is `least_share`.
    double least_peak(double least_share) const;

    // Takes moves, best gain per receipt first, until no rank is above the limit (returns true) or none helps.
    bool descend();

    // Large-neighbourhood search (Shaw, 1998), one step: takes a few ranks back to their start, descends again, and
    // keeps the result if it reaches the limit with no more receipts than before. Returns whether it was kept.
    // `exact`: weigh every move by its full effect; slow, for small shapes. Otherwise the effects of the dropped and of
    // the added copy are added up, which is off where a rank holds another copy of both.
    bool reconsider(Random& random, bool exact);

    // The same round the busiest rank, kept if the busiest rank has less to do afterwards, whatever it costs.
    bool lower_peak(Random& random, bool exact);

    // Takes the placement `slots` [P] (E: empty), known to be valid, as the present one.
    void adopt(const std::vector<int32_t>& slots);

    // What follows if `slot` takes `expert`, or if two slots exchange theirs.
    struct Outcome {
        float gain;   // of potential
        double peak;  // highest load of a rank that gets more to do, in units of the mean
    };
    Outcome try_receipt(int slot, int expert);
    Outcome try_swap(int slot, int other);

    // Puts `expert` into `slot`, whatever it held.
    void place(int slot, int expert);

    double peak() const;                      // load of the busiest rank (over its speed) in units of the mean
    bool reached() const;                     // no rank is above the limit
    int cost() const { return state_.cost; }  // receipts: experts on ranks that did not hold them at the start
    int count(int expert) const { return state_.count[expert]; }
    int32_t weight(int expert) const { return state_.weight[expert]; }  // in units of which a rank has 2^20 on average
    static double unit();                                               // that many
    bool alike() const { return conditions_.speed == nullptr; }         // all ranks are equally fast
    double speed(int rank) const { return alike() ? 1.0 : conditions_.speed[rank]; }
    int confined_nodes() const {
        return state_.near.empty() || conditions_.far > 0.0F ? 1 : conditions_.nodes;
    }  // experts never leave theirs
    bool nodes_differ() const { return !state_.near.empty(); }
    bool is_near(int node, int expert) const {
        return state_.near.empty() || state_.near[static_cast<size_t>(node) * (shape_.experts + 1) + expert];
    }
    const Shape& shape() const { return shape_; }
    const std::vector<int32_t>& slots() const { return state_.expert; }  // E stands for empty
    const std::vector<int32_t>& start() const { return state_.start; }

  private:
    struct Candidate {
        float score = 1e-7F;
        int slot = -1;   // takes `expert`
        int other = -1;  // for a swap: the slot that takes the expert of `slot`
        int expert = -1;
    };

    void restore(int rank);
    bool replicate(int expert);
    int copies_needed(int expert, int32_t most) const;
    void undo();
    void choose_ranks(Random& random, int wanted);
    bool restore_chosen();
    void tally(int expert, int copies, int besides);
    Outcome settle();

    bool improve(int rank);
    void offer_exactly(int rank, Candidate& best);
    void offer_outcome(const Outcome& outcome, float price, int slot, int other, int expert, Candidate& best);
    int receipt_cost(int slot, int expert) const;
    void refresh();
    void offer_receipts(int rank, Candidate& best);
    void offer_placements(int rank, Candidate& best);
    void offer_swaps(int rank, Candidate& best);

    void recount(int expert, int copies);
    void count_shares(int expert);
    void shift(int rank, int32_t change);
    void set_away(int slot, bool away);
    void set_spare(int slot, bool spare);

    double relative(int rank, int32_t load) const;

    int node_of(int rank) const { return rank / (shape_.ranks / conditions_.nodes); }

    bool is_home(int rank, int expert) const { return state_.home[at(rank, expert)] != 0; }
    uint16_t* holders_of(int expert) { return &state_.place[static_cast<size_t>(expert) * state_.stride]; }
    size_t at(int rank, int expert) const { return static_cast<size_t>(rank) * (shape_.experts + 1) + expert; }
    int32_t share_of(int expert, int copies) const { return state_.weight[expert] / copies; }

    // The placement, and what follows from it at once. Loads are integers in 1/2^20 of a rank's mean, so that sums are
    // exact in any order.
    struct State {
        std::vector<int32_t> expert, start;                // [P]
        std::vector<int32_t> weight, count, least, share;  // [E + 1], the last stands for "empty"
        std::vector<int32_t> rank_load;                    // [R]
        std::vector<int32_t> background;                   // [R], or none: see aim()
        std::vector<uint8_t> home;                         // [R, E + 1]: the rank held the expert at the start
        std::vector<uint8_t> away;                         // [P]: the expert was not on this rank at the start
        std::vector<uint16_t> place;                       // [E, stride]: the slots that hold an expert, count of them
        size_t stride = 0;                                 // most copies that an expert can have
        std::vector<uint16_t> rank_of;                     // [P]
        std::vector<int32_t> home_slots_first;             // [E + 1] into home_rank
        std::vector<uint16_t> home_rank;                   // ranks that hold an expert at the start
        std::vector<uint8_t> near;                         // [nodes, E + 1]: a rank of the node held the expert at the
                                                           // start; none if all is near
        std::vector<float> variance;                       // [E + 1] in units of a rank's mean, squared; or none
        int cost = 0;                                      // receipts
        std::vector<std::pair<int32_t, int32_t>> trail;    // slots changed since the last kept state, and what they
                                                           // held
    };

    // What the kernels read. Derived from the state where ranks have changed since the last refresh().
    struct Derived {
        std::vector<int32_t> dirty_ranks;
        std::vector<uint8_t> is_dirty;  // [R]
        std::vector<uint32_t> seen;     // [E + 1], equal to round where recomputed
        uint32_t round = 0;
        std::vector<float> slot_share, slot_load, slot_phi, slot_excess;  // [P]: the replica's load, its rank's and its
                                                                          // potential
        std::vector<float> home_price, away_price;  // [P]: price of receiving the slot's expert in exchange for one
                                                    // that is at home, or that is not
        std::vector<uint64_t> spare;                // [P] bits: the slot's expert has other copies, or none is there
        std::vector<float> up, up_change, down_change;  // [E + 1]: replica load with one copy more; changes of it
        std::vector<float> add_gain, drop_gain, add_bonus, drop_bonus;  // [E + 1]: effect on all holders of one copy
                                                                        // more or less
        std::vector<int32_t> spare_slot, spare_first;                   // compact list of spare slots; [R + 1] first of
                                                                        // each rank
        std::vector<float> spare_base, spare_load, spare_price;         // by entry of that list
    };

    // Room for one step, so that none is allocated.
    struct Scratch {
        std::vector<int32_t> chosen, lost;    // ranks taken back; experts without a copy
        std::vector<int32_t> tally, tallied;  // change of each rank's load; ranks that change
        std::vector<float> price, returned_price, expert_price, score;
        std::vector<int32_t> rows;  // slots of the rank that has a row of scores
    };

    const Shape shape_;
    const Conditions conditions_;
    Potential potential_;
    bool exact_ = false;
    int32_t limit_ = 0;
    int most_cost_ = 0;  // descend() gives up beyond
    State state_;
    Derived derived_;
    Scratch scratch_;
};

}  // namespace eplb
