// SPDX-License-Identifier: Apache-2.0
#include "order.h"

#include <algorithm>
#include <queue>
#include <utility>

namespace eplb {

namespace {

struct Change {
    int slot;
    int in;            // the expert that it takes
    int partner = -1;  // another change; the two are a swap and are made together
    bool done = false;
};

// The differences between two placements, rank by rank. Experts that stay on a rank keep their slots.
std::vector<Change> changes_between(const std::vector<int32_t>& start, const std::vector<int32_t>& target, int per_rank,
                                    int empty) {
    std::vector<Change> changes;
    std::vector<int32_t> incoming;
    std::vector<int> dropping;
    const int slots = static_cast<int>(start.size());
    for (int first = 0; first < slots; first += per_rank) {
        if (std::equal(start.begin() + first, start.begin() + first + per_rank, target.begin() + first)) continue;
        incoming.assign(target.begin() + first, target.begin() + first + per_rank);
        dropping.clear();
        for (int p = first; p < first + per_rank; ++p) {
            const auto kept = std::find(incoming.begin(), incoming.end(), start[p]);
            if (kept != incoming.end())
                incoming.erase(kept);
            else
                dropping.push_back(p);
        }
        size_t next = 0;
        for (const int expert : incoming)
            if (expert != empty) changes.push_back({dropping[next++], expert});
    }
    return changes;
}

class Ordering {
  public:
    Ordering(Search& search, const std::vector<int32_t>& target)
        : search_(search),
          empty_(search.shape().experts),
          start_peak_(search.peak()),
          best_peak_(start_peak_),
          changes_(changes_between(search.slots(), target, search.shape().per_rank(), empty_)),
          waiting_(static_cast<size_t>(empty_) + 1) {}

    OrderedMoves run() {
        pair_swaps();
        for (int i = 0; i < static_cast<int>(changes_.size()); ++i) offer(i);
        left_ = static_cast<int>(changes_.size());
        while (left_ > 0) {
            const int i = next();
            if (i < 0) {
                close_cycle();
                continue;
            }
            const int partner = changes_[i].partner;
            take(i);
            if (partner >= 0) take(partner);
            end_group();
        }
        if (open_) result_.groups.push_back({static_cast<int32_t>(result_.moves.size()), search_.peak()});
        return std::move(result_);
    }

  private:
    int out(const Change& change) const { return search_.slots()[change.slot]; }

    // Pairs two ranks that exchange experts of which both have the only copy.
    void pair_swaps() {
        const int per_rank = search_.shape().per_rank();
        std::vector<int> taker(static_cast<size_t>(empty_) + 1, -1);
        for (int i = 0; i < static_cast<int>(changes_.size()); ++i) taker[changes_[i].in] = i;
        for (int i = 0; i < static_cast<int>(changes_.size()); ++i) {
            Change& change = changes_[i];
            const int expert = out(change);
            if (change.partner >= 0 || expert == empty_ || search_.count(expert) > 1) continue;
            const int j = taker[expert];
            if (j < 0 || changes_[j].partner >= 0) continue;
            // A rank's incoming experts may go into any of its changed slots: take the expert that the partner drops.
            const int other = out(changes_[j]);
            if (other == empty_ || search_.count(other) > 1) continue;
            for (int k = 0; k < static_cast<int>(changes_.size()); ++k) {
                if (changes_[k].in != other || changes_[k].slot / per_rank != change.slot / per_rank) continue;
                if (changes_[k].partner >= 0) break;
                std::swap(changes_[k].in, change.in);
                change.partner = j;
                changes_[j].partner = i;
                break;
            }
        }
    }

    bool allowed(const Change& change) const {
        const int expert = out(change);
        return change.partner >= 0 || expert == empty_ || search_.count(expert) > 1;
    }

    // Gain per receipt; a swap has two.
    Search::Outcome outcome(const Change& change) {
        if (change.partner < 0) return search_.try_receipt(change.slot, change.in);
        Search::Outcome both = search_.try_swap(change.slot, changes_[change.partner].slot);
        both.gain *= 0.5F;
        return both;
    }

    void offer(int i) {
        const Change& change = changes_[i];
        if (change.partner >= 0 && change.partner < i) return;
        if (allowed(change))
            queue_.push({outcome(change).gain, -i});
        else
            waiting_[out(change)].push_back(i);
    }

    // The possible change with the best gain per receipt, or -1; a change that lifts a rank too high is taken only if
    // no other is left. Gains in the queue may be out of date: the best is computed again, and taken if it is still
    // best.
    int next() {
        const double bar = std::max(highest_allowed(), search_.peak());
        int found = -1;
        set_aside_.clear();
        while (!queue_.empty() && found < 0) {
            const int i = -queue_.top().second;
            queue_.pop();
            const Change& change = changes_[i];
            if (change.done) continue;
            if (!allowed(change)) {
                waiting_[out(change)].push_back(i);
                continue;
            }
            const Search::Outcome now = outcome(change);
            if (!queue_.empty() && now.gain < queue_.top().first)
                queue_.push({now.gain, -i});
            else if (now.peak > bar)
                set_aside_.push_back({now.gain, -i});
            else
                found = i;
        }
        for (const auto& entry : set_aside_) {
            if (found < 0)
                found = -entry.second;
            else if (-entry.second != found)
                queue_.push(entry);
        }
        return found;
    }

    // After every group, nine tenths of the gain so far must be kept.
    double highest_allowed() const { return best_peak_ + 0.1 * (start_peak_ - best_peak_); }

    void take(int i) {
        Change& change = changes_[i];
        change.done = true;
        --left_;
        search_.place(change.slot, change.in);
        result_.moves.push_back({change.slot, change.in});
        open_ = true;
        if (search_.count(change.in) < 2) return;
        for (const int waiter : waiting_[change.in])
            if (!changes_[waiter].done) offer(waiter);
        waiting_[change.in].clear();
    }

    void end_group() {
        const double peak = search_.peak();
        if (peak > highest_allowed()) return;
        best_peak_ = std::min(best_peak_, peak);
        open_ = false;
        result_.groups.push_back({static_cast<int32_t>(result_.moves.size()), peak});
    }

    // Every remaining change drops the only copy of an expert that another change brings back: follow one such cycle.
    void close_cycle() {
        std::vector<int> taker(static_cast<size_t>(empty_) + 1, -1), position(changes_.size(), -1), path;
        for (int i = 0; i < static_cast<int>(changes_.size()); ++i)
            if (!changes_[i].done) taker[changes_[i].in] = i;
        int i = 0;
        while (changes_[i].done) ++i;
        while (position[i] < 0) {
            position[i] = static_cast<int>(path.size());
            path.push_back(i);
            i = taker[out(changes_[i])];
        }
        const std::vector<int> cycle(path.begin() + position[i], path.end());
        for (const int k : cycle) take(k);
        end_group();
    }

    Search& search_;
    const int empty_;
    const double start_peak_;
    double best_peak_;  // lowest peak after any group
    std::vector<Change> changes_;
    std::vector<std::vector<int>> waiting_;  // by expert: changes that would drop its last copy
    std::priority_queue<std::pair<float, int>> queue_;
    std::vector<std::pair<float, int>> set_aside_;
    OrderedMoves result_;
    int left_ = 0;
    bool open_ = false;
};

}  // namespace

OrderedMoves order_moves(Search& search, const std::vector<int32_t>& target) { return Ordering(search, target).run(); }

}  // namespace eplb
