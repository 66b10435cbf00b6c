// SPDX-License-Identifier: Apache-2.0
// The search on one layer: scoring of moves, the descent, and the rounds that improve its result.
//
// One file, because every move must keep the placement, the values derived from it and the scratch buffers consistent.
#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace eplb {

namespace {

constexpr int kUnit = 1 << 20;
constexpr float kPerUnit = 1.0F / kUnit;
constexpr int kMostUnits = 1 << 11;  // most units (2^20) that an int32 holds

// Cost of a receipt, in units of the potential, when a copy must be made anyway and only its place is chosen.
constexpr float kReceiptInPotential = 0.05F;

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

Search::Search(Shape shape, Conditions conditions) : shape_(shape), conditions_(conditions) {
    const size_t P = shape.slots, E = shape.experts + 1, R = shape.ranks;
    state_.expert.resize(P);
    state_.weight.resize(E);
    state_.count.resize(E);
    state_.least.resize(E);
    state_.share.resize(E);
    state_.rank_load.resize(R);
    scratch_.tally.assign(R, 0);
    scratch_.load.resize(R);
    scratch_.phi.resize(R);
    scratch_.holds.resize(R);
    state_.rank_of.resize(P);
    for (size_t p = 0; p < P; ++p) state_.rank_of[p] = static_cast<uint16_t>(p / shape.per_rank());
    state_.home.resize(R * E);
    state_.home_slots_first.resize(E + 1);
    if (!alike()) state_.background.assign(R, 0);
    if (conditions.nodes > 1 && conditions.far < 1.0F) state_.near.resize(static_cast<size_t>(conditions.nodes) * E);
    derived_.is_dirty.resize(R);
    derived_.seen.resize(E);
    for (auto* v : {&derived_.slot_share, &derived_.slot_load, &derived_.slot_phi, &derived_.slot_excess,
                    &derived_.slot_above, &derived_.home_price, &derived_.away_price, &scratch_.price})
        v->resize(P);
    for (auto* v : {&derived_.spare_base, &derived_.spare_load, &derived_.spare_price}) v->resize(P);
    for (auto* v : {&derived_.up, &derived_.up_change, &derived_.down_change, &derived_.add_gain, &derived_.drop_gain,
                    &derived_.add_bonus, &derived_.drop_bonus, &scratch_.expert_price})
        v->resize(E);
    derived_.spare.resize((P + 63) / 64);
    state_.away.resize(P);
    derived_.spare_slot.resize(P);
    derived_.spare_first.resize(R + 1);
    scratch_.returned_price.resize(shape.per_rank());
    scratch_.score.resize(std::max(P * shape.per_rank(), E));
}

bool Search::begin(const double* load, const int32_t* slots, const double* variance) {
    const int P = shape_.slots, E = shape_.experts, R = shape_.ranks;
    double total = 0.0;
    for (int e = 0; e < E; ++e) total += load[e];
    for (int p = 0; p < P; ++p) state_.expert[p] = slots[p] < 0 ? E : slots[p];
    state_.start = state_.expert;
    std::fill(state_.count.begin(), state_.count.end(), 0);
    std::fill(state_.least.begin(), state_.least.end(), 1);
    std::fill(state_.home.begin(), state_.home.end(), 0);
    for (int p = 0; p < P; ++p) {
        ++state_.count[state_.expert[p]];
        state_.home[at(state_.rank_of[p], state_.expert[p])] = 1;
    }
    // Room for copies twice on a rank, one on every other rank, and one more during a swap.
    const int most = *std::max_element(state_.count.begin(), state_.count.end() - 1);
    state_.stride = static_cast<size_t>(R + most + 1);
    state_.place.resize(state_.stride * E);
    std::vector<int32_t> listed(E, 0);
    for (int p = 0; p < P; ++p)
        if (state_.expert[p] < E) holders_of(state_.expert[p])[listed[state_.expert[p]]++] = static_cast<uint16_t>(p);
    if (!state_.near.empty()) {
        std::fill(state_.near.begin(), state_.near.end(), 0);
        for (int p = 0; p < P; ++p)
            state_.near[static_cast<size_t>(node_of(state_.rank_of[p])) * (E + 1) + state_.expert[p]] = 1;
    }
    state_.home_rank.resize(P);
    int first = 0;
    for (int e = 0; e < E; ++e) {
        state_.home_slots_first[e] = first;
        for (int i = 0; i < state_.count[e]; ++i) state_.home_rank[first++] = state_.rank_of[holders_of(e)[i]];
    }
    state_.home_slots_first[E] = first;
    state_.cost = 0;
    state_.trail.clear();
    if (!(total > 0.0)) return false;
    const double scale = static_cast<double>(R) * kUnit / total;
    state_.variance.clear();
    if (variance != nullptr) {
        for (int e = 0; e < E; ++e)
            state_.variance.push_back(static_cast<float>(variance[e] * (R / total) * (R / total)));
        state_.variance.push_back(0.0F);
    }
    for (int e = 0; e < E; ++e) {
        state_.weight[e] = static_cast<int32_t>(std::llrint(load[e] * scale));
        count_shares(e);
    }
    std::fill(state_.rank_load.begin(), state_.rank_load.end(), 0);
    std::copy(state_.background.begin(), state_.background.end(), state_.rank_load.begin());
    for (int p = 0; p < P; ++p) {
        const int e = state_.expert[p];
        derived_.slot_share[p] = units(state_.share[e]);
        state_.rank_load[state_.rank_of[p]] += state_.share[e];
        set_away(p, false);
        set_spare(p, e == E || state_.count[e] > 1);
    }
    derived_.dirty_ranks.clear();
    for (int r = 0; r < R; ++r) derived_.dirty_ranks.push_back(r);
    std::fill(derived_.is_dirty.begin(), derived_.is_dirty.end(), 1);
    return true;
}

double Search::unit() { return kUnit; }

// With speeds, load / speed <= limit equals load + limit * (1 - speed) <= limit. So a slow rank gets a background load,
// and a fast rank a negative one. This is exact at the limit, and an approximation of the potential elsewhere.
void Search::aim(const Aim& aim) {
    const double most = kMostUnits / 2.0;  // most load with background, so that sums fit
    const double limit = std::min(aim.limit, most);
    limit_ = static_cast<int32_t>(std::llrint(limit * kUnit));
    potential_.limit = static_cast<float>(std::min(aim.scored_limit, most));
    potential_.square = static_cast<float>(aim.square);
    potential_.step = static_cast<float>(aim.step);
    for (int r = 0; r < shape_.ranks; ++r) {
        int32_t change = 0;
        if (!alike()) {
            // No rank has a load above R, so a rank with a background below -R is never above the limit.
            const double background = std::max(limit * (1.0 - conditions_.speed[r]), -1.0 - shape_.ranks);
            change = static_cast<int32_t>(std::llrint(background * kUnit)) - state_.background[r];
            state_.background[r] += change;
        }
        shift(r, change);  // all potentials change
    }
}

// A rank's load without its background, over its speed, in units of the mean.
double Search::relative(int rank, int32_t load) const {
    if (alike()) return static_cast<double>(load) / kUnit;
    return static_cast<double>(load - state_.background[rank]) / kUnit / conditions_.speed[rank];
}

double Search::peak() const {
    if (alike())
        return static_cast<double>(*std::max_element(state_.rank_load.begin(), state_.rank_load.end())) / kUnit;
    double peak = 0.0;
    for (int r = 0; r < shape_.ranks; ++r) peak = std::max(peak, relative(r, state_.rank_load[r]));
    return peak;
}

bool Search::reached() const { return *std::max_element(state_.rank_load.begin(), state_.rank_load.end()) <= limit_; }

// What ranks above the limit cost in the potential, in units.
int64_t Search::cost_above() const {
    const int32_t step = static_cast<int32_t>(std::llrint(potential_.step * kUnit));
    int64_t sum = 0;
    for (const int32_t load : state_.rank_load)
        if (load > limit_) sum += load - limit_ + step;
    return sum;
}

void Search::drop_step() {
    potential_.step = 0.0F;
    for (int r = 0; r < shape_.ranks; ++r) shift(r, 0);  // all potentials change
}

bool Search::descend(int most_cost) {
    const int most_steps = 4 * shape_.slots + 64;  // far more than any descent takes; ends moves in a circle
    int64_t above = cost_above();
    for (int i = 0; i < most_steps; ++i) {
        const int r = static_cast<int>(std::max_element(state_.rank_load.begin(), state_.rank_load.end()) -
                                       state_.rank_load.begin());
        if (state_.rank_load[r] <= limit_) return true;
        if (state_.cost > most_cost) return false;
        const bool moved = improve(r);
        if (potential_.step > 0.0F) {
            const int64_t now = cost_above();
            if (now >= above) drop_step();  // scores are not exact: with the step, moves may go in a circle
            above = now;
        } else if (!moved) {
            return false;
        }
    }
    return false;
}

// Calls `visit` for each slot whose expert has other copies, or that is empty.
template <typename Visit>
void Search::for_each_spare(const Visit& visit) const {
    const int words = static_cast<int>(derived_.spare.size());
    for (int word = 0; word < words; ++word)
        for (uint64_t bits = derived_.spare[word]; bits; bits &= bits - 1) visit(word * 64 + lowest_bit(bits));
}

// Updates the input of the kernels: potentials of the ranks that have changed, and the effects of one copy more or less
// of each expert on such a rank.
void Search::refresh() {
    const int E = shape_.experts, S = shape_.per_rank();
    const Potential potential = potential_;
    const int32_t *expert = state_.expert.data(), *count = state_.count.data();
    float *slot_load = derived_.slot_load.data(), *slot_phi = derived_.slot_phi.data();
    for (const int r : derived_.dirty_ranks) {
        derived_.is_dirty[r] = 0;
        const float load = units(state_.rank_load[r]), phi = potential(load), excess = load - potential.limit;
        const float above = potential.above(excess);
        for (int p = r * S; p < (r + 1) * S; ++p) {
            slot_load[p] = load;
            slot_phi[p] = phi;
            derived_.slot_excess[p] = excess;
            derived_.slot_above[p] = above;
        }
    }
    const uint32_t round = ++derived_.round;
    uint32_t* seen = derived_.seen.data();
    for (const int r : derived_.dirty_ranks) {
        const float load = slot_load[r * S], phi = slot_phi[r * S];
        for (int p = r * S; p < (r + 1) * S; ++p) {
            const int e = expert[p];
            const float up = derived_.up_change[e];
            if (count[e] == 1) {
                derived_.add_gain[e] = phi - potential(load + up) + derived_.add_bonus[e];
                continue;
            }
            if (seen[e] == round || e == E) continue;
            seen[e] = round;
            const float down = derived_.down_change[e];
            const uint16_t* holders = holders_of(e);
            float add = derived_.add_bonus[e], drop = -derived_.drop_bonus[e];
            for (int i = 0; i < count[e]; ++i) {
                const float its_load = slot_load[holders[i]], its_phi = slot_phi[holders[i]];
                add += its_phi - potential(its_load + up);
                drop += its_phi - potential(its_load + down);
            }
            derived_.add_gain[e] = add;
            derived_.drop_gain[e] = drop;
        }
    }
    derived_.dirty_ranks.clear();

    int n = 0, next_rank = 0;
    for_each_spare([&](int p) {
        const int e = expert[p], r = state_.rank_of[p];
        while (next_rank <= r) derived_.spare_first[next_rank++] = n;
        // The slot's own rank is among the holders in derived_.drop_gain; the kernels add its gain. An empty slot
        // loses nothing: its derived_.drop_gain and derived_.down_change are zero.
        derived_.spare_slot[n] = p;
        derived_.spare_base[n] = derived_.drop_gain[e] + potential(slot_load[p] + derived_.down_change[e]);
        derived_.spare_load[n] = slot_load[p] - derived_.slot_share[p];
        derived_.spare_price[n] = state_.away[p] ? kFree : kOneReceipt;
        ++n;
    });
    while (next_rank <= shape_.ranks) derived_.spare_first[next_rank++] = n;
}

// Rank r drops one of its replicated experts for any expert that it lacks.
void Search::offer_receipts(int r, Candidate& best) {
    const int E = shape_.experts, S = shape_.per_rank();
    if (derived_.spare_first[r] == derived_.spare_first[r + 1]) return;
    for (const bool away : {false, true}) {
        bool built = false;
        for (int i = derived_.spare_first[r]; i < derived_.spare_first[r + 1]; ++i) {
            const int p = derived_.spare_slot[i];
            if ((state_.away[p] != 0) != away) continue;
            if (!built) {
                std::fill(scratch_.expert_price.begin(), scratch_.expert_price.end(), away ? kFree : kOneReceipt);
                if (!state_.near.empty())
                    for (int e = 0; e < E; ++e)
                        if (!is_near(node_of(r), e)) scratch_.expert_price[e] *= conditions_.far;
                for (int s = r * S; s < (r + 1) * S; ++s) scratch_.expert_price[state_.start[s]] = kFree;
                for (int s = r * S; s < (r + 1) * S; ++s) scratch_.expert_price[state_.expert[s]] = kImpossible;
                built = true;
            }
            score_receipts(E, potential_, derived_.spare_base[i], derived_.spare_load[i], derived_.up.data(),
                           derived_.add_gain.data(), scratch_.expert_price.data(), scratch_.score.data());
            const int e = best_above(E, scratch_.score.data(), &best.score);
            if (e >= 0) best.slot = p, best.other = -1, best.expert = e;
        }
    }
}

// Another rank drops one of its replicated experts for one of rank r's.
void Search::offer_placements(int r, Candidate& best) {
    const int E = shape_.experts, S = shape_.per_rank(), R = shape_.ranks;
    const int n = derived_.spare_first[R];
    if (n == 0) return;
    for (int s = r * S; s < (r + 1) * S; ++s) {
        const int e = state_.expert[s];
        if (e == E || derived_.add_gain[e] <= 0.0F) continue;
        score_placements(n, potential_, derived_.spare_base.data(), derived_.spare_load.data(), derived_.up[e],
                         derived_.add_gain[e], derived_.spare_price.data(), scratch_.score.data());
        for (int i = state_.home_slots_first[e]; i < state_.home_slots_first[e + 1]; ++i) {
            const int q = state_.home_rank[i];
            for (int j = derived_.spare_first[q]; j < derived_.spare_first[q + 1]; ++j)
                if (derived_.spare_price[j] == kOneReceipt) scratch_.score[j] *= kFree;
        }
        for (int node = 0; node < conditions_.nodes && !state_.near.empty(); ++node) {
            if (is_near(node, e)) continue;
            const int first = node * (R / conditions_.nodes), last = first + R / conditions_.nodes;
            for (int j = derived_.spare_first[first]; j < derived_.spare_first[last]; ++j)
                scratch_.score[j] *= conditions_.far;
        }
        const uint16_t* holders = holders_of(e);
        for (int i = 0; i < state_.count[e]; ++i) {
            const int q = state_.rank_of[holders[i]];
            std::fill(scratch_.score.begin() + derived_.spare_first[q],
                      scratch_.score.begin() + derived_.spare_first[q + 1], 0.0F);
        }
        const int j = best_above(n, scratch_.score.data(), &best.score);
        if (j >= 0) best.slot = derived_.spare_slot[j], best.other = -1, best.expert = e;
    }
}

// Rank r and another rank exchange two experts.
void Search::offer_swaps(int r, Candidate& best) {
    const int P = shape_.slots, E = shape_.experts, S = shape_.per_rank();
    const float excess_r = derived_.slot_excess[r * S];
    const float far_swap = 2.0F * conditions_.far / (1.0F + conditions_.far);  // one of the two receipts is far
    scratch_.rows.clear();
    for (int pass = 0; pass < 2; ++pass) {  // experts of r that were there at the start, then those that were not
        bool built = false;
        for (int s = r * S; s < (r + 1) * S; ++s) {
            const int e = state_.expert[s];
            if (e == E || state_.away[s] != pass) continue;
            // Receipts: +1 for e on the other rank, -1 if e was a receipt of r; +1 for the other expert on r, -1 if it
            // was a receipt of the other rank.
            if (!built) {
                built = true;
                scratch_.price = pass ? derived_.away_price : derived_.home_price;
                for (int h = r * S; h < (r + 1) * S; ++h) {
                    const int f = state_.start[h];
                    if (f == E) continue;
                    const uint16_t* holders = holders_of(f);
                    for (int i = 0; i < state_.count[f]; ++i)
                        scratch_.price[holders[i]] = price_of(1 - pass - state_.away[holders[i]]);
                }
                for (int h = r * S; h < (r + 1) * S; ++h) {
                    const int f = state_.expert[h];
                    if (f == E) continue;
                    const uint16_t* holders = holders_of(f);
                    for (int i = 0; i < state_.count[f]; ++i) scratch_.price[holders[i]] = kImpossible;
                }
                std::fill(scratch_.price.begin() + r * S, scratch_.price.begin() + (r + 1) * S, 0.0F);
                if (!state_.near.empty())
                    for (int p = 0; p < P; ++p)
                        if (!is_near(node_of(r), state_.expert[p])) scratch_.price[p] *= far_swap;
            }
            float* row = scratch_.score.data() + scratch_.rows.size() * P;
            scratch_.rows.push_back(s);
            const auto score = [&](int first, int n, const float* price) {
                score_swaps(n, potential_, derived_.slot_share[s], excess_r, &derived_.slot_share[first],
                            &derived_.slot_excess[first], &derived_.slot_above[first], price, row + first);
            };
            score(0, P, scratch_.price.data());
            // Ranks that held e at the start take it back at a lower cost; ranks that hold it cannot take it.
            for (int i = state_.home_slots_first[e]; i < state_.home_slots_first[e + 1]; ++i) {
                const int first = state_.home_rank[i] * S;
                for (int k = 0; k < S; ++k) {
                    const int p = first + k;
                    scratch_.returned_price[k] = scratch_.price[p] > 0.0F
                                                     ? price_of(!is_home(r, state_.expert[p]) - pass - state_.away[p])
                                                     : 0.0F;
                }
                score(first, S, scratch_.returned_price.data());
            }
            for (int node = 0; node < conditions_.nodes && !state_.near.empty(); ++node) {
                if (is_near(node, e)) continue;
                for (int p = node * (P / conditions_.nodes); p < (node + 1) * (P / conditions_.nodes); ++p)
                    row[p] *= far_swap;
            }
            const uint16_t* holders = holders_of(e);
            for (int i = 0; i < state_.count[e]; ++i) {
                const int first = state_.rank_of[holders[i]] * S;
                std::fill(row + first, row + first + S, 0.0F);
            }
        }
    }
    const int i = best_above(P * static_cast<int>(scratch_.rows.size()), scratch_.score.data(), &best.score);
    if (i >= 0) best.slot = i % P, best.other = scratch_.rows[i / P], best.expert = state_.expert[scratch_.rows[i / P]];
}

// Gives rank r the experts that it held at the start. Experts that lose their last copy by this are noted in
// scratch_.lost.
void Search::restore(int r) {
    const int E = shape_.experts, S = shape_.per_rank();
    int next = r * S;
    for (int p = r * S; p < (r + 1) * S; ++p) {
        if (state_.expert[p] < E && !state_.away[p]) continue;
        const auto absent = [&](int e) {
            return std::find(state_.expert.begin() + r * S, state_.expert.begin() + (r + 1) * S, e) ==
                   state_.expert.begin() + (r + 1) * S;
        };
        while (next < (r + 1) * S && (state_.start[next] == E || !absent(state_.start[next]))) ++next;
        if (next == (r + 1) * S) return;  // nothing else to take back
        const int dropped = state_.expert[p];
        place(p, state_.start[next]);
        if (dropped < E && state_.count[dropped] < state_.least[dropped]) scratch_.lost.push_back(dropped);
    }
}

// Gives an expert one more copy, in the slot whose expert is dropped at the least cost. Returns false if no slot can.
// Copies are given one after another, and each changes most of what refresh() derives, of which little is needed here:
// the gains of the holders of experts that may lose a copy.
bool Search::replicate(int expert) {
    const Potential potential = potential_;
    float *rank_load = scratch_.load.data(), *phi = scratch_.phi.data();
    for (int r = 0; r < shape_.ranks; ++r) {
        rank_load[r] = units(state_.rank_load[r]);
        phi[r] = potential(rank_load[r]);
    }
    const auto with_holders = [&](int e, float change, float gain) {
        const uint16_t* holders = holders_of(e);
        for (int i = 0; i < state_.count[e]; ++i) {
            const int r = state_.rank_of[holders[i]];
            gain += phi[r] - potential(rank_load[r] + change);
        }
        return gain;
    };
    const float up = derived_.up[expert];
    const float add =
        state_.count[expert] > 0 ? with_holders(expert, derived_.up_change[expert], derived_.add_bonus[expert]) : 0.0F;
    std::fill(scratch_.holds.begin(), scratch_.holds.end(), 0);
    for (int i = 0; i < state_.count[expert]; ++i) scratch_.holds[state_.rank_of[holders_of(expert)[i]]] = 1;
    const uint32_t round = ++derived_.round;
    float best = -std::numeric_limits<float>::max();
    int slot = -1;
    for_each_spare([&](int p) {
        const int r = state_.rank_of[p], f = state_.expert[p];
        const bool near = !nodes_differ() || is_near(node_of(r), expert);
        if (scratch_.holds[r] || (!near && conditions_.far == 0.0F)) return;
        const float down = derived_.down_change[f];
        if (derived_.seen[f] != round && f < shape_.experts) {
            derived_.seen[f] = round;
            derived_.drop_gain[f] = with_holders(f, down, -derived_.drop_bonus[f]);
        }
        const float base = derived_.drop_gain[f] + potential(rank_load[r] + down);
        const float gain = base + add - potential(rank_load[r] - derived_.slot_share[p] + up);
        const float price = is_home(r, expert) ? 0.0F
                            : near             ? kReceiptInPotential
                                               : kReceiptInPotential / conditions_.far;
        if (gain - price > best) {
            best = gain - price;
            slot = p;
        }
    });
    if (slot < 0) return false;
    place(slot, expert);
    return true;
}

int Search::copies_needed(int expert, int32_t most) const {
    return std::max(1, std::min((state_.weight[expert] - 1) / most + 1, shape_.ranks));
}

bool Search::copies_fit(int32_t most) const {
    return total_copies(shape_.experts, state_.weight.data(), most, shape_.ranks) <= shape_.slots;
}

bool Search::replicas_fit(double share) const {
    return copies_fit(std::max(1, static_cast<int32_t>(std::min(share, kMostUnits / 2.0) * kUnit)));
}

double Search::smallest_largest_share() const {
    int32_t low = 1, high = *std::max_element(state_.weight.begin(), state_.weight.end());
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (copies_fit(middle))
            high = middle;
        else
            low = middle + 1;
    }
    return static_cast<double>(low) / kUnit;
}

double Search::least_peak(double least_share) const {
    if (!alike()) return 1.0;
    double least = least_share;
    if (shape_.slots == shape_.experts) {  // beside the heaviest expert are others, at best the lightest
        std::vector<int32_t> lightest(state_.weight.begin(), state_.weight.end() - 1);
        std::sort(lightest.begin(), lightest.end());
        for (int i = 0; i + 1 < shape_.per_rank(); ++i) least += units(lightest[i]);
    }
    return std::max(1.0, least);
}

bool Search::split_heavy(double share) {
    const int E = shape_.experts;
    const int32_t most = std::max(1, static_cast<int32_t>(std::llrint(share * kUnit)));
    if (!copies_fit(most)) return false;
    for (int e = 0; e < E; ++e) {
        state_.least[e] = copies_needed(e, most);
        if (state_.least[e] == 1) continue;
        for (int i = 0; i < state_.count[e]; ++i) set_spare(holders_of(e)[i], state_.count[e] > state_.least[e]);
    }
    for (int e = 0; e < E; ++e)
        while (state_.count[e] < state_.least[e] && replicate(e)) {
        }
    return true;
}

void Search::undo() {
    while (!state_.trail.empty()) {
        const auto [slot, expert] = state_.trail.back();
        state_.trail.pop_back();
        place(slot, expert);
        state_.trail.pop_back();
    }
}

// Adds up to `wanted` ranks with receipts to scratch_.chosen.
void Search::choose_ranks(Random& random, int wanted) {
    const int R = shape_.ranks, S = shape_.per_rank();
    for (int tries = 8 * wanted; tries > 0 && static_cast<int>(scratch_.chosen.size()) < wanted; --tries) {
        const int r = static_cast<int>(random.below(static_cast<uint32_t>(R)));
        if (std::find(scratch_.chosen.begin(), scratch_.chosen.end(), r) != scratch_.chosen.end()) continue;
        const auto first = state_.away.begin() + r * S;
        if (std::find(first, first + S, 1) != first + S) scratch_.chosen.push_back(r);
    }
}

bool Search::restore_chosen() {
    state_.trail.clear();
    scratch_.lost.clear();
    for (const int r : scratch_.chosen) restore(r);
    for (const int e : scratch_.lost)
        if (state_.count[e] < state_.least[e] && !replicate(e)) return false;
    return true;
}

bool Search::reconsider(Random& random, bool exact) {
    exact_ = exact;
    scratch_.chosen.clear();
    choose_ranks(random, 2 + static_cast<int>(random.below(3)));
    if (scratch_.chosen.empty()) return false;
    const int before = state_.cost;
    const bool kept = restore_chosen() && descend(before) && state_.cost <= before;
    exact_ = false;
    if (!kept) undo();
    return kept;
}

bool Search::lower_peak(Random& random, bool exact) {
    const double before = peak();
    int busiest = 0;
    while (relative(busiest, state_.rank_load[busiest]) < before) ++busiest;
    scratch_.chosen.assign(1, busiest);
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
        if (state_.expert[p] != slots[p]) place(p, slots[p]);
    state_.trail.clear();
}

// Notes the changes of load of an expert's holders, except `besides`, if the expert has another number of copies.
void Search::tally(int expert, int copies, int besides) {
    if (expert == shape_.experts || copies == 0) return;
    const int32_t change = share_of(expert, copies) - state_.share[expert];
    const uint16_t* holders = holders_of(expert);
    for (int i = 0; i < state_.count[expert]; ++i) {
        if (holders[i] == besides) continue;
        const int r = state_.rank_of[holders[i]];
        if (scratch_.tally[r] == 0) scratch_.tallied.push_back(r);
        scratch_.tally[r] += change;
    }
}

// Returns the outcome of the noted changes, and forgets them.
Search::Outcome Search::settle() {
    float gain = 0.0F;
    double peak = 0.0;
    for (const int r : scratch_.tallied) {
        if (scratch_.tally[r] == 0) continue;
        const int32_t after = state_.rank_load[r] + scratch_.tally[r];
        gain += potential_(units(state_.rank_load[r])) - potential_(units(after));
        if (scratch_.tally[r] > 0) peak = std::max(peak, relative(r, after));
        scratch_.tally[r] = 0;
    }
    scratch_.tallied.clear();
    return {gain, peak};
}

Search::Outcome Search::try_receipt(int slot, int expert) {
    const int r = state_.rank_of[slot], old = state_.expert[slot];
    tally(old, state_.count[old] - 1, slot);
    tally(expert, state_.count[expert] + 1, -1);
    scratch_.tallied.push_back(r);
    scratch_.tally[r] += share_of(expert, state_.count[expert] + 1) - state_.share[old];
    return settle();
}

Search::Outcome Search::try_swap(int slot, int other) {
    const int32_t change = state_.share[state_.expert[slot]] - state_.share[state_.expert[other]];
    scratch_.tallied.assign({state_.rank_of[slot], state_.rank_of[other]});
    scratch_.tally[state_.rank_of[slot]] -= change;
    scratch_.tally[state_.rank_of[other]] += change;
    return settle();
}

int Search::receipt_cost(int slot, int expert) const {
    return !is_home(state_.rank_of[slot], expert) - state_.away[slot];
}

void Search::offer_outcome(const Outcome& outcome, float price, int slot, int other, int expert, Candidate& best) {
    if (outcome.gain * price <= best.score) return;
    best.score = outcome.gain * price;
    best.slot = slot;
    best.other = other;
    best.expert = expert;
}

// Offers the moves of the three functions above one by one, with their exact effects.
void Search::offer_exactly(int r, Candidate& best) {
    const int P = shape_.slots, E = shape_.experts, S = shape_.per_rank();
    const auto holds = [&](int rank, int e) {
        const uint16_t* holders = holders_of(e);
        return std::any_of(holders, holders + state_.count[e], [&](int h) { return state_.rank_of[h] == rank; });
    };
    const auto far = [&](int slot, int e) {
        return is_near(node_of(state_.rank_of[slot]), e) ? 1.0F : conditions_.far;
    };
    const auto receive = [&](int p, int e) {
        if (e == E || holds(state_.rank_of[p], e)) return;
        offer_outcome(try_receipt(p, e), price_of(receipt_cost(p, e)) * far(p, e), p, -1, e, best);
    };
    for (int i = 0; i < derived_.spare_first[shape_.ranks]; ++i) {
        const int p = derived_.spare_slot[i];
        if (state_.rank_of[p] == r) {
            for (int e = 0; e < E; ++e) receive(p, e);
        } else {
            for (int s = r * S; s < (r + 1) * S; ++s) receive(p, state_.expert[s]);
        }
    }
    for (int s = r * S; s < (r + 1) * S; ++s) {
        const int e = state_.expert[s];
        for (int p = 0; p < P && e < E; ++p) {
            const int f = state_.expert[p];
            if (f == E || state_.share[f] >= state_.share[e] || state_.rank_of[p] == r || holds(state_.rank_of[p], e) ||
                holds(r, f))
                continue;
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
    const int given = state_.expert[best.slot];
    place(best.slot, best.expert);
    if (best.other >= 0) place(best.other, given);
    return true;
}

void Search::shift(int rank, int32_t change) {
    state_.rank_load[rank] += change;
    if (derived_.is_dirty[rank]) return;
    derived_.is_dirty[rank] = 1;
    derived_.dirty_ranks.push_back(rank);
}

void Search::set_away(int slot, bool away) {
    state_.away[slot] = away;
    const bool empty = state_.expert[slot] == shape_.experts;
    derived_.home_price[slot] = empty ? kImpossible : price_of(2 - away);
    derived_.away_price[slot] = empty ? kImpossible : price_of(1 - away);
}

void Search::set_spare(int slot, bool spare) {
    const uint64_t bit = uint64_t{1} << (slot % 64);
    derived_.spare[slot / 64] = spare ? derived_.spare[slot / 64] | bit : derived_.spare[slot / 64] & ~bit;
}

// Sets the values that depend on an expert's weight and number of copies.
void Search::count_shares(int expert) {
    const int copies = state_.count[expert];
    state_.share[expert] = copies ? share_of(expert, copies) : 0;
    const float share = units(state_.share[expert]);
    derived_.up[expert] = units(share_of(expert, copies + 1));
    derived_.up_change[expert] = derived_.up[expert] - share;
    derived_.down_change[expert] = copies > 1 ? units(share_of(expert, copies - 1)) - share : 0.0F;
    if (!state_.variance.empty()) {
        const float charge = potential_.square * state_.variance[expert];
        derived_.add_bonus[expert] = copies ? charge / static_cast<float>(copies * (copies + 1)) : 0.0F;
        derived_.drop_bonus[expert] = copies > 1 ? charge / static_cast<float>(copies * (copies - 1)) : 0.0F;
    }
}

void Search::place(int slot, int expert) {
    const int E = shape_.experts, r = state_.rank_of[slot], old = state_.expert[slot];
    state_.trail.push_back({slot, old});
    if (old < E) {
        uint16_t* holders = holders_of(old);
        const int left = state_.count[old] - 1;
        *std::find(holders, holders + left, slot) = holders[left];
        shift(r, -state_.share[old]);
        recount(old, left);
        state_.cost -= state_.away[slot];
    }
    state_.expert[slot] = expert;
    if (expert == E) {
        derived_.slot_share[slot] = 0.0F;
        set_away(slot, false);
        set_spare(slot, true);
        shift(r, 0);
        return;
    }
    shift(r, state_.share[expert]);
    holders_of(expert)[state_.count[expert]] = static_cast<uint16_t>(slot);
    recount(expert, state_.count[expert] + 1);
    set_away(slot, !is_home(r, expert));
    state_.cost += state_.away[slot];
}

// Sets the number of copies and spreads the load evenly over the holders, which all have the old share.
void Search::recount(int expert, int copies) {
    const int32_t before = state_.share[expert];
    state_.count[expert] = copies;
    count_shares(expert);
    const uint16_t* holders = holders_of(expert);
    for (int i = 0; i < copies; ++i) {
        shift(state_.rank_of[holders[i]], state_.share[expert] - before);
        derived_.slot_share[holders[i]] = units(state_.share[expert]);
        set_spare(holders[i], copies > state_.least[expert]);
    }
}

}  // namespace eplb
