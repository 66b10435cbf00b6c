// SPDX-License-Identifier: Apache-2.0
#include "few_moves.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <utility>

namespace eplb {

namespace {

constexpr int kMostExperts = 64;  // bits of a set
constexpr double kEven = 0.1;     // weight of the loads' squared distance from the mean beside the busiest rank
constexpr double kSame = 1e-9;

using Sets = std::vector<uint64_t>;  // [R] the experts of each rank

int number_of(uint64_t bits) {
    int n = 0;
    for (; bits; bits &= bits - 1) ++n;
    return n;
}

struct State {
    double energy;
    Sets sets;
    bool operator<(const State& other) const {
        return energy < other.energy || (energy == other.energy && sets < other.sets);
    }
};

class Beam {
  public:
    Beam(const Search& search, int most, int width)
        : search_(search), shape_(search.shape()), most_(most), width_(width), by_cost_(most + 1), best_(most + 1) {
        for (int e = 0; e < shape_.experts; ++e) weight_.push_back(search.weight(e) / Search::unit());
        start_.assign(shape_.ranks, 0);
        for (int p = 0; p < shape_.slots; ++p) start_[p / shape_.per_rank()] |= bit(search.start()[p]);
        for (auto& best : best_) best.first = -1.0;
    }

    std::vector<FewMoves> run() {
        now_ = start_;
        look(now_);
        offer(0);
        for (int cost = 0; cost <= most_; ++cost) {
            std::set<State>& states = by_cost_[cost];
            std::set<Sets> done;
            for (;;) {  // steps without a receipt stay at the same number
                const auto next =
                    std::find_if(states.begin(), states.end(), [&](const State& s) { return !done.count(s.sets); });
                if (next == states.end() || static_cast<int>(done.size()) >= 2 * width_) break;
                const Sets sets = next->sets;
                done.insert(sets);
                expand(sets, cost);
            }
            states.clear();
        }
        return answer();
    }

  private:
    static uint64_t bit(int e) { return uint64_t{1} << e; }

    // Sets loads and copies of a placement.
    void look(const Sets& sets) {
        count_.assign(shape_.experts, 0);
        load_.assign(shape_.ranks, 0.0);
        for (const uint64_t set : sets)
            for (int e = 0; e < shape_.experts; ++e) count_[e] += set >> e & 1;
        for (int r = 0; r < shape_.ranks; ++r)
            for (int e = 0; e < shape_.experts; ++e)
                if (sets[r] >> e & 1) load_[r] += weight_[e] / count_[e];
    }

    int receipts(int r, uint64_t set) const { return number_of(set & ~start_[r]); }

    // Notes now_, whose loads are load_.
    void offer(int cost) {
        if (cost > most_) return;
        double peak = 0.0, squares = 0.0;
        for (int r = 0; r < shape_.ranks; ++r) {
            const double load = load_[r] / search_.speed(r);
            peak = std::max(peak, load);
            squares += (load - 1.0) * (load - 1.0);
        }
        if (best_[cost].first < 0.0 || peak < best_[cost].first) best_[cost] = {peak, now_};
        const double energy = peak + kEven * squares;
        std::set<State>& states = by_cost_[cost];
        const bool full = static_cast<int>(states.size()) >= width_;
        if (full && std::prev(states.end())->energy <= energy) return;
        if (states.insert({energy, now_}).second && full) states.erase(std::prev(states.end()));
    }

    void expand(const Sets& sets, int cost) {
        look(sets);
        const std::vector<double> load = load_;
        const std::vector<int> count = count_;
        now_ = sets;
        const auto then = [&](int r) { return receipts(r, now_[r]) - receipts(r, sets[r]); };
        for (int r = 0; r < shape_.ranks; ++r) {
            for (int out = 0; out < shape_.experts; ++out) {
                if (!(sets[r] >> out & 1)) continue;
                for (int in = 0; in < shape_.experts && count[out] > 1; ++in) {
                    if (sets[r] >> in & 1) continue;
                    now_[r] = (sets[r] & ~bit(out)) | bit(in);
                    const int change = then(r);
                    if (change < 0) continue;  // known from a placement with fewer
                    const double less = weight_[in] / count[in] - weight_[in] / (count[in] + 1);
                    const double more = weight_[out] / (count[out] - 1) - weight_[out] / count[out];
                    for (int q = 0; q < shape_.ranks; ++q) {
                        if (q == r) continue;
                        load_[q] = load[q] - (sets[q] >> in & 1) * less + (sets[q] >> out & 1) * more;
                    }
                    load_[r] = load[r] + weight_[in] / (count[in] + 1) - weight_[out] / count[out];
                    offer(cost + change);
                }
                now_[r] = sets[r];
                load_ = load;
                for (int q = r + 1; q < shape_.ranks; ++q) {
                    if (sets[q] >> out & 1) continue;
                    for (int in = 0; in < shape_.experts; ++in) {
                        if (!(sets[q] >> in & 1) || (sets[r] >> in & 1)) continue;
                        now_[r] = (sets[r] & ~bit(out)) | bit(in);
                        now_[q] = (sets[q] & ~bit(in)) | bit(out);
                        const int change = then(r) + then(q);
                        if (change < 0) continue;
                        const double moved = weight_[out] / count[out] - weight_[in] / count[in];
                        load_[r] = load[r] - moved;
                        load_[q] = load[q] + moved;
                        offer(cost + change);
                        load_[r] = load[r];
                        load_[q] = load[q];
                    }
                    now_[q] = sets[q];
                    now_[r] = sets[r];
                }
            }
        }
    }

    std::vector<FewMoves> answer() const {
        std::vector<FewMoves> found;
        double lowest = best_[0].first;
        for (int cost = 1; cost <= most_; ++cost) {
            if (best_[cost].first < 0.0 || best_[cost].first > lowest - kSame) continue;
            lowest = best_[cost].first;
            found.push_back({slots_of(best_[cost].second), lowest, cost});
        }
        return found;
    }

    // Experts that stay on a rank keep their slots.
    std::vector<int32_t> slots_of(const Sets& sets) const {
        std::vector<int32_t> slots = search_.start();
        for (int r = 0; r < shape_.ranks; ++r) {
            uint64_t in = sets[r] & ~start_[r];
            for (int p = r * shape_.per_rank(); p < (r + 1) * shape_.per_rank(); ++p) {
                if (sets[r] >> slots[p] & 1) continue;
                int e = 0;
                while (!(in >> e & 1)) ++e;
                in &= in - 1;
                slots[p] = e;
            }
        }
        return slots;
    }

    const Search& search_;
    const Shape shape_;
    const int most_, width_;
    std::vector<double> weight_;  // [E] in units of a rank's mean
    Sets start_, now_;
    std::vector<double> load_;                   // [R]
    std::vector<int> count_;                     // [E] copies
    std::vector<std::set<State>> by_cost_;       // at most width_ each
    std::vector<std::pair<double, Sets>> best_;  // by receipts: PAR and placement
};

bool fits(const Search& search) {
    const Shape& shape = search.shape();
    if (shape.slots > kMostSlotsForFewMoves || shape.experts > kMostExperts || search.nodes_differ()) return false;
    for (int r = 0; r < shape.ranks; ++r) {
        uint64_t set = 0;
        for (int p = r * shape.per_rank(); p < (r + 1) * shape.per_rank(); ++p) {
            const int e = search.start()[p];
            if (e == shape.experts || (set >> e & 1)) return false;
            set |= uint64_t{1} << e;
        }
    }
    return true;
}

}  // namespace

std::vector<FewMoves> find_few_moves(const Search& search, int most, int width) {
    if (most < 1 || !fits(search)) return {};
    return Beam(search, most, width).run();
}

}  // namespace eplb
