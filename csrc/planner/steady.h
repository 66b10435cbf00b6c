// SPDX-License-Identifier: Apache-2.0
// Balance in every window, for layers whose experts are hot at different times, which the mean of the windows hides.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "search.h"

namespace eplb {

// Windows of one layer's load, each scaled to the same total; at most kMostWindows: longer series are merged.
class Steadying {
  public:
    static constexpr int kMostWindows = 16;

    // Least difference between the mean PAR of the windows and the PAR of their mean, or the target if that is higher;
    // below it there is nothing to gain.
    static constexpr double kWorthwhile = 0.05;

    // windows [T]: pointers to loads [E] of the layer, oldest first. `nodes`: with several, experts stay on their node.
    Steadying(Shape shape, const std::vector<const double*>& windows, const int32_t* start, int nodes);

    // Plans for every window, if that gains: half of the windows suggests moves, and the other half must confirm that
    // they lower the mean PAR. Windows that differ only by chance do not pass. If they pass, `slots` [P] (E: empty)
    // become a placement with a lower mean PAR over all windows, few receipts away, whose 95th percentile is no worse
    // than at the start. Returns whether they did.
    // `drifts`: the forecast found a drift, so windows must recur more clearly.
    bool improve(std::vector<int32_t>& slots, double target, bool drifts);

    // PARs of a placement [P], one for each window; `of_mean`: that of the windows' mean load.
    std::vector<double> pars(const std::vector<int32_t>& slots, double* of_mean = nullptr) const;

  private:
    struct Candidate {
        float score = 1e-4F;
        int slot = -1, other = -1, expert = -1;
    };

    bool recurs(double most) const;
    // For the first `windows` of them. Ends early where `ends`, asked every few steps, says so of the placement.
    std::vector<int32_t> descend(std::vector<int32_t> slots, int windows, double target,
                                 const std::function<bool(const std::vector<int32_t>&)>& ends);
    bool step(int rank);
    void offer_swaps(int rank, Candidate& best) const;
    void offer_copies(int rank, Candidate& best) const;
    void place(int slot, int expert);
    void add(int rank, int expert, float sign);
    void recount(int expert, int copies);
    template <typename LoadIn>
    float potential(const LoadIn& load_in) const;
    size_t at(int rank, int expert) const { return static_cast<size_t>(rank) * (shape_.experts + 1) + expert; }
    bool holds(int rank, int expert) const { return held_[at(rank, expert)] != 0; }
    bool is_home(int rank, int expert) const { return home_[at(rank, expert)] != 0; }
    bool may_meet(int rank, int other) const { return nodes_ == 1 || rank / per_node_ == other / per_node_; }
    int32_t* holders(int expert) { return holders_.data() + most_copies_ * expert; }
    const int32_t* holders(int expert) const { return holders_.data() + most_copies_ * expert; }
    const float* part(int expert) const { return part_.data() + static_cast<size_t>(expert) * stride_; }
    const float* counted(int expert) const { return &counted_[static_cast<size_t>(expert) * lanes_]; }
    float* load(int rank) { return &load_[static_cast<size_t>(rank) * lanes_]; }
    const float* load(int rank) const { return &load_[static_cast<size_t>(rank) * lanes_]; }

    const Shape shape_;
    const int nodes_, per_node_;
    int windows_ = 0, stride_ = 0;  // the stride is in whole vectors
    std::vector<int32_t> start_;
    std::vector<float> part_;     // [E + 1, stride], in units of a rank's mean; the last stands for "empty"
    int counts_ = 0, lanes_ = 0;  // windows that count in a descent; the same in whole vectors, filled up with windows
                                  // in which no expert has load and every rank the mean
    std::vector<float> counted_;  // [E + 1, lanes]: part_ of the windows that count
    std::vector<float> load_;     // [R, lanes]
    std::vector<int32_t> slots_, count_;
    std::vector<uint8_t> held_, home_;  // [R, E + 1], now and at the start
    size_t most_copies_ = 0;
    std::vector<int32_t> holders_, held_by_;  // [E, most_copies_] slots, and how many of them
    std::vector<float> potential_;            // [R] at the start of a step
    float limit_ = 1.0F;
};

}  // namespace eplb
