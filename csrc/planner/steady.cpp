// SPDX-License-Identifier: Apache-2.0
#include "steady.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "sums.h"
#include "vectors.h"
#include "windows.h"

namespace eplb {

namespace {

constexpr int kFewestWindows = 4;

// Part of the possible gain that the held-out windows must show.
constexpr double kConfirmed = 0.25;

// Most squared distance of the second half's windows from the first half's, over that from each other. A drift by equal
// steps in random directions gives 2.5 for eight windows.
constexpr double kRecurs = 1.5;

// The same if the forecast already found a drift.
constexpr double kRecursInDrift = 1.2;

constexpr float kSquare = 0.1F;  // weight of the square beside the load above the limit
constexpr int kRanksTried = 3;
constexpr int kStepsBetweenLooks = 4;

constexpr int kLanes = 4;  // of a vector

constexpr int kNever = 1 << 10;  // more receipts than any swap has

constexpr int whole_vectors(int windows) { return (windows + kLanes - 1) / kLanes * kLanes; }

// The cost of a rank with load 1 + `off` in one window.
float cost_of(float off, float room) { return std::max(off - room, 0.0F) + kSquare * off * off; }

// The squared distances of windows j.. from windows k.., four each, of loads [E, stride].
struct Distances {
    float of[kLanes][kLanes];  // [k, j]
};

EPLB_KERNEL
Distances distances(int experts, int stride, const float* part, int k, int j) {
    Distances sum = {};
    for (int e = 0; e < experts; ++e, part += stride) {
        for (int a = 0; a < kLanes; ++a) {
            for (int b = 0; b < kLanes; ++b) {
                const float off = part[j + b] - part[k + a];
                sum.of[a][b] += off * off;
            }
        }
    }
    return sum;
}

}  // namespace

Steadying::Steadying(Shape shape, const std::vector<const double*>& windows, const int32_t* start, int nodes)
    : shape_(shape), nodes_(nodes), per_node_(shape.ranks / nodes), start_(start, start + shape.slots) {
    const int T = static_cast<int>(windows.size()), E = shape.experts;
    for (int32_t& e : start_)
        if (e < 0) e = E;
    const int bins = std::min(T, kMostWindows);
    std::vector<std::vector<double>> loads;
    for (int bin = 0; bin < bins; ++bin) {
        const int first = bin * T / bins;
        std::vector<double> load(windows[first], windows[first] + E);
        for (int t = first + 1; t < (bin + 1) * T / bins; ++t)
            for (int e = 0; e < E; ++e) load[e] += windows[t][e];
        loads.push_back(std::move(load));
    }
    // A fragment of a window is not evidence by itself.
    std::vector<double> totals;
    for (const auto& load : loads) totals.push_back(sum_of(load.size(), load.data()));
    const double most = *std::max_element(totals.begin(), totals.end());
    std::vector<int> kept;
    for (int bin = 0; bin < bins; ++bin)
        if (totals[bin] > 0.25 * most) kept.push_back(bin);
    windows_ = static_cast<int>(kept.size());
    stride_ = whole_vectors(windows_);
    part_.assign(static_cast<size_t>(E + 1) * stride_, 0.0F);
    for (int k = 0; k < windows_; ++k) {
        const double* load = loads[kept[k]].data();
        const double scale = shape.ranks / totals[kept[k]];
        for (int e = 0; e < E; ++e) part_[static_cast<size_t>(e) * stride_ + k] = static_cast<float>(load[e] * scale);
    }
}

std::vector<double> Steadying::pars(const std::vector<int32_t>& slots, double* of_mean) const {
    std::vector<int32_t> count(shape_.experts + 1, 0);
    for (const int e : slots) ++count[e];
    std::vector<double> share(count.size(), 0.0);
    for (size_t e = 0; e < count.size(); ++e)
        if (count[e] > 0) share[e] = 1.0 / count[e];
    std::vector<double> peak(windows_, 0.0);
    double most = 0.0;  // of all windows together
    for (int r = 0; r < shape_.ranks; ++r) {
        double sum[kMostWindows] = {};
        for (int p = r * shape_.per_rank(); p < (r + 1) * shape_.per_rank(); ++p) {
            const float* loads = part(slots[p]);
            const double of_replica = share[slots[p]];
            for (int k = 0; k < stride_; k += kLanes)
                for (int i = 0; i < kLanes; ++i) sum[k + i] += of_replica * static_cast<double>(loads[k + i]);
        }
        for (int k = 0; k < windows_; ++k) peak[k] = std::max(peak[k], sum[k]);
        if (of_mean != nullptr) most = std::max(most, sum_of(windows_, sum));
    }
    if (of_mean != nullptr) *of_mean = most / windows_;
    return peak;
}

// Whether the windows of the second half are nearly as like some of the first half as like each other. Under a drift
// they are not, and what balances the first half is of no use for the second.
bool Steadying::recurs(double most) const {
    const int half = windows_ / 2;
    double to_first = 0.0, to_second = 0.0;
    std::vector<float> apart(static_cast<size_t>(kLanes) * stride_);
    for (int k = half / kLanes * kLanes; k < windows_; k += kLanes) {
        for (int j = 0; j < stride_; j += kLanes) {
            const Distances found = distances(shape_.experts, stride_, part_.data(), k, j);
            for (int i = 0; i < kLanes; ++i) std::copy_n(found.of[i], kLanes, &apart[i * stride_ + j]);
        }
        for (int i = std::max(half - k, 0); i < std::min(windows_ - k, kLanes); ++i) {
            float* from = &apart[i * stride_];
            from[k + i] = std::numeric_limits<float>::max();
            to_first += *std::min_element(from, from + half);
            to_second += *std::min_element(from + half, from + windows_);
        }
    }
    return to_first <= most * to_second;
}

bool Steadying::improve(std::vector<int32_t>& slots, double target, bool drifts) {
    if (windows_ < kFewestWindows) return false;
    double of_mean = 0.0;  // what a plan for the mean sees
    const std::vector<double> at_first = pars(slots, &of_mean);
    const double before = mean(at_first), possible = before - std::max(of_mean, target);
    if (possible < kWorthwhile || !recurs(drifts ? kRecursInDrift : kRecurs)) return false;
    const int half = windows_ / 2;
    const auto mean_of_rest = [&](const std::vector<double>& pars) {
        return std::accumulate(pars.begin() + half, pars.end(), 0.0) / (windows_ - half);
    };
    // What the first half suggests is given up as soon as the other half is worse off.
    const double unseen = mean_of_rest(at_first);
    const auto worse = [&](const std::vector<int32_t>& now) { return mean_of_rest(pars(now)) > unseen; };
    const std::vector<int32_t> trial = descend(slots, half, target, worse);
    if (unseen - mean_of_rest(pars(trial)) < kConfirmed * possible) return false;
    std::vector<int32_t> found = descend(slots, windows_, target, nullptr);
    if (mean(pars(found)) >= before || percentile95(pars(found)) > percentile95(pars(start_))) return false;
    slots = std::move(found);
    return true;
}

// The cost of a rank in the search, over the windows that count; `load_in` says its load in one.
template <typename LoadIn>
float Steadying::potential(const LoadIn& load_in) const {
    const float room = limit_ - 1.0F;
    float sum[kLanes] = {};
    for (int k = 0; k < lanes_; k += kLanes)
        for (int i = 0; i < kLanes; ++i) sum[i] += cost_of(load_in(k + i) - 1.0F, room);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

void Steadying::add(int rank, int expert, float sign) {
    const float scale = sign / static_cast<float>(count_[expert]);
    for (int k = 0; k < lanes_; ++k) load(rank)[k] += scale * counted(expert)[k];
}

void Steadying::recount(int expert, int copies) {
    const int32_t *first = holders(expert), *last = first + held_by_[expert];
    for (const int32_t* p = first; p < last; ++p) add(*p / shape_.per_rank(), expert, -1.0F);
    count_[expert] = copies;
    for (const int32_t* p = first; p < last; ++p) add(*p / shape_.per_rank(), expert, 1.0F);
}

void Steadying::place(int slot, int expert) {
    const int old = slots_[slot], r = slot / shape_.per_rank();
    add(r, old, -1.0F);
    if (old < shape_.experts) {
        int32_t* last = holders(old) + held_by_[old]--;
        int32_t* left = std::find(holders(old), last, slot);
        std::copy(left + 1, last, left);
        recount(old, count_[old] - 1);
    }
    if (expert < shape_.experts) {
        recount(expert, count_[expert] + 1);
        holders(expert)[held_by_[expert]++] = slot;
    }
    --held_[at(r, old)];
    ++held_[at(r, expert)];
    slots_[slot] = expert;
    add(r, expert, 1.0F);
}

std::vector<int32_t> Steadying::descend(std::vector<int32_t> slots, int windows, double target,
                                        const std::function<bool(const std::vector<int32_t>&)>& ends) {
    counts_ = windows;
    lanes_ = whole_vectors(windows);
    counted_.assign(static_cast<size_t>(shape_.experts + 1) * lanes_, 0.0F);
    for (int e = 0; e < shape_.experts; ++e)
        std::copy(part(e), part(e) + windows, &counted_[static_cast<size_t>(e) * lanes_]);
    limit_ = static_cast<float>(target);
    slots_ = std::move(slots);
    count_.assign(shape_.experts + 1, 0);
    for (const int e : slots_) ++count_[e];
    count_[shape_.experts] = 1;  // "empty" has no load; any divisor but zero will do
    load_.assign(static_cast<size_t>(shape_.ranks) * lanes_, 1.0F);
    for (int r = 0; r < shape_.ranks; ++r) std::fill(load(r), load(r) + windows, 0.0F);
    held_.assign(static_cast<size_t>(shape_.ranks) * (shape_.experts + 1), 0);
    home_ = held_;
    for (int p = 0; p < shape_.slots; ++p) home_[at(p / shape_.per_rank(), start_[p])] = 1;
    // Room for copies twice on a rank, one on every other rank, and one more during a swap.
    most_copies_ = static_cast<size_t>(shape_.ranks + *std::max_element(count_.begin(), count_.end()) + 1);
    holders_.resize(most_copies_ * shape_.experts);
    held_by_.assign(shape_.experts, 0);
    for (int p = 0; p < shape_.slots; ++p) {
        ++held_[at(p / shape_.per_rank(), slots_[p])];
        if (slots_[p] < shape_.experts) holders(slots_[p])[held_by_[slots_[p]]++] = p;
    }
    for (int p = 0; p < shape_.slots; ++p) add(p / shape_.per_rank(), slots_[p], 1.0F);
    potential_.resize(shape_.ranks);
    std::vector<std::pair<float, int>> order(shape_.ranks);
    for (int steps = 0; steps < shape_.slots; ++steps) {
        for (int r = 0; r < shape_.ranks; ++r) order[r] = {-*std::max_element(load(r), load(r) + counts_), r};
        const int tried = std::min(kRanksTried, shape_.ranks);
        std::partial_sort(order.begin(), order.begin() + tried, order.end());
        if (-order[0].first <= limit_) break;
        bool moved = false;
        for (int i = 0; i < tried && !moved; ++i) moved = step(order[i].second);
        if (!moved || (ends && steps % kStepsBetweenLooks == kStepsBetweenLooks - 1 && ends(slots_))) break;
    }
    return slots_;
}

bool Steadying::step(int rank) {
    Candidate best;
    for (int r = 0; r < shape_.ranks; ++r) potential_[r] = potential([&, now = load(r)](int k) { return now[k]; });
    offer_copies(rank, best);
    offer_swaps(rank, best);
    if (best.slot < 0) return false;
    const int given = slots_[best.slot];
    place(best.slot, best.expert);
    if (best.other >= 0) place(best.other, given);
    return true;
}

// Offers swaps: an expert of the rank for an expert of another rank.
void Steadying::offer_swaps(int r, Candidate& best) const {
    const int S = shape_.per_rank(), E = shape_.experts;
    const float before = potential_[r], room = limit_ - 1.0F;
    std::vector<float> given(static_cast<size_t>(S) * lanes_);  // loads of the rank's replicas
    std::vector<int32_t> cost(S);                               // receipts by giving them
    for (int s = 0; s < S; ++s)
        for (int k = 0; k < lanes_; ++k)
            given[s * lanes_ + k] =
                counted(slots_[r * S + s])[k] / static_cast<float>(std::max(count_[slots_[r * S + s]], 1));
    std::vector<float> taken(lanes_);
    for (int q = 0; q < shape_.ranks; ++q) {
        if (q == r || !may_meet(q, r)) continue;
        const float both = before + potential_[q];
        const float *load_r = load(r), *load_q = load(q);
        // No swap gains more than one after which both ranks have the same load in every window.
        const float most = both - 2.0F * potential([&](int k) { return 0.5F * (load_r[k] + load_q[k]); });
        if (most * kFree <= best.score) continue;
        for (int s = 0; s < S; ++s) {
            const int e = slots_[r * S + s];
            cost[s] = e == E || holds(q, e) ? kNever : !is_home(q, e) - !is_home(r, e);
        }
        const int least = *std::min_element(cost.begin(), cost.end());
        for (int p = q * S; p < (q + 1) * S; ++p) {
            const int f = slots_[p];
            if (f == E || holds(r, f)) continue;
            const int from = !is_home(r, f) - !is_home(q, f);
            if (most * price_of(from + least) <= best.score) continue;
            for (int k = 0; k < lanes_; ++k) taken[k] = counted(f)[k] / static_cast<float>(count_[f]);
            for (int s = 0; s < S; ++s) {
                if (cost[s] == kNever) continue;
                const float price = price_of(from + cost[s]);
                if (most * price <= best.score) continue;
                const float* give = &given[static_cast<size_t>(s) * lanes_];
                float sum[kLanes] = {};
                for (int k = 0; k < lanes_; k += kLanes) {
                    for (int i = 0; i < kLanes; ++i) {
                        const float change = give[k + i] - taken[k + i];
                        sum[i] +=
                            cost_of(load_r[k + i] - change - 1.0F, room) + cost_of(load_q[k + i] + change - 1.0F, room);
                    }
                }
                const float gain = both - ((sum[0] + sum[1]) + (sum[2] + sum[3]));
                if (gain * price > best.score) best = {gain * price, p, r * S + s, slots_[r * S + s]};
            }
        }
    }
}

// Offers copies of the rank's experts on other ranks, in place of experts with other copies. The effects of the added
// and of the dropped copy are added up, which is wrong for a rank that holds both experts.
void Steadying::offer_copies(int r, Candidate& best) const {
    const int S = shape_.per_rank(), E = shape_.experts;
    // The gain of an expert's holders, except one slot, if the expert has another number of copies.
    const auto gain_of = [&](int expert, int copies, int besides) {
        const float change = 1.0F / static_cast<float>(copies) - 1.0F / static_cast<float>(count_[expert]);
        const float* of_expert = counted(expert);
        float gain = 0.0F;
        for (int i = 0; i < held_by_[expert]; ++i) {
            if (holders(expert)[i] == besides) continue;
            const int q = holders(expert)[i] / S;
            gain += potential_[q] - potential([&, now = load(q)](int k) { return now[k] + change * of_expert[k]; });
        }
        return gain;
    };
    struct Spare {
        int slot, rank;
        float gain;  // of the other holders, if the slot drops its expert
    };
    std::vector<Spare> spares;
    for (int q = 0; q < shape_.ranks; ++q) {
        if (q == r || !may_meet(q, r)) continue;
        for (int p = q * S; p < (q + 1) * S; ++p) {
            const int f = slots_[p];
            if (f == E || count_[f] > 1) spares.push_back({p, q, f == E ? 0.0F : gain_of(f, count_[f] - 1, p)});
        }
    }
    for (int s = r * S; s < (r + 1) * S && !spares.empty(); ++s) {
        const int e = slots_[s];
        if (e == E) continue;
        const float added = gain_of(e, count_[e] + 1, -1);
        const float up = 1.0F / static_cast<float>(count_[e] + 1);
        const float* of_added = counted(e);
        for (const Spare& spare : spares) {
            const int f = slots_[spare.slot], q = spare.rank;
            const float most = added + spare.gain + potential_[q];
            if (most * kFree <= best.score || holds(q, e)) continue;
            const float price = price_of(!is_home(q, e) - (f < E && !is_home(q, f)));
            if (most * price <= best.score) continue;
            const float down = 1.0F / static_cast<float>(count_[f]);
            const float* of_dropped = counted(f);
            const float gain = most - potential([&, now = load(q)](int k) {
                                   return now[k] + up * of_added[k] - down * of_dropped[k];
                               });
            if (gain * price > best.score) best = {gain * price, spare.slot, -1, e};
        }
    }
}

}  // namespace eplb
