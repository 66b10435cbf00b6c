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
inline float price_of(int cost) { return cost >= 2 ? 0.5F : cost == 1 ? 1.0F : kFree; }

class Search {
  public:
    explicit Search(Shape shape);

    // Starts from `slots` [P] (-1: empty) under `load` [E]. Returns false where there is no load and nothing to do.
    // With `variance` [E] (of each expert's load, tokens squared; may be null) the square of the potential is the one
    // that is to be expected: a rank's variance is the sum of its replicas', each variance / copies^2.
    bool begin(const double* load, const int32_t* slots, const double* variance);

    // Nodes share the ranks evenly. A receipt from another node (one that held no copy at the start) counts less by the
    // factor `far`, 0 < far <= 1, or is forbidden where it is 0. Call before begin().
    void set_nodes(int nodes, float far);

    // Ranks are as fast as `speed` [R] says, with a mean of 1; null: all alike. A rank's load is then what it has to do
    // over its speed. Call before aim() and begin().
    void set_speed(const double* speed);

    // Sets the load at which a rank is light enough, in units of the mean, the weight of the potential's square, and
    // the load from which the potential rises steeply.
    void aim(double limit, double square, double scored_limit);

    // Gives experts more copies until none of their replicas carries more than `share` of a rank's mean, and keeps the
    // descent from dropping below. An expert whose replicas leave little room beside them holds a descent up: no
    // single copy more helps its ranks without hurting the receiver as much, and dropping one looks cheap. Does nothing
    // and returns false where the slots do not suffice.
    bool split_heavy(double share);

    // The load of the heaviest replica, in units of a rank's mean, when copies are given out to make that least.
    double smallest_largest_share() const;

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

    double peak() const;                // load of the busiest rank (over its speed) in units of the mean
    bool reached() const;               // no rank is above the limit
    int cost() const { return cost_; }  // receipts: experts on ranks that did not hold them at the start
    int count(int expert) const { return count_[expert]; }
    int32_t weight(int expert) const { return weight_[expert]; }  // in units of which a rank has 2^20 on average
    static double unit();                                         // that many
    bool alike() const { return speed_.empty(); }                 // all ranks are equally fast
    double speed(int rank) const { return speed_.empty() ? 1.0 : speed_[rank]; }
    int confined_nodes() const { return near_.empty() || far_ > 0.0F ? 1 : nodes_; }  // experts never leave theirs
    bool is_near(int node, int expert) const {
        return near_.empty() || near_[static_cast<size_t>(node) * (shape_.experts + 1) + expert];
    }
    const Shape& shape() const { return shape_; }
    const std::vector<int32_t>& slots() const { return expert_; }  // E stands for empty
    const std::vector<int32_t>& start() const { return start_; }

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

    int node_of(int rank) const { return rank / (shape_.ranks / nodes_); }

    bool is_home(int rank, int expert) const { return home_[at(rank, expert)] != 0; }
    uint16_t* holders_of(int expert) { return &place_[static_cast<size_t>(expert) * stride_]; }
    size_t at(int rank, int expert) const { return static_cast<size_t>(rank) * (shape_.experts + 1) + expert; }
    int32_t share_of(int expert, int copies) const { return weight_[expert] / copies; }

    Shape shape_;
    Potential potential_;
    bool exact_ = false;
    int nodes_ = 1;
    float far_ = 1.0F;
    std::vector<uint8_t> near_;  // [nodes, E + 1]: a rank of the node held the expert at the start; none if all is near
    int32_t limit_ = 0;
    int cost_ = 0;
    int most_cost_ = 0;                               // descend() gives up beyond
    std::vector<std::pair<int32_t, int32_t>> trail_;  // slots changed since the last kept state, and what they held
    std::vector<int32_t> chosen_, lost_;
    std::vector<int32_t> tally_, tallied_;  // scratch: change of each rank's load, and the ranks that change

    // Loads are integers in 1/2^20 of a rank's mean, so that sums are exact in any order.
    std::vector<int32_t> expert_, start_;                  // [P]
    std::vector<int32_t> weight_, count_, least_, share_;  // [E + 1], the last stands for "empty"
    std::vector<int32_t> rank_load_;                       // [R]
    std::vector<double> speed_;                            // [R], or none
    std::vector<int32_t> background_;                      // [R], or none: see aim()
    std::vector<uint8_t> home_;                            // [R, E + 1]
    std::vector<uint16_t> place_;                          // [E, stride]: the slots that hold an expert, count_ of them
    size_t stride_ = 0;                                    // most copies that an expert can have
    std::vector<uint16_t> rank_of_;                        // [P]
    std::vector<int32_t> home_slots_first_;                // [E + 1] into home_rank_
    std::vector<uint16_t> home_rank_;                      // ranks that hold an expert at the start

    // Derived from the above where ranks have changed since the last refresh(); what the kernels read.
    std::vector<int32_t> dirty_ranks_;
    std::vector<uint8_t> is_dirty_;  // [R]
    std::vector<uint32_t> seen_;     // [E + 1], equal to round_ where recomputed
    uint32_t round_ = 0;
    std::vector<float> slot_share_, slot_load_, slot_phi_,
        slot_excess_;                                  // [P]: the replica's load, its rank's and its potential
    std::vector<float> home_price_, away_price_;       // [P]: price of receiving the slot's expert in exchange for
                                                       // one that is at home, or that is not
    std::vector<uint64_t> spare_;                      // [P] bits: the slot's expert has other copies, or none is there
    std::vector<uint8_t> away_;                        // [P]: the expert was not on this rank at the start
    std::vector<float> variance_;                      // [E + 1] in units of a rank's mean, squared; or none
    std::vector<float> up_, up_change_, down_change_;  // [E + 1]: replica load with one copy more; changes of it
    std::vector<float> add_gain_, drop_gain_, add_bonus_,
        drop_bonus_;                                 // [E + 1]: effect on all holders of one copy more or less
    std::vector<int32_t> spare_slot_, spare_first_;  // compact list of spare slots; [R + 1] first of each rank
    std::vector<float> spare_base_, spare_load_, spare_price_;          // by entry of that list
    std::vector<float> price_, returned_price_, expert_price_, score_;  // scratch
    std::vector<int32_t> rows_;                                         // scratch
};

}  // namespace eplb
