// SPDX-License-Identifier: Apache-2.0
// One layer's placement while the search changes it: the expert of each slot, copies of each expert, load of each rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
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

// The factor on a candidate's gain: 1 / receipts; kFree without a receipt.
inline float price_of(int cost) { return cost >= 2 ? kTwoReceipts : cost == 1 ? kOneReceipt : kFree; }

// Conditions for all placements of a layer.
struct Conditions {
    int nodes = 1;     // nodes, which share the ranks evenly
    float far = 1.0F;  // factor on the score of a receipt from another node (whose own node held no copy at the start),
                       // 0 < far <= 1; 0 forbids it
    const double* speed = nullptr;  // [R] speeds of the ranks, mean 1; null: all alike. A rank's load is then its
                                    // tokens over its speed.
};

// The aim of a descent, in units of the mean load.
struct Aim {
    double limit;         // load at which a rank is light enough
    double square;        // weight of the potential's square
    double scored_limit;  // load from which the potential rises steeply
    double step = 0.0;    // by which it jumps there; dropped in a descent once no move lowers the potential
};

class Search {
  public:
    Search(Shape shape, Conditions conditions);

    // Starts from `slots` [P] (-1: empty) under `load` [E]. Returns false without load: then there is nothing to do.
    // With `variance` [E] (of each expert's load, tokens squared; may be null) the potential has the expected square: a
    // rank's variance is the sum over its replicas of variance / copies^2.
    bool begin(const double* load, const int32_t* slots, const double* variance);

    void aim(const Aim& aim);

    // Gives experts more copies until none of their replicas has more than `share` of a rank's mean load, and keeps the
    // descent from dropping these copies. Without it the descent gets stuck at an expert with heavy replicas: a single
    // further copy helps its ranks no more than it hurts the receiver, and dropping a copy looks cheap. Does nothing
    // and returns false if there are not enough slots.
    bool split_heavy(double share);

    // Whether there are enough slots for replicas of at most `share` of a rank's mean load.
    bool replicas_fit(double share) const;

    // The least possible load of the heaviest replica, in units of a rank's mean.
    double smallest_largest_share() const;

    // No placement has a lower PAR, where smallest_largest_share() is `least_share`.
    double least_peak(double least_share) const;

    // Takes moves, best gain per receipt first, until no rank is above the limit (returns true), no move helps, or
    // there are more receipts than `most_cost`.
    bool descend(int most_cost = std::numeric_limits<int>::max());

    // Large-neighbourhood search (Shaw, 1998), one step: takes a few ranks back to their start, descends again, and
    // keeps the result if it reaches the limit with no more receipts than before. Returns whether it was kept.
    // `exact`: score every move by its full effect; slow, for small shapes. Otherwise the effects of the dropped and of
    // the added copy are added up, which is wrong for a rank that holds further copies of both.
    bool reconsider(Random& random, bool exact);

    // The same step around the busiest rank, kept if the peak is lower afterwards, whatever the receipts.
    bool lower_peak(Random& random, bool exact);

    // Makes `slots` [P] (E: empty), a valid placement, the current one.
    void adopt(const std::vector<int32_t>& slots);

    // The effect if `slot` takes `expert`, or if two slots exchange their experts.
    struct Outcome {
        float gain;   // gain of potential
        double peak;  // highest load of a rank whose load grows, in units of the mean
    };
    Outcome try_receipt(int slot, int expert);
    Outcome try_swap(int slot, int other);

    // Puts `expert` into `slot`, whatever it held.
    void place(int slot, int expert);

    double peak() const;                      // load of the busiest rank (over its speed) in units of the mean
    bool reached() const;                     // no rank is above the limit
    int cost() const { return state_.cost; }  // receipts: experts on ranks that did not hold them at the start
    int count(int expert) const { return state_.count[expert]; }
    int32_t weight(int expert) const { return state_.weight[expert]; }  // a rank's mean load is 2^20 of its units
    static double unit();                                               // 2^20
    bool alike() const { return conditions_.speed == nullptr; }         // all ranks are equally fast
    double speed(int rank) const { return alike() ? 1.0 : conditions_.speed[rank]; }
    int confined_nodes() const {
        return state_.near.empty() || conditions_.far > 0.0F ? 1 : conditions_.nodes;
    }  // nodes that experts never leave
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
    bool copies_fit(int32_t most) const;
    int64_t cost_above() const;
    void drop_step();
    void undo();
    void choose_ranks(Random& random, int wanted);
    bool restore_chosen();
    void tally(int expert, int copies, int besides);
    Outcome settle();

    bool improve(int rank);
    void offer_exactly(int rank, Candidate& best);
    void offer_outcome(const Outcome& outcome, float price, int slot, int other, int expert, Candidate& best);
    int receipt_cost(int slot, int expert) const;
    template <typename Visit>
    void for_each_spare(const Visit& visit) const;
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

    // The placement, with copies and loads, which are updated with every change. Loads are integers in 1/2^20 of a
    // rank's mean, so that sums are exact in any order.
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

    // Input of the kernels. refresh() derives it from the state for ranks that have changed since its last call.
    struct Derived {
        std::vector<int32_t> dirty_ranks;
        std::vector<uint8_t> is_dirty;  // [R]
        std::vector<uint32_t> seen;     // [E + 1], equal to round where recomputed
        uint32_t round = 0;
        std::vector<float> slot_share;                                    // [P]: the replica's load
        std::vector<float> slot_load, slot_phi, slot_excess, slot_above;  // [P]: its rank's load, potential, and what
                                                                          // is above the limit
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

    // Buffers of one step, so that steps do not allocate.
    struct Scratch {
        std::vector<int32_t> chosen, lost;    // ranks taken back; experts without a copy
        std::vector<int32_t> tally, tallied;  // change of each rank's load; ranks that change
        std::vector<float> load, phi;         // of each rank
        std::vector<uint8_t> holds;           // whether a rank holds an expert
        std::vector<float> price, returned_price, expert_price, score;
        std::vector<int32_t> rows;  // slots of the rank that has a row of scores
    };

    const Shape shape_;
    const Conditions conditions_;
    Potential potential_;
    bool exact_ = false;
    int32_t limit_ = 0;
    State state_;
    Derived derived_;
    Scratch scratch_;
};

}  // namespace eplb
