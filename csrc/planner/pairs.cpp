// SPDX-License-Identifier: Apache-2.0
#include "pairs.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <numeric>
#include <queue>
#include <set>
#include <utility>

#include "copies.h"
#include "scratch.h"

namespace eplb {

namespace {

using Load = Copies::Load;

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
std::vector<int32_t> copies_now(const Search& search, const std::vector<int64_t>& weight,
                                const std::vector<int32_t>& ranks) {
    const int empty = search.shape().experts;
    const std::vector<int32_t>& slots = search.slots();
    std::vector<int32_t> count(empty, 0);
    for (const int r : ranks)
        for (const int e : {slots[2 * r], slots[2 * r + 1] == slots[2 * r] ? empty : slots[2 * r + 1]})
            if (e != empty) ++count[e];
    const int number = static_cast<int>(ranks.size());
    return give_copies(weight, std::move(count), number, 2 * number);
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
        std::vector<int32_t> count = copies_now(search, {weight.begin(), weight.end()}, ranks);
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
