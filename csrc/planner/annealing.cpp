// SPDX-License-Identifier: Apache-2.0
#include "annealing.h"

#include <algorithm>
#include <iterator>

namespace eplb {

namespace {

// First thresholds, one drawn for each run: high ones leave any dead end, low ones end at better placements.
constexpr double kFirstThresholds[] = {0.05, 0.15, 0.5, 1.5};
constexpr double kEven = 0.1;  // weight of the loads' squared distance from the mean beside the busiest rank

}  // namespace

Annealing::Annealing(const Search& search)
    : experts_(search.shape().experts),
      slots_(search.shape().slots),
      ranks_(search.shape().ranks),
      per_rank_(search.shape().per_rank()),
      share_(experts_),
      load_(ranks_),
      count_(experts_),
      held_(static_cast<size_t>(experts_) * ranks_) {
    for (int e = 0; e < experts_; ++e) weight_.push_back(search.weight(e) / search.unit());
    for (int r = 0; r < ranks_; ++r) slowness_.push_back(1.0 / search.speed(r));
}

double Annealing::peak() const { return *std::max_element(load_.begin(), load_.end()); }

double Annealing::energy() const {
    double squares = 0.0, peak = 0.0;
    for (const double load : load_) {
        squares += (load - 1.0) * (load - 1.0);
        peak = std::max(peak, load);
    }
    return peak + kEven * squares;
}

// Puts `expert` into `slot`, whatever it held. Sums the holders' loads again, so that rounding errors do not add up.
void Annealing::set(int slot, int expert) {
    const int r = slot / per_rank_, old = expert_[slot];
    --held_[static_cast<size_t>(old) * ranks_ + r];
    ++held_[static_cast<size_t>(expert) * ranks_ + r];
    expert_[slot] = expert;
    --count_[old];
    ++count_[expert];
    for (const int e : {old, expert}) {
        share_[e] = count_[e] > 0 ? weight_[e] / count_[e] : 0.0;
        for (int q = 0; q < ranks_; ++q) {
            if (q != r && !holds(q, e)) continue;
            double sum = 0.0;
            for (int p = q * per_rank_; p < (q + 1) * per_rank_; ++p) sum += share_[expert_[p]];
            load_[q] = sum * slowness_[q];
        }
    }
}

double Annealing::run(std::vector<int32_t>& slots, int steps, double floor, Random& random) {
    expert_ = slots;
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(held_.begin(), held_.end(), 0);
    for (int p = 0; p < slots_; ++p) {
        ++count_[expert_[p]];
        ++held_[static_cast<size_t>(expert_[p]) * ranks_ + p / per_rank_];
    }
    for (int e = 0; e < experts_; ++e) share_[e] = weight_[e] / count_[e];
    for (int r = 0; r < ranks_; ++r) {
        load_[r] = 0.0;
        for (int p = r * per_rank_; p < (r + 1) * per_rank_; ++p) load_[r] += share_[expert_[p]];
        load_[r] *= slowness_[r];
    }
    double now = energy(), best = peak();
    const double first_threshold = kFirstThresholds[random.below(std::size(kFirstThresholds))];
    for (int step = 0; step < steps && best > floor; ++step) {
        const double left = static_cast<double>(steps - step) / steps;
        const double threshold = first_threshold * left * left * random.below(1024) / 1024.0;
        const int p = static_cast<int>(random.below(static_cast<uint32_t>(slots_)));
        const int e = expert_[p], r = p / per_rank_;
        if (count_[e] > 1 && random.below(2) == 0) {
            const int other = static_cast<int>(random.below(static_cast<uint32_t>(experts_)));
            if (holds(r, other)) continue;
            set(p, other);
            const double then = energy();
            if (then > now + threshold) {
                set(p, e);
                continue;
            }
            now = then;
        } else {
            const int q = static_cast<int>(random.below(static_cast<uint32_t>(slots_)));
            const int f = expert_[q], s = q / per_rank_;
            if (s == r || e == f || holds(s, e) || holds(r, f)) continue;
            set(p, f);
            set(q, e);
            const double then = energy();
            if (then > now + threshold) {
                set(p, e);
                set(q, f);
                continue;
            }
            now = then;
        }
        if (peak() < best) {
            best = peak();
            slots = expert_;
        }
    }
    return best;
}

}  // namespace eplb
