// SPDX-License-Identifier: Apache-2.0
// How many copies each expert gets.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
#include "random_numbers.h"

namespace eplb {

// The copies of each expert if every further copy goes to the heaviest replica, on `ranks` ranks with `slots` slots
// together and no expert twice on a rank; empty if slots are left over. `copies`: those to start from; an expert that
// has 0 gets none.
std::vector<int32_t> give_copies(const std::vector<int64_t>& weight, std::vector<int32_t> copies, int ranks, int slots);

// The copies of each expert on ranks of two slots. The best pairing of given replicas is known: the heaviest with the
// lightest, the second heaviest with the second lightest, and so on. So the search is over numbers of copies alone.
class Copies {
  public:
    using Load = int32_t;

    // weight, count [E]: copies to start from, up to one for each rank (none: the expert is not among these). Their sum
    // is twice the ranks.
    Copies(const std::vector<Load>& weight, std::vector<int32_t> count, int ranks);

    // Moves one copy after another to where it lowers the load of pairs above a limit most. The limit is `limit` first
    // and nears the busiest pair where no step helps. From there it goes on after random steps (iterated local search),
    // and keeps the best. At most `trials` pairings are looked at.
    void search(Load limit, int trials, Random& random);

    Load heaviest() const { return now(0).heaviest; }  // pair
    const std::vector<int32_t>& count() const { return count_; }

    // The load of a replica of the expert; 0 if it is not among these, or none at all.
    Load share(int expert) const {
        return expert == static_cast<int>(count_.size()) || count_[expert] == 0 ? 0 : weight_[expert] / count_[expert];
    }

  private:
    struct Found {
        std::vector<int32_t> count, order;
    };

    Found found() const { return {count_, order_}; }
    void restore(const Found& found);
    void sort();
    void list();
    void spread_out();
    void split_heavy(Load limit);
    void descend(Load limit);
    void sink(Load limit);
    bool step(Load limit, bool lower_busiest);
    void kick(Random& random);
    std::vector<int32_t> copied() const;  // experts with more than one copy, the lightest replicas first
    void transfer(int from, int to);

    PairLoads now(Load limit) const;
    PairLoads look(int from, int to, Load limit);
    PairLoads with_twins(PairLoads pairs, const std::vector<Load>& loads, bool twins, Load limit, int copies) const;
    std::pair<int, int> busiest_pair() const;

    bool is_lighter(int a, int b) const { return share(a) < share(b) || (share(a) == share(b) && a < b); }
    Load after_loss(int expert) const { return weight_[expert] / (count_[expert] - 1); }
    int owner(int position) const { return order_[place_of(position)]; }  // the expert of a replica in loads_
    int place_of(int position) const;                                     // of the same expert, in order_

    const std::vector<Load>& weight_;
    std::vector<int32_t> count_;
    const int ranks_;
    std::vector<int32_t> order_, first_;  // experts, lightest replica first; [E] place of the first of them in loads_
    std::vector<Load> loads_, changed_;   // of all replicas, lightest first; the same after a change
    int trials_ = 0;
};

}  // namespace eplb
