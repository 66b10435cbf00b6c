// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <algorithm>
#include <numeric>

namespace eplb {

namespace {

constexpr int kMostSweeps = 500;

}  // namespace

Dispatch::Dispatch(Shape shape)
    : shape_(shape),
      count_(shape.experts),
      next_(shape.experts),
      rank_load_(shape.ranks),
      fixed_(shape.ranks),
      order_(shape.ranks),
      position_(shape.ranks),
      contained_(shape.ranks) {
    rank_of_.resize(shape.slots);
    for (int p = 0; p < shape.slots; ++p) rank_of_[p] = p / shape.per_rank();
}

// The rank loads with the least sum of squares are an optimum of the linear program, too. Block coordinate descent
// finds them: the load of one replicated expert after the other is spread again over its holders, lowest first. It
// stops when a lower bound, the load that cannot leave a set of ranks, proves that the busiest rank is near the
// optimum.
void Dispatch::share(const double* load, const int32_t* slots, double tolerance, double* share) {
    const int P = shape_.slots, E = shape_.experts;
    std::fill(count_.begin(), count_.end(), 0);
    for (int p = 0; p < P; ++p)
        if (slots[p] >= 0) ++count_[slots[p]];
    std::fill(fixed_.begin(), fixed_.end(), 0.0);
    replicated_.clear();
    int total = 0;
    for (int e = 0; e < E; ++e) {
        if (count_[e] < 2) continue;
        next_[e] = total;
        replicated_.push_back({e, total, total, load[e]});
        total += count_[e];
    }
    grouped_.resize(total);
    for (int p = 0; p < P; ++p) {
        const int e = slots[p];
        share[p] = e >= 0 ? 1.0 / count_[e] : 0.0;
        if (e < 0) continue;
        if (count_[e] > 1)
            grouped_[next_[e]++] = p;
        else
            fixed_[rank_of_[p]] += load[e];
    }
    rank_load_ = fixed_;
    holders_.clear();
    for (Replicated& r : replicated_) {
        const int first = r.first;
        r.first = static_cast<int32_t>(holders_.size());
        for (int i = first; i < first + count_[r.expert]; ++i) {
            const int rank = rank_of_[grouped_[i]];
            if (static_cast<int>(holders_.size()) > r.first && holders_.back().rank == rank)
                ++holders_.back().slots;
            else
                holders_.push_back({rank, 1, 0.0});
        }
        r.last = static_cast<int32_t>(holders_.size());
        for (int i = r.first; i < r.last; ++i) {
            holders_[i].load = r.load * holders_[i].slots / count_[r.expert];
            rank_load_[holders_[i].rank] += holders_[i].load;
        }
    }
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
        for (const Replicated& r : replicated_) fill(r);
        const double peak = *std::max_element(rank_load_.begin(), rank_load_.end());
        const double enough = peak / (1.0 + tolerance);
        if (held_above(peak * (1.0 - 1.5 * tolerance)) >= enough) break;
        if (sweep % 8 == 7 && lower_bound() >= enough) break;
    }
    for (const Replicated& r : replicated_) {
        if (!(r.load > 0.0)) continue;
        double rest = 0.0;
        for (int i = r.first; i < r.last; ++i) rest += holders_[i].load;
        if (!(rest > 0.0)) continue;
        int next = next_[r.expert] - count_[r.expert];
        for (int i = r.first; i < r.last; ++i)
            for (int k = 0; k < holders_[i].slots; ++k)
                share[grouped_[next++]] = holders_[i].load / rest / holders_[i].slots;
    }
}

// Spreads an expert's load over its holders (water-filling): holders that get load end at one level, and all others are
// above it.
void Dispatch::fill(const Replicated& r) {
    Holder* first = holders_.data() + r.first;
    Holder* last = holders_.data() + r.last;
    if (last - first == 2) {
        Holder &a = first[0], &b = first[1];
        const double rest_a = rank_load_[a.rank] - a.load, rest_b = rank_load_[b.rank] - b.load;
        a.load = std::min(std::max(0.5 * (r.load + rest_b - rest_a), 0.0), r.load);
        b.load = r.load - a.load;
        rank_load_[a.rank] = rest_a + a.load;
        rank_load_[b.rank] = rest_b + b.load;
        return;
    }
    for (Holder* h = first; h < last; ++h) rank_load_[h->rank] -= h->load;
    // Insertion sort by load without this expert; the order hardly changes from sweep to sweep. Slots of one rank are
    // one holder, so the order of holders is free.
    level_order_.resize(last - first);
    std::iota(level_order_.begin(), level_order_.end(), 0);
    for (size_t i = 1; i < level_order_.size(); ++i) {
        const int32_t h = level_order_[i];
        const double load = rank_load_[first[h].rank];
        size_t j = i;
        for (; j > 0 && rank_load_[first[level_order_[j - 1]].rank] > load; --j) level_order_[j] = level_order_[j - 1];
        level_order_[j] = h;
    }
    double sum = r.load, level = 0.0;
    size_t n = 0;
    while (n < level_order_.size()) {
        sum += rank_load_[first[level_order_[n]].rank];
        ++n;
        level = sum / static_cast<double>(n);
        if (n < level_order_.size() && rank_load_[first[level_order_[n]].rank] >= level) break;
    }
    for (size_t i = 0; i < level_order_.size(); ++i) {
        Holder& h = first[level_order_[i]];
        h.load = i < n ? std::max(level - rank_load_[h.rank], 0.0) : 0.0;
        rank_load_[h.rank] += h.load;
    }
}

// A lower bound of the busiest rank's load: the load of experts held only by ranks above `level`, over those ranks.
double Dispatch::held_above(double level) {
    double sum = 0.0;
    int ranks = 0;
    for (int r = 0; r < shape_.ranks; ++r) {
        if (rank_load_[r] < level) continue;
        sum += fixed_[r];
        ++ranks;
    }
    for (const Replicated& r : replicated_) {
        bool inside = true;
        for (int i = r.first; i < r.last; ++i) inside = inside && rank_load_[holders_[i].rank] >= level;
        if (inside) sum += r.load;
    }
    return sum / ranks;
}

// The largest such bound over the sets of the i busiest ranks.
double Dispatch::lower_bound() {
    const int R = shape_.ranks;
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(),
              [&](int a, int b) { return rank_load_[a] > rank_load_[b] || (rank_load_[a] == rank_load_[b] && a < b); });
    for (int i = 0; i < R; ++i) {
        position_[order_[i]] = i;
        contained_[i] = fixed_[order_[i]];
    }
    for (const Replicated& r : replicated_) {
        int last = 0;
        for (int i = r.first; i < r.last; ++i) last = std::max(last, position_[holders_[i].rank]);
        contained_[last] += r.load;
    }
    double best = 0.0, sum = 0.0;
    for (int i = 0; i < R; ++i) {
        sum += contained_[i];
        best = std::max(best, sum / (i + 1));
    }
    return best;
}

}  // namespace eplb
