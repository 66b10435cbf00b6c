// SPDX-License-Identifier: Apache-2.0
#include "incremental.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace eplb {

namespace {

constexpr int kUnit = 1 << 20;  // integer load of a rank that has exactly the mean

class Search {
  public:
    Search(const double* load, const int32_t* slots, int num_experts, int num_slots, int num_ranks, const Goal& goal)
        : E(num_experts), P(num_slots), R(num_ranks), S(num_slots / num_ranks), goal_(goal) {
        expert.assign(slots, slots + P);
        for (int& e : expert)
            if (e < 0) e = E;
        start = expert;
        weight.assign(E + 1, 0);
        count.assign(E + 1, 0);
        has.assign(static_cast<size_t>(R) * (E + 1), 0);
        holders.resize(E + 1);
        for (int p = 0; p < P; ++p) {
            ++count[expert[p]];
            ++has[at(p / S, expert[p])];
            if (expert[p] < E) holders[expert[p]].push_back(p / S);
        }
        home = has;
        double total = 0;
        for (int e = 0; e < E; ++e) total += load[e];
        if (total > 0)
            for (int e = 0; e < E; ++e)
                weight[e] = static_cast<int32_t>(std::llrint(load[e] / total * static_cast<double>(R) * kUnit));
        share.assign(E + 1, 0);
        for (int e = 0; e < E; ++e) share[e] = weight[e] / count[e];
        rank_load.assign(R, 0);
        for (int p = 0; p < P; ++p) rank_load[p / S] += share[expert[p]];
        limit = static_cast<int32_t>(std::llrint(goal.target * kUnit));
        received.assign(R, 0);
        tie_break_weight_ = 0.1;
        empty_ = total <= 0;
    }

    void descend() {
        if (empty_) return;
        const int most_steps = 8 * P + 64;
        for (int step = 0; step < most_steps; ++step) {
            const int r = static_cast<int>(std::max_element(rank_load.begin(), rank_load.end()) - rank_load.begin());
            if (rank_load[r] <= limit || !improve(r)) break;
        }
    }

    int E, P, R, S;
    std::vector<int32_t> expert, start, weight, count, share, rank_load, received;
    std::vector<uint8_t> has, home;
    std::vector<std::vector<int32_t>> holders;
    int32_t limit;

  private:
    size_t at(int rank, int e) const { return static_cast<size_t>(rank) * (E + 1) + e; }

    double potential(int64_t load) const {
        const double over = load > limit ? static_cast<double>(load - limit) / kUnit : 0.0;
        const double off = static_cast<double>(load - kUnit) / kUnit;
        return over + tie_break_weight_ * off * off;
    }

    // Potential gained by all holders of e but `besides` when e has `copies` copies instead of the present number.
    double effect(int e, int copies, int besides) const {
        if (e == E) return 0.0;
        const int32_t change = weight[e] / copies - share[e];
        double gain = 0.0;
        for (const int h : holders[e])
            if (h != besides) gain += potential(rank_load[h]) - potential(rank_load[h] + change);
        return gain;
    }

    int cost(int rank, int drop, int add) const { return !home[at(rank, add)] - !(home[at(rank, drop)] || drop == E); }

    bool full(int rank, int c) const { return goal_.max_per_rank > 0 && received[rank] + c > goal_.max_per_rank; }

    struct Candidate {
        double score = 0.0;
        int p = -1, q = -1, e = -1;  // slot p takes e; for swaps q >= 0 takes expert[p]
    };

    void offer(Candidate& best, double gain, int c, int p, int q, int e) const {
        if (gain <= 1e-9) return;
        const double score = gain / std::max(0.15, static_cast<double>(c));
        if (score > best.score) best = {score, p, q, e};
    }

    bool improve(int r) {
        Candidate best;
        std::vector<double> add(E), drop(E + 1, 0.0);
        for (int e = 0; e < E; ++e) {
            add[e] = effect(e, count[e] + 1, -1);
            if (count[e] > 1) drop[e] = effect(e, count[e] - 1, -1);
        }
        const auto receipt = [&](int p, int f) {
            const int rank = p / S, e = expert[p];
            if (has[at(rank, f)] || (e < E && count[e] < 2)) return;
            const int c = cost(rank, e, f);
            if (full(rank, c)) return;
            const double own = e == E ? 0.0
                                      : potential(rank_load[rank]) -
                                            potential(rank_load[rank] + weight[e] / (count[e] - 1) - share[e]);
            const double gain = add[f] + drop[e] - own + potential(rank_load[rank]) -
                                potential(rank_load[rank] - share[e] + weight[f] / (count[f] + 1));
            offer(best, gain, c, p, -1, f);
        };
        for (int p = r * S; p < (r + 1) * S; ++p)
            for (int f = 0; f < E; ++f) receipt(p, f);
        for (int p = 0; p < P; ++p) {
            if (p / S == r) continue;
            for (int o = r * S; o < (r + 1) * S; ++o)
                if (expert[o] < E) receipt(p, expert[o]);
        }
        for (int p = r * S; p < (r + 1) * S; ++p) {
            const int e = expert[p];
            for (int q = 0; q < P; ++q) {
                const int s = q / S, f = expert[q];
                if (s == r || share[f] >= share[e] || e == E || has[at(s, e)] || (f < E && has[at(r, f)])) continue;
                const int here = f == E ? 0 : cost(r, e, f), there = cost(s, f, e);
                if (full(r, here) || full(s, there)) continue;
                const int32_t change = share[e] - share[f];
                const double gain = potential(rank_load[r]) - potential(rank_load[r] - change) +
                                    potential(rank_load[s]) - potential(rank_load[s] + change);
                offer(best, gain, here + there, q, p, e);
            }
        }
        if (best.p < 0) return false;
        const int old = expert[best.p];
        place(best.p, best.e);
        if (best.q >= 0) place(best.q, old);
        return true;
    }

    void place(int p, int f) {
        const int rank = p / S, e = expert[p];
        if (f < E) received[rank] += !home[at(rank, f)];
        if (e < E) received[rank] -= !home[at(rank, e)];
        expert[p] = f;
        if (e < E) {
            --has[at(rank, e)];
            holders[e].erase(std::find(holders[e].begin(), holders[e].end(), rank));
            rank_load[rank] -= share[e];
            recount(e, count[e] - 1);
        }
        if (f < E) {
            ++has[at(rank, f)];
            recount(f, count[f] + 1);
            holders[f].push_back(rank);
            rank_load[rank] += share[f];
        }
    }

    void recount(int e, int copies) {
        count[e] = copies;
        const int32_t now = copies ? weight[e] / copies : 0;
        for (const int h : holders[e]) rank_load[h] += now - share[e];
        share[e] = now;
    }

    Goal goal_;
    double tie_break_weight_;
    bool empty_;
};

}  // namespace

LayerPlan plan_layer(const double* load, const int32_t* slots, int num_experts, int num_slots, int num_ranks,
                     const Goal& goal) {
    Search search(load, slots, num_experts, num_slots, num_ranks, goal);
    search.descend();
    LayerPlan plan;
    const int E = num_experts, S = search.S;
    // Experts that stay on a rank keep their slots; the received ones take the slots of the dropped ones.
    plan.slots.assign(slots, slots + num_slots);
    std::vector<int32_t> received, dropped;
    struct Change {
        int slot, out, in;
    };
    std::vector<Change> changes;
    for (int first = 0; first < num_slots; first += S) {
        std::vector<int32_t> left(search.expert.begin() + first, search.expert.begin() + first + S);
        dropped.clear();
        for (int p = first; p < first + S; ++p) {
            const auto found = std::find(left.begin(), left.end(), search.start[p]);
            if (found != left.end())
                left.erase(found);
            else
                dropped.push_back(p);
        }
        size_t i = 0;
        for (const int e : left)
            if (e < E) changes.push_back({dropped[i], search.start[dropped[i]], e}), ++i;
    }
    // Order: whatever leaves a copy of the dropped expert may go at once; the rest waits for, or goes together with,
    // the change that brings a copy elsewhere.
    std::vector<int32_t> copies(E + 1, 0);
    for (int p = 0; p < num_slots; ++p) ++copies[search.start[p]];
    std::vector<char> done(changes.size(), 0);
    int group = 0;
    size_t left = changes.size();
    const auto apply = [&](size_t i) {
        done[i] = 1;
        --left;
        --copies[changes[i].out];
        ++copies[changes[i].in];
        plan.slots[changes[i].slot] = changes[i].in;
        plan.moves.push_back({changes[i].slot, changes[i].in, group});
    };
    while (left > 0) {
        bool progress = false;
        for (size_t i = 0; i < changes.size(); ++i) {
            if (done[i] || (changes[i].out < E && copies[changes[i].out] < 2)) continue;
            apply(i);
            ++group;
            progress = true;
        }
        if (progress) continue;
        // Follow the last copy of each dropped expert to where it is received until the chain closes.
        size_t i = 0;
        while (done[i]) ++i;
        std::vector<size_t> chain;
        std::vector<char> seen(changes.size(), 0);
        while (!seen[i]) {
            seen[i] = 1;
            chain.push_back(i);
            for (size_t j = 0; j < changes.size(); ++j)
                if (!done[j] && changes[j].in == changes[i].out) {
                    i = j;
                    break;
                }
        }
        chain.erase(chain.begin(), std::find(chain.begin(), chain.end(), i));
        for (const size_t j : chain) apply(j);
        ++group;
    }
    return plan;
}

}  // namespace eplb
