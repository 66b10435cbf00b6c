// SPDX-License-Identifier: Apache-2.0
#include "search.h"

#include <algorithm>
#include <cmath>

namespace eplb {

namespace {

constexpr int kUnit = 1 << 20;
constexpr float kPerUnit = 1.0F / kUnit;

float units(int32_t load) { return static_cast<float>(load) * kPerUnit; }

int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int n = 0;
    while (!(bits >> n & 1)) ++n;
    return n;
#endif
}

float price_of(int cost) { return cost >= 2 ? 0.5F : cost == 1 ? 1.0F : kFree; }

}  // namespace

Search::Search(Shape shape) : shape_(shape) {
    const size_t P = shape.slots, E = shape.experts + 1, R = shape.ranks;
    expert_.resize(P);
    weight_.resize(E);
    count_.resize(E);
    share_.resize(E);
    rank_load_.resize(R);
    rank_of_.resize(P);
    for (size_t p = 0; p < P; ++p) rank_of_[p] = static_cast<uint16_t>(p / shape.per_rank());
    home_.resize(R * E);
    home_slots_first_.resize(E + 1);
    is_dirty_.resize(R);
    seen_.resize(E);
    for (auto* v : {&slot_share_, &slot_load_, &slot_phi_, &slot_excess_, &home_price_, &away_price_, &price_})
        v->resize(P);
    for (auto* v : {&spare_base_, &spare_load_, &spare_price_}) v->resize(P);
    for (auto* v : {&up_, &up_change_, &down_change_, &add_gain_, &drop_gain_, &expert_price_}) v->resize(E);
    spare_.resize((P + 63) / 64);
    away_.resize(P);
    spare_slot_.resize(P);
    spare_first_.resize(R + 1);
    score_.resize(std::max(P * shape.per_rank(), E));
}

bool Search::begin(const double* load, const int32_t* slots) {
    const int P = shape_.slots, E = shape_.experts, R = shape_.ranks;
    double total = 0.0;
    for (int e = 0; e < E; ++e) total += load[e];
    for (int p = 0; p < P; ++p) expert_[p] = slots[p] < 0 ? E : slots[p];
    start_ = expert_;
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(home_.begin(), home_.end(), 0);
    for (int p = 0; p < P; ++p) {
        ++count_[expert_[p]];
        home_[at(rank_of_[p], expert_[p])] = 1;
    }
    // Copies found twice on a rank, one on every other rank, and one more in the middle of a swap.
    const int most = *std::max_element(count_.begin(), count_.end() - 1);
    stride_ = static_cast<size_t>(R + most + 1);
    place_.resize(stride_ * E);
    std::vector<int32_t> listed(E, 0);
    for (int p = 0; p < P; ++p)
        if (expert_[p] < E) holders_of(expert_[p])[listed[expert_[p]]++] = static_cast<uint16_t>(p);
    home_rank_.resize(P);
    int first = 0;
    for (int e = 0; e < E; ++e) {
        home_slots_first_[e] = first;
        for (int i = 0; i < count_[e]; ++i) home_rank_[first++] = rank_of_[holders_of(e)[i]];
    }
    home_slots_first_[E] = first;
    cost_ = 0;
    steps = 0;
    if (!(total > 0.0)) return false;
    const double scale = static_cast<double>(R) * kUnit / total;
    for (int e = 0; e < E; ++e) {
        weight_[e] = static_cast<int32_t>(std::llrint(load[e] * scale));
        count_shares(e);
    }
    std::fill(rank_load_.begin(), rank_load_.end(), 0);
    for (int p = 0; p < P; ++p) {
        const int e = expert_[p];
        slot_share_[p] = units(share_[e]);
        rank_load_[rank_of_[p]] += share_[e];
        set_away(p, false);
        set_spare(p, e == E || count_[e] > 1);
    }
    dirty_ranks_.clear();
    for (int r = 0; r < R; ++r) dirty_ranks_.push_back(r);
    std::fill(is_dirty_.begin(), is_dirty_.end(), 1);
    return true;
}

void Search::aim(double limit, double square) {
    limit_ = static_cast<int32_t>(std::llrint(limit * kUnit));
    potential_.limit = static_cast<float>(limit);
    potential_.square = static_cast<float>(square);
}

double Search::peak() const {
    return static_cast<double>(*std::max_element(rank_load_.begin(), rank_load_.end())) / kUnit;
}

bool Search::descend(int most_steps) {
    for (int step = 0; step < most_steps; ++step) {
        const int r = static_cast<int>(std::max_element(rank_load_.begin(), rank_load_.end()) - rank_load_.begin());
        if (rank_load_[r] <= limit_) return true;
        if (!improve(r)) return false;
        ++steps;
    }
    return false;
}

// Brings what the kernels read up to date: potentials of the ranks that have changed, and the effects of one copy more
// or less of each expert that such a rank holds.
void Search::refresh() {
    const int E = shape_.experts, S = shape_.per_rank();
    for (const int r : dirty_ranks_) {
        is_dirty_[r] = 0;
        const float load = units(rank_load_[r]), phi = potential_(load);
        for (int p = r * S; p < (r + 1) * S; ++p) {
            slot_load_[p] = load;
            slot_phi_[p] = phi;
            slot_excess_[p] = load - potential_.limit;
        }
    }
    ++round_;
    for (const int r : dirty_ranks_) {
        for (int p = r * S; p < (r + 1) * S; ++p) {
            const int e = expert_[p];
            if (seen_[e] == round_ || e == E) continue;
            seen_[e] = round_;
            const uint16_t* holders = holders_of(e);
            float add = 0.0F, drop = 0.0F;
            if (count_[e] == 1) {
                add = slot_phi_[p] - potential_(slot_load_[p] + up_change_[e]);
            } else {
                for (int i = 0; i < count_[e]; ++i) {
                    const float load = slot_load_[holders[i]], phi = slot_phi_[holders[i]];
                    add += phi - potential_(load + up_change_[e]);
                    drop += phi - potential_(load + down_change_[e]);
                }
            }
            add_gain_[e] = add;
            drop_gain_[e] = drop;
        }
    }
    dirty_ranks_.clear();

    int n = 0, next_rank = 0;
    for (size_t word = 0; word < spare_.size(); ++word) {
        for (uint64_t bits = spare_[word]; bits; bits &= bits - 1) {
            const int p = static_cast<int>(word * 64) + lowest_bit(bits);
            const int e = expert_[p], r = rank_of_[p];
            while (next_rank <= r) spare_first_[next_rank++] = n;
            // The slot's own rank is among drop_gain_'s holders; what it gains is added by the kernels.
            const float base = e == E ? slot_phi_[p] : drop_gain_[e] + potential_(slot_load_[p] + down_change_[e]);
            spare_slot_[n] = p;
            spare_base_[n] = base;
            spare_load_[n] = slot_load_[p] - slot_share_[p];
            spare_price_[n] = away_[p] ? kFree : 1.0F;
            ++n;
        }
    }
    while (next_rank <= shape_.ranks) spare_first_[next_rank++] = n;
}

// Rank r drops one of its replicated experts for any expert that it lacks.
void Search::offer_receipts(int r, Candidate& best) {
    const int E = shape_.experts, S = shape_.per_rank();
    if (spare_first_[r] == spare_first_[r + 1]) return;
    for (const bool away : {false, true}) {
        bool built = false;
        for (int i = spare_first_[r]; i < spare_first_[r + 1]; ++i) {
            const int p = spare_slot_[i];
            if ((away_[p] != 0) != away) continue;
            if (!built) {
                std::fill(expert_price_.begin(), expert_price_.end(), away ? kFree : 1.0F);
                for (int s = r * S; s < (r + 1) * S; ++s) expert_price_[start_[s]] = kFree;
                for (int s = r * S; s < (r + 1) * S; ++s) expert_price_[expert_[s]] = 0.0F;
                built = true;
            }
            score_receipts(E, potential_, spare_base_[i], spare_load_[i], up_.data(), add_gain_.data(),
                           expert_price_.data(), score_.data());
            const int e = best_above(E, score_.data(), &best.score);
            if (e >= 0) best.slot = p, best.other = -1, best.expert = e;
        }
    }
}

// Another rank drops one of its replicated experts for one of rank r's.
void Search::offer_placements(int r, Candidate& best) {
    const int E = shape_.experts, S = shape_.per_rank(), R = shape_.ranks;
    const int n = spare_first_[R];
    if (n == 0) return;
    for (int s = r * S; s < (r + 1) * S; ++s) {
        const int e = expert_[s];
        if (e == E || add_gain_[e] <= 0.0F) continue;
        score_placements(n, potential_, spare_base_.data(), spare_load_.data(), up_[e], add_gain_[e],
                         spare_price_.data(), score_.data());
        for (int i = home_slots_first_[e]; i < home_slots_first_[e + 1]; ++i) {
            const int q = home_rank_[i];
            for (int j = spare_first_[q]; j < spare_first_[q + 1]; ++j)
                if (spare_price_[j] == 1.0F) score_[j] *= kFree;
        }
        const uint16_t* holders = holders_of(e);
        for (int i = 0; i < count_[e]; ++i) {
            const int q = rank_of_[holders[i]];
            std::fill(score_.begin() + spare_first_[q], score_.begin() + spare_first_[q + 1], 0.0F);
        }
        const int j = best_above(n, score_.data(), &best.score);
        if (j >= 0) best.slot = spare_slot_[j], best.other = -1, best.expert = e;
    }
}

// Rank r and another rank exchange two experts.
void Search::offer_swaps(int r, Candidate& best) {
    const int P = shape_.slots, E = shape_.experts, S = shape_.per_rank();
    const float excess_r = slot_excess_[r * S];
    rows_.clear();
    for (int pass = 0; pass < 2; ++pass) {  // experts of r that were there at the start, then those that were not
        bool built = false;
        for (int s = r * S; s < (r + 1) * S; ++s) {
            const int e = expert_[s];
            if (e == E || away_[s] != pass) continue;
            // Receipts: e there (+1), minus e's own at r when it came from elsewhere, plus the other expert here, minus
            // its own there when it came from elsewhere.
            if (!built) {
                built = true;
                price_ = pass ? away_price_ : home_price_;
                for (int h = r * S; h < (r + 1) * S; ++h) {
                    const int f = start_[h];
                    if (f == E) continue;
                    const uint16_t* holders = holders_of(f);
                    for (int i = 0; i < count_[f]; ++i) price_[holders[i]] = price_of(1 - pass - away_[holders[i]]);
                }
                for (int h = r * S; h < (r + 1) * S; ++h) {
                    const int f = expert_[h];
                    if (f == E) continue;
                    const uint16_t* holders = holders_of(f);
                    for (int i = 0; i < count_[f]; ++i) price_[holders[i]] = 0.0F;
                }
                std::fill(price_.begin() + r * S, price_.begin() + (r + 1) * S, 0.0F);
            }
            // Ranks that had e at the start take it back for less; ranks that hold it cannot take it.
            saved_.clear();
            for (int i = home_slots_first_[e]; i < home_slots_first_[e + 1]; ++i) {
                const int q = home_rank_[i];
                if (q == r) continue;
                for (int p = q * S; p < (q + 1) * S; ++p) {
                    saved_.push_back({p, price_[p]});
                    if (price_[p] > 0.0F) price_[p] = price_of(!is_home(r, expert_[p]) - pass - away_[p]);
                }
            }
            const uint16_t* holders = holders_of(e);
            for (int i = 0; i < count_[e]; ++i) {
                const int q = rank_of_[holders[i]];
                if (q == r) continue;
                for (int p = q * S; p < (q + 1) * S; ++p) {
                    saved_.push_back({p, price_[p]});
                    price_[p] = 0.0F;
                }
            }
            score_swaps(P, potential_, slot_share_[s], excess_r, slot_share_.data(), slot_excess_.data(), price_.data(),
                        score_.data() + static_cast<size_t>(rows_.size()) * P);
            rows_.push_back(s);
            for (size_t i = saved_.size(); i-- > 0;) price_[saved_[i].first] = saved_[i].second;
        }
    }
    const int i = best_above(P * static_cast<int>(rows_.size()), score_.data(), &best.score);
    if (i >= 0) best.slot = i % P, best.other = rows_[i / P], best.expert = expert_[rows_[i / P]];
}

bool Search::improve(int r) {
    refresh();
    Candidate best;
    offer_receipts(r, best);
    offer_placements(r, best);
    offer_swaps(r, best);
    if (best.slot < 0) return false;
    const int given = expert_[best.slot];
    place(best.slot, best.expert);
    if (best.other >= 0) place(best.other, given);
    return true;
}

void Search::shift(int rank, int32_t change) {
    rank_load_[rank] += change;
    if (is_dirty_[rank]) return;
    is_dirty_[rank] = 1;
    dirty_ranks_.push_back(rank);
}

void Search::set_away(int slot, bool away) {
    away_[slot] = away;
    const bool empty = expert_[slot] == shape_.experts;
    home_price_[slot] = empty ? 0.0F : price_of(2 - away);
    away_price_[slot] = empty ? 0.0F : price_of(1 - away);
}

void Search::set_spare(int slot, bool spare) {
    const uint64_t bit = uint64_t{1} << (slot % 64);
    spare_[slot / 64] = spare ? spare_[slot / 64] | bit : spare_[slot / 64] & ~bit;
}

// Sets what follows from an expert's weight and number of copies.
void Search::count_shares(int expert) {
    const int copies = count_[expert];
    share_[expert] = copies ? share_of(expert, copies) : 0;
    const float share = units(share_[expert]);
    up_[expert] = units(share_of(expert, copies + 1));
    up_change_[expert] = up_[expert] - share;
    down_change_[expert] = copies > 1 ? units(share_of(expert, copies - 1)) - share : 0.0F;
}

void Search::place(int slot, int expert) {
    const int E = shape_.experts, r = rank_of_[slot], old = expert_[slot];
    if (old < E) {
        uint16_t* holders = holders_of(old);
        const int left = count_[old] - 1;
        *std::find(holders, holders + left, slot) = holders[left];
        shift(r, -share_[old]);
        recount(old, left);
        cost_ -= away_[slot];
    }
    expert_[slot] = expert;
    shift(r, share_[expert]);
    holders_of(expert)[count_[expert]] = static_cast<uint16_t>(slot);
    recount(expert, count_[expert] + 1);
    set_away(slot, !is_home(r, expert));
    cost_ += away_[slot];
}

// Sets the number of copies and spreads the load evenly over the holders, each of which has the old share.
void Search::recount(int expert, int copies) {
    const int32_t before = share_[expert];
    count_[expert] = copies;
    count_shares(expert);
    const uint16_t* holders = holders_of(expert);
    for (int i = 0; i < copies; ++i) {
        shift(rank_of_[holders[i]], share_[expert] - before);
        slot_share_[holders[i]] = units(share_[expert]);
        set_spare(holders[i], copies > 1);
    }
}

}  // namespace eplb
