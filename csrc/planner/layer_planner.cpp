// SPDX-License-Identifier: Apache-2.0
#include "layer_planner.h"

#include <algorithm>
#include <iterator>

#include "annealing.h"
#include "incremental.h"
#include "pairs.h"
#include "scratch.h"
#include "steady.h"

namespace eplb {

namespace {

// Weights of the potential's square, tried in this order until one leads to the target.
constexpr double kSquares[] = {0.1, 0.5, 0.03, 2.0};

// The potential's step at the limit: kStep for a limit of 1, more for higher limits, up to kMostStep. With it a descent
// prefers moves after which fewer ranks are above the limit.
constexpr double kStep = 0.005;
constexpr double kStepPerLimit = 2.5;
constexpr double kMostStep = 0.08;

// A second descent, with another square and a multiple of the step, if both together have at most so many receipts.
constexpr double kSquareAgain = 0.01;
constexpr double kStepAgain = 2.0;
constexpr int kReceiptsOfTwo = 36;

// The same for improvement, one drawn for each round, so that a round with the same ranks may end differently.
constexpr double kSearchSquares[] = {0.003, 0.03, 0.1, 0.1, 0.3};
constexpr double kScoredAbove[] = {-0.01, 0.0, 0.0, 0.0};
constexpr double kSearchSteps[] = {0.0, 0.5, 1.0, 2.0};

// Rounds between two rounds that score moves exactly, and most slots for which exact scoring is affordable.
constexpr int kExactEvery = 4;
constexpr int kFewSlots = 128;

// Most slots for which "fast" has time for some rounds: they save a tenth of the moves.
constexpr int kSlotsOfFast = 512;

// On larger shapes "fast" has time for rounds after a short descent: rounds times receipts, and most rounds.
constexpr int kReceiptsOfFast = 24;
constexpr int kFewReceipts = 5;
constexpr int kMostRoundsOfFast = 8;

// On ranks of two slots: pairings of replicas looked at for each slot, and least of them; if the target is missed,
// rounds between two such searches.
constexpr int kTrialsPerSlot = 4;
constexpr int kLeastTrials = 1024;
constexpr int kPairsEvery = 3;

// Steps by which "fast" lowers the busiest rank of such a placement.
constexpr int kStepsOfFast = 8;

// If the target is missed: rounds between two trials of a new placement from scratch.
constexpr int kScratchEvery = 16;

// An expert is split before the descent if its replicas leave less room than this part of the other slots' mean load.
constexpr double kRoomBeside = 0.45;

// Under drift the heaviest replicas decide how well a plan ages: most ratio of a replica to the least possible largest.
constexpr double kNearLeast = 1.05;

// Least gain of PAR of a placement from scratch that fills all slots (in proportion for fewer receipts), if the search
// alone came within kNearScratch of the PAR that a placement from scratch has before its descent.
constexpr double kReceiptsForPar = 0.05;
constexpr double kNearScratch = 0.002;

// Where the target is missed, PARs within this of the lowest found are equally good before improvement.
constexpr double kSlack = 0.0015;

// The search for few moves: placements kept for each number of receipts are so many over slots times experts times
// ranks, within bounds, and more by a factor if thorough; and how many receipts it looks at where the descent is stuck.
constexpr int kStepsForFewMoves = 1 << 14;
constexpr int kLeastWidth = 8;
constexpr int kMostWidth = 128;
constexpr int kWiderIfThorough = 6;
constexpr int kDepthWhereStuck = 4;

// A plan may raise the windows' PARs on average by this part of its gain for the PAR of their sum.
constexpr double kHurt = 0.25;

// PARs closer than this are equal.
constexpr double kSame = 2e-6;

// The windows' PARs in float32 differ less than this from those in float64.
constexpr double kRounding = 1e-5;

// The last thousandth of the mean load costs more receipts than all before: larger shapes are not asked for it.
constexpr double kFine = 0.001;

}  // namespace

LayerPlanner::LayerPlanner(const double* load, const double* variance, const int32_t* slots, Shape shape,
                           const Goal& goal, double target, uint64_t seed)
    : load_(load),
      variance_(variance),
      slots_(slots),
      target_(shape.slots > kFewSlots ? std::max(target, 1.0 + kFine) : target),
      search_(shape, {goal.nodes, goal.stay_near ? 0.0F : static_cast<float>(1.0 / goal.far_cost), goal.speed}),
      random_(seed),
      stay_near_(goal.stay_near),
      thorough_(goal.thorough),
      nodes_(goal.nodes) {}

void LayerPlanner::begin(double limit, double square) {
    search_.aim({limit, square, limit, step_at(limit)});
    has_load_ = search_.begin(load_, slots_, variance_);
}

double LayerPlanner::step_at(double limit) const {
    return stepping_ ? std::min(kStep + kStepPerLimit * (limit - 1.0), kMostStep) : 0.0;
}

double LayerPlanner::least_share() {
    if (least_share_ == 0.0) least_share_ = search_.smallest_largest_share();
    return least_share_;
}

// No placement has a lower PAR.
double LayerPlanner::floor() {
    if (floor_ == 0.0) floor_ = search_.least_peak(least_share());
    return floor_;
}

// Whether the floor is above a PAR.
bool LayerPlanner::is_beyond_reach(double par) {
    const bool is_tight = search_.shape().slots == search_.shape().experts || !search_.replicas_fit(par);
    return is_tight && floor() > par;
}

// Notes the search's current placement if it is better than the best so far: it reaches the target, or reaches it with
// fewer receipts; if none reaches it, it has the lowest PAR, or fewer receipts with a PAR within the slack of it.
bool LayerPlanner::keep_if_better() {
    const double peak = search_.peak();
    const bool reached = peak <= target_ + kSame / 2;
    lowest_ = std::min(lowest_, peak);
    const double enough = lowest_ + std::max(slack_, kSame / 2);
    const bool better = best_.slots.empty()               ? true
                        : reached != best_.reached        ? reached
                        : !reached && peak > enough       ? false
                        : !reached && best_.peak > enough ? true
                        : search_.cost() == best_.cost    ? peak < best_.peak
                                                          : search_.cost() < best_.cost;
    if (better) best_ = {search_.slots(), peak, search_.cost(), reached};
    return better;
}

void LayerPlanner::descend() {
    const Shape& shape = search_.shape();
    const double room = kRoomBeside * (shape.slots - shape.ranks) / shape.slots;
    slack_ = kSlack;
    // Where the load drifts, a plan is to age well rather than to have the fewest receipts. Pairs that miss the target
    // are searched in another way.
    stepping_ = variance_ == nullptr && !pairs();
    for (const double square : kSquares) {
        begin(target_, square);
        if (!has_load_) return;
        keep_if_better();
        if (start_peak_ == 0.0) start_peak_ = best_.peak;
        if (best_.reached) return;
        if (is_beyond_reach(target_))  // below the floor are no receipts to be spent
            search_.aim({floor() + kSame / 2, square, floor(), step_at(floor())});
        double share = 1.0 - room;
        if (variance_ != nullptr) share = std::min(share, kNearLeast * least_share());
        // With one slot per rank a replica is a rank's load: the least largest share is the best there is.
        if (!search_.split_heavy(share) && shape.per_rank() == 1) search_.split_heavy(least_share());
        const bool reached = search_.descend();
        keep_if_better();
        if (best_.reached) {
            descend_again(share);
            return;
        }
        if (reached) break;
        if (pairs()) break;
        stepping_ = false;
    }
    if (!pairs()) sink(kStepsOfFast);
    if (!best_.reached && best_.peak > floor() + slack_) {
        const Found kept = best_;
        if (pairs()) {
            begin(target_, kSquares[0]);
            pair_up();
        } else {
            try_from_scratch(nullptr);
            sink(kStepsOfFast);
        }
        const double price = kReceiptsForPar * (best_.cost - kept.cost) / shape.slots;
        if (kept.peak <= scratch_peak_ + kNearScratch && kept.peak - best_.peak < price) {
            best_ = kept;
            lowest_ = kept.peak;
        }
    }
    save_receipts();
    slack_ = shape.slots > kFewSlots ? kFine : 0.0;
    search_.adopt(best_.slots);
}

// Descends once more, otherwise, unless that takes long.
void LayerPlanner::descend_again(double share) {
    if (!stepping_ || best_.cost < 2 || 2 * best_.cost > kReceiptsOfTwo) return;
    search_.adopt(search_.start());
    search_.aim({target_, kSquareAgain, target_, kStepAgain * step_at(target_)});
    search_.split_heavy(share);
    if (search_.descend(best_.cost)) keep_if_better();
    search_.adopt(best_.slots);
}

// A descent to a target out of reach changes more ranks than needed for the PAR that it reaches: descends once more to
// that PAR.
void LayerPlanner::save_receipts() {
    if (best_.reached) return;
    const double limit = best_.peak + kSame / 2;
    for (const double square : {kSquares[0], kSquares[2]}) {
        if (pairs() && square != kSquares[0]) break;
        begin(limit, square);
        if (search_.descend()) keep_if_better();
    }
}

// Lowers the busiest rank step by step: a descent to a limit just below it changes few ranks, and the load of all
// others may grow up to the limit. A step that fails is halved.
void LayerPlanner::sink(int steps) {
    search_.adopt(best_.slots);
    const double end = std::max(target_, floor());
    double part = 0.5;
    for (int i = 0; i < steps && !best_.reached && best_.peak > end + kSame; ++i) {
        const double limit = best_.peak - part * (best_.peak - end);
        search_.aim({limit, kSquares[2], limit});
        const bool reached = search_.descend();
        if (!keep_if_better()) search_.adopt(best_.slots);
        if (!reached) part *= 0.5;
    }
}

void LayerPlanner::try_from_scratch(Random* noise) {
    begin(target_, noise == nullptr ? kSquares[0] : kSearchSquares[random_.below(std::size(kSearchSquares))]);
    const std::vector<int32_t> slots = place_from_scratch(search_, noise);
    if (slots.empty()) return;
    search_.adopt(slots);
    const double peak = search_.peak();
    scratch_peak_ = std::min(scratch_peak_, peak);
    keep_if_better();
    search_.descend();
    keep_if_better();
    if (noise != nullptr) return;
    const std::vector<int32_t> part = repack(search_, std::max(target_, peak + kSame));
    if (part.empty()) return;
    search_.adopt(part);
    keep_if_better();
}

void LayerPlanner::pair_up() {
    const int trials = std::max(kLeastTrials, kTrialsPerSlot * search_.shape().slots);
    const std::vector<int32_t> slots = place_in_pairs(search_, std::max(target_, floor()), trials, random_);
    if (slots.empty()) return;
    search_.adopt(slots);
    scratch_peak_ = std::min(scratch_peak_, search_.peak());
    keep_if_better();
}

void LayerPlanner::anneal(int steps) {
    std::vector<int32_t> slots = best_.slots;
    if (std::find(slots.begin(), slots.end(), search_.shape().experts) != slots.end()) return;
    if (Annealing(search_).run(slots, steps, std::max(target_, floor()), random_) >= best_.peak - kSame) return;
    if (search_.alike()) lay_over_start(search_, slots);
    search_.adopt(slots);
    keep_if_better();
}

void LayerPlanner::improve_once(int round) {
    const bool small = search_.shape().slots <= kFewSlots;
    const double square = kSearchSquares[random_.below(std::size(kSearchSquares))];
    const bool exact = small && random_.below(kExactEvery) == 0;
    if (small && search_.confined_nodes() == 1 && !best_.reached && best_.peak > floor() + kSame && round % 4 == 3) {
        anneal(1000);
        return;
    }
    if (pairs() && !best_.reached && best_.peak > floor() + kSame && round % kPairsEvery == kPairsEvery - 1) {
        pair_up();
        search_.adopt(best_.slots);
        return;
    }
    if (!best_.reached && round % kScratchEvery == kScratchEvery - 1) {
        try_from_scratch(&random_);
        search_.adopt(best_.slots);
        return;
    }
    const bool lower = !best_.reached && round % 2 == 0;
    const double limit = best_.reached || lower ? target_ : std::max(search_.peak(), lowest_ + slack_) + 1e-6;
    const double scored_limit = limit + kScoredAbove[random_.below(std::size(kScoredAbove))];
    const double step = !best_.reached ? 0.0 : step_at(limit) * kSearchSteps[random_.below(std::size(kSearchSteps))];
    search_.aim({limit, square, scored_limit, step});
    if (lower)
        search_.lower_peak(random_, exact);
    else
        search_.reconsider(random_, exact);
    keep_if_better();
}

void LayerPlanner::save_moves() {
    if (settled() || variance_ != nullptr || search_.shape().slots > kMostSlotsForFewMoves) return;
    search_.begin(load_, slots_, variance_);
    const int most = best_.reached ? best_.cost : std::max(best_.cost, kDepthWhereStuck);
    const Shape& shape = search_.shape();
    const int64_t steps = static_cast<int64_t>(shape.slots) * shape.experts * shape.ranks;
    const int width = static_cast<int>(std::clamp<int64_t>(kStepsForFewMoves / steps, kLeastWidth, kMostWidth));
    few_ = find_few_moves(search_, most, thorough_ ? kWiderIfThorough * width : width);
    for (const FewMoves& few : few_) {
        search_.adopt(few.slots);
        keep_if_better();
    }
    few_.erase(std::remove_if(few_.begin(), few_.end(), [&](const FewMoves& few) { return few.cost >= best_.cost; }),
               few_.end());
    search_.adopt(best_.slots);
}

void LayerPlanner::improve(int rounds) {
    for (int i = 0; i < rounds && !settled(); ++i) improve_once(i);
}

void LayerPlanner::improve_briefly() {
    const int cheap = best_.cost == 0 || best_.cost > kFewReceipts ? 0 : kReceiptsOfFast / best_.cost;
    if (search_.shape().slots > kFewSlots && best_.reached) improve(std::min(cheap, kMostRoundsOfFast));
    if (search_.shape().slots <= kFewSlots) improve(std::clamp(kSlotsOfFast / search_.shape().slots, 4, 32));
}

// Whether windows can decide: a plan may be dropped for them, or a window's PAR is so high that a plan for every window
// may be worthwhile. What holds for all windows holds for several of them together.
bool LayerPlanner::windows_matter(const Windows& windows, double highest) const {
    if (windows.number() < 2 || !search_.alike()) return false;
    const bool moves = best_.slots != search_.start();
    if (moves && variance_ == nullptr) return true;
    if (moves) {
        const std::vector<double> pars = windows.pars(best_.slots.data());
        highest = pars.empty() ? 1.0 : *std::max_element(pars.begin(), pars.end());
    }
    return highest > std::max(target_, 1.0) + Steadying::kWorthwhile - kRounding;
}

OrderedMoves LayerPlanner::order(const Windows& windows, double highest) {
    if (!has_load_) return {};
    std::vector<int32_t> target = best_.slots;
    if (windows_matter(windows, highest)) {
        Steadying steadying(search_.shape(), windows.loads(), slots_, stay_near_ ? nodes_ : 1);
        steadied_ = steadying.improve(target, target_, variance_ != nullptr);
        if (steadied_ && target != search_.start()) {
            const std::vector<int32_t> start = search_.start();
            search_.begin(load_, slots_, variance_);
            OrderedMoves ordered = order_moves(search_, target);
            start_peak_ = mean(steadying.pars(start));
            ordered.groups = {{static_cast<int32_t>(ordered.moves.size()), mean(steadying.pars(target))}};
            return ordered;
        }
        // For constant load, a plan that helps the sum of the windows but hurts most of them is dropped.
        if (!steadied_ && variance_ == nullptr && target != search_.start()) {
            const std::vector<double> at_start = steadying.pars(search_.start()), after = steadying.pars(target);
            const double hurt = kHurt * (start_peak_ - best_.peak);
            if (!after.empty() && mean(after) > mean(at_start) + hurt && percentile95(after) > percentile95(at_start))
                return {};
        }
    }
    if (target == search_.start()) return {};
    search_.begin(load_, slots_, variance_);
    return order_moves(search_, target);
}

}  // namespace eplb
