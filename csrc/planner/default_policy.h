// SPDX-License-Identifier: Apache-2.0
// The "default" policy: DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB) as vLLM runs it, step by step, so that
// the caller can take every sort order and every float32 sum from NumPy. Ties are then broken as vLLM breaks them.
#pragma once

#include <cstdint>
#include <vector>

namespace eplb {

// Packs n weighted items into `packs` packs of n / packs items, heaviest item first, each into the lightest pack.
// order [n]: items by falling weight. Writes pack [n] and position within the pack [n] of each item.
void pack_balanced(const double* weight, const int64_t* order, int n, int packs, int32_t* pack, int32_t* position);

// Gives `copies` - n extra copies, one after the other, to the item with the largest weight per copy (first on ties).
// Writes item [copies] of each copy and the number of copies count [n].
void replicate(const double* weight, int n, int copies, int32_t* item, int32_t* count);

// Reorders the slots of each rank in place so that experts which stay on a rank keep their slots of `old` [num_slots].
void preserve_slots(int32_t* slots, const int32_t* old, int num_slots, int num_ranks);

}  // namespace eplb
