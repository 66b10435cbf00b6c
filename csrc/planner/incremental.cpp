// SPDX-License-Identifier: Apache-2.0
#include "incremental.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <memory>
#include <numeric>

#include "order.h"
#include "random_numbers.h"
#include "thread_pool.h"

namespace eplb {

namespace {

using Clock = std::chrono::steady_clock;

// Weights of the potential's square, tried in this order until one leads to the target.
constexpr double kSquares[] = {0.1, 0.5, 0.03, 2.0};

// The same for improvement, one drawn for each round, so that a round that takes back the same ranks may end elsewhere.
constexpr double kSearchSquares[] = {0.003, 0.03, 0.1, 0.1, 0.3};
constexpr double kScoredAbove[] = {-0.01, 0.0, 0.0, 0.0};

// Every so many rounds moves are weighed exactly where that is affordable.
constexpr int kExactEvery = 4;
constexpr int kFewSlots = 128;

// There a descent is so short that "fast" has time for some rounds: they take off a tenth of the moves.
constexpr int kRoundsOfFast = 4;

// An expert whose replicas leave less than this part of the other slots' mean load to them is split before the descent.
constexpr double kRoomBeside = 0.45;

// Under drift the heaviest replicas decide how well a plan ages: none may exceed the least possible by more.
constexpr double kNearLeast = 1.05;

constexpr int kRoundsPerTurn = 8;

class LayerPlanner {
  public:
    LayerPlanner(const double* load, const double* variance, const int32_t* slots, Shape shape, const Goal& goal,
                 double target, uint64_t seed)
        : load_(load), variance_(variance), slots_(slots), target_(target), search_(shape), random_(seed) {
        search_.set_nodes(goal.nodes, goal.stay_near ? 0.0F : static_cast<float>(1.0 / goal.far_cost));
        if (goal.speed == nullptr) return;
        // load / speed <= target is load + target * (1 - speed) <= target: a slow rank has something to do already.
        std::vector<double> background;
        for (int r = 0; r < shape.ranks; ++r) background.push_back(target * (1.0 - goal.speed[r]));
        search_.set_background(background);
    }

    void descend() {
        const Shape& shape = search_.shape();
        const double room = kRoomBeside * (shape.slots - shape.ranks) / shape.slots;
        double best_peak = 0.0;
        int best_cost = 0;
        for (const double square : kSquares) {
            search_.aim(target_, square, target_);
            has_load_ = search_.begin(load_, slots_, variance_);
            if (best_.empty()) {
                best_ = search_.slots();
                best_peak = search_.peak();
            }
            if (!has_load_ || search_.reached()) return;
            double share = 1.0 - room;
            if (variance_ != nullptr) share = std::min(share, kNearLeast * search_.smallest_largest_share());
            // With one slot per rank a replica is a rank's load: the least largest share is the best there is.
            if (!search_.split_heavy(share) && shape.per_rank() == 1)
                search_.split_heavy(search_.smallest_largest_share());
            reached_ = search_.descend();
            const double peak = search_.peak();
            if (reached_ || peak < best_peak || (peak == best_peak && search_.cost() < best_cost)) {
                best_peak = peak;
                best_cost = search_.cost();
                best_ = search_.slots();
            }
            if (reached_) return;
        }
        search_.adopt(best_);
    }

    void improve(int rounds) {
        if (!has_load_ || best_ == search_.start()) return;
        const bool small = search_.shape().slots <= kFewSlots;
        for (int i = 0; i < rounds; ++i) {
            const double square = kSearchSquares[random_.below(std::size(kSearchSquares))];
            const bool exact = small && random_.below(kExactEvery) == 0;
            const bool lower = !reached_ && i % 2 == 0;
            const double limit = reached_ || lower ? target_ : search_.peak() + 1e-6;
            search_.aim(limit, square, limit + kScoredAbove[random_.below(std::size(kScoredAbove))]);
            if (lower) {
                search_.lower_peak(random_, exact);
                reached_ = search_.reached();
            } else {
                search_.reconsider(random_, exact);
            }
        }
        best_ = search_.slots();
    }

    OrderedMoves order() {
        if (!has_load_ || best_ == search_.start()) return {};
        search_.begin(load_, slots_, variance_);
        return order_moves(search_, best_);
    }

    double start_peak() {
        search_.begin(load_, slots_, variance_);
        return search_.peak();
    }

  private:
    const double* load_;
    const double* variance_;
    const int32_t* slots_;
    const double target_;
    Search search_;
    Random random_;
    std::vector<int32_t> best_;
    bool has_load_ = false;
    bool reached_ = false;
};

// Consecutive groups of one layer that pay best when taken together.
struct Segment {
    int layer;
    int first, last;  // groups
    double cost;
    double gain;  // tokens taken off the busiest rank
    double slope() const { return gain / cost; }
};

// The upper hull of gain over cost: segments with falling slope.
void append_segments(const OrderedMoves& ordered, const std::vector<double>& move_cost, int layer, double start_peak,
                     double mean_load, std::vector<Segment>& segments) {
    const size_t base = segments.size();
    double peak = start_peak;
    int begin = 0;
    for (int g = 0; g < static_cast<int>(ordered.groups.size()); ++g) {
        const Group& group = ordered.groups[g];
        const double cost = std::accumulate(move_cost.begin() + begin, move_cost.begin() + group.end, 0.0);
        segments.push_back({layer, g, g + 1, cost, (peak - group.peak) * mean_load});
        peak = group.peak;
        begin = group.end;
        while (segments.size() > base + 1 && segments.end()[-2].slope() <= segments.back().slope()) {
            Segment& into = segments.end()[-2];
            into.last = segments.back().last;
            into.cost += segments.back().cost;
            into.gain += segments.back().gain;
            segments.pop_back();
        }
    }
}

// The cost of each move: 1 within the node, `far_cost` where the node held no copy at the start.
std::vector<double> costs_of(const OrderedMoves& ordered, const int32_t* slots, Shape shape, const Goal& goal) {
    std::vector<double> cost(ordered.moves.size(), 1.0);
    if (goal.nodes <= 1) return cost;
    const int per_node = shape.slots / goal.nodes;
    for (size_t i = 0; i < cost.size(); ++i) {
        const Move& move = ordered.moves[i];
        const int32_t* first = slots + move.slot / per_node * per_node;
        if (std::find(first, first + per_node, move.expert) == first + per_node) cost[i] = goal.far_cost;
    }
    return cost;
}

}  // namespace

LayeredPlan plan_incremental(const double* load, const double* variance, const int32_t* slots, int num_layers,
                             Shape shape, const Goal& goal) {
    const auto begin = Clock::now();
    std::vector<std::unique_ptr<LayerPlanner>> layers(num_layers);
    std::vector<OrderedMoves> ordered(num_layers);
    std::vector<double> start_peak(num_layers, 0.0);
    Random seeds(goal.seed);
    std::vector<uint64_t> layer_seed(num_layers);
    for (uint64_t& seed : layer_seed) seed = seeds.next();
    const auto begin_layer = [&](int l) {
        const size_t row = static_cast<size_t>(l) * shape.experts;
        layers[l] = std::make_unique<LayerPlanner>(load + row, variance == nullptr ? nullptr : variance + row,
                                                   slots + static_cast<size_t>(l) * shape.slots, shape, goal,
                                                   goal.target[l], layer_seed[l]);
        layers[l]->descend();
    };
    const auto finish_layer = [&](int l) {
        ordered[l] = layers[l]->order();
        if (!ordered[l].moves.empty()) start_peak[l] = layers[l]->start_peak();
        layers[l].reset();
    };
    if (!goal.thorough) {
        for_each_item(num_layers, goal.threads, [&](int l) {
            begin_layer(l);
            if (shape.slots <= kFewSlots) layers[l]->improve(kRoundsOfFast);
            finish_layer(l);
        });
    } else {
        for_each_item(num_layers, goal.threads, begin_layer);
        if (goal.rounds > 0) {
            for_each_item(num_layers, goal.threads, [&](int l) { layers[l]->improve(goal.rounds); });
        } else {
            const auto end =
                begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(goal.seconds));
            while (Clock::now() < end)
                for_each_item(num_layers, goal.threads, [&](int l) {
                    if (Clock::now() < end) layers[l]->improve(kRoundsPerTurn);
                });
        }
        for_each_item(num_layers, goal.threads, finish_layer);
    }

    std::vector<Segment> segments;
    for (int l = 0; l < num_layers; ++l) {
        const double* row = load + static_cast<size_t>(l) * shape.experts;
        const double mean = std::accumulate(row, row + shape.experts, 0.0) / shape.ranks;
        const auto cost = costs_of(ordered[l], slots + static_cast<size_t>(l) * shape.slots, shape, goal);
        append_segments(ordered[l], cost, l, start_peak[l], mean, segments);
    }
    std::stable_sort(segments.begin(), segments.end(),
                     [](const Segment& a, const Segment& b) { return a.slope() > b.slope(); });

    LayeredPlan plan;
    plan.slots.assign(slots, slots + static_cast<size_t>(num_layers) * shape.slots);
    std::vector<char> closed(num_layers, 0);
    std::vector<int64_t> received(shape.ranks, 0);
    int64_t total = 0;
    int32_t group_number = 0;
    for (const Segment& segment : segments) {
        const OrderedMoves& from = ordered[segment.layer];
        if (segment.slope() < goal.least_gain) closed[segment.layer] = 1;
        for (int g = segment.first; g < segment.last && !closed[segment.layer]; ++g) {
            const int first = g == 0 ? 0 : from.groups[g - 1].end, last = from.groups[g].end;
            bool fits = goal.max_moves < 0 || total + last - first <= goal.max_moves;
            for (int i = first; i < last; ++i) {
                const int64_t n = ++received[from.moves[i].slot / shape.per_rank()];
                if (goal.max_moves_per_rank >= 0 && n > goal.max_moves_per_rank) fits = false;
            }
            if (!fits) {
                for (int i = first; i < last; ++i) --received[from.moves[i].slot / shape.per_rank()];
                closed[segment.layer] = 1;
                break;
            }
            for (int i = first; i < last; ++i) {
                const Move& move = from.moves[i];
                plan.slots[static_cast<size_t>(segment.layer) * shape.slots + move.slot] = move.expert;
                plan.moves.insert(plan.moves.end(), {segment.layer, move.slot, move.expert, group_number});
            }
            total += last - first;
            ++group_number;
        }
    }
    return plan;
}

}  // namespace eplb
