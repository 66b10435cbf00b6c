// SPDX-License-Identifier: Apache-2.0
#include "pairs.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <numeric>
#include <queue>
#include <set>
#include <utility>

#include "kernels.h"
#include "scratch.h"

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

using Load = int32_t;

// How many copies each expert gets. With two slots per rank the best pairing of given replicas is known: the heaviest
// with the lightest, and so on. So the search is over numbers of copies alone.
class Copies {
  public:
    // weight, count [E]: copies to start from, up to one for each rank (none: the expert is not among these). Their sum
    // is twice the ranks.
    Copies(const std::vector<Load>& weight, std::vector<int32_t> count, int ranks)
        : weight_(weight), count_(std::move(count)), ranks_(ranks), first_(weight.size()), changed_(2 * ranks) {
        for (int e = 0; e < static_cast<int>(weight_.size()); ++e)
            if (count_[e] > 0) order_.push_back(e);
        sort();
    }

    // Moves one copy after another to where it lowers the load of pairs above a limit most. The limit is `limit` first
    // and nears the busiest pair where no step helps. From there it goes on after random steps (iterated local search),
    // and keeps the best. At most `trials` pairings are looked at.
    void search(Load limit, int trials, Random& random) {
        trials_ = trials;
        split_heavy(limit);
        descend(limit);
        Load lowest = heaviest();
        if (lowest > limit) {
            const Found found = now_found();
            spread_out();
            if (heaviest() < lowest) {
                descend(limit);
                lowest = heaviest();
            } else {
                restore(found);
            }
        }
        Found best = now_found();
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
            best = now_found();
        }
    }

    Load heaviest() const { return now(0).heaviest; }
    const std::vector<int32_t>& count() const { return count_; }
    // The load of a replica of the expert; 0 if it is not among these, or none at all.
    Load share(int expert) const {
        return expert == static_cast<int>(count_.size()) || count_[expert] == 0 ? 0 : weight_[expert] / count_[expert];
    }

  private:
    struct Found {
        std::vector<int32_t> count, order;
    };
    Found now_found() const { return {count_, order_}; }
    void restore(const Found& found) {
        count_ = found.count;
        order_ = found.order;
        list();
    }

    void sort() {
        std::sort(order_.begin(), order_.end(), [&](int a, int b) { return is_lighter(a, b); });
        list();
    }

    // Every further copy goes to the heaviest replica.
    void spread_out() {
        count_ = give_copies({weight_.begin(), weight_.end()}, order_, ranks_, 2 * ranks_);
        sort();
    }

    void descend(Load limit) {
        while (heaviest() > limit && step(limit, false)) {
        }
        sink(limit);
    }

    bool is_lighter(int a, int b) const { return share(a) < share(b) || (share(a) == share(b) && a < b); }

    static int draw(size_t n, Random& random) { return static_cast<int>(random.below(static_cast<uint32_t>(n))); }

    // Lowers the busiest pair: first the load of all pairs near it, then of that alone.
    void sink(Load limit) {
        for (int part = 2; part <= kNearest && heaviest() > limit;) {
            const Load most = heaviest(), near = most - std::max(1, (most - limit) / part);
            while (heaviest() > near && step(near, false)) {
            }
            if (heaviest() >= most) part *= 2;
        }
        while (heaviest() > limit && step(limit, true)) {
        }
    }

    void kick(Random& random) {
        std::vector<int32_t> losing;
        for (const int e : order_)
            if (count_[e] > 1) losing.push_back(e);
        for (int kicks = 1 + draw(kMostKicks, random); kicks > 0 && !losing.empty(); --kicks) {
            const int from = losing[draw(losing.size(), random)], to = order_[draw(order_.size(), random)];
            if (from != to && count_[from] > 1 && count_[to] < ranks_) transfer(from, to);
        }
    }

    void list() {
        loads_.clear();
        for (const int e : order_) {
            first_[e] = static_cast<int>(loads_.size());
            loads_.insert(loads_.end(), count_[e], share(e));
        }
    }

    void transfer(int from, int to) {
        --count_[from];
        ++count_[to];
        for (const int e : {from, to}) order_.erase(std::find(order_.begin(), order_.end(), e));
        for (const int e : {from, to})
            order_.insert(std::lower_bound(order_.begin(), order_.end(), e,
                                           [&](int a, int b) { return is_lighter(a, b); }),
                          e);
        list();
    }

    Load after_loss(int expert) const { return weight_[expert] / (count_[expert] - 1); }

    // Experts whose replicas fit beside no other get a copy of the expert whose replicas stay lightest.
    void split_heavy(Load limit) {
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

    PairLoads now(Load limit) const {
        return with_twins(pair_loads(ranks_, loads_.data(), limit), loads_, owner(ranks_ - 1) == owner(ranks_), limit,
                          count_[owner(ranks_)]);
    }

    // The pairs if one copy of `from` were one of `to`.
    PairLoads look(int from, int to, Load limit) {
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
        std::sort(std::begin(changes), std::end(changes), [](const Change& a, const Change& b) { return a.at < b.at; });
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

    // Two replicas of one expert, which a rank may not have, are lightest and heaviest only in the middle. Then one of
    // them pairs with the next heavier replica.
    PairLoads with_twins(PairLoads pairs, const std::vector<Load>& loads, bool twins, Load limit, int copies) const {
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

    // The expert of the replica at a position in loads_.
    int owner(int position) const { return order_[place_of(position)]; }
    int place_of(int position) const {
        const auto after = std::upper_bound(order_.begin(), order_.end(), position,
                                            [&](int at, int e) { return at < first_[e]; });
        return static_cast<int>(after - order_.begin()) - 1;
    }

    // The places in order_ of the experts of the busiest pair, the lighter first.
    std::pair<int, int> busiest_pair() const {
        int light = 0, heavy = 2 * ranks_ - 1, best = 0;
        for (int i = 0; i < ranks_; ++i)
            if (loads_[i] + loads_[heavy - i] > loads_[best] + loads_[heavy - best]) best = i;
        light = best;
        heavy -= best;
        return {place_of(light), place_of(heavy)};
    }

    // Moves the copy that lowers the load above `limit` most, or the busiest pair's. Returns false if none does. The
    // experts of the busiest pair and the next heavier one may get a copy, those whose replicas stay lightest may lose
    // one.
    bool step(Load limit, bool lower_busiest) {
        const auto measure = [&](const PairLoads& loads) { return lower_busiest ? loads.heaviest : loads.above; };
        std::vector<int32_t> losing;
        for (const int e : order_)
            if (count_[e] > 1) losing.push_back(e);
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

    const std::vector<Load>& weight_;
    std::vector<int32_t> count_;
    const int ranks_;
    std::vector<int32_t> order_, first_;  // experts, lightest replica first; [E] place of the first of them in loads_
    std::vector<Load> loads_, changed_;   // of all replicas, lightest first; the same after a change
    int trials_ = 0;
};

// Which replicas share a rank, with few receipts: ranks keep what they hold, as far as copies and limit allow. Then the
// heaviest replica without a slot takes a slot beside which there is room. If there is none, it takes the slot of the
// lightest replica whose partner leaves room, and that one is without a slot: of all that could give way the lightest
// fits wherever another does. If there is none either, too few ranks have a light replica, and it gets a rank together
// with the lightest replica without a slot.
class Rooms {
  public:
    Rooms(const Search& search, const std::vector<int32_t>& ranks, const Copies& copies, Load limit)
        : start_(search.start()),
          empty_(search.shape().experts),
          ranks_(ranks),
          copies_(copies),
          limit_(limit),
          missing_(copies.count()),
          held_(2 * ranks.size(), empty_) {}

    // Writes the ranks' slots into `slots` [P]; returns false if it finds no way.
    bool fill(std::vector<int32_t>& slots) {
        keep();
        list();
        while (!without_.empty()) {
            const auto heaviest = std::prev(without_.end());
            const int expert = -heaviest->second;
            const Load load = heaviest->first;
            without_.erase(heaviest);
            if (!take_room(expert, load) && !replace(expert, load) && !clear(expert, load)) return false;
        }
        for (size_t r = 0; r < ranks_.size(); ++r) std::copy_n(&held_[2 * r], 2, &slots[2 * ranks_[r]]);
        return true;
    }

  private:
    using Entry = std::pair<Load, int32_t>;
    using LightestFirst = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;

    Load share(int slot) const { return copies_.share(held_[slot]); }
    Load both(int rank) const { return share(2 * rank) + share(2 * rank + 1); }
    bool has_room(int rank) const { return held_[2 * rank] == empty_ || held_[2 * rank + 1] == empty_; }
    bool held_at_start(int slot, int expert) const {
        const int rank = ranks_[slot / 2];
        return start_[2 * rank] == expert || start_[2 * rank + 1] == expert;
    }

    void drop(int slot) {
        ++missing_[held_[slot]];
        held_[slot] = empty_;
    }

    void keep() {
        const int ranks = static_cast<int>(ranks_.size());
        for (int r = 0; r < ranks; ++r) {
            const int first = start_[2 * ranks_[r]], second = start_[2 * ranks_[r] + 1];
            held_[2 * r] = first;
            if (second != first) held_[2 * r + 1] = second;
        }
        std::vector<Entry> slots;
        for (int slot = 0; slot < 2 * ranks; ++slot)
            if (held_[slot] != empty_) slots.push_back({both(slot / 2), slot});
        std::sort(slots.begin(), slots.end());
        for (const auto& [load, slot] : slots)  // copies above the number wanted are dropped from the busiest ranks
            if (missing_[held_[slot]]-- <= 0) drop(slot);
        for (int r = 0; r < ranks; ++r)
            if (both(r) > limit_) drop(share(2 * r) > share(2 * r + 1) ? 2 * r : 2 * r + 1);
    }

    // Lists the replicas without a slot and the ranks with room. A rank without any gets the lightest replica, which
    // leaves most room.
    void list() {
        for (int e = 0; e < empty_; ++e)
            for (int i = 0; i < missing_[e]; ++i) without_.insert({copies_.share(e), -e});
        for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
            if (both(r) == 0 && held_[2 * r] == empty_ && held_[2 * r + 1] == empty_) {
                held_[2 * r] = -without_.begin()->second;
                without_.erase(without_.begin());
            }
            offer(r);
        }
    }

    // Makes a rank known as one with room, or as one whose replicas may give way.
    void offer(int r) {
        for (const int slot : {2 * r, 2 * r + 1})
            if (held_[slot] != empty_) (has_room(r) ? rooms_ : staying_).push({share(slot), slot});
    }

    // Puts the expert beside a replica that leaves room, on a rank that held it at the start if there is one.
    bool take_room(int expert, Load load) {
        for (; !rooms_.empty() && rooms_.top().first + load <= limit_; rooms_.pop())
            open_.push_back(rooms_.top().second);
        open_.erase(std::remove_if(open_.begin(), open_.end(),
                                   [&](int slot) { return !has_room(slot / 2) || share(slot) + load > limit_; }),
                    open_.end());
        int found = -1;
        for (const int slot : open_) {
            if (held_[slot] == expert || held_[slot] == empty_) continue;
            if (found < 0) found = slot;
            if (!held_at_start(slot, expert)) continue;
            found = slot;
            break;
        }
        if (found < 0) return false;
        held_[found ^ 1] = expert;
        offer(found / 2);
        return true;
    }

    bool replace(int expert, Load load) {
        for (; !staying_.empty() && staying_.top().first + load <= limit_; staying_.pop()) {
            const int slot = staying_.top().second ^ 1;
            ways_.push({share(slot), slot});
        }
        std::vector<Entry> refused;
        bool placed = false;
        while (!placed && !ways_.empty() && ways_.top().first < load) {
            const Entry way = ways_.top();
            const int slot = way.second;
            ways_.pop();
            if (has_room(slot / 2) || share(slot) != way.first || share(slot ^ 1) + load > limit_) continue;
            if (held_[slot ^ 1] == expert) {
                refused.push_back(way);
                continue;
            }
            without_.insert({way.first, -held_[slot]});
            held_[slot] = expert;
            offer(slot / 2);
            placed = true;
        }
        for (const Entry& way : refused) ways_.push(way);
        return placed;
    }

    // Of the ranks with lighter replicas only: one with room, because that takes fewer receipts; of those the lightest.
    bool clear(int expert, Load load) {
        auto lightest = without_.begin();
        while (lightest != without_.end() && -lightest->second == expert) ++lightest;
        if (lightest == without_.end() || lightest->first + load > limit_) return false;
        const int second = -lightest->second;
        int rank = -1;
        std::pair<bool, Load> best{true, load};
        for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
            const std::pair<bool, Load> cost{!has_room(r), std::max(share(2 * r), share(2 * r + 1))};
            if (cost.second < load && (rank < 0 || cost < best)) rank = r, best = cost;
        }
        if (rank < 0) return false;
        without_.erase(lightest);
        for (const int slot : {2 * rank, 2 * rank + 1})
            if (held_[slot] != empty_) without_.insert({share(slot), -held_[slot]});
        held_[2 * rank] = expert;
        held_[2 * rank + 1] = second;
        offer(rank);
        return true;
    }

    const std::vector<int32_t>& start_;
    const int32_t empty_;
    const std::vector<int32_t>& ranks_;
    const Copies& copies_;
    const Load limit_;
    std::vector<int32_t> missing_;   // [E] copies without a slot
    std::vector<int32_t> held_;      // two for each of the ranks
    std::multiset<Entry> without_;   // replicas without a slot
    LightestFirst rooms_, staying_;  // by load: slots beside which there is room; those whose neighbour may give way
    std::vector<int32_t> open_;      // slots beside which there is room for all that is without one
    LightestFirst ways_;             // slots whose replica may give way, by load
};

// Copies on the ranks of each expert, and one more for the heaviest replica until all slots are used. None if that is
// impossible.
std::vector<int32_t> copies_now(const Search& search, const std::vector<Load>& weight, const std::vector<int32_t>& ranks) {
    const int empty = search.shape().experts;
    const std::vector<int32_t>& slots = search.slots();
    std::vector<int32_t> count(empty, 0);
    int used = 0;
    for (const int r : ranks) {
        for (const int e : {slots[2 * r], slots[2 * r + 1] == slots[2 * r] ? empty : slots[2 * r + 1]}) {
            if (e == empty) continue;
            ++count[e];
            ++used;
        }
    }
    for (; used < 2 * static_cast<int>(ranks.size()); ++used) {
        int best = -1;
        for (int e = 0; e < empty; ++e) {
            if (count[e] == 0 || count[e] == static_cast<int>(ranks.size())) continue;
            if (best < 0 || weight[e] / count[e] > weight[best] / count[best]) best = e;
        }
        if (best < 0) return {};
        ++count[best];
    }
    return count;
}

}  // namespace

std::vector<int32_t> place_in_pairs(const Search& search, double limit, int trials, Random& random) {
    const Shape& shape = search.shape();
    std::vector<Load> weight;
    for (int e = 0; e < shape.experts; ++e) weight.push_back(search.weight(e));
    std::vector<int32_t> slots(shape.slots, shape.experts);
    std::vector<std::vector<int32_t>> counts;
    const int nodes = search.confined_nodes(), per_node = shape.ranks / nodes;
    bool filled = true;
    for (int node = 0; node < nodes; ++node) {
        std::vector<int32_t> ranks(per_node);
        std::iota(ranks.begin(), ranks.end(), node * per_node);
        std::vector<int32_t> count = copies_now(search, weight, ranks);
        if (count.empty()) return {};
        Copies copies(weight, std::move(count), per_node);
        const auto most = static_cast<Load>(limit * Search::unit());
        copies.search(most, trials, random);
        counts.push_back(copies.count());
        filled = filled && Rooms(search, ranks, copies, std::max(most, copies.heaviest())).fill(slots);
    }
    return filled ? slots : place_from_scratch(search, nullptr, counts);
}

}  // namespace eplb
