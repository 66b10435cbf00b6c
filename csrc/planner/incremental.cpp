// SPDX-License-Identifier: Apache-2.0
#include "incremental.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>

#include "layer_planner.h"
#include "order.h"
#include "random_numbers.h"
#include "thread_pool.h"
#include "windows.h"

namespace eplb {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRoundsPerTurn = 8;

// A limit on moves above this does not bind on the small layers that have choices.
constexpr int64_t kMostMovesToChoose = 4096;

// Consecutive groups of one layer with the best gain when taken together.
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

// A choice for a layer: some of its first groups, or another placement with its own moves; and its gain.
struct Choice {
    int moves;            // that count towards the limit
    double gain;          // tokens
    const FewMoves* few;  // the placement; null: the first `groups` of the ordered moves
    int groups;
};

// The choice of each layer, [L] (-1: none), with at most `most` moves and the greatest sum of gains: a multiple-choice
// knapsack, solved exactly.
std::vector<int> choose_within(const std::vector<std::vector<Choice>>& choices, int64_t most) {
    const size_t width = static_cast<size_t>(most) + 1;
    std::vector<double> gain(width, 0.0);  // by moves allowed
    std::vector<std::vector<int>> chosen;
    for (const std::vector<Choice>& of_layer : choices) {
        std::vector<double> next = gain;
        std::vector<int>& choice = chosen.emplace_back(width, -1);
        for (int i = 0; i < static_cast<int>(of_layer.size()); ++i) {
            for (size_t m = of_layer[i].moves; m < width; ++m) {
                const double with = gain[m - of_layer[i].moves] + of_layer[i].gain;
                if (with <= next[m]) continue;
                next[m] = with;
                choice[m] = i;
            }
        }
        gain = next;
    }
    std::vector<int> answer(choices.size(), -1);
    size_t left = width - 1;
    for (size_t l = choices.size(); l-- > 0;) {
        answer[l] = chosen[l][left];
        if (answer[l] >= 0) left -= choices[l][answer[l]].moves;
    }
    return answer;
}

// For each move, whether the receiving node held no copy of the expert at the start.
std::vector<char> crossing(const OrderedMoves& ordered, const int32_t* slots, Shape shape, int nodes) {
    std::vector<char> crosses(ordered.moves.size(), 0);
    if (nodes <= 1) return crosses;
    const int per_node = shape.slots / nodes;
    for (size_t i = 0; i < crosses.size(); ++i) {
        const Move& move = ordered.moves[i];
        const int32_t* first = slots + move.slot / per_node * per_node;
        crosses[i] = std::find(first, first + per_node, move.expert) == first + per_node;
    }
    return crosses;
}

// All layers as they were searched for, one by one.
struct Searched {
    explicit Searched(int num_layers)
        : layers(num_layers), ordered(num_layers), start_peak(num_layers, 0.0), steadied(num_layers, 0) {}
    std::vector<std::unique_ptr<LayerPlanner>> layers;  // null where nothing is left to choose
    std::vector<OrderedMoves> ordered;
    std::vector<double> start_peak;
    std::vector<char> steadied;
};

// The arguments of plan_incremental().
struct Problem {
    const double* load;
    const double* variance;
    const int32_t* slots;
    int num_layers;
    Shape shape;

    const int32_t* slots_of(int l) const { return slots + static_cast<size_t>(l) * shape.slots; }
    double mean_load(int l) const {
        const double* row = load + static_cast<size_t>(l) * shape.experts;
        return std::accumulate(row, row + shape.experts, 0.0) / shape.ranks;
    }
    Windows windows_of(int l, const Goal& goal) const {
        std::vector<const double*> loads;
        for (int t = 0; t < goal.windows; ++t)
            loads.push_back(goal.series + (static_cast<size_t>(t) * num_layers + l) * shape.experts);
        return Windows(shape, std::move(loads), goal.speed);
    }
    void order(int l, const Goal& goal, Searched& found) const {
        found.ordered[l] = found.layers[l]->order(windows_of(l, goal), goal.windows > 0 ? goal.highest[l] : 0.0);
        found.start_peak[l] = found.layers[l]->start_peak();
        found.steadied[l] = found.layers[l]->steadied();
    }
};

// Searches for a placement of each layer. `few_moves`: whether layers are kept that have others with fewer moves.
Searched search_layers(const Problem& problem, const Goal& goal, bool few_moves) {
    const auto begin = Clock::now();
    const int num_layers = problem.num_layers;
    Searched found(num_layers);
    std::vector<std::unique_ptr<LayerPlanner>>& layers = found.layers;
    Random seeds(goal.seed);
    std::vector<uint64_t> layer_seed(num_layers);
    for (uint64_t& seed : layer_seed) seed = seeds.next();
    const auto begin_layer = [&](int l) {
        const size_t row = static_cast<size_t>(l) * problem.shape.experts;
        const double* variance = problem.variance == nullptr ? nullptr : problem.variance + row;
        // A layer without variance has constant load, so its plan need not age well.
        const bool varies = variance != nullptr && std::any_of(variance, variance + problem.shape.experts,
                                                               [](double each) { return each > 0.0; });
        layers[l] = std::make_unique<LayerPlanner>(problem.load + row, varies ? variance : nullptr, problem.slots_of(l),
                                                   problem.shape, goal, goal.target[l], layer_seed[l]);
        layers[l]->descend();
    };
    const auto finish_layer = [&](int l) {
        problem.order(l, goal, found);
        if (!few_moves || layers[l]->with_fewer_moves().empty()) layers[l].reset();
    };
    // What is at its target in every window is so in their sum, and keeps its placement.
    std::vector<int> open;
    for (int l = 0; l < num_layers; ++l)
        if (goal.windows == 0 || goal.highest[l] > goal.target[l] - kSearchRounding) open.push_back(l);
    const auto for_each_open = [&](const auto& work) {
        for_each_item(static_cast<int>(open.size()), goal.threads, [&](int i) { work(open[i]); });
    };
    if (!goal.thorough) {
        for_each_open([&](int l) {
            begin_layer(l);
            layers[l]->improve_briefly();
            layers[l]->save_moves();
            finish_layer(l);
        });
    } else {
        for_each_open([&](int l) {
            begin_layer(l);
            layers[l]->save_moves();
        });
        if (goal.rounds > 0) {
            for_each_open([&](int l) { layers[l]->improve(goal.rounds); });
        } else {
            const auto end =
                begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(goal.seconds));
            std::vector<int> unsettled;
            for (const int l : open)
                if (!layers[l]->settled()) unsettled.push_back(l);
            while (!unsettled.empty() && Clock::now() < end) {
                for_each_item(static_cast<int>(unsettled.size()), goal.threads, [&](int i) {
                    if (Clock::now() < end) layers[unsettled[i]]->improve(kRoundsPerTurn);
                });
                unsettled.erase(
                    std::remove_if(unsettled.begin(), unsettled.end(), [&](int l) { return layers[l]->settled(); }),
                    unsettled.end());
            }
        }
        for_each_open([&](int l) {
            layers[l]->save_moves();  // of a plan that has more, or others, by now
            finish_layer(l);
        });
    }
    return found;
}

// Brings the moves between nodes of `found` within their limit. Each layer has some of its moves, or those of a search
// within the nodes; the sum of gains is the greatest.
void stay_within(const Problem& problem, const Goal& goal, Searched& found) {
    const int64_t limit = goal.max_moves_between_nodes;
    const int64_t unit = (limit + kMostMovesToChoose - 1) / kMostMovesToChoose;  // moves that are counted as one
    std::vector<std::vector<Choice>> choices(problem.num_layers);
    int64_t far_in_all = 0;
    const auto gain = [&](const Searched& of, int l, const Group& group) {  // of equal gains that with fewer moves
        return (of.start_peak[l] - group.peak - 1e-6 * group.end) * problem.mean_load(l);
    };
    for (int l = 0; l < problem.num_layers; ++l) {
        const OrderedMoves& ordered = found.ordered[l];
        const std::vector<char> crosses = crossing(ordered, problem.slots_of(l), problem.shape, goal.nodes);
        int far = 0, begin = 0;
        for (int g = 0; g < static_cast<int>(ordered.groups.size()); ++g) {
            const Group& group = ordered.groups[g];
            far += static_cast<int>(std::count(crosses.begin() + begin, crosses.begin() + group.end, 1));
            begin = group.end;
            choices[l].push_back({static_cast<int>((far + unit - 1) / unit), gain(found, l, group), nullptr, g + 1});
        }
        far_in_all += far;
    }
    if (far_in_all <= limit) return;
    Goal near_goal = goal;
    near_goal.stay_near = true;
    near_goal.thorough = false;
    Searched near = search_layers(problem, near_goal, false);
    constexpr int kNear = -1;
    for (int l = 0; l < problem.num_layers; ++l)
        if (!near.ordered[l].groups.empty())
            choices[l].push_back({0, gain(near, l, near.ordered[l].groups.back()), nullptr, kNear});
    const std::vector<int> chosen = choose_within(choices, limit / unit);
    for (int l = 0; l < problem.num_layers; ++l) {
        const int groups = chosen[l] < 0 ? 0 : choices[l][chosen[l]].groups;
        if (groups == kNear) {
            found.ordered[l] = std::move(near.ordered[l]);
            found.start_peak[l] = near.start_peak[l];
            found.steadied[l] = near.steadied[l];
            continue;
        }
        found.ordered[l].groups.resize(groups);
        found.ordered[l].moves.resize(groups == 0 ? 0 : found.ordered[l].groups.back().end);
    }
}

}  // namespace

LayeredPlan plan_incremental(const double* load, const double* variance, const int32_t* slots, int num_layers,
                             Shape shape, const Goal& goal) {
    const Problem problem{load, variance, slots, num_layers, shape};
    const bool few_moves = goal.max_moves >= 0 && goal.max_moves <= kMostMovesToChoose && goal.max_moves_per_rank < 0 &&
                           goal.max_moves_between_nodes < 0;
    Searched found = search_layers(problem, goal, few_moves);
    if (goal.max_moves_between_nodes > 0 && !goal.stay_near) stay_within(problem, goal, found);
    std::vector<std::unique_ptr<LayerPlanner>>& layers = found.layers;
    std::vector<OrderedMoves>& ordered = found.ordered;
    const std::vector<double>& start_peak = found.start_peak;
    const std::vector<char>& steadied = found.steadied;

    int64_t wanted = 0;
    for (const OrderedMoves& of_layer : ordered) wanted += static_cast<int64_t>(of_layer.moves.size());
    const bool choosing = std::any_of(layers.begin(), layers.end(), [](const auto& layer) { return layer != nullptr; });
    if (few_moves && wanted > goal.max_moves && choosing) {
        std::vector<std::vector<Choice>> choices(num_layers);
        for (int l = 0; l < num_layers; ++l) {
            for (int g = 0; g < static_cast<int>(ordered[l].groups.size()); ++g) {
                const Group& group = ordered[l].groups[g];
                choices[l].push_back({group.end, (start_peak[l] - group.peak) * problem.mean_load(l), nullptr, g + 1});
            }
            if (layers[l] == nullptr || steadied[l]) continue;
            for (const FewMoves& few : layers[l]->with_fewer_moves())
                choices[l].push_back({few.cost, (start_peak[l] - few.peak) * problem.mean_load(l), &few, 0});
        }
        const std::vector<int> chosen = choose_within(choices, goal.max_moves);
        for (int l = 0; l < num_layers; ++l) {
            if (chosen[l] < 0) {
                ordered[l] = {};
                continue;
            }
            const Choice& choice = choices[l][chosen[l]];
            if (choice.few != nullptr) {
                layers[l]->take(choice.few->slots);
                problem.order(l, goal, found);
            } else {
                ordered[l].groups.resize(choice.groups);
                ordered[l].moves.resize(choice.moves);
            }
        }
    }

    std::vector<Segment> segments;
    std::vector<std::vector<char>> crosses(num_layers);
    for (int l = 0; l < num_layers; ++l) {
        crosses[l] = crossing(ordered[l], problem.slots_of(l), shape, goal.nodes);
        std::vector<double> cost;
        for (const char far : crosses[l]) cost.push_back(far ? goal.far_cost : 1.0);
        append_segments(ordered[l], cost, l, start_peak[l], problem.mean_load(l), segments);
    }
    std::stable_sort(segments.begin(), segments.end(),
                     [](const Segment& a, const Segment& b) { return a.slope() > b.slope(); });

    LayeredPlan plan;
    plan.slots.assign(slots, slots + static_cast<size_t>(num_layers) * shape.slots);
    plan.par_of_windows.assign(2 * static_cast<size_t>(num_layers), 0.0);
    std::vector<char> closed(num_layers, 0);
    std::vector<int64_t> received(shape.ranks, 0);
    int64_t total = 0, total_far = 0;
    int32_t group_number = 0;
    for (const Segment& segment : segments) {
        const OrderedMoves& from = ordered[segment.layer];
        for (int g = segment.first; g < segment.last && !closed[segment.layer]; ++g) {
            const int first = g == 0 ? 0 : from.groups[g - 1].end, last = from.groups[g].end;
            const auto begin_far = crosses[segment.layer].begin();
            const int64_t far = std::count(begin_far + first, begin_far + last, 1);
            bool fits = (goal.max_moves < 0 || total + last - first <= goal.max_moves) &&
                        (goal.max_moves_between_nodes < 0 || total_far + far <= goal.max_moves_between_nodes);
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
            if (steadied[segment.layer]) {
                plan.par_of_windows[2 * segment.layer] = start_peak[segment.layer];
                plan.par_of_windows[2 * segment.layer + 1] = from.groups[g].peak;
            }
            total += last - first;
            total_far += far;
            ++group_number;
        }
    }
    if (goal.windows == 0) return plan;
    std::vector<char> moves(num_layers, 0);
    for (size_t i = 0; i < plan.moves.size(); i += 4) moves[plan.moves[i]] = 1;
    for (int l = 0; l < num_layers; ++l) {
        const int32_t* after = &plan.slots[static_cast<size_t>(l) * shape.slots];
        plan.p95_of_windows.push_back(moves[l] ? percentile95(problem.windows_of(l, goal).pars(after)) : goal.p95[l]);
    }
    return plan;
}

}  // namespace eplb
