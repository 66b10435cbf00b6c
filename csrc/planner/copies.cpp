// SPDX-License-Identifier: Apache-2.0
#include "copies.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <numeric>
#include <tuple>

namespace eplb {

namespace {

// Experts that may get a copy in a step, and those that may lose one.
constexpr size_t kGaining = 3;
constexpr ptrdiff_t kLosing = 16;

// The last steps lower pairs within this part of the way from the busiest to the limit.
constexpr int kNearest = 16;

// Most random steps at once, and how often in a row they may lead to nothing better.
constexpr int kMostKicks = 2;
constexpr int kMostInVain = 8;

int draw(size_t n, Random& random) { return static_cast<int>(random.below(static_cast<uint32_t>(n))); }

}  // namespace

std::vector<int32_t> give_copies(const std::vector<int64_t>& weight, std::vector<int32_t> copies, int ranks,
                                 int slots) {
    int left = slots - std::accumulate(copies.begin(), copies.end(), 0);
    if (left < 0) return {};
    using Entry = std::pair<int64_t, int32_t>;  // load of a replica; of equal ones the lowest expert first
    std::vector<Entry> heap;
    for (int e = 0; e < static_cast<int>(copies.size()); ++e)
        if (copies[e] > 0) heap.push_back({weight[e] / copies[e], -e});
    std::make_heap(heap.begin(), heap.end());
    for (; left > 0; --left) {
        while (!heap.empty() && copies[-heap.front().second] == ranks) {
            std::pop_heap(heap.begin(), heap.end());
            heap.pop_back();
        }
        if (heap.empty()) return {};
        std::pop_heap(heap.begin(), heap.end());
        const int e = -heap.back().second;
        heap.back().first = weight[e] / ++copies[e];
        std::push_heap(heap.begin(), heap.end());
    }
    return copies;
}

Copies::Copies(const std::vector<Load>& weight, std::vector<int32_t> count, int ranks)
    : weight_(weight), count_(std::move(count)), ranks_(ranks), first_(weight.size()), changed_(2 * ranks) {
    for (int e = 0; e < static_cast<int>(weight_.size()); ++e)
        if (count_[e] > 0) order_.push_back(e);
    sort();
}

void Copies::search(Load limit, int trials, Random& random) {
    trials_ = trials;
    split_heavy(limit);
    descend(limit);
    Load lowest = heaviest();
    if (lowest > limit) {
        const Found before = found();
        spread_out();
        if (heaviest() < lowest) {
            descend(limit);
            lowest = heaviest();
        } else {
            restore(before);
        }
    }
    Found best = found();
    for (int in_vain = 0; lowest > limit && trials_ > 0 && in_vain < kMostInVain; ++in_vain) {
        kick(random);
        while (heaviest() > lowest && step(lowest - 1, false)) {
        }
        if (heaviest() < lowest) {
            sink(limit);
            in_vain = 0;
        }
        if (heaviest() > lowest) {
            restore(best);
            continue;
        }
        lowest = heaviest();
        best = found();
    }
}

void Copies::restore(const Found& found) {
    count_ = found.count;
    order_ = found.order;
    list();
}

void Copies::sort() {
    std::sort(order_.begin(), order_.end(), [&](int a, int b) { return is_lighter(a, b); });
    list();
}

void Copies::list() {
    loads_.clear();
    for (const int e : order_) {
        first_[e] = static_cast<int>(loads_.size());
        loads_.insert(loads_.end(), count_[e], share(e));
    }
}

// Every further copy goes to the heaviest replica.
void Copies::spread_out() {
    for (const int e : order_) count_[e] = 1;
    count_ = give_copies({weight_.begin(), weight_.end()}, std::move(count_), ranks_, 2 * ranks_);
    sort();
}

// Experts whose replicas fit beside no other get a copy of the expert whose replicas stay lightest.
void Copies::split_heavy(Load limit) {
    for (;;) {
        const int top = order_.back();
        if (share(top) + loads_.front() <= limit || count_[top] == ranks_) return;
        int from = -1;
        for (const int e : order_)
            if (count_[e] > 1 && e != top && (from < 0 || after_loss(e) < after_loss(from))) from = e;
        if (from < 0 || after_loss(from) >= share(top)) return;
        transfer(from, top);
    }
}

int Copies::place_of(int position) const {
    const auto after =
        std::upper_bound(order_.begin(), order_.end(), position, [&](int at, int e) { return at < first_[e]; });
    return static_cast<int>(after - order_.begin()) - 1;
}

PairLoads Copies::now(Load limit) const {
    return with_twins(pair_loads(ranks_, loads_.data(), limit), loads_, owner(ranks_ - 1) == owner(ranks_), limit,
                      count_[owner(ranks_)]);
}

// Two replicas of one expert, which a rank may not have, are lightest and heaviest only in the middle. Then one of
// them pairs with the next heavier replica.
PairLoads Copies::with_twins(PairLoads pairs, const std::vector<Load>& loads, bool twins, Load limit,
                             int copies) const {
    if (!twins) return pairs;
    const Load load = loads[ranks_];
    int first = ranks_ - 1, last = ranks_ + 1;
    while (first > 0 && last - first < copies && loads[first - 1] == load) --first;
    while (last < 2 * ranks_ && last - first < copies && loads[last] == load) ++last;
    const int number = std::min(ranks_ - first, last - ranks_);
    for (int i = last; i < std::min(last + number, 2 * ranks_); ++i) {
        pairs.heaviest = std::max(pairs.heaviest, load + loads[i]);
        pairs.above += std::max(load + loads[i] - limit, 0);
    }
    return pairs;
}

// The pairs if one copy of `from` were one of `to`.
PairLoads Copies::look(int from, int to, Load limit) {
    struct Change {
        int at, taken, given;  // position, replicas taken away there, replicas put there
        int expert;
        Load load;
    };
    const Load more = after_loss(from), less = weight_[to] / (count_[to] + 1);
    const auto position = [&](Load load) {
        return static_cast<int>(std::lower_bound(loads_.begin(), loads_.end(), load) - loads_.begin());
    };
    Change changes[] = {{first_[from], count_[from], 0, from, 0},
                        {position(more), 0, count_[from] - 1, from, more},
                        {first_[to], count_[to], 0, to, 0},
                        {position(less), 0, count_[to] + 1, to, less}};
    const auto key = [&](const Change& change) { return std::tuple(change.at, change.expert == to, change.given > 0); };
    std::sort(std::begin(changes), std::end(changes),
              [&](const Change& a, const Change& b) { return key(a) < key(b); });
    int next = 0, out = 0;
    int middle[] = {-1, -1}, copies = 0;  // experts of the two replicas in the middle, copies of the second
    const auto note = [&](int first, int last, int expert, int source, int number) {
        for (const int i : {0, 1}) {
            const int at = ranks_ - 1 + i;
            if (at < first || at >= last) continue;
            middle[i] = expert >= 0 ? expert : owner(source + at - first);
            copies = expert >= 0 ? number : count_[middle[i]];
        }
    };
    const auto copy_to = [&](int end) {
        std::copy(loads_.begin() + next, loads_.begin() + end, changed_.begin() + out);
        note(out, out + end - next, -1, next, 0);
        out += end - next;
    };
    for (const Change& change : changes) {
        const int end = std::max(next, change.at);
        copy_to(end);
        std::fill_n(changed_.begin() + out, change.given, change.load);
        note(out, out + change.given, change.expert, 0, change.given);
        out += change.given;
        next = end + change.taken;
    }
    copy_to(2 * ranks_);
    return with_twins(pair_loads(ranks_, changed_.data(), limit), changed_, middle[0] == middle[1], limit, copies);
}

// The places in order_ of the experts of the busiest pair, the lighter first.
std::pair<int, int> Copies::busiest_pair() const {
    int light = 0, heavy = 2 * ranks_ - 1, best = 0;
    for (int i = 0; i < ranks_; ++i)
        if (loads_[i] + loads_[heavy - i] > loads_[best] + loads_[heavy - best]) best = i;
    light = best;
    heavy -= best;
    return {place_of(light), place_of(heavy)};
}

std::vector<int32_t> Copies::copied() const {
    std::vector<int32_t> found;
    for (const int e : order_)
        if (count_[e] > 1) found.push_back(e);
    return found;
}

void Copies::transfer(int from, int to) {
    --count_[from];
    ++count_[to];
    for (const int e : {from, to}) order_.erase(std::find(order_.begin(), order_.end(), e));
    for (const int e : {from, to})
        order_.insert(std::lower_bound(order_.begin(), order_.end(), e, [&](int a, int b) { return is_lighter(a, b); }),
                      e);
    list();
}

// Moves the copy that lowers the load above `limit` most, or the busiest pair's. Returns false if none does. The
// experts of the busiest pair and the next heavier one may get a copy, those whose replicas stay lightest may lose
// one.
bool Copies::step(Load limit, bool lower_busiest) {
    const auto measure = [&](const PairLoads& loads) { return lower_busiest ? loads.heaviest : loads.above; };
    std::vector<int32_t> losing = copied();
    const auto last = losing.begin() + std::min<ptrdiff_t>(kLosing, losing.size());
    std::partial_sort(losing.begin(), last, losing.end(), [&](int a, int b) {
        return after_loss(a) < after_loss(b) || (after_loss(a) == after_loss(b) && a < b);
    });
    losing.erase(last, losing.end());
    const auto [light, heavy] = busiest_pair();
    std::vector<int32_t> gaining{order_[heavy]};
    if (light != heavy) gaining.push_back(order_[light]);
    for (size_t i = heavy + 1; i < order_.size() && gaining.size() < kGaining; ++i) gaining.push_back(order_[i]);
    Load best = measure(now(limit));
    int from = -1, to = -1;
    for (const int gains : gaining) {
        if (count_[gains] == ranks_) continue;
        for (const int loses : losing) {
            if (loses == gains || --trials_ < 0) continue;
            const Load then = measure(look(loses, gains, limit));
            if (then < best) best = then, from = loses, to = gains;
        }
    }
    if (from < 0) return false;
    transfer(from, to);
    return true;
}

// Lowers the busiest pair: first the load of all pairs near it, then of that alone.
void Copies::sink(Load limit) {
    for (int part = 2; part <= kNearest && heaviest() > limit;) {
        const Load most = heaviest(), near = most - std::max(1, (most - limit) / part);
        while (heaviest() > near && step(near, false)) {
        }
        if (heaviest() >= most) part *= 2;
    }
    while (heaviest() > limit && step(limit, true)) {
    }
}

void Copies::descend(Load limit) {
    while (heaviest() > limit && step(limit, false)) {
    }
    sink(limit);
}

void Copies::kick(Random& random) {
    const std::vector<int32_t> losing = copied();
    for (int kicks = 1 + draw(kMostKicks, random); kicks > 0 && !losing.empty(); --kicks) {
        const int from = losing[draw(losing.size(), random)], to = order_[draw(order_.size(), random)];
        if (from != to && count_[from] > 1 && count_[to] < ranks_) transfer(from, to);
    }
}

}  // namespace eplb
