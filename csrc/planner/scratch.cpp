// SPDX-License-Identifier: Apache-2.0
// One file, because all steps of a placement from scratch work on the same bins.
#include "scratch.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <utility>

#include "copies.h"

namespace eplb {

namespace {

// Experts bin by bin; each bin has as many places as a rank has slots.
struct Bins {
    Bins(int number, int size) : number(number), size(size), expert(static_cast<size_t>(number) * size), used(number) {}
    int32_t* begin(int bin) { return &expert[static_cast<size_t>(bin) * size]; }
    int32_t* end(int bin) { return begin(bin) + used[bin]; }
    const int32_t* begin(int bin) const { return &expert[static_cast<size_t>(bin) * size]; }
    const int32_t* end(int bin) const { return begin(bin) + used[bin]; }
    bool holds(int bin, int e) const { return std::find(begin(bin), end(bin), e) != end(bin); }
    bool full(int bin) const { return used[bin] == size; }
    void put(int bin, int e) { begin(bin)[used[bin]++] = e; }

    int number, size;
    std::vector<int32_t> expert;  // [number, size]
    std::vector<int32_t> used;    // [number]
};

// Fills bins, heaviest replica first, each copy into the lightest bin without the expert.
class Packer {
  public:
    Packer(int bins, int size, const std::vector<int64_t>& share) : share_(share), held_(bins, size) {}

    // The same for bins of unequal speed (`slowness` by bin): each copy goes to the bin that is done first.
    bool pack(const std::vector<std::pair<int32_t, int32_t>>& items, const std::vector<double>& slowness) {
        std::vector<double> load(held_.number, 0.0);
        for (const auto& [expert, copies] : items) {
            const auto share = static_cast<double>(share_[expert]);
            taken_.clear();
            for (int left = copies; left > 0; --left) {
                int best = -1;
                for (int bin = 0; bin < held_.number; ++bin) {
                    if (held_.full(bin) || held_.holds(bin, expert)) continue;
                    if (best < 0 || (load[bin] + share) * slowness[bin] < (load[best] + share) * slowness[best])
                        best = bin;
                }
                if (best < 0) {
                    for (int bin = 0; bin < held_.number; ++bin) taken_.push_back({0, bin});
                    if (!make_room(expert)) return false;
                    continue;
                }
                held_.put(best, expert);
                load[best] += share;
            }
        }
        return true;
    }

    // items: experts with their copies, in falling order of share. False if the bins cannot be filled this way.
    bool pack(const std::vector<std::pair<int32_t, int32_t>>& items) {
        std::vector<Entry> entries(held_.number);
        for (int bin = 0; bin < held_.number; ++bin) entries[bin] = {0, bin};
        Open open(std::greater<Entry>(), std::move(entries));
        for (const auto& [expert, copies] : items) {
            taken_.clear();
            for (int left = copies; left > 0; --left) {
                if (open.empty()) {
                    if (!make_room(expert)) return false;
                    continue;
                }
                const auto [load, bin] = open.top();
                open.pop();
                held_.put(bin, expert);
                taken_.push_back({load + share_[expert], bin});
            }
            for (const Entry& entry : taken_)
                if (!held_.full(entry.second)) open.push(entry);
        }
        return true;
    }

    int64_t heaviest() const {
        int64_t most = 0;
        for (int bin = 0; bin < held_.number; ++bin) {
            int64_t load = 0;
            for (const int32_t* e = held_.begin(bin); e < held_.end(bin); ++e) load += share_[*e];
            most = std::max(most, load);
        }
        return most;
    }

    Bins& bins() { return held_; }

  private:
    using Entry = std::pair<int64_t, int32_t>;  // a bin with room, by load
    using Open = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;

    // For an expert that every bin with room holds already: one of them takes another expert from a full bin, which
    // takes this one instead. Loads may get worse; later steps correct that.
    bool make_room(int expert) {
        for (const auto& [load, to] : taken_) {
            if (held_.full(to)) continue;
            for (int from = 0; from < held_.number; ++from) {
                if (held_.holds(from, expert)) continue;
                for (int32_t* other = held_.begin(from); other < held_.end(from); ++other) {
                    if (held_.holds(to, *other)) continue;
                    held_.put(to, *other);
                    *other = expert;
                    return true;
                }
            }
        }
        return false;
    }

    const std::vector<int64_t>& share_;  // [E] load of a replica
    Bins held_;
    std::vector<Entry> taken_;  // bins that have just got the expert
};

// Which of `ranks` takes which bin: those with most experts in common first, then by augmenting paths (Kuhn, 1955)
// where a bin has any in common with a rank.
class Matching {
  public:
    Matching(const Search& search, const std::vector<int32_t>& ranks, const Bins& bins)
        : bins_(bins.number),
          common_(static_cast<size_t>(bins_) * bins_, 0),
          near_(bins_),
          rank_of_(bins_, -1),
          bin_of_(bins_, -1) {
        const int experts = search.shape().experts, size = bins.size;
        // Which of the ranks have an expert at the start, as lists one after another.
        const std::vector<int32_t>& start = search.start();
        std::vector<int32_t> first(experts + 2, 0), homes(static_cast<size_t>(bins_) * size);
        for (const int r : ranks)
            for (int p = r * size; p < (r + 1) * size; ++p) ++first[std::min(start[p] + 2, experts + 1)];
        for (int e = 2; e <= experts; ++e) first[e] += first[e - 1];
        for (int r = 0; r < bins_; ++r)
            for (int p = ranks[r] * size; p < (ranks[r] + 1) * size; ++p)
                if (start[p] < experts) homes[first[start[p] + 1]++] = r;
        std::vector<std::vector<std::pair<int32_t, int32_t>>> by_common(size + 1);
        for (int bin = 0; bin < bins_; ++bin) {
            for (const int32_t* e = bins.begin(bin); e < bins.end(bin); ++e) {
                if (*e == experts) continue;
                for (int i = first[*e]; i < first[*e + 1]; ++i) {
                    const int r = homes[i];
                    if (i > first[*e] && r == homes[i - 1]) continue;  // twice on one rank
                    if (common(bin, r)++ == 0) near_[bin].push_back(r);
                }
            }
            for (const int r : near_[bin]) by_common[common(bin, r)].push_back({bin, r});
        }
        for (int most = size; most > 0; --most)
            for (const auto& [bin, r] : by_common[most])
                if (rank_of_[bin] < 0 && bin_of_[r] < 0) join(bin, r);
        for (int bin = 0; bin < bins_; ++bin) {
            if (rank_of_[bin] >= 0) continue;
            tried_.assign(bins_, 0);
            augment(bin);
        }
        for (int bin = 0, r = 0; bin < bins_; ++bin) {
            if (rank_of_[bin] >= 0) continue;
            while (bin_of_[r] >= 0) ++r;
            join(bin, r);
        }
    }

    int rank_of(int bin) const { return rank_of_[bin]; }  // index in ranks

  private:
    bool augment(int bin) {
        for (const int r : near_[bin]) {
            if (tried_[r]) continue;
            tried_[r] = 1;
            const int other = bin_of_[r];
            // Only bins with one expert in common with their rank give it up, so that nothing is lost.
            if (other >= 0 && (common(other, r) > 1 || !augment(other))) continue;
            join(bin, r);
            return true;
        }
        return false;
    }

    void join(int bin, int r) {
        rank_of_[bin] = r;
        bin_of_[r] = bin;
    }

    uint8_t& common(int bin, int r) { return common_[static_cast<size_t>(bin) * bins_ + r]; }

    const int bins_;
    std::vector<uint8_t> common_, tried_;     // [bins, ranks] experts in common; [ranks]
    std::vector<std::vector<int32_t>> near_;  // [bins] ranks with any expert in common
    std::vector<int32_t> rank_of_, bin_of_;   // [bins], [ranks]
};

void lay_over(const Search& search, const std::vector<int32_t>& ranks, const Bins& bins, std::vector<int32_t>& slots) {
    const Matching matching(search, ranks, bins);
    for (int bin = 0; bin < bins.number; ++bin)
        std::copy(bins.begin(bin), bins.end(bin), slots.begin() + ranks[matching.rank_of(bin)] * bins.size);
}

// Ranks and the experts that they may hold: all ranks and experts, or a node and its experts.
struct Block {
    std::vector<int32_t> ranks, experts;
};

std::vector<Block> blocks_of(const Search& search) {
    const int nodes = search.confined_nodes(), per_node = search.shape().ranks / nodes;
    std::vector<Block> blocks(nodes);
    for (int node = 0; node < nodes; ++node) {
        Block& block = blocks[node];
        block.ranks.resize(per_node);
        std::iota(block.ranks.begin(), block.ranks.end(), node * per_node);
        for (int e = 0; e < search.shape().experts; ++e)
            if (nodes == 1 || search.is_near(node, e)) block.experts.push_back(e);
    }
    return blocks;
}

// The copies of a block's experts, each of which has at least one; see give_copies().
std::vector<int32_t> copies_from_one(const std::vector<int64_t>& weight, const Block& block, int per_rank) {
    std::vector<int32_t> copies(weight.size(), 0);
    for (const int e : block.experts) copies[e] = 1;
    const int ranks = static_cast<int>(block.ranks.size());
    return give_copies(weight, std::move(copies), ranks, ranks * per_rank);
}

std::vector<int64_t> shares_of(const std::vector<int64_t>& weight, const std::vector<int32_t>& copies) {
    std::vector<int64_t> share(weight.size(), 0);
    for (size_t e = 0; e < weight.size(); ++e)
        if (copies[e] > 0) share[e] = weight[e] / copies[e];
    return share;
}

// The experts of a block, heaviest replica first.
std::vector<int32_t> by_share(std::vector<int32_t> experts, const std::vector<int64_t>& share) {
    std::sort(experts.begin(), experts.end(),
              [&](int a, int b) { return share[a] > share[b] || (share[a] == share[b] && a < b); });
    return experts;
}

// The experts that have copies, with their numbers of copies.
std::vector<std::pair<int32_t, int32_t>> items_of(const std::vector<int32_t>& experts,
                                                  const std::vector<int32_t>& copies) {
    std::vector<std::pair<int32_t, int32_t>> items;
    items.reserve(experts.size());
    for (const int e : experts)
        if (copies[e] > 0) items.push_back({e, copies[e]});
    return items;
}

// Repacks some ranks of a block, see repack().
class Repacking {
  public:
    Repacking(const Search& search, const Block& block, const std::vector<int32_t>& copies,
              const std::vector<int64_t>& share, int64_t limit)
        : search_(search),
          block_(block),
          share_(share),
          limit_(limit),
          size_(search.shape().per_rank()),
          sorted_(by_share(block.experts, share)),
          kept_(search.shape().ranks, size_),
          found_(0, size_) {
        keep_wanted(copies);
        choose_order();
    }

    bool fill(std::vector<int32_t>& slots) {
        const int most = static_cast<int>(order_.size());
        int step = 1 + most / 16, chosen = must_;
        while (!attempt(chosen)) {  // double the step until it succeeds, then bisect for the fewest ranks
            if (chosen == most) return false;
            chosen = std::min(most, chosen + step);
            step *= 2;
        }
        int low = std::max(must_ - 1, chosen - step / 2), high = chosen;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (attempt(middle) ? high : low) = middle;
        }
        if (high != last_ && !attempt(high)) return false;
        lay_over(search_, chosen_ranks(high), found_, slots);
        return true;
    }

  private:
    // Drops an expert's surplus copies, from the busiest of its ranks, or notes the copies that it lacks.
    void keep_wanted(const std::vector<int32_t>& copies) {
        const int experts = search_.shape().experts;
        const std::vector<int32_t>& start = search_.start();
        load_.assign(search_.shape().ranks, 0);
        lacking_.assign(experts, 0);
        std::vector<std::vector<int32_t>> holders(experts);
        for (const int r : block_.ranks)
            for (int p = r * size_; p < (r + 1) * size_; ++p) {
                if (start[p] == experts || kept_.holds(r, start[p])) continue;
                kept_.put(r, start[p]);
                holders[start[p]].push_back(r);
                load_[r] += share_[start[p]];
            }
        for (const int e : block_.experts) {
            lacking_[e] = std::max(0, copies[e] - static_cast<int>(holders[e].size()));
            while (static_cast<int>(holders[e].size()) > copies[e]) {
                const auto busiest = std::max_element(holders[e].begin(), holders[e].end(),
                                                      [&](int a, int b) { return load_[a] < load_[b]; });
                *std::find(kept_.begin(*busiest), kept_.end(*busiest), e) = kept_.end(*busiest)[-1];
                --kept_.used[*busiest];
                load_[*busiest] -= share_[e];
                holders[e].erase(busiest);
            }
        }
    }

    // The ranks that must be packed again, then the others, lightest first.
    void choose_order() {
        order_ = block_.ranks;
        const auto must = [&](int r) { return !kept_.full(r) || load_[r] > limit_; };
        const auto middle = std::stable_partition(order_.begin(), order_.end(), must);
        must_ = static_cast<int>(middle - order_.begin());
        std::stable_sort(middle, order_.end(), [&](int a, int b) { return load_[a] < load_[b]; });
    }

    std::vector<int32_t> chosen_ranks(int number) const { return {order_.begin(), order_.begin() + number}; }

    bool attempt(int number) {
        std::vector<int32_t> copies = lacking_;
        for (int i = 0; i < number; ++i)
            for (const int32_t* e = kept_.begin(order_[i]); e < kept_.end(order_[i]); ++e) ++copies[*e];
        Packer packer(number, size_, share_);
        if (!packer.pack(items_of(sorted_, copies)) || packer.heaviest() > limit_) return false;
        found_ = std::move(packer.bins());
        last_ = number;
        return true;
    }

    const Search& search_;
    const Block& block_;
    const std::vector<int64_t>& share_;
    const int64_t limit_;
    const int size_;
    const std::vector<int32_t> sorted_;  // experts, heaviest replica first
    Bins kept_;                          // by rank
    std::vector<int64_t> load_;          // [R] of what is kept
    std::vector<int32_t> lacking_;       // [E]
    std::vector<int32_t> order_;         // ranks
    int must_ = 0;                       // the first of them
    Bins found_;
    int last_ = -1;  // ranks of found_
};

}  // namespace

std::vector<int32_t> place_from_scratch(const Search& search, Random* noise,
                                        const std::vector<std::vector<int32_t>>& chosen) {
    const Shape& shape = search.shape();
    std::vector<int64_t> weight;
    for (int e = 0; e < shape.experts; ++e) {
        const int64_t exact = search.weight(e);
        weight.push_back(noise == nullptr ? exact : exact * (973 + noise->below(103)) / 1024);
    }
    std::vector<int32_t> slots(shape.slots, shape.experts);
    size_t number = 0;
    for (const Block& block : blocks_of(search)) {
        const int ranks = static_cast<int>(block.ranks.size());
        const auto copies = chosen.empty() ? copies_from_one(weight, block, shape.per_rank()) : chosen[number++];
        if (copies.empty()) return {};
        const auto share = shares_of(weight, copies);
        Packer packer(ranks, shape.per_rank(), share);
        const auto items = items_of(by_share(block.experts, share), copies);
        if (search.alike()) {
            if (!packer.pack(items)) return {};
            lay_over(search, block.ranks, packer.bins(), slots);
            continue;
        }
        std::vector<double> slowness;
        for (const int r : block.ranks) slowness.push_back(1.0 / search.speed(r));
        if (!packer.pack(items, slowness)) return {};
        std::copy(packer.bins().expert.begin(), packer.bins().expert.end(),
                  slots.begin() + block.ranks.front() * shape.per_rank());
    }
    return slots;
}

std::vector<int32_t> repack(const Search& search, double limit) {
    if (!search.alike()) return {};
    const Shape& shape = search.shape();
    std::vector<int64_t> weight;
    for (int e = 0; e < shape.experts; ++e) weight.push_back(search.weight(e));
    std::vector<int32_t> slots = search.start();
    for (const Block& block : blocks_of(search)) {
        const auto copies = copies_from_one(weight, block, shape.per_rank());
        if (copies.empty()) return {};
        const auto share = shares_of(weight, copies);
        Repacking repacking(search, block, copies, share, static_cast<int64_t>(limit * Search::unit()));
        if (!repacking.fill(slots)) return {};
    }
    return slots;
}

void lay_over_start(const Search& search, std::vector<int32_t>& slots) {
    const Shape& shape = search.shape();
    std::vector<int32_t> ranks(shape.ranks);
    std::iota(ranks.begin(), ranks.end(), 0);
    Bins bins(shape.ranks, shape.per_rank());
    bins.expert = slots;
    std::fill(bins.used.begin(), bins.used.end(), bins.size);
    lay_over(search, ranks, bins, slots);
}

}  // namespace eplb
