// SPDX-License-Identifier: Apache-2.0
#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace eplb {

namespace {

constexpr int kUnit = 1 << 20;
constexpr float kPerUnit = 1.0F / kUnit;
constexpr int kMostUnits = 1 << 11;  // that an int32 holds

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

}  // namespace

Search::Search(Shape shape) : shape_(shape) {
    const size_t P = shape.slots, E = shape.experts + 1, R = shape.ranks;
    expert_.resize(P);
    weight_.resize(E);
    count_.resize(E);
    least_.resize(E);
    share_.resize(E);
    rank_load_.resize(R);
    tally_.assign(R, 0);
    rank_of_.resize(P);
    for (size_t p = 0; p < P; ++p) rank_of_[p] = static_cast<uint16_t>(p / shape.per_rank());
    home_.resize(R * E);
    home_slots_first_.resize(E + 1);
    is_dirty_.resize(R);
    seen_.resize(E);
    for (auto* v : {&slot_share_, &slot_load_, &slot_phi_, &slot_excess_, &home_price_, &away_price_, &price_})
        v->resize(P);
    for (auto* v : {&spare_base_, &spare_load_, &spare_price_}) v->resize(P);
    for (auto* v :
         {&up_, &up_change_, &down_change_, &add_gain_, &drop_gain_, &add_bonus_, &drop_bonus_, &expert_price_})
        v->resize(E);
    spare_.resize((P + 63) / 64);
    away_.resize(P);
    spare_slot_.resize(P);
    spare_first_.resize(R + 1);
    returned_price_.resize(shape.per_rank());
    score_.resize(std::max(P * shape.per_rank(), E));
}

bool Search::begin(const double* load, const int32_t* slots, const double* variance) {
    const int P = shape_.slots, E = shape_.experts, R = shape_.ranks;
    double total = 0.0;
    for (int e = 0; e < E; ++e) total += load[e];
    for (int p = 0; p < P; ++p) expert_[p] = slots[p] < 0 ? E : slots[p];
    start_ = expert_;
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(least_.begin(), least_.end(), 1);
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
    if (!near_.empty()) {
        std::fill(near_.begin(), near_.end(), 0);
        for (int p = 0; p < P; ++p) near_[static_cast<size_t>(node_of(rank_of_[p])) * (E + 1) + expert_[p]] = 1;
    }
    home_rank_.resize(P);
    int first = 0;
    for (int e = 0; e < E; ++e) {
        home_slots_first_[e] = first;
        for (int i = 0; i < count_[e]; ++i) home_rank_[first++] = rank_of_[holders_of(e)[i]];
    }
    home_slots_first_[E] = first;
    cost_ = 0;
    most_cost_ = std::numeric_limits<int>::max();
    trail_.clear();
    if (!(total > 0.0)) return false;
    const double scale = static_cast<double>(R) * kUnit / total;
    variance_.clear();
    if (variance != nullptr) {
        for (int e = 0; e < E; ++e) variance_.push_back(static_cast<float>(variance[e] * (R / total) * (R / total)));
        variance_.push_back(0.0F);
    }
    for (int e = 0; e < E; ++e) {
        weight_[e] = static_cast<int32_t>(std::llrint(load[e] * scale));
        count_shares(e);
    }
    std::fill(rank_load_.begin(), rank_load_.end(), 0);
    std::copy(background_.begin(), background_.end(), rank_load_.begin());
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

void Search::set_nodes(int nodes, float far) {
    nodes_ = nodes;
    far_ = far;
    near_.resize(nodes > 1 && far < 1.0F ? static_cast<size_t>(nodes) * (shape_.experts + 1) : 0);
}

double Search::unit() { return kUnit; }

void Search::set_speed(const double* speed) {
    speed_.clear();
    if (speed != nullptr) speed_.assign(speed, speed + shape_.ranks);
    background_.assign(speed_.size(), 0);
}

// With speeds, load / speed <= limit is load + limit * (1 - speed) <= limit: a slow rank has something to do already,
// its background, and a fast one less than nothing. That is exact at the limit, and shapes the potential elsewhere.
void Search::aim(double limit, double square, double scored_limit) {
    const double most = kMostUnits / 2.0;  // of a load with its background, so that sums fit
    limit = std::min(limit, most);
    limit_ = static_cast<int32_t>(std::llrint(limit * kUnit));
    potential_.limit = static_cast<float>(std::min(scored_limit, most));
    potential_.square = static_cast<float>(square);
    for (int r = 0; r < shape_.ranks; ++r) {
        int32_t change = 0;
        if (!speed_.empty()) {
            // No rank has more than R to do, so that one with less than -R to begin with is never above the limit.
            const double background = std::max(limit * (1.0 - speed_[r]), -1.0 - shape_.ranks);
            change = static_cast<int32_t>(std::llrint(background * kUnit)) - background_[r];
            background_[r] += change;
        }
        shift(r, change);  // all potentials change
    }
}

// A rank's load without its background, over its speed, in units of the mean.
double Search::relative(int rank, int32_t load) const {
    if (speed_.empty()) return static_cast<double>(load) / kUnit;
    return static_cast<double>(load - background_[rank]) / kUnit / speed_[rank];
}

double Search::peak() const {
    if (speed_.empty()) return static_cast<double>(*std::max_element(rank_load_.begin(), rank_load_.end())) / kUnit;
    double peak = 0.0;
    for (int r = 0; r < shape_.ranks; ++r) peak = std::max(peak, relative(r, rank_load_[r]));
    return peak;
}

bool Search::reached() const { return *std::max_element(rank_load_.begin(), rank_load_.end()) <= limit_; }

bool Search::descend() {
    const int most_steps = 4 * shape_.slots + 64;  // far more than any descent takes; moves that go in circles end here
    for (int step = 0; step < most_steps; ++step) {
        const int r = static_cast<int>(std::max_element(rank_load_.begin(), rank_load_.end()) - rank_load_.begin());
        if (rank_load_[r] <= limit_) return true;
        if (cost_ > most_cost_ || !improve(r)) return false;
    }
    return false;
}

// Brings what the kernels read up to date: potentials of the ranks that have changed, and the effects of one copy more
// or less of each expert that such a rank holds.
void Search::refresh() {
    const int E = shape_.experts, S = shape_.per_rank();
    const Potential potential = potential_;
    const int32_t *expert = expert_.data(), *count = count_.data();
    float *slot_load = slot_load_.data(), *slot_phi = slot_phi_.data();
    for (const int r : dirty_ranks_) {
        is_dirty_[r] = 0;
        const float load = units(rank_load_[r]), phi = potential(load), excess = load - potential.limit;
        for (int p = r * S; p < (r + 1) * S; ++p) {
            slot_load[p] = load;
            slot_phi[p] = phi;
            slot_excess_[p] = excess;
        }
    }
    const uint32_t round = ++round_;
    uint32_t* seen = seen_.data();
    for (const int r : dirty_ranks_) {
        const float load = slot_load[r * S], phi = slot_phi[r * S];
        for (int p = r * S; p < (r + 1) * S; ++p) {
            const int e = expert[p];
            const float up = up_change_[e];
            if (count[e] == 1) {
                add_gain_[e] = phi - potential(load + up) + add_bonus_[e];
                continue;
            }
            if (seen[e] == round || e == E) continue;
            seen[e] = round;
            const float down = down_change_[e];
            const uint16_t* holders = holders_of(e);
            float add = add_bonus_[e], drop = -drop_bonus_[e];
            for (int i = 0; i < count[e]; ++i) {
                const float its_load = slot_load[holders[i]], its_phi = slot_phi[holders[i]];
                add += its_phi - potential(its_load + up);
                drop += its_phi - potential(its_load + down);
            }
            add_gain_[e] = add;
            drop_gain_[e] = drop;
        }
    }
    dirty_ranks_.clear();

    int n = 0, next_rank = 0;
    const int words = static_cast<int>(spare_.size());
    for (int word = 0; word < words; ++word) {
        for (uint64_t bits = spare_[word]; bits; bits &= bits - 1) {
            const int p = word * 64 + lowest_bit(bits);
            const int e = expert[p], r = rank_of_[p];
            while (next_rank <= r) spare_first_[next_rank++] = n;
            // The slot's own rank is among drop_gain_'s holders; what it gains is added by the kernels. An empty slot
            // has nothing to lose: its drop_gain_ and down_change_ are zero.
            spare_slot_[n] = p;
            spare_base_[n] = drop_gain_[e] + potential(slot_load[p] + down_change_[e]);
            spare_load_[n] = slot_load[p] - slot_share_[p];
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
                if (!near_.empty())
                    for (int e = 0; e < E; ++e)
                        if (!is_near(node_of(r), e)) expert_price_[e] *= far_;
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
        for (int node = 0; node < nodes_ && !near_.empty(); ++node) {
            if (is_near(node, e)) continue;
            const int first = node * (R / nodes_), last = first + R / nodes_;
            for (int j = spare_first_[first]; j < spare_first_[last]; ++j) score_[j] *= far_;
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
    const float far_swap = 2.0F * far_ / (1.0F + far_);  // one of the two receipts is far
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
                if (!near_.empty())
                    for (int p = 0; p < P; ++p)
                        if (!is_near(node_of(r), expert_[p])) price_[p] *= far_swap;
            }
            float* row = score_.data() + rows_.size() * P;
            rows_.push_back(s);
            const auto score = [&](int first, int n, const float* price) {
                score_swaps(n, potential_, slot_share_[s], excess_r, &slot_share_[first], &slot_excess_[first], price,
                            row + first);
            };
            score(0, P, price_.data());
            // Ranks that had e at the start take it back for less; ranks that hold it cannot take it.
            for (int i = home_slots_first_[e]; i < home_slots_first_[e + 1]; ++i) {
                const int first = home_rank_[i] * S;
                for (int k = 0; k < S; ++k) {
                    const int p = first + k;
                    returned_price_[k] = price_[p] > 0.0F ? price_of(!is_home(r, expert_[p]) - pass - away_[p]) : 0.0F;
                }
                score(first, S, returned_price_.data());
            }
            for (int node = 0; node < nodes_ && !near_.empty(); ++node) {
                if (is_near(node, e)) continue;
                for (int p = node * (P / nodes_); p < (node + 1) * (P / nodes_); ++p) row[p] *= far_swap;
            }
            const uint16_t* holders = holders_of(e);
            for (int i = 0; i < count_[e]; ++i) {
                const int first = rank_of_[holders[i]] * S;
                std::fill(row + first, row + first + S, 0.0F);
            }
        }
    }
    const int i = best_above(P * static_cast<int>(rows_.size()), score_.data(), &best.score);
    if (i >= 0) best.slot = i % P, best.other = rows_[i / P], best.expert = expert_[rows_[i / P]];
}

// Gives rank r the experts that it held at the start. Experts that lose their last copy thereby are noted in lost_.
void Search::restore(int r) {
    const int E = shape_.experts, S = shape_.per_rank();
    int next = r * S;
    for (int p = r * S; p < (r + 1) * S; ++p) {
        if (expert_[p] < E && !away_[p]) continue;
        const auto absent = [&](int e) {
            return std::find(expert_.begin() + r * S, expert_.begin() + (r + 1) * S, e) ==
                   expert_.begin() + (r + 1) * S;
        };
        while (next < (r + 1) * S && (start_[next] == E || !absent(start_[next]))) ++next;
        if (next == (r + 1) * S) return;  // nothing else to take back
        const int dropped = expert_[p];
        place(p, start_[next]);
        if (dropped < E && count_[dropped] < least_[dropped]) lost_.push_back(dropped);
    }
}

// Gives an expert one more copy, in the slot that can best spare its own. Returns false if there is none.
bool Search::replicate(int expert) {
    refresh();
    const int n = spare_first_[shape_.ranks];
    const float add = count_[expert] > 0 ? add_gain_[expert] : 0.0F;
    float best = -std::numeric_limits<float>::max();
    int slot = -1;
    for (int i = 0; i < n; ++i) {
        const int p = spare_slot_[i], r = rank_of_[p];
        const uint16_t* holders = holders_of(expert);
        const bool held = std::any_of(holders, holders + count_[expert], [&](int h) { return rank_of_[h] == r; });
        const bool near = is_near(node_of(r), expert);
        if (held || (!near && far_ == 0.0F)) continue;
        const float gain = spare_base_[i] + add - potential_(spare_load_[i] + up_[expert]);
        const float price = is_home(r, expert) ? 0.0F : near ? 0.05F : 0.05F / far_;
        if (gain - price > best) {
            best = gain - price;
            slot = p;
        }
    }
    if (slot < 0) return false;
    place(slot, expert);
    return true;
}

int Search::copies_needed(int expert, int32_t most) const {
    return std::max(1, std::min((weight_[expert] - 1) / most + 1, shape_.ranks));
}

double Search::smallest_largest_share() const {
    int32_t low = 1, high = *std::max_element(weight_.begin(), weight_.end());
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        int64_t wanted = 0;
        for (int e = 0; e < shape_.experts; ++e) wanted += copies_needed(e, middle);
        if (wanted <= shape_.slots)
            high = middle;
        else
            low = middle + 1;
    }
    return static_cast<double>(low) / kUnit;
}

bool Search::split_heavy(double share) {
    const int E = shape_.experts;
    const int32_t most = std::max(1, static_cast<int32_t>(std::llrint(share * kUnit)));
    int64_t wanted = 0;
    for (int e = 0; e < E; ++e) wanted += copies_needed(e, most);
    if (wanted > shape_.slots) return false;
    for (int e = 0; e < E; ++e) {
        least_[e] = copies_needed(e, most);
        if (least_[e] == 1) continue;
        for (int i = 0; i < count_[e]; ++i) set_spare(holders_of(e)[i], count_[e] > least_[e]);
    }
    for (int e = 0; e < E; ++e)
        while (count_[e] < least_[e] && replicate(e)) {
        }
    return true;
}

void Search::undo() {
    while (!trail_.empty()) {
        const auto [slot, expert] = trail_.back();
        trail_.pop_back();
        place(slot, expert);
        trail_.pop_back();
    }
}

// Adds up to `wanted` ranks that have received something to chosen_.
void Search::choose_ranks(Random& random, int wanted) {
    const int R = shape_.ranks, S = shape_.per_rank();
    for (int tries = 8 * wanted; tries > 0 && static_cast<int>(chosen_.size()) < wanted; --tries) {
        const int r = static_cast<int>(random.below(static_cast<uint32_t>(R)));
        if (std::find(chosen_.begin(), chosen_.end(), r) != chosen_.end()) continue;
        const auto first = away_.begin() + r * S;
        if (std::find(first, first + S, 1) != first + S) chosen_.push_back(r);
    }
}

bool Search::restore_chosen() {
    trail_.clear();
    lost_.clear();
    for (const int r : chosen_) restore(r);
    for (const int e : lost_)
        if (count_[e] < least_[e] && !replicate(e)) return false;
    return true;
}

bool Search::reconsider(Random& random, bool exact) {
    exact_ = exact;
    chosen_.clear();
    choose_ranks(random, 2 + static_cast<int>(random.below(3)));
    if (chosen_.empty()) return false;
    const int before = cost_;
    most_cost_ = before;
    const bool kept = restore_chosen() && descend() && cost_ <= before;
    most_cost_ = std::numeric_limits<int>::max();
    exact_ = false;
    if (!kept) undo();
    return kept;
}

bool Search::lower_peak(Random& random, bool exact) {
    const double before = peak();
    int busiest = 0;
    while (relative(busiest, rank_load_[busiest]) < before) ++busiest;
    chosen_.assign(1, busiest);
    choose_ranks(random, 2 + static_cast<int>(random.below(3)));
    const bool sound = restore_chosen();
    exact_ = exact;
    if (sound) descend();
    exact_ = false;
    const bool kept = sound && peak() < before;
    if (!kept) undo();
    return kept;
}

void Search::adopt(const std::vector<int32_t>& slots) {
    for (int p = 0; p < shape_.slots; ++p)
        if (expert_[p] != slots[p]) place(p, slots[p]);
    trail_.clear();
}

// Notes how the loads of an expert's holders, but `besides`, change when it has another number of copies.
void Search::tally(int expert, int copies, int besides) {
    if (expert == shape_.experts || copies == 0) return;
    const int32_t change = share_of(expert, copies) - share_[expert];
    const uint16_t* holders = holders_of(expert);
    for (int i = 0; i < count_[expert]; ++i) {
        if (holders[i] == besides) continue;
        const int r = rank_of_[holders[i]];
        if (tally_[r] == 0) tallied_.push_back(r);
        tally_[r] += change;
    }
}

// The outcome of the noted changes, which are forgotten.
Search::Outcome Search::settle() {
    float gain = 0.0F;
    double peak = 0.0;
    for (const int r : tallied_) {
        if (tally_[r] == 0) continue;
        const int32_t after = rank_load_[r] + tally_[r];
        gain += potential_(units(rank_load_[r])) - potential_(units(after));
        if (tally_[r] > 0) peak = std::max(peak, relative(r, after));
        tally_[r] = 0;
    }
    tallied_.clear();
    return {gain, peak};
}

Search::Outcome Search::try_receipt(int slot, int expert) {
    const int r = rank_of_[slot], old = expert_[slot];
    tally(old, count_[old] - 1, slot);
    tally(expert, count_[expert] + 1, -1);
    tallied_.push_back(r);
    tally_[r] += share_of(expert, count_[expert] + 1) - share_[old];
    return settle();
}

Search::Outcome Search::try_swap(int slot, int other) {
    const int32_t change = share_[expert_[slot]] - share_[expert_[other]];
    tallied_.assign({rank_of_[slot], rank_of_[other]});
    tally_[rank_of_[slot]] -= change;
    tally_[rank_of_[other]] += change;
    return settle();
}

int Search::receipt_cost(int slot, int expert) const { return !is_home(rank_of_[slot], expert) - away_[slot]; }

void Search::offer_outcome(const Outcome& outcome, float price, int slot, int other, int expert, Candidate& best) {
    if (outcome.gain * price <= best.score) return;
    best.score = outcome.gain * price;
    best.slot = slot;
    best.other = other;
    best.expert = expert;
}

// The moves of the three functions above, one by one.
void Search::offer_exactly(int r, Candidate& best) {
    const int P = shape_.slots, E = shape_.experts, S = shape_.per_rank();
    const auto holds = [&](int rank, int e) {
        const uint16_t* holders = holders_of(e);
        return std::any_of(holders, holders + count_[e], [&](int h) { return rank_of_[h] == rank; });
    };
    const auto far = [&](int slot, int e) { return is_near(node_of(rank_of_[slot]), e) ? 1.0F : far_; };
    const auto receive = [&](int p, int e) {
        if (e == E || holds(rank_of_[p], e)) return;
        offer_outcome(try_receipt(p, e), price_of(receipt_cost(p, e)) * far(p, e), p, -1, e, best);
    };
    for (int i = 0; i < spare_first_[shape_.ranks]; ++i) {
        const int p = spare_slot_[i];
        if (rank_of_[p] == r) {
            for (int e = 0; e < E; ++e) receive(p, e);
        } else {
            for (int s = r * S; s < (r + 1) * S; ++s) receive(p, expert_[s]);
        }
    }
    for (int s = r * S; s < (r + 1) * S; ++s) {
        const int e = expert_[s];
        for (int p = 0; p < P && e < E; ++p) {
            const int f = expert_[p];
            if (f == E || share_[f] >= share_[e] || rank_of_[p] == r || holds(rank_of_[p], e) || holds(r, f)) continue;
            const float price = price_of(receipt_cost(p, e) + receipt_cost(s, f)) * far(p, e) * far(s, f);
            offer_outcome(try_swap(p, s), price, p, s, e, best);
        }
    }
}

bool Search::improve(int r) {
    refresh();
    Candidate best;
    if (exact_) {
        offer_exactly(r, best);
    } else {
        offer_receipts(r, best);
        offer_placements(r, best);
        offer_swaps(r, best);
    }
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
    if (!variance_.empty()) {
        const float charge = potential_.square * variance_[expert];
        add_bonus_[expert] = copies ? charge / static_cast<float>(copies * (copies + 1)) : 0.0F;
        drop_bonus_[expert] = copies > 1 ? charge / static_cast<float>(copies * (copies - 1)) : 0.0F;
    }
}

void Search::place(int slot, int expert) {
    const int E = shape_.experts, r = rank_of_[slot], old = expert_[slot];
    trail_.push_back({slot, old});
    if (old < E) {
        uint16_t* holders = holders_of(old);
        const int left = count_[old] - 1;
        *std::find(holders, holders + left, slot) = holders[left];
        shift(r, -share_[old]);
        recount(old, left);
        cost_ -= away_[slot];
    }
    expert_[slot] = expert;
    if (expert == E) {
        slot_share_[slot] = 0.0F;
        set_away(slot, false);
        set_spare(slot, true);
        shift(r, 0);
        return;
    }
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
        set_spare(holders[i], copies > least_[expert]);
    }
}

}  // namespace eplb
